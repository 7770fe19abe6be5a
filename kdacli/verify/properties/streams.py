"""Two CUDA streams at once, each with its own tensors, get what each gets alone."""

from collections.abc import Iterator

import torch

from kdacli.judge.reference import pool_as_final_state
from kdacli.verify.checks.memory import own_memory
from kdacli.verify.properties.subject import Subject, differing
from kdacli.verify.properties.threads import half

REASON = "prefill and decode share a GPU on two streams: a common workspace, or a launch on another stream, is a race"
ROUNDS = 8


def check(subject: Subject) -> Iterator[str]:
    """8 calls on each of two streams, in turn, with nothing waited for in between."""
    cases = [subject.inputs, half(subject.inputs)]
    alone = [subject.outputs, subject.run(cases[1])]
    copies = [own_memory(cases[i % 2]) for i in range(2 * ROUNDS)]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream(), torch.cuda.Stream()], []
    for i, inputs in enumerate(copies):
        with torch.cuda.stream(streams[i % 2]):
            found.append(pool_as_final_state(subject.kernel.run(inputs), inputs))
    torch.cuda.synchronize()
    wrong = {name for i, outputs in enumerate(found) for name in differing(alone[i % 2], outputs)}
    for name in sorted(wrong):
        yield f"{name} differs when two streams run at once"
