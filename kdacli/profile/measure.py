"""From cases and kernels to rows: the middle of `kda profile`, which knows neither flags nor tables."""

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from kda_kernels.registry import Kernel
from kda_kernels.tensors import Inputs
from kdacli.profile import noise, nvtx, watch
from kdacli.profile.ceilings import Ceilings
from kdacli.profile.gpu_timer import first_line
from kdacli.profile.select import is_peer, split
from kdacli.profile.suites import Case
from kdacli.profile.timing import Budget, Statistics, Timed, interleave
from kdacli.profile.traffic import floor_us, flops, gbps, traffic


class Timer(Protocol):
    """`GpuTimer`, or a stand-in for it."""

    cold: bool

    def prepare(self, fn: Callable[[], object]) -> Timed: ...


Stages = Callable[[Callable[[], object]], list[dict[str, Any]]]
Watch = Callable[[], AbstractContextManager[list[dict[str, float]]]]
AGAIN = "again"  # the second timing of the first kernel; no kernel has such a name


def _no_watch() -> AbstractContextManager[list[dict[str, float]]]:
    return contextlib.nullcontext([])


@dataclasses.dataclass(frozen=True)
class Method:
    """How cases are measured.

    Attributes:
        timer: makes calls ready for timing.
        ceilings: what the rows are held against.
        budget: when to stop sampling.
        stages: what lists the CUDA kernels of a call, if anybody wants them.
        watch: yields readings of the clocks, see `watch.Watch`.
        repeat: time the first kernel of a case twice, to see by how much the same thing differs from itself.
    """

    timer: Timer
    ceilings: Ceilings
    budget: Budget
    stages: Stages | None = None
    watch: Watch = _no_watch
    repeat: bool = True


@dataclasses.dataclass
class Result:
    """What came of one case.

    Attributes:
        rows: one for each kernel that ran, in the order of the kernels. Keys: op, case, gates, point (of a sweep, else
            none), kernel, ours, peer; median_us, low_us and high_us (its 95% confidence interval), spread_us (10th to
            90th percentile), p10_us, p90_us, samples; cache (cold, warm), mode (graph, eager), note (why not a graph,
            or None); host_us; call_bytes (of memory); bytes, state_bytes, gbps, floor_us (bytes at the ceiling), share
            (floor_us / median_us), tflops and tensor_share (of the matrix product's; both None for the gate),
            tokens_per_ms; problem; repeat (relative difference of two timings of the case's first kernel, None if it
            was timed once); vs (see `_against`); clocks (see `watch.summary`); stages (with --stages). A kernel that
            raised has op, case, gates, kernel, ours, peer and error instead.
        refused: case, gates, kernel and reason of each kernel that cannot run the case.
    """

    rows: list[dict[str, Any]]
    refused: list[dict[str, Any]]


def measure_case(case: Case, load: Callable[[Case], Inputs], kernels: Sequence[Kernel], method: Method) -> Result:
    """Times the kernels that can run a case, all on the same tensors.

    A state pool is a copy of the case's own and is updated by every call of every kernel: it stays bounded, since the
    gates decay it, and no kernel's time depends on its values.
    """
    runnable, reasons = split(kernels, case.problem)
    where: dict[str, Any] = {"case": case.name, "gates": case.gates}
    if case.point:
        where["point"] = dict(case.point)
    found: dict[str, dict[str, Any]] = {}
    if runnable:
        with nvtx.open_range(case.label, nvtx.shape(case.problem)):
            try:
                _measure(case, load, runnable, method, found)
            except Exception as error:  # inputs that do not fit, a GPU that faulted: the other cases go on
                found = {k.name: {"error": first_line(error)} for k in runnable} | found
        gc.collect()  # graphs hold their memory until then
    rows = [
        {"op": str(case.problem.op), **where, "kernel": k.name, "ours": k.ours, "peer": is_peer(k)} | found[k.name]
        for k in runnable
    ]
    return Result(rows, [where | {"kernel": name, "reason": why} for name, why in reasons.items()])


