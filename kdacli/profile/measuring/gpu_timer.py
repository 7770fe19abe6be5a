"""GPU time of one call: CUDA events around a graph replay, with the L2 cache emptied before it.

Why no library does this for us is in TIMING.md beside this file.
"""

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

from kda_kernels.errors import one_line
from kdacli.profile.measuring.timing import HostTime

WARM_UP_CALLS = 3  # the first compiles or tunes, the others reach the caching allocator's steady state
HOST_CALLS = 20
NEW_SHAPES_S = 1.0  # for calls at new shapes, each of which may compile or tune
EVICT_BYTES = 256 << 20
BUSY_US = 150.0  # GPU work queued before a warm sample, so that the launch is hidden as eviction hides it

Fn = Callable[[], Any]


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

    def prepare(self, call: Fn, new_shapes: Iterable[Fn] = ()) -> "GpuTimed":
        """Warms `call` up (which may compile and tune), takes its host time and captures it.

        Args:
            call: what is timed.
            new_shapes: the call at other shapes, for its host time alone.

        Raises:
            Exception: whatever the call raises.
        """
        for _ in range(WARM_UP_CALLS):
            call()
        host = HostTime(statistics.median(host_us([call] * HOST_CALLS)), _median(host_us(new_shapes, NEW_SHAPES_S)))
        taken = call_bytes(call)
        graph, note = capture(call) if self.graph else (None, None)
        timed = GpuTimed(graph or Eager(call), "graph" if graph else "eager", note, host, taken, lambda: None)
        if self.cold:
            timed.before = self.evict
        else:
            repeats = max(1, min(50, round(BUSY_US / max(timed.sample(), 1.0))))
            timed.before = lambda: [timed.launch() for _ in range(repeats)]
        return timed


class Eager:
    """A call as it is."""

    def __init__(self, launch: Fn) -> None:
        self.launch, self.run = launch, launch


class Graph:
    """A call that was captured, and the outputs that each replay writes anew."""

    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Any) -> None:
        self.launch: Fn = graph.replay
        self.outputs = outputs

    def run(self) -> Any:
        self.launch()
        return self.outputs


class GpuTimed:
    """A call ready to be sampled; see `kdacli.profile.measuring.timing.Timed`."""

    def __init__(
        self, call: Eager | Graph, mode: str, note: str | None, host: HostTime, call_bytes: int, before: Fn
    ) -> None:
        self.launch, self.run, self.mode, self.note, self.before = call.launch, call.run, mode, note, before
        self.host, self.call_bytes = host, call_bytes
        self.start = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)

    def sample(self) -> float:
        """Microseconds between the events around one call. The GPU is still busy with `before` when it is enqueued."""
        self.before()
        self.start.record()
        self.launch()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e3


def host_us(calls: Iterable[Fn], limit_s: float = math.inf) -> list[float]:
    """Microseconds that each call keeps the CPU, without waiting for the GPU; none begins after `limit_s`."""
    torch.cuda.synchronize()
    times, begin = [], time.perf_counter_ns()
    for call in calls:
        start = time.perf_counter_ns()
        if (start - begin) / 1e9 > limit_s:
            break
        call()
        times.append((time.perf_counter_ns() - start) / 1e3)
    torch.cuda.synchronize()
    return times


def _median(times: list[float]) -> float | None:
    return statistics.median(times) if times else None


def call_bytes(fn: Fn) -> int:
    """What a call takes of torch's allocator at its peak: workspaces and the output. Other allocators are not seen."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fn()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def capture(call: Fn) -> tuple[Graph | None, str | None]:
    """`call` as a CUDA graph, or None and why it cannot be captured."""
    if _synchronises(call):
        return None, "no CUDA graph: the call waits for the GPU"
    graph, outputs = torch.cuda.CUDAGraph(), None
    errors: list[Exception] = []
    try:
        # A capture that fails leaves its own stream current: the outer context puts ours back.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, capture_error_mode="thread_local"),
        ):
            try:
                outputs = call()
            except Exception as error:
                errors.append(error)
                raise
        graph.replay()
        torch.cuda.synchronize()
    except Exception as error:  # ending a broken capture raises another error on top of the one that tells
        return None, f"no CUDA graph: {one_line((errors or [error])[0], 200)}"
    return Graph(graph, outputs), None


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
