"""GPU time of one call: CUDA events around a graph replay, with the L2 cache emptied before it.

Why no library does this for us is in TIMING.md beside this file.
"""

import statistics
import time
import warnings
from collections.abc import Callable

import torch

WARM_UP_CALLS = 3  # the first compiles or tunes, the others reach the caching allocator's steady state
HOST_CALLS = 20
EVICT_BYTES = 256 << 20
BUSY_US = 150.0  # GPU work queued before a warm sample, so that the launch is hidden as eviction hides it

Fn = Callable[[], object]


class Evictor:
    """Empties the L2 cache by reading a buffer of more than twice its size: reads leave no dirty lines behind."""

    def __init__(self, device: str = "cuda", num_bytes: int | None = None) -> None:
        if num_bytes is None:
            l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
            num_bytes = max(EVICT_BYTES, 4 * l2)
        self.buffer = torch.zeros(num_bytes // 4, dtype=torch.int32, device=device)
        self.result = torch.empty((), dtype=torch.int32, device=device)

    def __call__(self) -> None:
        torch.amax(self.buffer, dim=0, out=self.result)


class GpuTimer:
    """Makes calls ready for timing on the current CUDA device.

    Attributes:
        cold: empty the L2 cache before each sample.
        graph: time the replay of a CUDA graph; else the eager call, launch overhead included.
    """

    def __init__(self, *, cold: bool = True, graph: bool = True) -> None:
        self.cold, self.graph = cold, graph
        self.evict = Evictor()

    def prepare(self, fn: Fn) -> "GpuTimed":
        """Warms `fn` up (which may compile and tune), takes its host time and captures it.

        Raises:
            Exception: whatever `fn` raises.
        """
        for _ in range(WARM_UP_CALLS):
            fn()
        torch.cuda.synchronize()
        host = host_us(fn)
        torch.cuda.synchronize()
        taken = call_bytes(fn)
        call, note = capture(fn) if self.graph else (None, None)
        timed = GpuTimed(call or fn, "graph" if call else "eager", note, host, taken, lambda: None)
        if self.cold:
            timed.before = self.evict
        else:
            repeats = max(1, min(50, round(BUSY_US / max(timed.sample(), 1.0))))
            timed.before = lambda: [timed.call() for _ in range(repeats)]
        return timed


class GpuTimed:
    """A call ready to be sampled; see `kdacli.profile.timing.Timed`."""

    def __init__(self, call: Fn, mode: str, note: str | None, host_us: float, call_bytes: int, before: Fn) -> None:
        self.call, self.mode, self.note, self.host_us, self.before = call, mode, note, host_us, before
        self.call_bytes = call_bytes
        self.start = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)

    def sample(self) -> float:
        """Microseconds between the events around one call. The GPU is still busy with `before` when it is enqueued."""
        self.before()
        self.start.record()
        self.call()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e3


def host_us(fn: Fn, calls: int = HOST_CALLS) -> float:
    """Median microseconds that a call keeps the CPU, without waiting for the GPU."""
    times = []
    for _ in range(calls):
        start = time.perf_counter_ns()
        fn()
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times) / 1e3


def call_bytes(fn: Fn) -> int:
    """What a call takes of torch's allocator at its peak: workspaces and the output. Other allocators are not seen."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fn()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def capture(fn: Fn) -> tuple[Fn | None, str | None]:
    """The replay of `fn` as a CUDA graph, or None and why it cannot be captured."""
    if _synchronises(fn):
        return None, "no CUDA graph: the call waits for the GPU"
    graph = torch.cuda.CUDAGraph()
    errors: list[Exception] = []
    try:
        # A capture that fails leaves its own stream current: the outer context puts ours back.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, capture_error_mode="thread_local"),
        ):
            try:
                fn()
            except Exception as error:
                errors.append(error)
                raise
        graph.replay()
        torch.cuda.synchronize()
    except Exception as error:  # ending a broken capture raises another error on top of the one that tells
        return None, f"no CUDA graph: {first_line((errors or [error])[0])}"
    return graph.replay, None


def _synchronises(fn: Fn) -> bool:
    """Whether `fn` waits for the GPU, found without a capture: one that failed can upset those that follow."""
    try:
        _set_sync_debug_mode("error")
        fn()
    except RuntimeError as error:
        if "synchroniz" not in str(error).lower():
            raise
        return True
    finally:
        _set_sync_debug_mode("default")
    torch.cuda.synchronize()
    return False


def _set_sync_debug_mode(mode: str) -> None:
    with warnings.catch_warnings():  # torch warns that the mode is a prototype
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(mode)


def first_line(error: BaseException, limit: int = 200) -> str:
    """The error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
