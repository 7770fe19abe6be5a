"""What `kda profile` says of noise: intervals against known distributions, clocks, and two recordings compared."""

import copy
import dataclasses
import itertools
import json
import random
import statistics
from pathlib import Path

import pytest

from kda_kernels.errors import CheckFailedError, InputError
from kda_kernels.problem import Op, Problem
from kdacli.commands.profile import command
from kdacli.profile import baseline, report, report_baseline, watch
from kdacli.profile.ceilings import Ceilings
from kdacli.profile.measure import Method, measure_case
from kdacli.profile.noise import Ratio, ratio
from kdacli.profile.suites import Case
from kdacli.profile.timing import TICK_US, Budget, Statistics
from kdacli.synthetic import make_inputs

RECORDS = Path(__file__).parent.parent / "benchmarks"


def normal(seed, mean, sd, n):
    r = random.Random(seed)
    return [r.gauss(mean, sd) for _ in range(n)]


# Intervals


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


# Kernels held against each other


SMALL = Problem(Op.DECODE, (1,), 1, 1, K=16, V=16, packed=False, pool_slots=2)


@dataclasses.dataclass(frozen=True)
class Kernel:
    name: str
    us: tuple[float, ...]
    ours: bool = True
    backend: str = "fake"
    op: Op = Op.DECODE

    def unsupported(self, problem):
        return None

    def run(self, inputs):
        return self.us


class Timer:
    """The samples of each call are what it returns, in turn; a second timing of it starts `shift` times as high."""

    cold = True

    def __init__(self, shift=1.0):
        self.shift, self.seen = shift, set()

    def prepare(self, fn):
        us = fn()
        factor = self.shift if us in self.seen else 1.0
        self.seen.add(us)

        class Timed:
            mode, note, host_us, call_bytes = "graph", None, 1.0, 0
            times = itertools.cycle([factor * v for v in us])

            def sample(self):
                return next(self.times)

        return Timed()


def rows_of(*kernels, shift=1.0, watched=None):
    extra = {"watch": watched} if watched else {}
    method = Method(Timer(shift), Ceilings(2440.0, 3020.0, 2.0, 800.0), Budget(0, 40, 40), **extra)
    case = Case("S", SMALL, "bench")
    return measure_case(case, lambda c: make_inputs(c.problem), kernels, method).rows


def test_every_kernel_is_held_against_the_best_peer():
    peer, worse = Kernel("peer", (20.0,), ours=False), Kernel("worse", (40.0,), ours=False)
    ours, mine, worse, peer = rows_of(Kernel("ours", (10.0,)), Kernel("x.py:f", (25.0,), False, "user"), worse, peer)
    assert {row["vs"]["kernel"] for row in (ours, mine, worse, peer)} == {"peer"}
    assert [row["vs"]["speedup"] for row in (ours, mine, worse, peer)] == [2.0, 0.8, 0.5, 1.0]
    assert [row["vs"]["supported"] for row in (ours, mine, worse, peer)] == [True, True, True, None]
    assert [row["peer"] for row in (ours, mine, worse, peer)] == [False, False, True, True]
    assert all(row["vs"]["best_peer"] for row in (ours, peer))
    assert report.speedup(ours) == "2.00x ±0.2%  "
    assert report.speedup(peer) is None


def test_without_peers_the_first_kernel_is_the_measure():
    first, second = rows_of(Kernel("a", (10.0,)), Kernel("b", (20.0,)))
    assert (first["vs"]["best_peer"], first["vs"]["supported"]) == (False, None)
    assert (second["vs"]["kernel"], second["vs"]["speedup"]) == ("a", 0.5)


def test_a_repetition_bounds_what_can_be_told_apart():
    """A kernel 3% slower than the first, where the first differs from itself by nothing, and by 5%."""
    a, b = Kernel("a", (100.0,)), Kernel("b", (103.0,))
    *_, row = rows_of(a, b)
    assert (row["repeat"], row["vs"]["supported"]) == (0.0, True)
    *_, row = rows_of(a, b, shift=1.05)
    assert (row["repeat"], row["vs"]["supported"]) == (pytest.approx(0.05), False)
    assert report.speedup(row).plain == "0.97x ±0.0% ?"


# Clocks


