"""A CUDA graph's replay gives what an eager call gives, also after the numbers in its memory have changed."""

import warnings
from collections.abc import Iterator

import torch

from kda_kernels.errors import one_line
from kda_kernels.tensors import Inputs, Outputs
from kdacli.judge.reference import pool_as_final_state
from kdacli.verify.checks.memory import every_tensor, own_memory
from kdacli.verify.properties.subject import NotApplicableError, Subject, differing
from kdacli.verify.properties.threads import half

REASON = "engines replay decode as a graph: what the host read, or baked in, at capture stays what it was then"


def check(subject: Subject) -> Iterator[str]:
    """Captures one call, replays it on its numbers, then on others.

    A peer that cannot be captured is not asked for more, nor is plain torch, which reads lengths on the host; our GPU
    kernels must be.
    """
    static = own_memory(subject.inputs)
    try:
        graph, outputs = _capture(subject, static)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        torch.cuda.synchronize()
        if not subject.ours or getattr(subject.kernel, "backend", None) == "torch":
            raise NotApplicableError(f"it cannot be captured: {type(error).__name__}: {error}") from error
        yield f"it cannot be captured in a CUDA graph: {one_line(error)}"
        return
    other = half(subject.inputs)
    for what, inputs, expected in (
        ("the numbers of its capture", subject.inputs, subject.outputs),
        ("other numbers in the same memory", other, subject.run(other)),
    ):
        numbers = every_tensor(inputs)
        for name, tensor in every_tensor(static).items():
            tensor.copy_(numbers[name])
        graph.replay()
        torch.cuda.synchronize()
        for name in differing(expected, pool_as_final_state(outputs, static)):
            yield f"{name} of a graph's replay on {what} differs from an eager call's"


def _capture(subject: Subject, static: Inputs) -> tuple[torch.cuda.CUDAGraph, Outputs]:
    """One call on `static` as a graph, after a warm-up on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        subject.kernel.run(static)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # where a kernel has nothing to launch
        with torch.cuda.graph(graph):
            outputs = subject.kernel.run(static)
    return graph, outputs
