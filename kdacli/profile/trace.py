"""The run that Nsight Systems watches: the same kernels on the same inputs, in named ranges, nothing timed here."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

from kda_kernels import ranges
from kda_kernels.errors import CheckFailedError
from kda_kernels.registry import Kernel
from kdacli.profile import nvtx
from kdacli.profile.cases import Load
from kdacli.profile.gpu_timer import first_line
from kdacli.profile.select import split
from kdacli.profile.suites import Case

CALLS = 5
WARM_UP_CALLS = 2


def trace(
    cases: Sequence[Case],
    load: Load,
    kernels: Sequence[Kernel],
    evict: Callable[[], object],
    synchronize: Callable[[], object],
) -> None:
    """Runs each kernel that can, each call after `evict`, with its stages shown.

    The calls are eager: the ranges of the stages surround launches, and a graph's replay has only one.

    Raises:
        CheckFailedError: a kernel raised an error; the others ran.
    """
    errors = {}
    for case in cases:
        runnable, _ = split(kernels, case.problem)
        with nvtx.open_range(case.label):
            with nvtx.open_range(nvtx.INPUTS):
                inputs = load(case).fresh()
                synchronize()
            for kernel in runnable:
                try:
                    _calls(kernel.name, lambda kernel=kernel, inputs=inputs: kernel.run(inputs), evict, synchronize)
                except Exception as error:  # a peer may raise anything
                    errors[f"{kernel.name} at {case.label}"] = first_line(error)
    if errors:
        raise CheckFailedError("; ".join(f"{where}: {error}" for where, error in errors.items()))


def _calls(name: str, fn: Callable[[], object], evict: Callable[[], object], synchronize: Callable[[], object]) -> None:
    with nvtx.open_range(nvtx.WARM_UP):  # compiles and tunes; its stages stay hidden
        for _ in range(WARM_UP_CALLS):
            fn()
        synchronize()
    with _stages_shown():
        for _ in range(CALLS):
            with nvtx.open_range(nvtx.EVICT):
                evict()
            with nvtx.open_range(name):
                fn()
        synchronize()


@contextlib.contextmanager
def _stages_shown() -> Iterator[None]:
    ranges.enable(nvtx.open_range)
    try:
        yield
    finally:
        ranges.disable()
