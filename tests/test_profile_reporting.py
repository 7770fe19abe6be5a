"""What `kda profile` prints and draws."""

import dataclasses
import sys

import pytest
from profile_stand_ins import CEILINGS, SMALL, Kernel, Timer, failed_row, load, method, point, record, rendered, row

from kda_kernels.errors import InputError, UnavailableError
from kdacli import plots
from kdacli.profile.cases.suites import TimedCase
from kdacli.profile.measuring.all_cases import records
from kdacli.profile.records import baseline, layer
from kdacli.profile.records.row import Clocks, Refusal, Stage, Versus
from kdacli.profile.records.sweep import series
from kdacli.profile.reporting import baseline as baseline_report
from kdacli.profile.reporting import plot, tables
from kdacli.profile.reporting import sweep as sweep_report
from kdacli.profile.reporting.columns import fitting


def test_tables_fit_and_compare_with_the_first_kernel(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    names = {"triton-gate": 40.0, "triton-gate-unfused": 93.4, "fla-gate": 1234.5}
    kernels = [Kernel(name, (us,)) for name, us in names.items()] + [Kernel("bad", error="boom")]
    cases = [TimedCase("D:H=96,N=128", SMALL, "bench"), TimedCase("P1", SMALL, "weak")]
    *_, found = records(cases, load, kernels, method(Timer(note="no CUDA graph: x", mode="eager")), dict)
    text = rendered(tables.tables(found.rows))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert sum("triton-gate-unfused" in line for line in lines) == 4  # in both tables, and no row was folded
    assert "0.43x" in text  # 40 / 93.4: as fast as
    assert "0.03x" in text
    assert text.count("failed") == 2
    notes = tables.notes(found.rows, [Refusal("c", "g", "k", "no GPU")] * 2)
    assert "bad failed at P1 weak: RuntimeError: boom" in notes
    assert notes.count("k cannot run: no GPU") == 1
    assert notes.count("triton-gate is timed eagerly: no CUDA graph: x") == 1


def test_both_host_times_are_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    one = row(host_us=9.25, host_new_us=64.75)
    text = rendered(tables.tables([one, row("old")]))
    assert "host us   host new" in text and "9.25       64.8" in text
    text = rendered(tables.tables([one, dataclasses.replace(one, gates="weak", host_new_us=71.0)]))
    assert "9.25       71.0" in text  # of several regimes the worst
    assert "host new" not in rendered(tables.tables([row()]))


def test_wrong_outputs_are_marked():
    text = rendered(tables.tables([row("honest"), failed_row("cheat", output_error=1.4), failed_row("bad")]))
    marks = {line.split()[-2 if line.split()[0] == "P1" else 0]: line for line in text.splitlines() if line.strip()}
    assert "wrong" in marks["cheat"] and "failed" in marks["bad"]
    for regimes in (("bench", "weak"),):
        rows = [failed_row("cheat", gates=gates, output_error=1.4) for gates in regimes]
        assert rendered(tables.tables(rows)).count("wrong") == 2


@pytest.mark.parametrize(
    ("vs", "text"),
    [
        (Versus("peer", True, 2.0, 1.99, 2.01, True), "2.00x ±0.5%  "),
        (Versus("peer", True, 0.97, 0.97, 0.97, False), "0.97x ±0.0% ?"),
        (Versus("peer", True, 1.0, 1.0, 1.0, None), None),
        (None, None),
    ],
)
def test_a_speedup_says_what_the_noise_supports(vs, text):
    shown = tables.speedup(row(vs=vs))
    assert getattr(shown, "plain", shown) == text


def test_the_footer_says_how():
    gpu = {"name": "H100", "driver": "580", "sm_clock_mhz": 1980.0, "sm_clock_max_mhz": 1980.0}
    text = "\n".join(tables.footer(record(row(samples=20), row(samples=99), provenance={"gpu": gpu})))
    for part in ("H100", "SM 1980 of 1980 MHz", "2440 GB/s", "3020 GB/s", "20 to 99 samples", "cold"):
        assert part in text


def test_the_footer_names_what_throttled():
    def line(*rows):
        return next((line for line in tables.footer(record(*rows)) if line.startswith("While timing")), None)

    clocks = Clocks([1200.0, 1900.0, 1980.0], [2619.0] * 3, 699.6, 71.0, ["power cap"], 9)
    assert line(row(clocks=clocks), row(case="B")) == (
        "While timing: SM 1200 to 1980 MHz, memory 2619 MHz, up to 700 W and 71 C; "
        "throttled in 1 of 1 cases: power cap."
    )
    assert line(row(clocks=dataclasses.replace(clocks, throttle=[]))).endswith("nothing throttled.")
    assert line(row()) is None


def test_stage_tables_fit():
    stages = [Stage("chain", "void " + "template<x>" * 40, 1.0, 30.0)]
    text = rendered(tables.stage_tables([row(stages=stages), row(stages=[])]))
    assert max(map(len, text.splitlines())) <= 100
    assert "100%" in text


def test_layer_tables():
    costs = layer.costs("kimi-k3", 8, [row("k", low_us=99.0, high_us=102.0)])
    text = " ".join(rendered(tables.layer_tables(costs)).split())
    assert "kimi-k3, TP 8, 69 KDA layers, prefill of 64 tokens" in text
    assert "100 6.900 0.103" in text  # us per layer, ms, half their interval


@pytest.mark.parametrize(("columns", "kept"), [("200", 4), ("100", 3), ("80", 2), ("30", 2)])
def test_columns_of_less_worth_go_first(columns, kept, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    names = ("kernel", "us", "x" * 70, "y" * 30)
    table, left_out = fitting("t", names, [["triton-decode", "1.0", "2", "3"]], ("y" * 30, "x" * 70))
    assert len(table.columns) == kept
    assert left_out == ["y" * 30, "x" * 70][: 4 - kept]


def test_columns_with_nothing_in_them_are_left_out(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    table, left_out = fitting("t", ("kernel", "a", "b"), [["k", None, "-"], ["l", "-", "1"]], ("a", "b"))
    assert ([column.header.plain for column in table.columns], left_out) == (["kernel", "b"], [])


def test_many_changes_are_counted():
    rows = [row(f"k{i}") for i in range(50)]
    after = [row(f"k{i}", us=120.0 if i == 7 else 100.0) for i in range(50)]
    changes = baseline.compare(record(*rows), record(*after))
    assert baseline_report.table(changes).row_count == 1
    notes = baseline_report.notes(changes, record(*rows), record(*after))
    assert notes[0].startswith("50 timings: 49 same, 1 slower.")


# Sweeps


@pytest.mark.parametrize("columns", ["80", "100", "160"])
def test_the_tables_of_a_sweep_fit(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    rows = []
    for i, name in enumerate(["ours-decode", *(f"some-peer-{i}" for i in range(6))]):
        for n in range(1, 41):
            us = (1 + i) * (3.0 + 0.5 * n) * (1.1 if (i, n) == (0, 17) else 1.0)
            vs = Versus("some-peer-0", True, 2.0, 1.9, 2.1, True)
            rows.append(point(name, n, us, half=0.001, peer=i > 0, vs=vs))
    found = list(sweep_report.tables(rows))
    text = rendered(found)
    assert max(map(len, text.splitlines())) <= int(columns)
    assert [line.split()[0] for line in text.splitlines() if line.strip()].count("17") == 1  # a bump is always shown
    assert "decode H=2, bench gates" in text
    assert any(left_out for _, left_out in found) == (columns != "160")
    notes = sweep_report.notes(rows)
    assert notes[0] == "ours-decode H=2 bench at N=17 is 10.0% over the line through its neighbours"


def test_many_bumps_are_cut_short_and_counted():
    """Every other point sticks out of the two beside it; a peer's do not fill the screen."""
    rows = [
        point(name, n, (3.0 + n) * (1.2 if n % 2 else 1.0), half=0.001, peer=name == "peer")
        for name in ("ours", "peer")
        for n in range(1, 41)
    ]
    notes = sweep_report.notes(rows)
    assert len(notes) == sweep_report.MOST_POINTS + 2
    assert notes[-2] == "and 3 more points: they are in --json, under sweep"  # 19 of the odd ones have two neighbours
    assert not any("peer" in note for note in notes[:-1])


def test_points_are_spread_evenly():
    assert sweep_report.spaced([1, 2, 3]) == [1, 2, 3]
    shown = sweep_report.spaced(list(range(1, 257)), {100})
    assert len(shown) <= sweep_report.MOST_POINTS + 1
    assert {1, 100, 256} <= set(shown)
    assert shown == sorted(shown)


# Plots


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_sweep_is_drawn(suffix, tmp_path):
    pytest.importorskip("matplotlib")
    path = str(tmp_path / f"p.{suffix}")
    plots.require(path)
    plot.draw(record(*(point(k, n, n + 3.0) for k in ("ours", "peer") for n in (1, 2, 4))), path)
    head = (tmp_path / f"p.{suffix}").read_bytes()
    assert head.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix])


def test_curves_and_the_floor_are_in_the_picture():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    found = series([point(k, n, n + 3.0) for k in ("ours", "peer") for n in (1, 2, 4)])
    panel = figure.subplots()
    plot.against(panel, found)
    assert [line.get_label() for line in panel.lines] == ["ours", "peer", "floor: bytes at the ceiling"]
    assert list(panel.lines[1].get_xdata()) == [1, 2, 4]
    assert list(panel.lines[1].get_ydata()) == [4.0, 5.0, 7.0]


def test_a_roofline():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    panel = figure.subplots()
    plot.roofline(panel, [point("ours", 1, 10.0)], CEILINGS)
    ((x, y),) = panel.collections[0].get_offsets()
    assert (x, y) == (pytest.approx(0.5e12 * 10e-6 / 1e6), 0.5)  # operations in 10 us, over the bytes
    roof = panel.lines[0]
    assert roof.get_ydata()[0] == pytest.approx(roof.get_xdata()[0] * 2.440)
    assert list(roof.get_ydata()[1:]) == [800.0, 800.0]  # flat from the ridge on
    assert roof.get_xdata()[1] == pytest.approx(800.0 / 2.440)
    with pytest.raises(InputError, match="no operations"):
        plot.roofline(panel, [point("gate", 1, 10.0, tflops=None)], CEILINGS)


def test_a_picture_that_cannot_be(monkeypatch):
    with pytest.raises(InputError, match="should end in"):
        plots.require("x.gif")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnavailableError, match=r"pip install matplotlib, or kdacli\[plot\]"):
        plots.require("x.png")
