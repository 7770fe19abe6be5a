"""Sweeps of `kda profile`: what the flag means, lines and bumps against known curves, and the tables."""

import dataclasses
import functools
import io
import itertools

import pytest
import torch

from kda_kernels.errors import CheckFailedError, InputError
from kda_kernels.problem import Op
from kdacli.commands.profile import command
from kdacli.profile import axes, report_sweep, sweep
from kdacli.profile.cases import _sweep_cases, cases_from, narrowing
from kdacli.profile.ceilings import Ceilings
from kdacli.profile.fit import bumps, fit
from kdacli.profile.measure import Method
from kdacli.profile.record import records, require_smooth
from kdacli.profile.timing import Budget
from kdacli.synthetic import make_inputs


def parsed(*words):
    return command.make_context("profile", list(words)).params


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("T=1k..16k", (1024, 2048, 4096, 8192, 16384)),
        ("N=1..6:1", (1, 2, 3, 4, 5, 6)),
        ("N=1..10:4", (1, 5, 9, 10)),
        ("N=1..100:x10", (1, 10, 100)),
        ("N=3..20", (3, 6, 12, 20)),
        ("H=96,12,24,12", (12, 24, 96)),
        ("N=7", (7,)),
        ("N=5..5", (5,)),
    ],
)
def test_an_axis(text, values):
    assert axes.parse(text) == axes.Axis(text[0], values)


@pytest.mark.parametrize(
    "text", ["", "N", "K=1..2", "N=", "N=2..1", "N=1..", "N=1..4:x1", "N=1..4:0", "N=0..4", "N=1,,2", "N=1..4:y", "T=a"]
)
def test_an_axis_that_is_none(text):
    with pytest.raises(InputError, match="--sweep is"):
        axes.parse(text)


def test_the_first_axis_runs_fastest():
    points = axes.points([axes.parse("N=1,2"), axes.parse("H=4,8")])
    assert points == [{"N": 1, "H": 4}, {"N": 2, "H": 4}, {"N": 1, "H": 8}, {"N": 2, "H": 8}]
    with pytest.raises(InputError, match="each axis once"):
        axes.points([axes.parse("N=1,2"), axes.parse("N=3")])
    with pytest.raises(InputError, match="at most"):
        axes.points([axes.parse("T=1..6000:1")])


def test_cases_of_a_sweep():
    cases, _ = cases_from(parsed("--op", "decode", "--sweep", "N=1..4", "--sweep", "H=2,4", "--gates", "weak"))
    assert [c.point for c in cases[:3]] == [(("N", 1), ("H", 2)), (("N", 2), ("H", 2)), (("N", 4), ("H", 2))]
    assert [(c.problem.N, c.problem.H) for c in cases] == [(1, 2), (2, 2), (4, 2), (1, 4), (2, 4), (4, 4)]
    assert {c.problem.pool_slots for c in cases} == {8}  # one pool for all: twice the most sequences
    assert {c.gates for c in cases} == {"weak"}
    assert len({c.label for c in cases}) == len(cases)
    cases, _ = cases_from(parsed("--sweep", "T=64..256", "-H", "2"))
    assert [(c.problem.op, c.problem.T) for c in cases] == [(Op.PREFILL, 64), (Op.PREFILL, 128), (Op.PREFILL, 256)]


@pytest.mark.parametrize(
    "words",
    [
        ("--sweep", "N=1..4", "-N", "3"),
        ("--sweep", "N=1..4", "--lens", "1,1"),
        ("--sweep", "H=1..4", "--model", "kimi-k3"),
        ("--sweep", "N=1..4", "--suite", "decode"),
        ("--sweep", "N=1..4", "--sweep", "N=8"),
        ("--bump", "5"),
        ("--layer", "kimi-k3", "-H", "4"),
        ("--layer", "kimi-k3", "--op", "gate"),
        ("--layer", "kimi-k3", "--tp", "7"),
        ("--layer", "kimi-k3", "--sweep", "N=1..4"),
    ],
)
def test_contradictions_are_named(words):
    with pytest.raises(InputError):
        command.main(list(words), standalone_mode=False)


