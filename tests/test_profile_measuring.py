"""How `kda profile` measures: bytes and operations, sampling, noise, clocks, and the outputs of what was timed."""

import dataclasses
import functools
import itertools
import statistics
import sys
import types

import pytest
import torch
from profile_stand_ins import CEILINGS, SMALL, SMALL_DECODE, Kernel, Timer, load, method, normal

from kda_kernels import ranges
from kda_kernels.errors import CheckFailedError, UnavailableError
from kda_kernels.problem import Gate, Op, Options, Problem
from kdacli.profile.cases.suites import TimedCase, suite
from kdacli.profile.measuring import ceilings, noise, outputs, watch
from kdacli.profile.measuring.all_cases import records
from kdacli.profile.measuring.call import Call
from kdacli.profile.measuring.ceilings import Ceilings
from kdacli.profile.measuring.gpu_timer import Evictor, GpuTimer, call_bytes
from kdacli.profile.measuring.noise import Ratio, ratio
from kdacli.profile.measuring.one_case import measure_case
from kdacli.profile.measuring.stages import Event, StageProfiler, summarise
from kdacli.profile.measuring.timing import TICK_US, Budget, Statistics, interleave
from kdacli.profile.measuring.traffic import floor_us, flops, gbps, traffic
from kdacli.profile.records.record import require_complete
from kdacli.profile.records.row import Clocks, FailedRow, Refusal, Stage, Versus
from kdacli.synthetic import make_inputs


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


# Sampling


class Samples:
    """The part of a timed call that is sampled."""

    def __init__(self, times, log=None, name=""):
        self.times, self.log, self.name = iter(times), log, name

    def sample(self):
        if self.log is not None:
            self.log.append(self.name)
        value = next(self.times)
        if isinstance(value, Exception):
            raise value
        return value


