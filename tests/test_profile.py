"""`kda profile`: everything but the GPU timer itself without a GPU; that one by the tests marked gpu."""

import contextlib
import dataclasses
import io
import itertools
import json
import statistics
import subprocess
import sys

import click.testing
import pytest
import torch

from kda_kernels import ranges, registry
from kda_kernels.errors import CheckFailedError, InputError, UnavailableError
from kda_kernels.problem import Gate, Op, Options, Problem
from kdacli.commands.profile import command
from kdacli.profile import ceilings, inner, ncu, noise, nsys, nvtx, report, select, watch
from kdacli.profile.cases import cases_from
from kdacli.profile.ceilings import Ceilings
from kdacli.profile.gpu_timer import Evictor, GpuTimer, call_bytes, first_line, host_us
from kdacli.profile.measure import Method, measure_case
from kdacli.profile.record import Saver, records, require_complete
from kdacli.profile.stages import Event, StageProfiler, summarise
from kdacli.profile.suites import Case, suite
from kdacli.profile.timing import Budget, Statistics, interleave
from kdacli.profile.trace import CALLS, trace
from kdacli.profile.traffic import floor_us, flops, gbps, traffic
from kdacli.synthetic import make_inputs

CEILINGS = Ceilings(copy_gbps=2440.0, inplace_gbps=3020.0, least_us=2.0, tensor_tflops=800.0)


def problems(name):
    return {case.name: case.problem for case in suite(name)}


# Traffic


@pytest.mark.parametrize(
    ("case", "floor"), [("P1", 340), ("P2", 113), ("P3", 11), ("P4", 43), ("P5", 370), ("P6", 241), ("P7", 225)]
)
def test_prefill_floors_are_the_published_ones(case, floor):
    """At 3.0 TB/s, to the microsecond that was published."""
    assert round(floor_us(traffic(problems("prefill")[case]).total, 3000)) == floor


@pytest.mark.parametrize(
    ("case", "floor"),
    [("D:H=32,N=1", 1.4), ("D:H=32,N=8", 11.1), ("D:H=32,N=32", 44.4), ("D:H=32,N=128", 177.7)]
    + [("D:H=96,N=1", 4.2), ("D:H=96,N=8", 33.3), ("D:H=96,N=32", 133.3), ("D:H=96,N=128", 533.1)],
)
def test_decode_state_floors_are_the_published_ones(case, floor):
    """The published decode floors count the state alone, at 3.02 TB/s; q, k, v, g, beta and o add one percent."""
    moved = traffic(problems("decode")[case])
    assert floor_us(moved.state, 3020) == pytest.approx(floor, rel=2e-3, abs=0.05)
    assert 1.009 < moved.total / moved.state < 1.03


def test_traffic_counts_the_tensors_that_are_there():
    """Against the sizes of tensors that were made for the problem."""
    problem = Problem(Op.PREFILL, (70, 0, 33), H=2, HV=4, K=32, V=16, g_dtype="float32", state_dtype="bfloat16")
    inputs = make_inputs(problem)
    read = sum(t.nbytes for t in (inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta))
    moved = traffic(problem)
    assert moved.activations == read + inputs.v.nbytes  # o is as v
    assert moved.parameters == inputs.A_log.nbytes + inputs.dt_bias.nbytes
    assert moved.state == 2 * inputs.state.nbytes


def test_traffic_of_the_gate_stage():
    moved = traffic(problems("gate")["G:T=8192,H=96"])
    assert moved.activations == 8192 * 96 * 128 * (2 + 4)
    assert moved.state == 0
    assert flops(problems("gate")["G:T=8192,H=96"]) == 0


