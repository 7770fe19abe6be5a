"""`--trace`: a timeline for Perfetto (https://ui.perfetto.dev): the calls, their stages, their CUDA kernels."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kda_kernels.errors import UnavailableError
from kda_kernels.registry import Kernel
from kdacli.profile.cases.choose import Load
from kdacli.profile.cases.suites import TimedCase
from kdacli.profile.tools.trace import Ranges, trace


def write(
    path: Path, cases: Sequence[TimedCase], load: Load, kernels: Sequence[Kernel], evict: Callable[[], object]
) -> None:
    """Runs every kernel some more times, eagerly, under torch's profiler, which writes Chrome's trace format.

    Ranges: the case, then inputs, warm-up, evict, and the kernel's name around each call with its stages inside.

    Raises:
        CheckFailedError: a kernel raised an error; the trace of the others is written.
        UnavailableError: the profiler saw no GPU activity: CUPTI is not to be had.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    with _profiled(
        path, profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True)
    ) as profiler:
        try:
            trace(cases, load, kernels, evict, torch.cuda.synchronize, Ranges(_open_range))
        finally:
            torch.cuda.synchronize()
    if not any(e.device_type == torch.autograd.DeviceType.CUDA for e in profiler.events()):
        raise UnavailableError(f"{path} has no GPU activity in it: torch's profiler found no CUPTI")


@contextlib.contextmanager
def _profiled(path: Path, profiler) -> Iterator:
    """Writes the trace whatever happens inside."""
    profiler.start()
    try:
        yield profiler
    finally:
        profiler.stop()
        profiler.export_chrome_trace(str(path))


def _open_range(name: str, payload: object) -> contextlib.AbstractContextManager:
    from torch.profiler import record_function

    return record_function(name)