def test_samples_are_taken_in_turns():
    log = []
    timed = {name: Samples(itertools.count(1.0), log, name) for name in ("a", "b")}
    samples, failed = interleave(timed, Budget(seconds=0, min_samples=3))
    assert log == ["a", "b"] * 3
    assert samples == {"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0, 3.0]}
    assert not failed


def test_an_error_stops_only_its_own_kernel():
    timed = {"bad": Samples([1.0, ValueError("x")]), "good": Samples(itertools.repeat(2.0))}
    samples, failed = interleave(timed, Budget(seconds=0, min_samples=4))
    assert samples["good"] == [2.0] * 4
    assert list(failed) == ["bad"]
    samples, failed = interleave({"bad": Samples([ValueError("x")])}, Budget())
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
    samples, _ = interleave({"a": Samples(itertools.repeat(1.0))}, Budget(0.3, 20, 50, 10.0, 3), lambda: next(clock))
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


# Noise


def test_the_interval_of_a_median_holds_it_19_times_of_20():
    inside = 0
    for seed in range(400):
        found = Statistics.of(normal(seed, 100.0, 5.0, 41))
        inside += found.low_us <= 100.0 <= found.high_us
    assert 0.93 < inside / 400 < 0.99


def test_the_interval_of_a_ratio_holds_it_19_times_of_20():
    inside = 0
    for seed in range(200):
        found = ratio(normal(seed, 120.0, 4.0, 60), normal(seed + 1000, 100.0, 4.0, 60))
        inside += found.low <= 1.2 <= found.high
    assert 0.90 < inside / 200 < 1.0


def test_a_drift_that_both_share_does_not_widen_the_ratio():
    """The clocks fall by 20% while two kernels take turns: each alone is uncertain, their ratio is not."""
    drift = [1 + 0.2 * i / 100 for i in range(100)]
    a = [100 * d * e for d, e in zip(drift, normal(1, 1, 0.002, 100), strict=True)]
    b = [110 * d * e for d, e in zip(drift, normal(2, 1, 0.002, 100), strict=True)]
    found = ratio(b, a)
    alone = Statistics.of(a)
    assert found.low < 1.1 < found.high
    assert found.high - found.low < 0.3 * (alone.high_us - alone.low_us) / alone.median_us
    assert found.supported(None)


def test_the_clocks_tick_bounds_the_interval():
    found = ratio([5.0] * 50, [5.0] * 50)
    assert found.value == 1.0
    assert found.high - 1 == pytest.approx(TICK_US / 5.0)
    assert not found.supported(None)
    with pytest.raises(ValueError, match="samples"):
        ratio([], [1.0])


@pytest.mark.parametrize(
    ("found", "repeat", "supported"),
    [
        (Ratio(1.10, 1.08, 1.12), 0.01, True),
        (Ratio(1.10, 1.08, 1.12), 0.15, False),  # a repetition differed by more
        (Ratio(1.01, 0.99, 1.03), 0.0, False),  # the interval holds 1
        (Ratio(0.90, 0.88, 0.92), 0.05, True),
        (Ratio(0.97, 0.96, 0.98), None, True),
    ],
)
def test_what_the_noise_supports(found, repeat, supported):
    assert found.supported(repeat) is supported


# Rows


def measured(*kernels, timer=None, problem=SMALL, loader=load, **more):
    return measure_case(TimedCase("S", problem, "weak"), loader, kernels, method(timer, **more))


def test_ceilings_count_bytes_read_and_written():
    """1 MB read and 1 MB written in 100 us: 20 GB/s; a product of 100 x 100 matrices: 0.02 TFLOP/s."""
    called = []

    def prepare(call):
        called.append(call())
        return Samples(itertools.repeat(100.0))

    found = ceilings.measure(prepare, device="cpu", num_bytes=1_000_000, matrix=100)
    assert len(called) == 4
    assert found == Ceilings(pytest.approx(20.0), pytest.approx(20.0), 100.0, pytest.approx(0.02))
    assert CEILINGS.of(Op.DECODE) == 3020.0
    assert CEILINGS.of(Op.PREFILL) == CEILINGS.of(Op.GATE) == 2440.0


def test_a_row_holds_what_its_times_say():
    (row,), refused = measured(Kernel("ours", us=(3.0, 9.0, 4.0)))
    assert refused == []
    assert (row.op, row.case, row.gates, row.kernel, row.problem) == ("prefill", "S", "weak", "ours", SMALL)
    assert (row.median_us, row.samples) == (statistics.median([3.0, 9.0, 4.0]), 3)
    assert row.bytes == traffic(SMALL).total
    assert row.gbps == pytest.approx(row.bytes / 4e-6 / 1e9)
    assert row.share == pytest.approx(row.gbps / 2440.0)
    assert row.floor_us == pytest.approx(row.share * 4.0)
    assert row.tflops == pytest.approx(flops(SMALL) / 4e-6 / 1e12)
    assert row.tensor_share == pytest.approx(row.tflops / 800.0)
    assert row.tokens_per_ms == pytest.approx(64 / 0.004)
    assert 0 < row.output_error < 0.01


def test_a_kernel_that_raises_becomes_a_row_with_the_reason():
    kernels = [Kernel("bad", error="CUDA error: boom\nmore"), Kernel("good"), Kernel("none", reason="no")]
    rows, refused = measured(*kernels)
    assert [row.kernel for row in rows] == ["bad", "good"]
    assert rows[0].error == "RuntimeError: CUDA error: boom more"
    assert rows[1].median_us == 10.0
    assert refused == [Refusal("S", "weak", "none", "no")]


def test_inputs_that_cannot_be_made_fail_the_case_only():
    def loader(case):
        if case.name == "big":
            raise UnavailableError("needs 1 TB")
        return load(case)

    cases = [TimedCase("big", SMALL, "bench"), TimedCase("S", SMALL, "bench")]
    *_, record = records(cases, loader, [Kernel("a")], method(), dict)
    assert record.rows[0].error == "needs 1 TB"
    assert record.rows[1].median_us == 10.0
    with pytest.raises(CheckFailedError, match="1 of 2 timings failed$"):
        require_complete(record, [])


def test_what_was_measured_before_a_fault_stays():
    def stages(fn):
        raise RuntimeError("no CUPTI")

    (row,), _ = measured(Kernel("a"), stages=stages)
    assert row.median_us == 10.0


def test_the_state_of_the_case_is_not_written():
    """Kernels update a pool in place: they get a copy of it."""
    inputs = make_inputs(SMALL_DECODE)
    before = inputs.state.clone()
    (row,), _ = measured(Kernel("d", op=Op.DECODE), problem=SMALL_DECODE, loader=lambda case: inputs)
    assert row.median_us == 10.0
    torch.testing.assert_close(inputs.state, before, rtol=0, atol=0, equal_nan=True)


def test_every_kernel_is_held_against_the_best_peer():
    peer, worse = Kernel("peer", (20.0,), ours=False), Kernel("worse", (40.0,), ours=False)
    kernels = [Kernel("ours", (10.0,)), Kernel("x.py:f", (25.0,), False, "user"), worse, peer]
    rows, _ = measured(*kernels, samples=40)
    assert {row.vs.kernel for row in rows} == {"peer"}
    assert [row.vs.speedup for row in rows] == [2.0, 0.8, 0.5, 1.0]
    assert [row.vs.supported for row in rows] == [True, True, True, None]
    assert [row.peer for row in rows] == [False, False, True, True]
    assert all(row.vs.best_peer for row in rows)


def test_without_peers_the_first_kernel_is_the_measure():
    (first, second), _ = measured(Kernel("a", (10.0,)), Kernel("b", (20.0,)))
    assert first.vs == Versus("a", False, 1.0, 1.0, 1.0, None)
    assert (second.vs.kernel, second.vs.speedup) == ("a", 0.5)


def test_a_repetition_bounds_what_can_be_told_apart():
    """A kernel 3% slower than the first, where the first differs from itself by nothing, and by 5%."""
    kernels = [Kernel("a", (100.0,)), Kernel("b", (103.0,))]
    (_, row), _ = measured(*kernels, samples=40)
    assert (row.repeat, row.vs.supported) == (0.0, True)
    (_, row), _ = measured(*kernels, samples=40, timer=Timer(1.05))
    assert (row.repeat, row.vs.supported) == (pytest.approx(0.05), False)


# Outputs


class Remembers(Kernel):
    """Gives back what it gave before for the same addresses and shapes."""

    memory = {}

    def run(self, inputs):
        key = tuple((t.data_ptr(), t.shape) for t in inputs.tensors().values())
        if key not in self.memory:
            self.memory[key] = super().run(inputs)
        return self.memory[key]


class GatesOnly(Kernel):
    """Remembers the gates of an address."""

    memory = {}

    def run(self, inputs):
        g = self.memory.setdefault((inputs.g.data_ptr(), inputs.g.shape), inputs.g.clone())
        return super().run(dataclasses.replace(inputs, g=g))


@pytest.mark.parametrize(
    "problem",
    [
        SMALL,
        SMALL_DECODE,
        Problem(Op.GATE, (70, 3), 2, 2, K=16, V=16, initial_state=False, final_state=False),
        Problem(Op.PREFILL, (5, 0, 3), 2, 4, K=16, V=8, pool_slots=5, padding=1, state_v_first=False),
        Problem(Op.PREFILL, (9, 9), 1, 3, K=8, V=8, packed=False, options=Options(Gate.NONE, beta_is_logit=False)),
    ],
    ids=lambda problem: problem.name,
)
def test_a_kernel_that_remembers_its_outputs_has_no_time(problem):
    """It is right on inputs that it sees for the first time, so it was right when it was timed first."""
    kernels = [Kernel("honest", op=problem.op), Remembers("cheat", op=problem.op)]
    cases = [TimedCase("S", problem, "bench")]
    *_, record = records(cases, load, kernels, method(), dict)
    honest, cheat = record.rows
    assert honest.output_error < 0.01
    assert isinstance(cheat, FailedRow) and cheat.output_error > outputs.LIMIT
    assert cheat.error.startswith("wrong outputs: with other inputs in the same tensors they are off by ")
    with pytest.raises(CheckFailedError, match="1 of 2 timings failed, 1 of them since the outputs are wrong"):
        require_complete(record, [])


def test_a_kernel_that_remembers_its_gates_has_no_time():
    """Where gates matter: behind those of the regime weak, which hardly forget, other gates change little."""
    (row,), _ = measure_case(TimedCase("S", SMALL, "bench"), load, [GatesOnly("cheat")], method())
    assert row.output_error > outputs.LIMIT


def test_outputs_that_are_not_numbers_are_wrong():
    class Nan(Kernel):
        def run(self, inputs):
            out = super().run(inputs)
            out.final_state[0, 0, 0, 0] = float("nan")
            return out

    (row,), _ = measured(Nan("nan"))
    assert row.output_error == float("inf")


def test_long_rows_are_looked_at_in_part(monkeypatch):
    """A kernel that is wrong behind the part, and in its final state, passes; one that is wrong within does not."""
    monkeypatch.setattr(outputs, "TOKENS", 40)
    problem = Problem(Op.PREFILL, (30, 34), 1, 1, K=16, V=16)

    class WrongFrom(Kernel):
        def run(self, inputs):
            out = super().run(inputs)
            out.o[:, self.us[0] :] = 7
            out.final_state.fill_(7)
            return out

    (late, early), _ = measured(WrongFrom("late", (40,)), WrongFrom("early", (39,)), problem=problem)
    assert late.output_error < 0.01 and isinstance(early, FailedRow)


# Host time at new shapes


@pytest.mark.parametrize(
    ("problem", "tokens", "sequences"),
    [
        (Problem(Op.PREFILL, (5, 4), 1, 1, K=16, V=16), [8, 7, 6], [2, 2, 2]),
        (Problem(Op.PREFILL, (2, 0, 1), 1, 1, K=16, V=16), [2, 1], [3, 3]),
        (Problem(Op.PREFILL, (3, 3), 1, 1, K=16, V=16, packed=False), [4, 2], [2, 2]),
        (Problem(Op.PREFILL, (1,), 1, 1, K=16, V=16), [], []),
        (Problem(Op.DECODE, (1,) * 3, 1, 1, K=16, V=16, packed=False, pool_slots=4), [2, 1], [2, 1]),
        (Problem(Op.DECODE, (1,) * 3, 1, 1, K=16, V=16, packed=False), [2, 1], [2, 1]),
        (Problem(Op.DECODE, (1,) * 3, 1, 1, K=16, V=16, pool_slots=4), [2, 1], [3, 3]),
        (Problem(Op.DECODE, (1,), 1, 1, K=16, V=16, packed=False, pool_slots=4), [], []),
    ],
)
def test_each_new_shape_is_a_smaller_call(problem, tokens, sequences):
    """And computes what it should: the same tokens as in the whole call, where both have them."""
    inputs = make_inputs(problem)
    call = Call(Kernel("k", op=problem.op), inputs)
    smaller = [one.inputs for one in call.smaller(3)]
    assert [x.q.shape[0] * x.q.shape[1] for x in smaller] == tokens
    seen = [x.q.shape[0] if x.cu_seqlens is None else len(x.cu_seqlens) - 1 for x in smaller]
    assert seen == sequences
    whole = Call(call.kernel, inputs.fresh())().o
    for x in smaller:
        o = Call(call.kernel, x.fresh())().o
        torch.testing.assert_close(o, whole[: o.shape[0], : o.shape[1]], rtol=0, atol=1e-2)


def test_a_new_shape_is_one_that_the_kernel_can_run():
    class Even(Kernel):
        def unsupported(self, problem=None):
            return "an odd number of tokens" if problem and problem.T % 2 else None

    call = Call(Even("k"), make_inputs(SMALL))
    assert [one.inputs.q.shape[1] for one in call.smaller(5)] == [62, 60]


def test_the_host_time_of_a_new_shape_is_in_the_row():
    (row,), _ = measured(Kernel("a"))
    assert (row.host_us, row.host_new_us) == (5.0, 7.0)
    one = Problem(Op.PREFILL, (1,), 1, 1, K=16, V=16)
    (row,), _ = measured(Kernel("a"), problem=one)
    assert row.host_new_us is None


# Clocks


def test_the_clocks_are_read_while_a_kernel_is_timed():
    low = {"sm_mhz": 1200.0, "memory_mhz": 2619.0, "power_w": 700.0, "temperature_c": 80.0, "throttle": 5.0}
    readings = iter([low])
    (row,), _ = measured(Kernel("a"), clocks=watch.Watch(lambda: next(readings), interval_s=60))
    assert row.clocks == Clocks([1200.0] * 3, [2619.0] * 3, 700.0, 80.0, ["power cap"], 1)


def test_a_watch_reads_in_the_background():
    calls = itertools.count()
    with watch.Watch(lambda: {"n": float(next(calls))}, interval_s=0.001)() as readings:
        while len(readings) < 3:
            pass
    n = len(readings)
    assert n >= 4  # and one at the end
    assert watch.summary([]) is None
    assert len(readings) == n  # the thread has ended


def test_a_reading_that_fails_voids_no_timing():
    """NVML may fail at any reading, the last included; those before it stay."""

    def read():
        if next(calls):
            raise RuntimeError("GPU is lost")
        return {"n": 1.0}

    calls, asked = itertools.count(), watch.Watch(lambda: read(), interval_s=0.001)
    with asked() as readings:
        while asked.lost is None:
            pass
    assert readings == [{"n": 1.0}]
    assert asked.lost == "clocks were not always watched: NVML says GPU is lost"
    *_, record = records([TimedCase("S", SMALL, "weak")], load, [Kernel("a")], method(clocks=asked), dict)
    assert (record.rows[0].median_us, record.rows[0].clocks) == (10.0, None)
    assert record.not_watched == asked.lost


def test_what_slows_a_gpu_down_has_a_name():
    assert watch.reasons(0x1 | 0x2) == []
    assert watch.reasons(0x8 | 0x40) == ["hardware slowdown", "hardware thermal"]


def test_the_clocks_of_the_gpu_in_use(monkeypatch):
    """A stand-in for the NVML of an older driver: asked for the GPU by its UUID; what fails is said in a line."""

    class NVMLError(Exception):
        pass

    asked = []
    nvml = types.SimpleNamespace(
        NVMLError=NVMLError, NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2, NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=asked.append,
        nvmlDeviceGetClockInfo=lambda gpu, which: {1: 1980, 2: 2619}[which],
        nvmlDeviceGetPowerUsage=lambda gpu: 350_500,
        nvmlDeviceGetTemperature=lambda gpu, which: 41,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda gpu: 0x4,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(watch, "gpu_uuid", lambda: "GPU-12-34")
    read, why = watch.nvml_reader()
    assert (asked, why) == (["GPU-12-34"], None)
    assert read() == {"sm_mhz": 1980.0, "memory_mhz": 2619.0, "power_w": 350.5, "temperature_c": 41.0, "throttle": 4.0}

    def fails():
        raise NVMLError("Driver Not Loaded")

    nvml.nvmlInit = fails
    assert watch.nvml_reader() == (None, "clocks were not watched: NVML says Driver Not Loaded")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert watch.nvml_reader() == (None, "clocks were not watched: pip install nvidia-ml-py")


# Stages


def test_stages_of_one_call():
    """Two calls of two kernels in nested ranges, and an eviction that is no part of them."""
    events = []
    for t in (0.0, 100.0):
        events += [Event("evict", t, t + 50, False), Event("call", t + 50, t + 90, True)]
        events += [Event("chain", t + 60, t + 90, True), Event("k1", t + 50, t + 60, False)]
        events += [Event("k2", t + 60, t + 90, False), Event("k3", t + 95, t + 96, False)]
    assert summarise(events, 2, frozenset({"evict"})) == [
        Stage("call", "k1", 1.0, 10.0),
        Stage("chain", "k2", 1.0, 30.0),
        Stage(None, "k3", 1.0, 1.0),
    ]


# The timer


def test_eviction_reads_all_and_writes_nothing():
    evict = Evictor("cpu", num_bytes=4096)
    evict.buffer[-1] = 3
    before = evict.buffer.clone()
    evict()
    assert evict.result == 3
    assert torch.equal(evict.buffer, before)


@pytest.mark.gpu
def test_memory_of_a_call_on_a_gpu():
    """Neither what there was before nor what an earlier call took counts; what is freed within the call does."""
    kept = torch.empty(1 << 22, device="cuda")
    kept.clone()
    assert call_bytes(lambda: torch.empty(1 << 20, device="cuda").sum()) == pytest.approx(4 << 20, rel=0.01)


@pytest.mark.gpu
def test_host_time_is_the_cpus_alone():
    """A call that keeps the GPU busy for 10 ms returns at once; a new shape's call is one each."""
    seen = []
    x = torch.ones(1 << 28, device="cuda")
    new_shapes = [functools.partial(seen.append, n) for n in range(4)]
    timed = GpuTimer(graph=False).prepare(lambda: [x.add_(1) for _ in range(20)], new_shapes)
    assert timed.sample() > 5000 > timed.host.same_us > 0
    assert seen == [0, 1, 2, 3] and timed.host.new_us < 1000


@pytest.mark.gpu
def test_a_graph_computes_anew_at_each_run():
    x = torch.ones(1024, device="cuda")
    timed = GpuTimer().prepare(lambda: x * 2)
    assert timed.mode == "graph"
    x.fill_(3)
    assert torch.equal(timed.run(), torch.full_like(x, 6))


@pytest.mark.gpu
def test_a_capture_that_fails_says_why():
    """And the next call is captured as if nothing had happened."""

    def call():
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not while capturing\nmore")
        return x.add_(1)

    x = torch.ones(1024, device="cuda")
    timed = GpuTimer().prepare(call)
    assert (timed.mode, timed.note) == ("eager", "no CUDA graph: RuntimeError: not while capturing more")
    assert timed.sample() > 0
    assert GpuTimer().prepare(lambda: x.add_(1)).mode == "graph"


@pytest.mark.gpu
def test_gpu_times_agree_with_the_bandwidth():
    """A copy of 1 GiB takes as long as the ceiling, which is such a copy, says: cold or warm, by graph or eagerly."""
    found = ceilings.measure(GpuTimer().prepare)
    assert 20 < found.tensor_tflops < 10_000
    assert 200 < found.copy_gbps < 20_000
    assert 200 < found.inplace_gbps < 20_000
    x = torch.zeros(1 << 28, device="cuda")
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
    assert [row.stage for row in rows] == ["first", None]
    assert all(row.launches == 1 and row.us > 0 for row in rows)


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
    assert found.sm_mhz[0] > 100
    assert found.readings >= 1


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
