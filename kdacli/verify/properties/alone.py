"""Batch invariant: a sequence's bits depend on itself alone, not on its batch, nor on where a cached prefix was cut."""

import dataclasses
from collections.abc import Iterator

import torch

from kda_kernels.checks import check_inputs, seq_lens
from kda_kernels.problem import CHUNK, Op, Problem
from kda_kernels.tensors import Inputs, Outputs
from kdacli.judge.bits import same_bits
from kdacli.verify.checks.continuity import tokens_of
from kdacli.verify.properties.split import in_two
from kdacli.verify.properties.subject import NotApplicableError, Subject

REASON = (
    "batch_invariant: the same bits for the same prompt, whatever is in the batch and wherever a cached prefix ends"
)


def asked(problem: Problem) -> Problem:
    """The same with batch_invariant."""
    return dataclasses.replace(problem, features=problem.features | {"batch_invariant"})


def check(subject: Subject) -> Iterator[str]:
    """Each sequence in the batch, and by itself; a plain state or a pool goes along.

    Prompts of more than a chunk also in two calls, cut where a checkpoint may be, if the state between is fp32.
    """
    inputs = dataclasses.replace(subject.inputs, batch_invariant=True)
    if inputs.cu_seqlens is None:
        raise NotApplicableError("sequences are taken from packed batches only")
    subject.require(asked(subject.problem))
    together = subject.run(inputs)
    yield from subject.wrong(together)
    lens = torch.tensor(seq_lens(inputs, check_inputs(inputs, values=True)), device=inputs.q.device)
    starts = (lens.cumsum(0) - lens).tolist()
    for n, length in enumerate(lens.tolist()):
        if not length:
            continue
        rows = torch.arange(starts[n], starts[n] + length, device=inputs.q.device)
        alone = subject.run(_only(inputs, n, rows, lens[n : n + 1]))
        for name, mine in (("o", together.o[:, rows]), ("final_state", _state(inputs, together, n))):
            other = alone.o if name == "o" else _state(inputs, alone, 0 if inputs.state_indices is None else n)
            if mine is not None and (other is None or not same_bits(mine.contiguous(), other.contiguous())):
                yield f"{name} of sequence {n} has other bits in the batch than alone"
    exact = inputs.conv is None and (inputs.state is None or inputs.state.dtype is torch.float32)
    if subject.problem.op is Op.PREFILL and exact and bool((lens > CHUNK).any()):
        cut = (lens - 1).clamp(min=0) // CHUNK * CHUNK
        parts, end = in_two(subject, inputs, lens, cut), int(lens.sum())
        if not same_bits(parts.o[:, :end], together.o[:, :end]):
            yield f"o has other bits in two calls, cut at a multiple of {CHUNK} tokens"
        for n in range(len(starts)):
            mine, other = _state(inputs, together, n), _state(inputs, parts, n)
            if mine is not None and (other is None or not same_bits(mine, other)):
                yield f"final_state of sequence {n} has other bits in two calls, cut at a multiple of {CHUNK} tokens"


def _only(inputs: Inputs, n: int, rows: torch.Tensor, lens: torch.Tensor) -> Inputs:
    part = tokens_of(inputs, rows, lens)
    if (conv := inputs.conv) is not None and conv.indices is not None:
        part = dataclasses.replace(part, conv=dataclasses.replace(conv, indices=conv.indices[n : n + 1].clone()))
    if inputs.state_indices is not None:
        return dataclasses.replace(part, state_indices=inputs.state_indices[n : n + 1].clone())
    return part if inputs.state is None else dataclasses.replace(part, state=inputs.state[n : n + 1].clone())


def _state(inputs: Inputs, outputs: Outputs, n: int) -> torch.Tensor | None:
    slot = n if inputs.state_indices is None else int(inputs.state_indices[n])
    return None if outputs.final_state is None or slot < 0 else outputs.final_state[slot]
