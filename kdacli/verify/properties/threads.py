"""16 threads at once, each with its own tensors, get what each gets alone.

The threads are new, and the call is the first thing that they do with the GPU: a library that asks the driver for
something finds no context there, unless it sets one.
"""

import concurrent.futures
import threading
from collections.abc import Iterator

import torch

from kda_kernels.tensors import Inputs, Outputs
from kdacli.judge.reference import pool_as_final_state
from kdacli.verify.checks.memory import own_memory
from kdacli.verify.properties.subject import NotApplicableError, Subject, differing

REASON = "servers call from many threads: caches without a lock and buffers kept between calls mix requests up"
THREADS = 16


def check(subject: Subject) -> Iterator[str]:
    """Every second thread has halved values, so that a mix-up shows; all start together."""
    if subject.interpreted:
        raise NotApplicableError("Triton's interpreter is not made for threads")
    cases = [subject.inputs, half(subject.inputs)]
    alone = [subject.outputs, subject.run(cases[1])]
    ready = threading.Barrier(THREADS)

    def work(inputs: Inputs) -> Outputs:
        ready.wait(timeout=60)
        outputs = subject.kernel.run(inputs)
        return pool_as_final_state(outputs, inputs)

    theirs = [own_memory(cases[i % 2]) for i in range(THREADS)]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(work, theirs))
    if subject.inputs.q.is_cuda:
        torch.cuda.synchronize()
    wrong = {name for i, outputs in enumerate(found) for name in differing(alone[i % 2], outputs)}
    for name in sorted(wrong):
        yield f"{name} differs when {THREADS} threads call at once"


def half(inputs: Inputs) -> Inputs:
    """The same call with v halved: everything stays valid, and every result changes. For the op `gate`, so is g."""
    copy = own_memory(inputs)
    copy.v.mul_(0.5)
    copy.g.mul_(0.5)
    return copy