def test_the_clocks_are_read_while_a_kernel_is_timed():
    low = {
        "sm_mhz": 1200.0,
        "memory_mhz": 2619.0,
        "power_w": 700.0,
        "temperature_c": 80.0,
        "throttle": float(0x4 | 0x1),
    }
    readings = iter([low])
    (row,) = rows_of(Kernel("a", (10.0,)), watched=watch.Watch(lambda: next(readings), interval_s=60))
    assert row["clocks"] == {
        "sm_mhz": [1200.0, 1200.0, 1200.0], "memory_mhz": [2619.0, 2619.0, 2619.0], "power_w": 700.0,
        "temperature_c": 80.0, "throttle": ["power cap"], "readings": 1,
    }  # fmt: skip


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
    (row,) = rows_of(Kernel("a", (10.0,)), watched=asked)
    assert (row["median_us"], row["clocks"]) == (10.0, None)


def test_the_footer_names_what_throttled():
    clocks = {
        "sm_mhz": [1200.0, 1900.0, 1980.0], "memory_mhz": [2619.0] * 3, "power_w": 699.6, "temperature_c": 71.0,
        "throttle": ["power cap"], "readings": 9,
    }  # fmt: skip
    rows = [{"case": "A", "gates": "bench", "clocks": clocks}, {"case": "B", "gates": "bench"}]
    assert report._clocks_line(rows) == (
        "While timing: SM 1200 to 1980 MHz, memory 2619 MHz, up to 700 W and 71 C; "
        "throttled in 1 of 1 cases: power cap."
    )
    assert report._clocks_line([rows[0] | {"clocks": clocks | {"throttle": []}}]).endswith("nothing throttled.")
    assert report._clocks_line([{"case": "B", "gates": "bench"}]) is None
    assert watch.reasons(0x1 | 0x2) == []
    assert watch.reasons(0x8 | 0x40) == ["hardware slowdown", "hardware thermal"]


# Two recordings


def row(kernel="ours", us=100.0, half=0.1, peer=False, **extra):
    return {
        "op": "prefill", "case": "P1", "gates": "bench", "kernel": kernel, "peer": peer, "median_us": us,
        "low_us": us - half, "high_us": us + half, "p10_us": us - half, "p90_us": us + half, "spread_us": 2 * half,
        "samples": 100, "mode": "graph", "cache": "cold", "problem": {"H": 1}, "repeat": 0.0,
    } | extra  # fmt: skip


def record(*rows):
    return {
        "schema": "kda.profile/2", "provenance": {"gpu": {"name": "H100"}, "date": "2026-11-22"}, "rows": list(rows),
        "ceilings": {"copy_gbps": 2440.0, "inplace_gbps": 3020.0, "least_us": 3.7}, "refused": [], "complete": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (row(), row(us=100.5), "same"),
        (row(), row(us=103.0), "slower"),
        (row(), row(us=97.0), "faster"),
        (row(half=3.0), row(us=103.0, half=3.0), "same"),  # the intervals are wide
        (row(repeat=0.05), row(us=103.0), "same"),  # a repetition differed by more
        (row(), {"op": "prefill", "case": "P1", "gates": "bench", "kernel": "ours", "error": "boom"}, "failed"),
        (row(), row(us=103.0, mode="eager"), "incomparable"),
        (row(), row(us=103.0, problem={"H": 2}), "incomparable"),
    ],
)
def test_a_change(before, after, verdict):
    (change,) = baseline.compare(record(before), record(after))
    assert change.verdict == verdict
    assert change.is_regression == (verdict in ("slower", "failed"))


def test_a_regression_ends_with_1_and_a_peers_change_does_not():
    before = record(row(), row("peer", peer=True), row("gone"))
    after = record(row(us=100.2), row("peer", us=150.0, peer=True), row("new"))
    changes = baseline.compare(before, after)
    assert [(c.kernel, c.verdict) for c in changes] == [
        ("ours", "same"), ("peer", "slower"), ("new", "new"), ("gone", "missing")
    ]  # fmt: skip
    baseline.require_no_regression(changes)
    with pytest.raises(CheckFailedError, match="1 of 3 timings regressed: ours at P1 bench"):
        baseline.require_no_regression(
            baseline.compare(before, record(row(us=110.0), row("peer", peer=True), row("gone")))
        )
    with pytest.raises(CheckFailedError, match="no timing of the baseline"):
        baseline.require_no_regression(baseline.compare(before, record(row("other"))))