def _measure(
    case: Case,
    load: Callable[[Case], Inputs],
    kernels: Sequence[Kernel],
    method: Method,
    found: dict[str, dict[str, Any]],
) -> None:
    """Puts the figures or the error of each kernel into `found`: what was measured before a fault stays."""
    with nvtx.open_range(nvtx.INPUTS):
        inputs = load(case).fresh()
    timed: dict[str, Timed] = {}
    for kernel in kernels:
        try:
            with nvtx.open_range(nvtx.WARM_UP):
                timed[kernel.name] = method.timer.prepare(_bind(kernel, inputs))
                if method.repeat and len(timed) == 1:
                    timed[AGAIN] = method.timer.prepare(_bind(kernel, inputs))
        except Exception as error:  # a peer may raise anything; the others go on
            timed.pop(kernel.name, None)
            found[kernel.name] = {"error": first_line(error)}
    with method.watch() as readings:
        samples, failed = interleave(timed, method.budget)
    again, twice = samples.pop(AGAIN, None), timed.pop(AGAIN, None)
    clocks = watch.summary(readings)
    for name, call in timed.items():
        if name in failed:
            found[name] = {"error": first_line(failed[name])}
        else:
            found[name] = _figures(case, call, Statistics.of(samples[name]), method) | {"clocks": clocks}
    times = {name: samples[name] for name in timed if name not in failed}
    if times:
        repeat = None if twice is None or AGAIN in failed else _repeat(times, again)
        _compare(found, times, repeat, {k.name for k in kernels if is_peer(k)})
    for kernel in kernels:
        if method.stages is not None and "error" not in found[kernel.name]:
            found[kernel.name]["stages"] = method.stages(_bind(kernel, inputs))


def _repeat(times: Mapping[str, list[float]], again: list[float]) -> float | None:
    """By how much two timings of the same kernel differ, as a fraction."""
    first = next(iter(times.values()))
    return abs(noise.ratio(again, first).value - 1) if again else None


def _compare(found: dict[str, dict[str, Any]], times: Mapping[str, list[float]], repeat: float | None, peers: set[str]):
    """Holds every kernel against the fastest peer, or against the first kernel where no peer ran."""
    ran = [name for name in times if name in peers]
    reference = min(ran, key=lambda name: found[name]["median_us"]) if ran else next(iter(times))
    for name in times:
        found[name]["repeat"] = repeat
        found[name]["vs"] = _against(reference, bool(ran), name, times, repeat)


def _against(
    reference: str, is_best_peer: bool, name: str, times: Mapping[str, list[float]], repeat: float | None
) -> dict[str, Any]:
    """How many times as fast as the reference a kernel is: kernel, best_peer, speedup, low, high, supported."""
    same = name == reference
    found = noise.Ratio(1.0, 1.0, 1.0) if same else noise.ratio(times[reference], times[name])
    return {
        "kernel": reference,
        "best_peer": is_best_peer,
        "speedup": found.value,
        "low": found.low,
        "high": found.high,
        "supported": None if same else found.supported(repeat),
    }


def _bind(kernel: Kernel, inputs: Inputs) -> Callable[[], object]:
    return lambda: kernel.run(inputs)


def _figures(case: Case, call: Timed, stats: Statistics, method: Method) -> dict[str, Any]:
    problem, moved, work = case.problem, traffic(case.problem), flops(case.problem)
    floor = floor_us(moved.total, method.ceilings.of(problem.op))
    return {
        "median_us": stats.median_us,
        "spread_us": stats.spread_us,
        "low_us": stats.low_us,
        "high_us": stats.high_us,
        "p10_us": stats.p10_us,
        "p90_us": stats.p90_us,
        "samples": stats.samples,
        "cache": "cold" if method.timer.cold else "warm",
        "mode": call.mode,
        "note": call.note,
        "host_us": call.host_us,
        "call_bytes": call.call_bytes,
        "bytes": moved.total,
        "state_bytes": moved.state,
        "gbps": gbps(moved.total, stats.median_us),
        "floor_us": floor,
        "share": floor / stats.median_us,
        "tflops": work / stats.median_us / 1e6 if work else None,
        "tensor_share": work / stats.median_us / 1e6 / method.ceilings.tensor_tflops if work else None,
        "tokens_per_ms": problem.T / stats.median_us * 1e3,
        "problem": problem.to_dict(),
    }
