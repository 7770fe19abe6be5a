"""For tests of `kda profile` without a GPU: kernels that compute in plain torch, whose times are given; and rows."""

import dataclasses
import io
import itertools
import random
from collections.abc import Callable

from kda_kernels.problem import Op, Problem
from kda_kernels.reference import plain_chunk, plain_recurrent
from kda_kernels.reference.oracle import gate_cumsum
from kda_kernels.tensors import Inputs, Outputs
from kdacli.commands.profile import command
from kdacli.output import console
from kdacli.profile.measuring.ceilings import Ceilings
from kdacli.profile.measuring.one_case import Method
from kdacli.profile.measuring.timing import Budget, HostTime
from kdacli.profile.records.record import Record
from kdacli.profile.records.row import FailedRow, TimedRow, Versus
from kdacli.profile.wanted import Wanted
from kdacli.synthetic import make_inputs

CEILINGS = Ceilings(copy_gbps=2440.0, inplace_gbps=3020.0, least_us=2.0, tensor_tflops=800.0)
SMALL = Problem(Op.PREFILL, (64,), 1, 1, K=16, V=16)
SMALL_DECODE = Problem(Op.DECODE, (1, 1), 1, 1, K=16, V=16, packed=False, pool_slots=4)


def wanted(*words: str) -> Wanted:
    """What these words of a command line ask `kda profile` for."""
    return Wanted.of(command.make_context("profile", list(words)).params)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """us: its times in turn, or what makes one of its inputs. reason: why it cannot run. error: what it raises."""

    name: str
    us: tuple[float, ...] | Callable[[Inputs], float] = (10.0,)
    ours: bool = True
    backend: str = "plain"
    op: Op = Op.PREFILL
    reason: str | None = None
    error: str | None = None

    def unsupported(self, problem: Problem | None = None) -> str | None:
        return self.reason

    def run(self, inputs: Inputs) -> Outputs:
        if self.error:
            raise RuntimeError(self.error)
        if self.op is Op.GATE:
            return Outputs(gate_cumsum(inputs).float())
        return (plain_recurrent if self.op is Op.DECODE else plain_chunk).run(inputs)


class Timer:
    """Times are those that the kernels have; those of a second timing of a kernel are `shift` times as long."""

    cold = True

    def __init__(self, shift: float = 1.0, mode: str = "graph", note: str | None = None):
        self.shift, self.mode, self.note, self.seen = shift, mode, note, set()

    def prepare(self, call, new_shapes=()):
        call()
        us = call.kernel.us
        factor = self.shift if (call.kernel.name, id(call.inputs)) in self.seen else 1.0
        self.seen.add((call.kernel.name, id(call.inputs)))
        return Timed([factor * t for t in ((us(call.inputs),) if callable(us) else us)], call, new_shapes, self)


class Timed:
    call_bytes = 3_000_000

    def __init__(self, times, run, new_shapes, timer):
        self.times, self.run, self.mode, self.note = itertools.cycle(times), run, timer.mode, timer.note
        self.new_shapes = [new().o.shape for new in new_shapes]
        self.host = HostTime(5.0, 7.0 if self.new_shapes else None)

    def sample(self) -> float:
        return next(self.times)


def method(timer: Timer | None = None, samples: int = 3, **more) -> Method:
    return Method(timer or Timer(), CEILINGS, Budget(0, samples, samples), **more)


def normal(seed: int, mean: float, deviation: float, n: int) -> list[float]:
    """Samples of a normal distribution."""
    r = random.Random(seed)
    return [r.gauss(mean, deviation) for _ in range(n)]


def load(case) -> Inputs:
    return make_inputs(case.problem, gates=case.gates)


def row(kernel="ours", us=100.0, half=0.1, peer=False, **changes) -> TimedRow:
    """A row of a record, with these times, of a prefill of SMALL."""
    given = {
        "op": "prefill", "case": "P1", "gates": "bench", "kernel": kernel, "ours": not peer, "peer": peer,
        "problem": SMALL, "median_us": us, "low_us": us - half, "high_us": us + half, "p10_us": us - half,
        "p90_us": us + half, "spread_us": 2 * half, "samples": 100, "cache": "cold", "mode": "graph", "note": None,
        "host_us": 5.0, "call_bytes": None, "output_error": None, "bytes": 1_000_000, "state_bytes": 0, "gbps": 10.0,
        "floor_us": us / 2, "share": 0.5, "tflops": 0.5, "tensor_share": None, "tokens_per_ms": 1.0, "repeat": 0.0,
        "vs": Versus(kernel, False, 1.0, 1.0, 1.0, None), "clocks": None,
    }  # fmt: skip
    return TimedRow(**given | changes)


def failed_row(kernel="ours", error="boom", **changes) -> FailedRow:
    given = {"op": "prefill", "case": "P1", "gates": "bench", "kernel": kernel, "ours": True, "peer": False}
    return FailedRow(**given | {"error": error} | changes)


def point(kernel: str, n: int, us: float, **changes) -> TimedRow:
    """A row of a sweep of N."""
    problem = Problem(Op.DECODE, (1,) * n, 2, 2, packed=False, pool_slots=2 * n)
    return row(kernel, us, op="decode", case=f"N={n}", point={"N": n}, problem=problem, **changes)


def record(*rows, **changes) -> Record:
    given = {
        "provenance": {"gpu": {"name": "H100"}, "date": "2026-11-22"}, "ceilings": CEILINGS, "seconds": 0.3,
        "complete": True, "rows": list(rows), "refused": [],
    }  # fmt: skip
    return Record(**given | changes)


def rendered(tables) -> str:
    """What is printed of tables, or of pairs of a table and what it has no room for."""
    out = console()
    out.file = io.StringIO()
    for table in tables:
        out.print(table[0] if isinstance(table, tuple) else table)
    return out.file.getvalue()