def test_the_same_code_in_two_runs_is_no_change():
    """P2 of two recordings of one H100, an hour apart: they differ by up to 0.8%."""
    first, second = (
        json.loads((RECORDS / name).read_text()) for name in ("prefill-triton-h100.json", "prefill-p2-fla-h100.json")
    )
    p2 = {r["gates"]: r for r in first["rows"] if r["case"] == "P2"}
    for r in second["rows"]:
        if r["kernel"] == "triton-prefill":
            (change,) = baseline.compare(record(p2[r["gates"]]), record(r | {"case": "P2"}))
            assert change.verdict == "same"
            assert change.noise < 0.02


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[]", "schema is None"),
        ('{"schema": "kda.verify/1", "rows": []}', "schema is kda.verify/1"),
        ('{"schema": "kda.profile/2", "rows": []}', "no rows"),
        ('{"schema": "kda.profile/2", "rows": [{"op": "gate"}]}', "lack a time"),
    ],
)
def test_a_file_that_is_no_recording(text, message, tmp_path):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(InputError, match=message):
        baseline.read(str(tmp_path / "r.json"))
    with pytest.raises(InputError, match="cannot be read"):
        baseline.read(str(tmp_path / "none.json"))


def test_recordings_of_two_gpus_are_not_compared():
    with pytest.raises(InputError, match="H100 and this is a H200"):
        baseline.require_same_gpu({"gpu": {"name": "H100"}}, {"gpu": {"name": "H200"}})
    baseline.require_same_gpu({"gpu": None}, {"gpu": {"name": "H200"}})


def run(*words):
    command.main(list(words), standalone_mode=False)


def test_a_recording_is_shown_and_compared_without_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    source = str(RECORDS / "decode-h100.json")
    whole = json.loads(Path(source).read_text())
    slower = copy.deepcopy(whole)
    for r in slower["rows"]:
        if (r["kernel"], r["case"]) == ("triton-decode", "D:H=96,N=32"):
            for key in ("median_us", "p10_us", "p90_us"):
                r[key] *= 1.05
    (tmp_path / "slower.json").write_text(json.dumps(slower))
    run("--from", source)
    said = capsys.readouterr().out
    assert "D:H=96,N=128" in said
    assert "NVIDIA H100" in said
    run("--from", source, "--baseline", source)
    said = capsys.readouterr().out
    assert f"{len(whole['rows'])} timings: {len(whole['rows'])} same." in said
    assert max(map(len, said.splitlines())) <= 80
    with pytest.raises(CheckFailedError, match="triton-decode at D:H=96,N=32 bench"):
        run("--from", str(tmp_path / "slower.json"), "--baseline", source)
    assert "+5.0%" in capsys.readouterr().out


@pytest.mark.parametrize("words", [("--suite", "decode"), ("-H", "4"), ("--gates", "init"), ("--sweep", "N=1..4")])
def test_a_recording_is_not_timed(words):
    with pytest.raises(InputError, match="--from"):
        run("--from", str(RECORDS / "decode-h100.json"), *words)


def test_many_changes_are_counted():
    rows = [row(f"k{i}") for i in range(50)]
    after = [row(f"k{i}", us=120.0 if i == 7 else 100.0) for i in range(50)]
    changes = baseline.compare(record(*rows), record(*after))
    assert report_baseline.table(changes).row_count == 1
    notes = report_baseline.notes(changes, record(*rows), record(*after))
    assert notes[0].startswith("50 timings: 49 same, 1 slower.")


def test_the_half_width_of_an_old_recording_comes_from_its_spread():
    """Version 1 has percentiles only: for normal samples the estimate is that of the order statistics."""
    samples = normal(3, 100.0, 2.0, 200)
    stats = Statistics.of(samples)
    old = row(us=stats.median_us, p10_us=stats.p10_us, p90_us=stats.p90_us, samples=200)
    del old["low_us"]
    expected = 1.96 * 1.2533 * statistics.stdev(samples) / 200**0.5 / stats.median_us
    assert baseline._half_width(old) == pytest.approx(expected, rel=0.15)


def test_the_clocks_of_the_gpu_in_use(monkeypatch):
    """A stand-in for the NVML of an older driver: asked for the GPU by its UUID; what fails is said in a line."""
    import sys
    import types

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