def test_smaller_batches_are_the_first_rows_of_the_largest():
    """As if each had been made for itself, but with the larger pool: same rows, and every slot used is filled."""
    cases = _sweep_cases(parsed("--op", "decode", "--sweep", "N=1..4", "-H", "1", "--head-dim", "16"), ("bench",))
    made = []

    def load(case):
        made.append(case.problem.N)
        return make_inputs(case.problem, gates=case.gates)

    narrowed = narrowing(cases, load)
    whole = load(cases[-1])
    made.clear()
    for case in cases:
        inputs, n = narrowed(case), case.problem.N
        assert inputs.q.shape[0] == inputs.state_indices.shape[0] == n
        assert torch.equal(inputs.v, whole.v[:n])
        assert inputs.state.shape[0] == case.problem.pool_slots
        assert not inputs.state[inputs.state_indices.long()].isnan().any()
    assert made == [4]
    packed = [dataclasses.replace(c, problem=dataclasses.replace(c.problem, packed=True)) for c in cases]
    assert narrowing(packed, load)(packed[0]).q.shape[:2] == (1, 1)


def test_a_line_is_found_again():
    """Exactly for exact points; for small and large points alike when they are off by the same percentage."""
    x = [1, 2, 4, 1000, 100_000]
    line = fit(x, [5.0 + 0.25 * v for v in x])
    assert (line.slope, line.intercept) == (pytest.approx(0.25), pytest.approx(5.0))
    assert abs(line.worst) < 1e-9
    y = [(5.0 + 0.25 * v) * (1.02 if i == 3 else 1) for i, v in enumerate(x)]
    line = fit(x, y)
    assert line.worst_x == 1000
    assert 0.005 < line.worst < 0.02
    assert line.slope == pytest.approx(0.25, abs=5 * line.slope_error)
    assert fit([1, 2], [3.0, 4.0]) is None


def test_bumps_over_the_line_through_the_neighbours():
    x = list(range(1, 10))
    y = [2.0 + v for v in x]
    y[4] *= 1.06
    low, high = [0.99 * v for v in y], [1.01 * v for v in y]
    (bump,) = bumps(x, y, low, high, 0.05)
    assert (bump.x, bump.over) == (5, pytest.approx(0.06))
    assert bump.least == pytest.approx(0.99 * 1.06 / 1.01 - 1)
    assert not bumps(x, y, low, high, 0.07)
    assert not bumps([1, 2, 4, 8], [2.0 + v for v in (1, 2, 4, 8)], [0] * 4, [9e9] * 4, 0.0)  # uneven steps, a line
    y[0] *= 9  # an end has one neighbour
    assert [b.x for b in bumps(x, y, low, high, 0.05)] == [5]


@dataclasses.dataclass(frozen=True)
class Curve:
    """A kernel whose time is 3 us + half a microsecond a sequence, but for a bump."""

    name: str
    factor: float = 1.0
    bump_at: int = 0
    ours: bool = True
    backend: str = "fake"
    op: Op = Op.DECODE

    def unsupported(self, problem):
        return None

    def run(self, inputs):
        n = inputs.q.shape[0]
        return self.factor * (3.0 + 0.5 * n) * (1.1 if n == self.bump_at else 1.0)


class Timer:
    cold = True

    def prepare(self, fn):
        us = fn()

        class Timed:
            mode, note, host_us, call_bytes = "graph", None, 1.0, 0
            times = itertools.repeat(us)

            def sample(self):
                return next(self.times)

        return Timed()


@functools.cache
def swept(*kernels, heads="1"):
    words = ("--op", "decode", "--head-dim", "16", "--sweep", "N=1..40:1", "--sweep", f"H={heads}")
    cases, _ = cases_from(parsed(*words))
    method = Method(Timer(), Ceilings(2440.0, 3020.0, 2.0, 800.0), Budget(0, 5, 5), repeat=False)
    load = narrowing(cases, lambda case: make_inputs(case.problem, gates=case.gates))
    *_, record = records(cases, load, kernels, method, lambda: {"gpu": None})
    return record


