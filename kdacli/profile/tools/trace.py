"""The run that a profiler watches: the same kernels on the same inputs, in named ranges, nothing timed here."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from kda_kernels import ranges
from kda_kernels.errors import CheckFailedError, one_line
from kda_kernels.registry import Kernel
from kdacli.profile.cases.choose import Load
from kdacli.profile.cases.select import split
from kdacli.profile.cases.suites import TimedCase
from kdacli.profile.tools import nvtx

CALLS = 5
WARM_UP_CALLS = 2


class Ranges:
    """How ranges are opened, and what surrounds the launches that are looked at; by default NVTX, and nothing.

    Attributes:
        open: from a name and a payload (a shape, or None) to a context manager.
        measured: a context manager around each call that is looked at.
        calls: of each kernel.
    """

    def __init__(
        self,
        open_range: Callable[[str, Any], AbstractContextManager] | None = None,
        measured: Callable[[], AbstractContextManager] = contextlib.nullcontext,
        calls: int = CALLS,
    ) -> None:
        self.open, self.measured, self.calls = open_range or nvtx.open_range, measured, calls


def trace(
    cases: Sequence[TimedCase],
    load: Load,
    kernels: Sequence[Kernel],
    evict: Callable[[], object],
    synchronize: Callable[[], object],
    ranges_of: Ranges | None = None,
) -> None:
    """Runs each kernel that can, each call after `evict`, with its stages shown.

    The calls are eager: the ranges of the stages surround launches, and a graph's replay has only one.

    Raises:
        CheckFailedError: a kernel raised an error; the others ran.
    """
    shown, errors = ranges_of or Ranges(), {}
    for case in cases:
        runnable, _ = split(kernels, case.problem)
        payload = nvtx.shape(case.problem)
        with shown.open(case.label, payload):
            with shown.open(nvtx.INPUTS, None):
                inputs = load(case).fresh()
                synchronize()
            for kernel in runnable:
                try:
                    _calls(kernel, inputs, payload, evict, synchronize, shown)
                except Exception as error:  # a peer may raise anything
                    errors[f"{kernel.name} at {case.label}"] = one_line(error, 200)
    if errors:
        raise CheckFailedError("; ".join(f"{where}: {error}" for where, error in errors.items()))


def _calls(
    kernel: Kernel,
    inputs: Any,
    payload: Any,
    evict: Callable[[], object],
    synchronize: Callable[[], object],
    shown: Ranges,
) -> None:
    with shown.open(nvtx.WARM_UP, None):  # compiles and tunes; its stages stay hidden
        for _ in range(WARM_UP_CALLS):
            kernel.run(inputs)
        synchronize()
    with _stages_shown(lambda name: shown.open(name, payload)):
        for _ in range(shown.calls):
            with shown.open(nvtx.EVICT, None):
                evict()
            with shown.measured(), shown.open(kernel.name, payload):
                kernel.run(inputs)
        synchronize()


@contextlib.contextmanager
def _stages_shown(open_range: Callable[[str], AbstractContextManager]) -> Iterator[None]:
    ranges.enable(open_range)
    try:
        yield
    finally:
        ranges.disable()
