"""One call of a kernel, made so that what it does beside its results shows."""

import contextlib
import dataclasses
from typing import Protocol

import torch

from kda_kernels.problem import Problem
from kda_kernels.tensors import Inputs, Outputs
from kdacli.judge.reference import pool_as_final_state
from kdacli.poisoned import poisoned_memory
from kdacli.verify.checks.guards import GuardedAllocations
from kdacli.verify.checks.memory import Copy


class Runner(Protocol):
    """What can be checked: a `Kernel`, or several calls that together act like one."""

    @property
    def name(self) -> str: ...

    @property
    def carried_state(self) -> str | None: ...

    @property
    def rounded_convolution(self) -> bool: ...

    def unsupported(self, problem: Problem) -> str | None: ...

    def run(self, inputs: Inputs) -> Outputs: ...


@dataclasses.dataclass(frozen=True)
class ObservedCall:
    """A call that was made: what came out (a pool as final_state, whatever was returned), on which copy of the inputs,
    and what was written around tensors, in words.
    """

    outputs: Outputs
    copy: Copy
    strays: tuple[str, ...]


def call(runner: Runner, inputs: Inputs, *, guarded: bool = False) -> ObservedCall:
    """Runs on a copy of `inputs`, in memory that is NaN where nothing was put, and waits for the GPU.

    Args:
        guarded: put guard zones around what the kernel allocates too, which makes torch's own operations slower.
    """
    copy = Copy.of(inputs)
    zones = GuardedAllocations() if guarded else None
    with poisoned_memory(), zones or contextlib.nullcontext():
        outputs = runner.run(copy.inputs)
    if inputs.q.is_cuda:
        torch.cuda.synchronize()
    strays = tuple(dict.fromkeys(copy.broken_zones() + (zones.broken() if zones else [])))
    return ObservedCall(pool_as_final_state(outputs, copy.inputs), copy, strays)