def test_traffic_of_what_is_left_out():
    full = Problem(Op.DECODE, (1,) * 8, 4, 4, packed=False, pool_slots=8)
    padded = dataclasses.replace(full, padding=2)
    activated = dataclasses.replace(full, options=Options(gate=Gate.NONE))
    fresh = dataclasses.replace(full, op=Op.PREFILL, pool_slots=None, initial_state=False)
    assert traffic(padded).state == traffic(full).state * 6 // 8
    o_bytes = 2 * 4 * 128  # of one token, and written for padding rows too
    assert traffic(full).activations - traffic(padded).activations == 2 * (traffic(full).activations // 8 - o_bytes)
    assert traffic(activated).parameters == 0
    assert traffic(fresh).state == traffic(full).state // 2
    assert traffic(dataclasses.replace(fresh, final_state=False)).state == 0


def test_flops_and_rates():
    decode = Problem(Op.DECODE, (1, 1), 1, 1, K=128, V=64, pool_slots=2)
    assert flops(decode) == 2 * 7 * 128 * 64
    prefill = Problem(Op.PREFILL, (64,), 1, 1)
    matmuls = 2 * 64 * 64 * 128 * 5 + 3 * 2 * 64 * 128 * 128  # five C x C x 128 products, three C x K x V
    assert flops(prefill) == pytest.approx(matmuls + 64**3 / 3, rel=1e-3)
    assert gbps(3_000_000, floor_us(3_000_000, 1234.0)) == pytest.approx(1234.0)


# Suites and flags


def test_suites_are_the_published_shapes():
    prefill = problems("prefill")
    shapes = {name: (p.N, p.T, p.H) for name, p in prefill.items()}
    assert shapes == {
        "P1": (1, 8192, 96), "P2": (1, 8192, 32), "P3": (1, 2048, 12), "P4": (1, 8192, 12),
        "P5": (8, 8192, 96), "P6": (6, 8192, 64), "P7": (1, 32768, 16),
    }  # fmt: skip
    for p in prefill.values():
        assert p.options == Options(gate=Gate.SAFE, lower_bound=-5.0)
        assert (p.packed, p.initial_state, p.final_state, p.state_dtype) == (True, True, True, "float32")
    decode = problems("decode")
    assert [(p.H, p.N) for p in decode.values()] == list(itertools.product((32, 96), (1, 8, 32, 128)))
    assert {p.options.gate for p in decode.values()} == {Gate.SOFTPLUS}
    assert all(p.pool_slots >= p.N and set(p.seq_lens) == {1} for p in decode.values())
    assert [(p.T, p.H) for p in problems("gate").values()] == [(8192, 32), (8192, 96)]
    half = problems("decode-bf16")
    assert {p.state_dtype for p in half.values()} == {"bfloat16"}
    assert list(half) == [f"{name},bf16" for name in decode]
    for p, q in zip(decode.values(), half.values(), strict=True):
        assert traffic(q).state == traffic(p).state / 2


def test_suite_in_each_gate_regime():
    assert [c.gates for c in suite("prefill")[:3]] == ["bench", "init", "weak"]
    assert {c.gates for c in suite("decode")} == {"bench"}
    assert [c.label for c in suite("gate", ("weak", "init"))] == [
        f"G:T=8192,H={heads} {gates}" for heads in (32, 96) for gates in ("weak", "init")
    ]


def parsed(*words):
    return command.make_context("profile", list(words)).params


def test_a_case_for_each_regime_asked_for():
    cases, _ = cases_from(parsed("-T", "512", "-H", "4", "--gates", "weak", "--gates", "bench", "--gates", "weak"))
    assert [c.label for c in cases] == ["N=1 T=512 H=4 weak", "N=1 T=512 H=4 bench"]
    assert cases[0].problem.op is Op.PREFILL


def test_decode_alone_is_its_suite():
    cases, _ = cases_from(parsed("--op", "decode", "--gates", "weak"))
    assert [(c.name, c.gates) for c in cases] == [(name, "weak") for name in problems("decode")]
    (case,), _ = cases_from(parsed("--op", "decode", "-H", "4", "--state-dtype", "bf16"))
    assert case.name == "H=4 N=32 bf16 state"
    assert (case.problem.H, case.problem.N) == (4, 32)


def test_a_kernel_decides_the_op():
    cases, _ = cases_from(parsed("--kernel", "triton-decode"))
    assert [(c.problem.op, c.problem.N, c.gates) for c in cases] == [(Op.DECODE, 32, "bench")]


@pytest.mark.parametrize(
    "words",
    [
        ("--suite", "prefill", "-H", "4"),
        ("--suite", "decode-bf16", "--op", "prefill"),
        ("--sweep", "N=1..4", "--stages"),
        ("--suite", "prefill", "--op", "decode"),
        ("--suite", "prefill", "--dump", "x.pt"),
        ("--kernel", "nope"),
        ("--call", "x"),
        ("--output", "x"),
        ("--nsys-path", "x"),
        ("--nsys", "--nsys-path", "no-such-program"),
        ("--json", "no-such-directory/x.json"),
    ],
)
def test_wrong_use_is_named(words):
    with pytest.raises(InputError):
        command.main(list(words), standalone_mode=False)


def test_without_a_gpu_it_says_so():
    env = inner.environment("nsys") | {"CUDA_VISIBLE_DEVICES": ""}
    del env[inner.TRACE_ENV]
    words = [sys.executable, "-m", "kdacli", "profile", "--suite", "decode"]
    done = subprocess.run(words, capture_output=True, text=True, env=env, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.count("\n") == 1
    assert "GPU" in done.stderr


# Kernels


@dataclasses.dataclass(frozen=True)
class FakeKernel:
    name: str
    us: float = 10.0
    reason: str | None = None
    error: str | None = None
    op: Op = Op.PREFILL
    ours: bool = True
    backend: str = "fake"

    def unsupported(self, problem):
        return self.reason

    def run(self, inputs):
        if self.error:
            raise RuntimeError(self.error)
        return self.us


def test_default_candidates_leave_plain_torch_out():
    names = [k.name for k in select.candidates([Op.PREFILL, Op.PREFILL])]
    assert names[:2] == ["cute-prefill", "triton-prefill"]
    assert "fla-prefill" in names
    assert not any(name.startswith("torch") for name in names)
    assert all(k.ours for k in select.candidates([Op.GATE], peers=False))
    assert [k.name for k in select.candidates([Op.DECODE], ["torch-decode", "torch-decode"])] == ["torch-decode"]


def test_those_that_cannot_run_have_a_reason():
    problem = problems("prefill")["P3"]
    good, old = FakeKernel("good"), FakeKernel("old", reason="no GPU")
    assert select.split([old, good], problem) == ([good], {"old": "no GPU"})
    with pytest.raises(UnavailableError, match="old: no GPU"):
        select.require_runnable(suite("prefill"), [old])


# Sampling


class FakeTimed:
    def __init__(self, times, log=None, name="", mode="graph", note=None):
        self.times, self.log, self.name, self.mode, self.note, self.host_us = iter(times), log, name, mode, note, 5.0
        self.call_bytes = 3_000_000

    def sample(self):
        if self.log is not None:
            self.log.append(self.name)
        value = next(self.times)
        if isinstance(value, Exception):
            raise value
        return value


def test_samples_are_taken_in_turns():
    log = []
    timed = {name: FakeTimed(itertools.count(1.0), log, name) for name in ("a", "b")}
    samples, failed = interleave(timed, Budget(seconds=0, min_samples=3))
    assert log == ["a", "b"] * 3
    assert samples == {"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0, 3.0]}
    assert not failed


def test_an_error_stops_only_its_own_kernel():
    timed = {"bad": FakeTimed([1.0, ValueError("x")]), "good": FakeTimed(itertools.repeat(2.0))}
    samples, failed = interleave(timed, Budget(seconds=0, min_samples=4))
    assert samples["good"] == [2.0] * 4
    assert list(failed) == ["bad"]
    samples, failed = interleave({"bad": FakeTimed([ValueError("x")])}, Budget())
    assert list(failed) == ["bad"]
    assert interleave({}, Budget()) == ({}, {})


@pytest.mark.parametrize(
    ("step_s", "rounds"),
    [(0.001, 50), (0.01, 30), (0.1, 20), (3.0, 4), (100.0, 3)],
    ids=["most", "time", "least", "patience", "few"],
)
def test_the_budget_ends_the_sampling(step_s, rounds):
    """A clock that moves by one round's time each time it is read; one kernel."""
    clock = itertools.count(0.0, step_s)
    samples, _ = interleave({"a": FakeTimed(itertools.repeat(1.0))}, Budget(0.3, 20, 50, 10.0, 3), lambda: next(clock))
    assert len(samples["a"]) == rounds


def test_the_budget_is_for_each_kernel():
    budget = Budget(seconds=1.0, min_samples=1)
    assert budget.spent(5, 1.0, kernels=1)
    assert not budget.spent(5, 1.0, kernels=2)


def test_statistics():
    samples = [float(n) for n in range(100, -1, -1)][:-1]  # 100 .. 1
    stats = Statistics.of(samples)
    assert stats.median_us == statistics.median(samples) == 50.5
    assert (stats.p10_us, stats.p90_us) == (pytest.approx(10.9), pytest.approx(90.1))
    assert stats.spread_us == pytest.approx(79.2)
    assert Statistics.of([7.0]) == Statistics(7.0, 7.0, 7.0, 6.984, 7.016, 1)  # the clock's tick is 0.032 us
    for wrong in ([], [1.0, 0.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="positive times"):
            Statistics.of(wrong)


# Ceilings, rows and tables


class FakeTimer:
    """Calls what it is given once; what that returns is the time of each sample, in microseconds."""

    cold = True

    def __init__(self, us=None, mode="graph", note=None):
        self.us, self.mode, self.note = us, mode, note

    def prepare(self, fn):
        value = fn()
        return FakeTimed(itertools.repeat(self.us or value), mode=self.mode, note=self.note)


def test_ceilings_count_bytes_read_and_written():
    """1 MB read and 1 MB written in 100 us: 20 GB/s; a product of 100 x 100 matrices: 0.02 TFLOP/s."""
    found = ceilings.measure(FakeTimer(us=100.0).prepare, device="cpu", num_bytes=1_000_000, matrix=100)
    assert found == Ceilings(pytest.approx(20.0), pytest.approx(20.0), 100.0, pytest.approx(0.02))
    assert CEILINGS.of(Op.DECODE) == 3020.0
    assert CEILINGS.of(Op.PREFILL) == CEILINGS.of(Op.GATE) == 2440.0


SMALL = Problem(Op.PREFILL, (64,), 1, 1, K=16, V=16)


def load_small(case):
    return make_inputs(case.problem, gates=case.gates)


def method(timer=None, **extra):
    return Method(timer or FakeTimer(), CEILINGS, Budget(seconds=0, min_samples=3), **extra)


def test_a_row_holds_what_its_times_say():
    result = measure_case(Case("S", SMALL, "weak"), load_small, [FakeKernel("ours", us=4.0)], method())
    (row,) = result.rows
    assert (row["op"], row["case"], row["gates"], row["kernel"]) == ("prefill", "S", "weak", "ours")
    assert (row["median_us"], row["spread_us"], row["samples"]) == (4.0, 0.0, 3)
    assert (row["cache"], row["mode"], row["note"], row["host_us"]) == ("cold", "graph", None, 5.0)
    assert row["call_bytes"] == 3_000_000
    assert row["bytes"] == traffic(SMALL).total
    assert row["gbps"] == pytest.approx(row["bytes"] / 4e-6 / 1e9)
    assert row["share"] == pytest.approx(row["gbps"] / 2440.0)
    assert row["floor_us"] == pytest.approx(row["share"] * 4.0)
    assert row["tflops"] == pytest.approx(flops(SMALL) / 4e-6 / 1e12)
    assert row["tensor_share"] == pytest.approx(row["tflops"] / 800.0)
    assert row["tokens_per_ms"] == pytest.approx(64 / 0.004)
    assert Problem.from_dict(row["problem"]) == SMALL


def test_a_kernel_that_raises_becomes_a_row_with_the_reason():
    kernels = [FakeKernel("bad", error="CUDA error: boom\nmore"), FakeKernel("good"), FakeKernel("none", reason="no")]
    result = measure_case(Case("S", SMALL, "bench"), load_small, kernels, method())
    assert [row["kernel"] for row in result.rows] == ["bad", "good"]
    assert result.rows[0]["error"] == "RuntimeError: CUDA error: boom"
    assert result.rows[1]["median_us"] == 10.0
    assert result.refused == [{"case": "S", "gates": "bench", "kernel": "none", "reason": "no"}]


def test_inputs_that_cannot_be_made_fail_the_case_only():
    def load(case):
        if case.name == "big":
            raise UnavailableError("needs 1 TB")
        return load_small(case)

    cases = [Case("big", SMALL, "bench"), Case("S", SMALL, "bench")]
    *_, record = records(cases, load, [FakeKernel("a")], method(), dict)
    assert record["rows"][0]["error"] == "UnavailableError: needs 1 TB"
    assert record["rows"][1]["median_us"] == 10.0
    with pytest.raises(CheckFailedError, match="1 of 2"):
        require_complete(record, [])


def test_what_was_measured_before_a_fault_stays():
    def stages(fn):
        raise RuntimeError("no CUPTI")

    result = measure_case(Case("S", SMALL, "bench"), load_small, [FakeKernel("a")], method(stages=stages))
    assert result.rows[0]["median_us"] == 10.0


def test_the_state_of_the_case_is_not_written():
    """Kernels update a pool in place: they get a copy of it."""
    problem = Problem(Op.DECODE, (1, 1), 1, 1, K=16, V=16, packed=False, pool_slots=3)
    inputs = make_inputs(problem)
    before = inputs.state.clone()

    class Writer(FakeKernel):
        def run(self, inputs):
            inputs.state.fill_(7.0)
            return 1.0

    measure_case(Case("D", problem, "bench"), lambda case: inputs, [Writer("w", op=Op.DECODE)], method())
    torch.testing.assert_close(inputs.state, before, rtol=0, atol=0, equal_nan=True)


def test_the_record_grows_case_by_case():
    cases = [Case("A", SMALL, "bench"), Case("B", SMALL, "weak")]
    kernels = [FakeKernel("ours"), FakeKernel("old", reason="no GPU")]
    steps = [json.loads(json.dumps(r)) for r in records(cases, load_small, kernels, method(), lambda: {"seed": 1})]
    assert [(len(r["rows"]), r["complete"]) for r in steps] == [(1, False), (2, True)]
    last = steps[-1]
    assert last["schema"] == "kda.profile/2"
    assert last["provenance"] == {"seed": 1}
    assert last["ceilings"] == {"copy_gbps": 2440.0, "inplace_gbps": 3020.0, "least_us": 2.0, "tensor_tflops": 800.0}
    require_complete(last, ["ours"])
    with pytest.raises(UnavailableError, match="old cannot run: no GPU"):
        require_complete(last, ["ours", "old"])


def rendered(tables):
    from kdacli.output import console

    out = console()
    out.file = io.StringIO()
    for table in tables:
        out.print(table[0] if isinstance(table, tuple) else table)
    return out.file.getvalue()


def test_tables_fit_and_compare_with_the_first_kernel(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    names = {"triton-gate": 40.0, "triton-gate-unfused": 93.4, "fla-gate": 1234.5}
    kernels = [FakeKernel(name, us) for name, us in names.items()] + [FakeKernel("bad", error="boom")]
    cases = [Case("D:H=96,N=128", SMALL, "bench"), Case("P1", SMALL, "weak")]
    *_, record = records(cases, load_small, kernels, method(FakeTimer(note="no CUDA graph: x", mode="eager")), dict)
    text = rendered(report.tables(record["rows"]))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert sum("triton-gate-unfused" in line for line in lines) == 4  # in both tables, and no row was folded
    assert "0.43x" in text  # 40 / 93.4: as fast as
    assert "0.03x" in text
    assert text.count("failed") == 2
    notes = report.notes(record["rows"], [{"kernel": "k", "case": "c", "gates": "g", "reason": "no GPU"}] * 2)
    assert "bad failed at P1 weak: RuntimeError: boom" in notes
    assert notes.count("k cannot run: no GPU") == 1
    assert notes.count("triton-gate is timed eagerly: no CUDA graph: x") == 1


def test_the_footer_says_how():
    row = {"samples": 20, "cache": "cold", "case": "P1", "gates": "bench"}
    gpu = {"name": "H100", "driver": "580", "sm_clock_mhz": 1980.0, "sm_clock_max_mhz": 1980.0}
    record = {
        "rows": [row, row | {"samples": 99}],
        "provenance": {"gpu": gpu},
        "ceilings": dataclasses.asdict(CEILINGS),
    }
    text = "\n".join(report.footer(record))
    for part in ("H100", "SM 1980 of 1980 MHz", "2440 GB/s", "3020 GB/s", "20 to 99 samples", "cold"):
        assert part in text


# Stages


def test_stages_of_one_call():
    """Two calls of two kernels in nested ranges, and an eviction that is no part of them."""
    events = []
    for t in (0.0, 100.0):
        events += [Event("evict", t, t + 50, False), Event("call", t + 50, t + 90, True)]
        events += [Event("chain", t + 60, t + 90, True), Event("k1", t + 50, t + 60, False)]
        events += [Event("k2", t + 60, t + 90, False), Event("k3", t + 95, t + 96, False)]
    assert summarise(events, 2, frozenset({"evict"})) == [
        {"stage": "call", "kernel": "k1", "launches": 1.0, "us": 10.0},
        {"stage": "chain", "kernel": "k2", "launches": 1.0, "us": 30.0},
        {"stage": None, "kernel": "k3", "launches": 1.0, "us": 1.0},
    ]


def test_stage_tables_fit():
    stages = [{"stage": "chain", "kernel": "void " + "template<x>" * 40, "launches": 1.0, "us": 30.0}]
    row = {"kernel": "triton-prefill", "case": "P1", "gates": "bench", "stages": stages}
    empty = row | {"stages": []}
    text = rendered(report.stage_tables([row, empty]))
    assert max(map(len, text.splitlines())) <= 100
    assert "100%" in text


def test_ranges_cost_nothing_until_enabled():
    opened = []

    class Range:
        def __init__(self, name):
            opened.append(name)

        def __enter__(self):
            pass

        def __exit__(self, *error):
            pass

    with ranges.stage("a"):
        pass
    ranges.enable(Range)
    try:
        with ranges.stage("b"):
            pass
    finally:
        ranges.disable()
    with ranges.stage("c"):
        pass
    assert opened == ["b"]


def test_nvtx_ranges_open_with_no_profiler():
    with nvtx.open_range("case"), nvtx.open_range("kernel"):
        pass


def test_the_traced_run_shows_stages_of_the_measured_calls_only(monkeypatch):
    opened = []

    @dataclasses.dataclass
    class Range:
        name: str
        payload: object

        def __enter__(self):
            opened.append(self.name)

        def __exit__(self, *error):
            pass

    class Staged(FakeKernel):
        def run(self, inputs):
            with ranges.stage("chain"):
                return super().run(inputs)

    monkeypatch.setattr(nvtx, "open_range", Range)
    kernels = [Staged("bad", error="boom"), Staged("good")]
    with pytest.raises(CheckFailedError, match="bad at S bench: RuntimeError: boom"):
        trace([Case("S", SMALL, "bench")], load_small, kernels, lambda: None, lambda: None)
    calls = [nvtx.EVICT, "good", "chain"] * CALLS
    assert opened == ["S bench", nvtx.INPUTS, nvtx.WARM_UP, nvtx.WARM_UP, *calls]
    with ranges.stage("after"):
        pass
    assert "after" not in opened


# Nsight Systems

CSV = """NOTICE: Existing SQLite export found: kda-profile-1.sqlite
Processing [kda-profile-1.sqlite] with [cuda_gpu_kern_sum.py]...
Time (%),Total Time (ns),Instances,Avg (ns),Med (ns),Min (ns),Max (ns),StdDev (ns),Name
60.0,5000000,5,1000000.0,999000.0,990000,1010000,1000.0,kda:chain:chunk_chain_kernel
30.0,2500000,5,500000.0,499000.0,490000,510000,1000.0,"kda:evict:void reduce_kernel<512, 1>(int, int)"
5.0,"400,000",1,400000.0,400000.0,400000,400000,0.0,warm-up/chunk_chain_kernel
5.0,400000,1,400000.0,400000.0,400000,400000,0.0,"void evict_not<int, 2>(float *)"

Processing [kda-profile-1.sqlite] with [nvtx_gpu_proj_sum.py]...
Range,Style,Total Proj Time (ns),Total Range Time (ns),Range Instances,Proj Avg (ns),Total GPU Ops,Avg Range Lvl
kda:P1 bench,PushPop,9000000,9500000,1,9000000.0,12,0
kda:warm-up,PushPop,9000000,9500000,1,9000000.0,12,1
:evict,PushPop,9000000,9500000,1,9000000.0,12,1.0
kda:ours,PushPop,6000000,70000,5,1200000.0,15,1.0
kda:chain,PushPop,5000000,60000,5,1000000.0,5,2.0

"""


def test_kernels_of_an_nsys_summary():
    assert nsys.parse_kernels(CSV) == [
        {"kernel": "kda:chain:chunk_chain_kernel", "launches": 5, "total_us": 5000.0, "median_us": 999.0},
        {"kernel": "void evict_not<int, 2>(float *)", "launches": 1, "total_us": 400.0, "median_us": 400.0},
    ]
    assert nsys.parse_kernels("SKIPPED: no CUDA kernel data\n") == []


def test_ranges_of_an_nsys_summary():
    """Means, without cases: theirs would count compiling, too."""
    ours = {"range": "ours", "instances": 5, "launches": 3.0, "gpu_us": 1200.0, "host_us": 14.0}
    chain = {"range": "chain", "instances": 5, "launches": 1.0, "gpu_us": 1000.0, "host_us": 12.0}
    assert nsys.parse_ranges(CSV) == [ours, chain]
    older = "\n".join(
        line.rpartition(",")[0] if "Push" in line or "Style" in line else line for line in CSV.splitlines()
    )
    assert [row["range"] for row in nsys.parse_ranges(older)] == ["P1 bench", "ours", "chain"]


def test_nsys_tables_show_both():
    text = rendered(report.nsys_tables(nsys.parse_kernels(CSV), nsys.parse_ranges(CSV)))
    assert max(map(len, text.splitlines())) <= 100
    assert "kda:chain:chunk_chain_kernel" in text
    assert "ours" in text and "P1 bench" not in text
    assert "All 3 cases are taken together" in report.nsys_notes(3, True)[0]
    assert "together" not in report.nsys_notes(1, True)[0]
    assert report.nsys_notes(1, True)[2].endswith("has its shape as payload.")
    assert "pip install -U nvtx" in report.nsys_notes(1, False)[2]


def test_the_inner_run_gets_the_same_problem():
    words = ["profile", "--nsys", "-H", "4", "--json", "a.json", "--output=r", "--nsys-path", "x", "--gates", "weak"]
    assert inner.arguments(words) == ["profile", "-H", "4", "--gates", "weak"]


def test_a_report_gets_a_name_that_is_free(tmp_path):
    assert inner.report_path(".nsys-rep", None, tmp_path).name == "kda-profile-1.nsys-rep"
    (tmp_path / "kda-profile-1.qdstrm").touch()
    assert inner.report_path(".nsys-rep", None, tmp_path).name == "kda-profile-2.nsys-rep"
    assert inner.report_path(".nsys-rep", str(tmp_path / "mine")).name == "mine.nsys-rep"
    (tmp_path / "mine.nsys-rep").touch()
    with pytest.raises(InputError, match="exists"):
        inner.report_path(".nsys-rep", str(tmp_path / "mine"))


def test_nsys_is_found_or_told_of(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match="install Nsight Systems"):
        nsys.find(places=())
    for version in ("2024.10.1", "2025.9.1", "2025.10.2"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "nsys").touch(mode=0o755)
    assert nsys.find(places=(f"{tmp_path}/*/nothing", f"{tmp_path}/*/nsys")) == f"{tmp_path}/2025.10.2/nsys"
    assert nsys.find(f"{tmp_path}/2024.10.1/nsys") == f"{tmp_path}/2024.10.1/nsys"


FAKE_NSYS = r"""#!/bin/sh
if [ "$1" = stats ]; then cat "$(dirname "$0")/stats.csv"; exit 0; fi
while [ "$1" != -o ]; do shift; done
[ -n "$KDA_PROFILE_TRACE" ] || exit 9
echo "inner: $*"
touch "$2.$(cat "$(dirname "$0")/suffix")"
exit "$(cat "$(dirname "$0")/code")"
"""


@pytest.fixture
def fake_nsys(tmp_path):
    (tmp_path / "nsys").write_text(FAKE_NSYS)
    (tmp_path / "nsys").chmod(0o755)
    (tmp_path / "stats.csv").write_text(CSV)

    def setup(suffix="nsys-rep", code=0):
        (tmp_path / "suffix").write_text(suffix)
        (tmp_path / "code").write_text(str(code))
        return str(tmp_path / "nsys"), tmp_path / "report.nsys-rep"

    return setup


def test_a_run_under_nsys(fake_nsys, capfd):
    program, path = fake_nsys()
    nsys.profile(program, path, ["profile", "--nsys", "-H", "4"])
    kernels, found = nsys.stats(program, path)
    assert path.exists()
    assert len(kernels) == len(found) == 2
    said = capfd.readouterr()
    assert "-m kdacli profile -H 4" in said.err
    assert said.out == ""


@pytest.mark.parametrize(
    ("suffix", "code", "error", "message"),
    [
        ("qdstrm", 0, UnavailableError, "there is no QdstrmImporter beside it"),
        ("nothing", 7, CheckFailedError, "exit code 7"),
        ("nsys-rep", 1, CheckFailedError, "exit code 1"),
    ],
)
def test_a_run_under_nsys_that_fails(fake_nsys, suffix, code, error, message):
    program, path = fake_nsys(suffix, code)
    with pytest.raises(error, match=message):
        nsys.profile(program, path, ["profile"])


def test_an_importer_that_cannot_start(tmp_path, monkeypatch, capfd):
    """As in Nsight Compute's copy on a machine without libdw and libelf; said before anything runs."""
    for name in ("target-linux-x64/nsys", "linux-desktop-glibc_2_11_3-x64/QdstrmImporter"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("#!/bin/sh\necho started\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "ldd").write_text("""#!/bin/sh
echo '	libdw.so.1 => not found'
echo '	libelf.so.1 => not found'
echo '	libdw.so.1 => not found'
echo '	libc.so.6 => /lib/libc.so.6 (0x7f)'
""")
    (tmp_path / "ldd").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    program, path = str(tmp_path / "target-linux-x64" / "nsys"), tmp_path / "r.nsys-rep"
    with pytest.raises(UnavailableError, match="lacks libdw.so.1, libelf.so.1; .*apt-get install libdw1 libelf1$"):
        nsys.profile(program, path, ["profile"])
    assert "started" not in capfd.readouterr().err
    (tmp_path / "ldd").write_text("#!/bin/sh\necho '	libc.so.6 => /lib/libc.so.6 (0x7f)'\n")
    with pytest.raises(CheckFailedError, match="wrote no report"):
        nsys.profile(program, path, ["profile"])
    assert "started" in capfd.readouterr().err
    path.with_suffix(".qdstrm").touch()
    with pytest.raises(UnavailableError, match="QdstrmImporter, failed: see above"):
        nsys.profile(program, path, ["profile"])


def test_a_report_with_nothing_in_it(fake_nsys):
    program, path = fake_nsys()
    path.with_name("stats.csv").write_text("SKIPPED: no data\n")
    with pytest.raises(CheckFailedError, match="SKIPPED: no data"):
        nsys.stats(program, path)


# The timer


def test_eviction_reads_all_and_writes_nothing():
    evict = Evictor("cpu", num_bytes=4096)
    evict.buffer[-1] = 3
    before = evict.buffer.clone()
    evict()
    assert evict.result == 3
    assert torch.equal(evict.buffer, before)


def test_host_time_is_of_one_call():
    calls = []
    assert 0 < host_us(lambda: calls.append(1), calls=5) < 1e4
    assert calls == [1] * 5


def test_memory_of_a_call_is_its_peak(monkeypatch):
    """What there was before, and what an earlier call took, do not count."""
    taken = {"now": 100, "peak": 900}

    def reset():
        taken["peak"] = taken["now"]

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: taken["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: taken["peak"])
    assert call_bytes(lambda: taken.update(peak=150)) == 50


@pytest.mark.gpu
def test_memory_of_a_call_on_a_gpu():
    assert call_bytes(lambda: torch.empty(1 << 20, device="cuda").sum()) >= 4 << 20


def test_first_line_of_an_error():
    assert first_line(ValueError("a\nb")) == "ValueError: a"
    assert first_line(ValueError()) == "ValueError"
    assert len(first_line(ValueError("x" * 999))) == 200


class FakeCuda:
    """Stands for torch.cuda: events a given time apart, and captures that can be made to fail."""

    def __init__(self, monkeypatch, us=50.0):
        self.us, self.mode, self.capturing, self.streams = us, "default", False, []
        for name in ("synchronize", "set_sync_debug_mode", "current_stream", "stream", "CUDAGraph", "graph", "Event"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr("kdacli.profile.gpu_timer.Evictor", lambda: lambda: None)
        monkeypatch.setattr("kdacli.profile.gpu_timer.call_bytes", lambda fn: 0)

    def synchronize(self):
        pass

    def set_sync_debug_mode(self, mode):
        self.mode = mode

    def current_stream(self):
        return "ours"

    @contextlib.contextmanager
    def stream(self, stream):
        try:
            yield
        finally:
            self.streams.append(stream)

    def CUDAGraph(self):
        class Graph:
            replays = 0

            def replay(self):
                self.replays += 1

        return Graph()

    @contextlib.contextmanager
    def graph(self, graph, capture_error_mode):
        self.capturing = True
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError("the capture was invalidated") from error
        finally:
            self.capturing = False

    def Event(self, enable_timing):
        outer = self

        class Event:
            def record(self):
                pass

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return outer.us / 1e3

        return Event()


def test_a_call_is_captured_and_replayed(monkeypatch):
    cuda, calls = FakeCuda(monkeypatch), []
    timed = GpuTimer().prepare(lambda: calls.append(cuda.capturing))
    assert (timed.mode, timed.note, calls.count(True), calls[-1]) == ("graph", None, 1, True)
    before = len(calls)
    assert timed.sample() == 50.0
    assert len(calls) == before  # a replay calls no Python
    assert cuda.mode == "default"
    assert cuda.streams == ["ours"]


def test_a_capture_that_fails_says_why(monkeypatch):
    cuda = FakeCuda(monkeypatch)

    def fn():
        if cuda.capturing:
            raise RuntimeError("cudaMalloc is not permitted\nCompile with ...")

    timed = GpuTimer().prepare(fn)
    assert (timed.mode, timed.note) == ("eager", "no CUDA graph: RuntimeError: cudaMalloc is not permitted")
    assert cuda.streams == ["ours"]


def test_a_call_that_waits_is_never_captured(monkeypatch):
    cuda, captured = FakeCuda(monkeypatch), []

    def fn():
        captured.append(cuda.capturing)
        if cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    timed = GpuTimer().prepare(fn)
    assert (timed.mode, timed.note) == ("eager", "no CUDA graph: the call waits for the GPU")
    assert not any(captured)
    assert cuda.mode == "default"


def test_eager_and_warm(monkeypatch):
    """Warm: the call itself runs before the sample, often enough to cover the launch."""
    FakeCuda(monkeypatch, us=50.0)
    calls = []
    timed = GpuTimer(cold=False, graph=False).prepare(lambda: calls.append(1))
    assert (timed.mode, timed.note) == ("eager", None)
    calls.clear()
    timed.sample()
    assert len(calls) == 3 + 1  # 150 us of work at 50 us each


@pytest.fixture
def fake_machine(monkeypatch):
    """A GPU that is the CPU, with kernels that only name their time."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("kdacli.options.require_memory", lambda problem, device: None)
    monkeypatch.setattr(
        "kdacli.synthetic.make_inputs", lambda problem, device, **regime: make_inputs(problem, **regime)
    )
    monkeypatch.setattr("kdacli.profile.ceilings.measure", lambda prepare: CEILINGS)
    options = []

    def timer(**given):
        options.append(given)
        found = FakeTimer()
        found.cold, found.evict = given["cold"], lambda: None
        return found

    monkeypatch.setattr("kdacli.profile.gpu_timer.GpuTimer", timer)
    monkeypatch.setattr(
        "kdacli.profile.select.candidates", lambda ops, names, peers: [FakeKernel("ours"), FakeKernel("b", 20.0)]
    )
    return options


def test_the_command_prints_and_records(fake_machine, tmp_path, capsys):
    dest = tmp_path / "r.json"
    words = ["-T", "64", "-H", "1", "--head-dim", "16", "--seconds", "0", "--gates", "init", "--gates", "weak"]
    command.main([*words, "--json", str(dest)], standalone_mode=False)
    said = capsys.readouterr().out
    assert "0.50x" in said
    assert "cold" in said
    record = json.loads(dest.read_text())
    assert [(r["gates"], r["kernel"], r["median_us"]) for r in record["rows"]] == [
        ("init", "ours", 10.0), ("init", "b", 20.0), ("weak", "ours", 10.0), ("weak", "b", 20.0)
    ]  # fmt: skip
    assert record["complete"]
    assert set(record["provenance"]) >= {"gpu", "packages", "commit", "command", "seed"}
    with pytest.raises(InputError, match="exists"):
        command.main([*words, "--json", str(dest)], standalone_mode=False)
    assert fake_machine == [{"cold": True, "graph": True}]


def test_json_alone_on_stdout(fake_machine, capsys):
    words = ["-T", "64", "-H", "1", "--head-dim", "16", "--seconds", "0", "--warm", "--eager", "--json", "-"]
    command.main(words, standalone_mode=False)
    said = capsys.readouterr()
    assert [r["cache"] for r in json.loads(said.out)["rows"]] == ["warm", "warm"]
    assert "0.50x" in said.err
    assert fake_machine == [{"cold": False, "graph": False}]


def test_what_a_dump_and_a_layer_add(fake_machine, tmp_path, capsys, monkeypatch):
    from kdacli.dumps import save

    inputs = make_inputs(Problem(Op.PREFILL, (64,), 1, 1, K=16, V=16, options=Options(Gate.SAFE, -5.0)))
    save(tmp_path / "d.pt", inputs)
    monkeypatch.setattr("kda_kernels.tensors.Inputs.to", lambda self, device: self)
    dest = tmp_path / "r.json"
    command.main(["--dump", str(tmp_path / "d.pt"), "--seconds", "0", "--json", str(dest)], standalone_mode=False)
    said = capsys.readouterr().out
    assert "the dump's gates" in said
    assert "Half-life of the 16 channels" in said
    assert sum(json.loads(dest.read_text())["half_lives"]["counts"]) == 16
    words = ["--layer", "kimi-k3", "--tp", "96", "-T", "64", "--op", "prefill", "--seconds", "0", "--json", str(dest)]
    command.main([*words, "--force"], standalone_mode=False)
    said = " ".join(capsys.readouterr().out.split())
    assert "kimi-k3, TP 96, 69 KDA layers, prefill of 64 tokens" in said
    assert json.loads(dest.read_text())["layer"]["rows"][0]["ms"] == pytest.approx(0.69)


def test_a_baseline_ends_with_1_on_a_regression(fake_machine, tmp_path, capsys):
    dest = tmp_path / "r.json"
    words = ["-T", "64", "-H", "1", "--head-dim", "16", "--seconds", "0"]
    command.main([*words, "--json", str(dest)], standalone_mode=False)
    command.main([*words, "--baseline", str(dest)], standalone_mode=False)
    assert "2 timings: 2 same." in capsys.readouterr().out
    record = json.loads(dest.read_text())
    for row in record["rows"]:
        for key in ("median_us", "low_us", "high_us"):
            row[key] /= 2 if row["kernel"] == "ours" else 1
    dest.write_text(json.dumps(record))
    with pytest.raises(CheckFailedError, match="1 of 2 timings regressed: ours"):
        command.main([*words, "--baseline", str(dest)], standalone_mode=False)
    assert "+100.0%" in capsys.readouterr().out


@pytest.mark.parametrize(("cost", "written"), [(0.0, [0, 3, 6, 8]), (1.0, [0, 8])], ids=["quick", "slow"])
def test_a_growing_record_is_written_now_and_then(cost, written):
    """A case every two seconds: every third record where writing costs nothing, fewer where it takes a second."""
    now, found = [10.0], []

    def write(record, force):
        found.append((record["n"], force))
        now[0] += cost

    save = Saver(write, False, lambda: now[0])
    for n in range(9):
        save({"n": n, "complete": n == 8})
        now[0] += 2.0
    assert found == [(n, n > 0) for n in written]


@pytest.mark.gpu
def test_gpu_times_agree_with_the_bandwidth():
    """A copy of 256 MB takes as long as the ceiling says, cold or warm, by graph or eagerly."""
    found = ceilings.measure(GpuTimer().prepare, num_bytes=1 << 29)
    assert 20 < found.tensor_tflops < 10_000
    assert 200 < found.copy_gbps < 20_000
    assert 200 < found.inplace_gbps < 20_000
    x = torch.zeros(1 << 26, device="cuda")
    y = torch.empty_like(x)
    for cold, graph in itertools.product((True, False), (True, False)):
        timed = GpuTimer(cold=cold, graph=graph).prepare(lambda: y.copy_(x))
        samples, _ = interleave({"copy": timed}, Budget(seconds=0.1))
        rate = gbps(2 * x.nbytes, Statistics.of(samples["copy"]).median_us)
        assert timed.mode == ("graph" if graph else "eager")
        assert rate == pytest.approx(found.copy_gbps, rel=0.3)


@pytest.mark.gpu
def test_gpu_a_call_that_waits_is_timed_eagerly():
    """And the next call is captured as if nothing had happened."""
    x = torch.ones(1024, device="cuda")
    timer = GpuTimer()
    waiting = timer.prepare(lambda: x.sum().item())
    assert waiting.mode == "eager"
    assert "waits for the GPU" in waiting.note
    assert waiting.sample() > 0
    assert timer.prepare(lambda: x.add_(1)).mode == "graph"


@pytest.mark.gpu
def test_gpu_stages_list_the_kernels_of_a_call():
    x = torch.ones(1 << 20, device="cuda")

    def call():
        with ranges.stage("first"):
            x.add_(1)
        x.mul_(2)

    rows = StageProfiler(GpuTimer().evict)(call)
    assert [row["stage"] for row in rows] == ["first", None]
    assert all(row["launches"] == 1 and row["us"] > 0 for row in rows)


@pytest.mark.gpu
def test_gpu_profile_end_to_end(tmp_path):
    """Our kernel of each op, at a small shape, from the command line to the record."""
    for name in ("triton-prefill", "triton-decode", "triton-gate"):
        dest = tmp_path / f"{name}.json"
        words = ["--kernel", name, "-H", "4", "--gates", "init", "--seconds", "0.05", "--json", str(dest), "--stages"]
        done = click.testing.CliRunner().invoke(command, words, catch_exceptions=False)
        assert done.exit_code == 0
        record = json.loads(dest.read_text())
        (row,) = record["rows"]
        assert record["complete"]
        assert (row["kernel"], row["mode"], row["cache"], row["gates"]) == (name, "graph", "cold", "init")
        assert row["median_us"] > 0
        assert row["stages"]


@pytest.mark.gpu
def test_gpu_clocks_are_read():
    read, why = watch.nvml_reader()
    if read is None:
        assert "nvidia-ml-py" in why
        pytest.skip(why)
    x = torch.ones(1 << 26, device="cuda")
    with watch.Watch(read, 0.01)() as readings:
        for _ in range(200):
            x.mul_(1.0)
        torch.cuda.synchronize()
    found = watch.summary(readings)
    assert found["sm_mhz"][0] > 100
    assert found["readings"] >= 1


@pytest.mark.gpu
def test_gpu_the_same_kernel_twice_is_no_difference():
    """Two names for one call: what their ratio says must be that the noise supports none, or one under 2%."""
    x = torch.zeros(1 << 24, device="cuda")
    timer = GpuTimer()
    timed = {name: timer.prepare(lambda: x.add_(1.0)) for name in ("a", "b")}
    samples, _ = interleave(timed, Budget(seconds=0.2))
    found = noise.ratio(samples["a"], samples["b"])
    assert not found.supported(0.02)
    assert found.high - found.low < 0.05


@pytest.mark.gpu
def test_gpu_sweep_end_to_end(tmp_path):
    dest, picture = tmp_path / "s.json", tmp_path / "s.svg"
    words = ["--kernel", "triton-decode", "--sweep", "N=1..32", "-H", "8", "--seconds", "0.02", "--json", str(dest)]
    done = click.testing.CliRunner().invoke(command, [*words, "--plot", str(picture)], catch_exceptions=False)
    assert done.exit_code == 0
    record = json.loads(dest.read_text())
    assert [row["point"]["N"] for row in record["rows"]] == [1, 2, 4, 8, 16, 32]
    (one,) = record["sweep"]
    assert one["line"]["slope"] > 0
    assert picture.exists()


@pytest.mark.gpu
def test_gpu_a_timeline_has_the_cuda_kernels(tmp_path):
    path = tmp_path / "t.json"
    words = ["--kernel", "triton-decode", "-N", "4", "-H", "4", "--seconds", "0.02", "--trace", str(path)]
    done = click.testing.CliRunner().invoke(command, words, catch_exceptions=False)
    assert done.exit_code == 0
    events = json.loads(path.read_text())["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)
    assert sum(event.get("name") == "triton-decode" and event.get("cat") == "user_annotation" for event in events) == 5


@pytest.mark.gpu
def test_gpu_nsight_compute_end_to_end(tmp_path):
    """A real ncu, where there is one: our kernels and nothing of what is around them, with the main metrics."""
    try:
        ncu.find()
    except UnavailableError as error:
        pytest.skip(str(error))
    dest = tmp_path / "n.json"
    words = [sys.executable, "-m", "kdacli", "profile", "--ncu", "--kernel", "triton-decode", "-N", "64", "-H", "32"]
    words += ["--output", str(tmp_path / "n"), "--json", str(dest)]
    env = inner.environment("")
    del env[inner.TRACE_ENV]
    done = subprocess.run(words, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    launches = json.loads(dest.read_text())["ncu"]["launches"]
    assert launches
    for key in ("us", "dram", "l2", "sm", "occupancy", "registers", "bank_conflicts", "local_bytes", "read_bytes"):
        assert all(row[key] is not None for row in launches), key
    assert all(row["stalls"] for row in launches)
    if "read as CSV" not in done.stdout:
        assert {row["kernel"] for row in launches} == {"triton-decode"}


def test_the_registry_offers_what_the_suites_need():
    for name in ("prefill", "decode", "gate"):
        assert any(k.ours for k in registry.kernels(name))
