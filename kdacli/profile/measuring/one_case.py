"""From a case and kernels to rows: the middle of `kda profile`, which knows neither flags nor tables."""

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from kda_kernels.errors import one_line
from kda_kernels.registry import Kernel
from kda_kernels.tensors import Inputs
from kdacli.profile.cases.select import is_peer, split
from kdacli.profile.cases.suites import TimedCase
from kdacli.profile.measuring import noise, watch
from kdacli.profile.measuring.call import Call
from kdacli.profile.measuring.ceilings import Ceilings
from kdacli.profile.measuring.outputs import LIMIT, Check
from kdacli.profile.measuring.timing import Budget, Statistics, Timed, Timer, interleave
from kdacli.profile.measuring.traffic import floor_us, flops, gbps, traffic
from kdacli.profile.records.row import FailedRow, Refusal, Row, Stage, TimedRow, Versus
from kdacli.profile.tools import nvtx

AGAIN = "again"  # the second timing of the first kernel; no kernel has such a name
NEW_SHAPES = 10


@dataclasses.dataclass(frozen=True)
class Method:
    """How cases are measured.

    Attributes:
        timer: makes calls ready for timing.
        ceilings: what the rows are held against.
        budget: when to stop sampling.
        stages: what lists the CUDA kernels of a call, if anybody wants them.
        clocks: what watches them, where they can be read.
        swept: cases are points of a sweep, which say enough of each other. Otherwise the first kernel of a case is
            timed twice, to see by how much the same thing differs from itself, and calls at new shapes on the host.
    """

    timer: Timer
    ceilings: Ceilings
    budget: Budget
    stages: Callable[[Callable[[], object]], list[Stage]] | None = None
    clocks: watch.Watch | None = None
    swept: bool = False

    def watching(self) -> AbstractContextManager[list[watch.Reading]]:
        return self.clocks() if self.clocks else contextlib.nullcontext([])


def measure_case(
    case: TimedCase, load: Callable[[TimedCase], Inputs], kernels: Sequence[Kernel], method: Method
) -> tuple[list[Row], list[Refusal]]:
    """Times the kernels that can run a case, all on the same tensors, and checks the outputs of the calls it timed.

    A state pool is a copy of the case's own and is updated by every call of every kernel: it stays bounded, since the
    gates decay it, and no kernel's time depends on its values.

    Returns:
        A row for each kernel that ran, in their order, and the kernels that cannot run the case.
    """
    runnable, reasons = split(kernels, case.problem)
    found = _Found(case)
    if runnable:
        with nvtx.open_range(case.label, nvtx.shape(case.problem)):
            try:
                _measure(load, runnable, method, found)
            except Exception as error:  # inputs that do not fit, a GPU that faulted: the other cases go on
                for kernel in runnable:
                    if kernel.name not in found.rows:
                        found.failed(kernel, error)
        gc.collect()  # graphs hold their memory until then
    point = dict(case.point) or None
    refused = [Refusal(case.name, case.gates, name, why, point) for name, why in reasons.items()]
    return [found.rows[kernel.name] for kernel in runnable], refused


class _Found:
    """The rows of a case so far: what was measured before a fault stays."""

    def __init__(self, case: TimedCase) -> None:
        self.case, self.rows = case, dict[str, Row]()

    def of(self, kernel: Kernel) -> dict[str, Any]:
        """What a row says of the case and the kernel."""
        case = self.case
        return {
            "op": str(case.problem.op), "case": case.name, "gates": case.gates, "point": dict(case.point) or None,
            "kernel": kernel.name, "ours": kernel.ours, "peer": is_peer(kernel),
        }  # fmt: skip

    def failed(self, kernel: Kernel, error: str | Exception, output_error: float | None = None) -> None:
        self.rows[kernel.name] = FailedRow(**self.of(kernel), error=one_line(error, 200), output_error=output_error)


