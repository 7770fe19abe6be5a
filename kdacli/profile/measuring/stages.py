"""Where a call's GPU time goes: its CUDA kernels, by name, as CUPTI saw them."""

import dataclasses
from collections.abc import Callable, Iterable

from kda_kernels import ranges
from kdacli.profile.records.row import Stage

CALLS = 5


@dataclasses.dataclass(frozen=True)
class Event:
    """A span on the GPU's timeline in microseconds: a kernel, or a range (then it spans the range's kernels)."""

    name: str
    start_us: float
    end_us: float
    is_range: bool


def summarise(events: Iterable[Event], calls: int, leave_out: frozenset[str] = frozenset()) -> list[Stage]:
    """Kernels in the order they first ran.

    Args:
        events: of `calls` calls.
        leave_out: kernels that are not the call's.

    Returns:
        One for each kernel and shortest range that holds it, if any; launches and us are those of one call.
    """
    events = sorted(events, key=lambda e: e.start_us)
    spans = sorted((e for e in events if e.is_range), key=lambda e: e.end_us - e.start_us)
    found: dict[tuple[str | None, str], list[float]] = {}
    for event in events:
        if event.is_range or event.name in leave_out:
            continue
        middle = (event.start_us + event.end_us) / 2
        stage = next((s.name for s in spans if s.start_us <= middle <= s.end_us), None)
        found.setdefault((stage, event.name), []).append(event.end_us - event.start_us)
    return [Stage(*key, len(times) / calls, sum(times) / calls) for key, times in found.items()]


class StageProfiler:
    """Profiles eager calls with torch.profiler, each after `evict`, whose own kernels are left out."""

    def __init__(self, evict: Callable[[], object]) -> None:
        self.evict = evict
        self.leave_out: frozenset[str] | None = None

    def __call__(self, fn: Callable[[], object]) -> list[Stage]:
        """Those of a call; none where CUPTI is not to be had."""
        if self.leave_out is None:
            self.leave_out = frozenset(e.name for e in self._events(lambda: None) if not e.is_range)
        return summarise(self._events(fn), CALLS, self.leave_out)

    def _events(self, fn: Callable[[], object]) -> list[Event]:
        import torch
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile, record_function

        ranges.enable(record_function)
        try:
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
                for _ in range(CALLS):
                    self.evict()
                    fn()
                torch.cuda.synchronize()
        finally:
            ranges.disable()
        seen = list(profiler.events())
        # A range has an event on the host and, where it launched kernels, one of the same name on the GPU.
        names = {e.name for e in seen if e.is_user_annotation}
        return [
            Event(e.name, e.time_range.start, e.time_range.end, e.name in names)
            for e in seen
            if e.device_type == DeviceType.CUDA
        ]