def test_a_whole_sweep():
    record = swept(Curve("ours", bump_at=17), Curve("peer", 2.0, ours=False))
    ours, peer = sweep.series(record["rows"])
    assert (ours.kernel, ours.axis, ours.x) == ("ours", "N", list(range(1, 41)))
    assert peer.line().slope == pytest.approx(1.0)
    assert [bump.x for bump in ours.bumps()] == [17]
    assert ours.slowest()["point"] == {"N": 17, "H": 1}
    assert ours.slowest()["vs"]["speedup"] == pytest.approx(2 / 1.1)
    assert peer.slowest() is None
    again = [row["point"]["N"] for row in record["rows"] if row.get("rechecked") and row["kernel"] == "ours"]
    assert again == [16, 17, 18]
    assert [row["kernel"] for row in record["rows"]] == ["ours", "peer"] * 40  # rechecking keeps the order
    assert record["sweep"][0]["bumps"][0]["x"] == 17
    with pytest.raises(CheckFailedError, match=r"ours N=17 .* by 10.0%"):
        require_smooth(record, 0.05)
    require_smooth(record, 0.11)


def test_a_series_says_what_its_points_have_in_common():
    def shape(op, axis, lens, state="float32"):
        row = {"problem": {"seq_lens": lens, "H": 96, "state_dtype": state}}
        return sweep.Series("k", op, "bench", (), axis, (row,)).shape

    assert shape("decode", "N", [1]) == "H=96"
    assert shape("decode", "N", [1], "bfloat16") == "H=96 bf16 state"
    assert shape("decode", "H", [1] * 8) == "N=8"
    assert shape("prefill", "T", [1024]) == "H=96"
    assert shape("prefill", "H", [1024]) == "T=1024"
    assert shape("prefill", "T", [64, 64]) == "N=2 H=96"


def test_a_peers_bump_is_its_own():
    record = swept(Curve("ours"), Curve("peer", bump_at=17, ours=False))
    assert not any(row.get("rechecked") for row in record["rows"])
    require_smooth(record, 0.05)


@pytest.mark.parametrize("columns", ["80", "100", "160"])
def test_the_tables_fit(columns, monkeypatch):
    from kdacli.output import console

    monkeypatch.setenv("COLUMNS", columns)
    kernels = [Curve("ours-decode", bump_at=17)] + [Curve(f"some-peer-{i}", 1 + i, ours=False) for i in range(6)]
    record = swept(*kernels, heads="1,2")
    out, missing = console(), []
    out.file = io.StringIO()
    for table, left_out in report_sweep.tables(record["rows"]):
        out.print(table)
        missing += left_out
    text = out.file.getvalue()
    assert max(map(len, text.splitlines())) <= int(columns)
    assert [line.split()[0] for line in text.splitlines() if line.strip()].count("17") == 2  # a bump is always shown
    assert "decode H=2, bench gates" in text
    assert bool(missing) == (columns != "160")
    notes = report_sweep.notes(record["rows"])
    assert notes[0] == "ours-decode H=1 bench at N=17 is 10.0% over the line through its neighbours"


def test_many_bumps_are_cut_short_and_counted():
    """Every other point sticks out of the two beside it; a peer's do not fill the screen."""
    rows = [
        row | {key: row[key] * 1.2 for key in ("median_us", "low_us", "high_us")} if row["point"]["N"] % 2 else row
        for row in swept(Curve("ours"), Curve("peer", ours=False))["rows"]
    ]
    notes = report_sweep.notes(rows)
    assert len(notes) == report_sweep.MOST_POINTS + 2
    assert notes[-2] == "and 3 more points: they are in --json, under sweep"  # 19 of the odd ones have two neighbours
    assert not any("peer" in note for note in notes[:-1])


def test_points_are_spread_evenly():
    assert report_sweep.spaced([1, 2, 3]) == [1, 2, 3]
    shown = report_sweep.spaced(list(range(1, 257)), {100})
    assert len(shown) <= report_sweep.MOST_POINTS + 1
    assert {1, 100, 256} <= set(shown)
    assert shown == sorted(shown)