def _measure(load: Callable[[TimedCase], Inputs], kernels: Sequence[Kernel], method: Method, found: _Found) -> None:
    with nvtx.open_range(nvtx.INPUTS):
        inputs = load(found.case).fresh()
    timed: dict[str, Timed] = {}
    for kernel in kernels:
        call = Call(kernel, inputs)
        try:
            with nvtx.open_range(nvtx.WARM_UP):
                timed[kernel.name] = method.timer.prepare(call, () if method.swept else call.smaller(NEW_SHAPES))
                if len(timed) == 1 and not method.swept:
                    timed[AGAIN] = method.timer.prepare(call)
        except Exception as error:  # a peer may raise anything; the others go on
            timed.pop(kernel.name, None)
            found.failed(kernel, error)
    with method.watching() as readings:
        samples, errors = interleave(timed, method.budget)
    ran = [kernel for kernel in kernels if kernel.name in timed and kernel.name not in errors]
    for kernel in kernels:
        if kernel.name in errors:
            found.failed(kernel, errors[kernel.name])
    if not ran:
        return
    versus = _versus({kernel.name: samples[kernel.name] for kernel in ran}, _repeat(samples, errors), ran)
    clocks = watch.summary(readings)
    for kernel in ran:
        stats = Statistics.of(samples[kernel.name])
        figures = _figures(found.case, timed[kernel.name], stats, method) | versus[kernel.name]
        found.rows[kernel.name] = TimedRow(**found.of(kernel), **figures, clocks=clocks)
    _check([(kernel, timed[kernel.name]) for kernel in ran], inputs, found)
    for kernel in ran:
        if method.stages and isinstance(row := found.rows[kernel.name], TimedRow):
            found.rows[kernel.name] = dataclasses.replace(row, stages=method.stages(Call(kernel, inputs)))


def _check(calls: Sequence[tuple[Kernel, Timed]], inputs: Inputs, found: _Found) -> None:
    """Puts the error of the outputs into the rows; a kernel whose outputs are wrong has no time."""
    check = Check(inputs, found.case.problem.op)
    for kernel, call in calls:
        try:
            error = check.error(call.run)
        except Exception as raised:  # a peer may raise anything
            found.failed(kernel, raised)
            continue
        row = found.rows[kernel.name]
        if error <= LIMIT and isinstance(row, TimedRow):
            found.rows[kernel.name] = dataclasses.replace(row, output_error=error)
        else:
            off = f"off by {error:.0%} of their size (at most {LIMIT:.0%})"
            found.failed(kernel, f"wrong outputs: with other inputs in the same tensors they are {off}", error)


def _repeat(samples: dict[str, list[float]], errors: Mapping[str, Exception]) -> float | None:
    """By how much two timings of the first kernel differ, as a fraction; None where it was timed once."""
    if (again := samples.pop(AGAIN, None)) is None or AGAIN in errors:
        return None
    first = next(iter(samples.values()))
    return abs(noise.ratio(again, first).value - 1) if first else None


def _versus(
    times: Mapping[str, list[float]], repeat: float | None, kernels: Sequence[Kernel]
) -> dict[str, dict[str, Any]]:
    """Holds every kernel against the fastest peer, or against the first kernel where no peer ran."""
    peers = [kernel.name for kernel in kernels if is_peer(kernel)]
    reference = min(peers, key=lambda name: Statistics.of(times[name]).median_us) if peers else kernels[0].name
    found = {}
    for name, mine in times.items():
        same = name == reference
        ratio = noise.Ratio(1.0, 1.0, 1.0) if same else noise.ratio(times[reference], mine)
        supported = None if same else ratio.supported(repeat)
        vs = Versus(reference, bool(peers), ratio.value, ratio.low, ratio.high, supported)
        found[name] = {"repeat": repeat, "vs": vs}
    return found


def _figures(case: TimedCase, call: Timed, stats: Statistics, method: Method) -> dict[str, Any]:
    problem, moved, work = case.problem, traffic(case.problem), flops(case.problem)
    floor, peak = floor_us(moved.total, method.ceilings.of(problem.op)), method.ceilings.tensor_tflops
    tflops = work / stats.median_us / 1e6 if work else None
    return dataclasses.asdict(stats) | {
        "spread_us": stats.spread_us,
        "cache": "cold" if method.timer.cold else "warm",
        "mode": call.mode,
        "note": call.note,
        "host_us": call.host.same_us,
        "host_new_us": call.host.new_us,
        "call_bytes": call.call_bytes,
        "output_error": None,
        "bytes": moved.total,
        "state_bytes": moved.state,
        "gbps": gbps(moved.total, stats.median_us),
        "floor_us": floor,
        "share": floor / stats.median_us,
        "tflops": tflops,
        "tensor_share": tflops / peak if tflops and peak else None,
        "tokens_per_ms": problem.T / stats.median_us * 1e3,
        "problem": problem,
    }
