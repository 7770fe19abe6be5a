"""What a run of `kda profile` leaves: records, and what is worked out from them."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import rich.console
import torch
from profile_stand_ins import SMALL, Kernel, failed_row, load, method, point, record, row, wanted

from kda_kernels.errors import CheckFailedError, InputError, UnavailableError
from kda_kernels.problem import Gate, Op, Options, Problem
from kdacli.presets import PRESETS
from kdacli.profile.cases.choose import cases_of, narrowing
from kdacli.profile.cases.suites import TimedCase
from kdacli.profile.measuring.all_cases import records
from kdacli.profile.records import baseline, halflife, layer, sweep
from kdacli.profile.records.fit import bumps, fit
from kdacli.profile.records.record import Record, Saver, read, require_complete
from kdacli.profile.records.row import FailedRow, TimedRow, documented, to_json
from kdacli.profile.reporting.tables import layer_tables
from kdacli.synthetic import make_inputs

RECORDS = Path(__file__).parent.parent / "benchmarks"


def test_the_record_grows_case_by_case():
    cases = [TimedCase("A", SMALL, "bench"), TimedCase("B", SMALL, "weak")]
    kernels = [Kernel("ours"), Kernel("old", reason="no GPU")]
    steps = [json.loads(json.dumps(to_json(r))) for r in records(cases, load, kernels, method(), lambda: {"seed": 1})]
    assert [(len(r["rows"]), r["complete"]) for r in steps] == [(1, False), (2, True)]
    last = steps[-1]
    assert last["schema"] == "kda.profile/2"
    assert last["provenance"] == {"seed": 1}
    assert last["ceilings"] == {"copy_gbps": 2440.0, "inplace_gbps": 3020.0, "least_us": 2.0, "tensor_tflops": 800.0}
    assert last["refused"] == [
        {"case": "A", "gates": "bench", "kernel": "old", "reason": "no GPU"},
        {"case": "B", "gates": "weak", "kernel": "old", "reason": "no GPU"},
    ]


def test_a_kernel_asked_for_by_name_that_ran_nowhere():
    *_, whole = records(
        [TimedCase("A", SMALL, "bench")], load, [Kernel("a"), Kernel("b", reason="old")], method(), dict
    )
    require_complete(whole, ["a"])
    with pytest.raises(UnavailableError, match="b cannot run: old"):
        require_complete(whole, ["a", "b"])


@pytest.mark.parametrize("name", ["decode-h100", "prefill-memory-h100", "gate-h100", "prefill-1m-h100"])
def test_a_recording_is_read_whole(name, tmp_path):
    """Every key that the file has is in what is written again, with the same value; older ones gain what they lack."""
    before = json.loads((RECORDS / f"{name}.json").read_text())
    after = json.loads(json.dumps(to_json(read(str(RECORDS / f"{name}.json")))))
    for old, new in zip(before.pop("rows"), after.pop("rows"), strict=True):
        assert old.items() <= new.items()
    for key in before:
        assert before[key] == after[key] or key == "ceilings"


def test_the_tables_of_keys_are_the_fields():
    """benchmarks/README.md says what each key means in the fields' own words."""
    text = (RECORDS / "README.md").read_text()
    for classes in ((Record,), (TimedRow, FailedRow)):
        table = "\n".join(documented(*classes))
        assert table in text, f"put this into benchmarks/README.md:\n{table}"


@pytest.mark.parametrize(("cost", "written"), [(0.0, [0, 3, 6, 8]), (1.0, [0, 8])], ids=["quick", "slow"])
def test_a_growing_record_is_written_now_and_then(cost, written):
    """A case every two seconds: every third record where writing costs nothing, fewer where it takes a second."""
    now, found = [10.0], []

    def write(whole, force):
        found.append((whole["seconds"], force))
        now[0] += cost

    save = Saver(write, False, lambda: now[0])
    for n in range(9):
        save(record(seconds=n, complete=n == 8))
        now[0] += 2.0
    assert found == [(n, n > 0) for n in written]


# Two recordings


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (row(), row(us=100.5), "same"),
        (row(), row(us=103.0), "slower"),
        (row(), row(us=97.0), "faster"),
        (row(half=3.0), row(us=103.0, half=3.0), "same"),  # the intervals are wide
        (row(repeat=0.05), row(us=103.0), "same"),  # a repetition differed by more
        (row(), failed_row(), "failed"),
        (row(), row(us=103.0, mode="eager"), "incomparable"),
        (row(), row(us=103.0, problem=dataclasses.replace(SMALL, H=2, HV=2)), "incomparable"),
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
    first, second = (read(str(RECORDS / name)) for name in ("prefill-triton-h100.json", "prefill-p2-fla-h100.json"))
    p2 = {r.gates: r for r in first.rows if r.case == "P2"}
    for r in second.rows:
        if r.kernel == "triton-prefill":
            (change,) = baseline.compare(record(p2[r.gates]), record(dataclasses.replace(r, case="P2")))
            assert change.verdict == "same"
            assert change.noise < 0.02


TORN = json.dumps(to_json(record())).replace('"rows": []', '"rows": [ROW]')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[]", "schema is None"),
        ('{"schema": "kda.verify/1", "rows": []}', "schema is kda.verify/1"),
        ('{"schema": "kda.profile/2", "rows": []}', "no rows"),
        (TORN.replace("ROW", '{"op": "gate", "error": "x"}'), r"rows\[0\] lacks case"),
        (TORN.replace("ROW", "7"), r"rows\[0\] is 7: it should be an object"),
        (
            TORN.replace("ROW", json.dumps(to_json(row()) | {"median_us": "1"})),
            "median_us is 1: it should be a finite number",
        ),
        (TORN.replace("ROW", json.dumps(to_json(row()) | {"median_us": -1})), "is -1.0: it should be a time"),
        (TORN.replace("ROW", json.dumps(to_json(row()) | {"problem": {"op": "x"}})), "not a problem"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_a_file_that_is_no_recording(text, message, tmp_path):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read(str(tmp_path / "r.json"))
    with pytest.raises(InputError, match="cannot be read"):
        read(str(tmp_path / "none.json"))


def test_recordings_of_two_gpus_are_not_compared():
    with pytest.raises(InputError, match="H100 and this is a H200"):
        baseline.require_same_gpu({"gpu": {"name": "H100"}}, {"gpu": {"name": "H200"}})
    baseline.require_same_gpu({"gpu": None}, {"gpu": {"name": "H200"}})


# Sweeps


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


def curve(factor=1.0, bump_at=0):
    """3 us + half a microsecond a sequence, but for a bump."""

    def us(inputs):
        n = inputs.q.shape[0]
        return factor * (3.0 + 0.5 * n) * (1.1 if n == bump_at else 1.0)

    return us


def swept(*kernels):
    words = ("--op", "decode", "--head-dim", "16", "--sweep", "N=1..20:1", "--sweep", "H=1")
    cases, _ = cases_of(wanted(*words))
    *_, whole = records(cases, narrowing(cases, load), kernels, method(samples=5, swept=True), dict)
    return whole


def test_a_whole_sweep():
    kernels = [Kernel("ours", curve(bump_at=17), op=Op.DECODE), Kernel("peer", curve(2.0), ours=False, op=Op.DECODE)]
    whole = swept(*kernels)
    ours, peer = sweep.series(whole.rows)
    assert (ours.kernel, ours.axis, ours.x) == ("ours", "N", list(range(1, 21)))
    assert peer.line().slope == pytest.approx(1.0)
    assert [bump.x for bump in ours.bumps()] == [17]
    assert ours.slowest() == (pytest.approx(2 / 1.1), 17)
    assert peer.slowest() is None
    again = [row.point["N"] for row in whole.rows if row.rechecked and row.kernel == "ours"]
    assert again == [16, 17, 18]
    assert [row.kernel for row in whole.rows] == ["ours", "peer"] * 20  # rechecking keeps the order
    assert whole.sweep[0].bumps[0].x == 17
    assert {row.host_new_us for row in whole.rows} == {None}
    with pytest.raises(CheckFailedError, match=r"ours N=17 .* by 10.0%"):
        sweep.require_smooth(whole.rows, 0.05)
    sweep.require_smooth(whole.rows, 0.11)


def test_a_peers_bump_is_its_own():
    rows = [point("peer", n, (3.0 + n) * (1.2 if n == 3 else 1.0), peer=True) for n in range(1, 6)]
    assert [bump.x for bump in sweep.series(rows)[0].bumps()] == [3]
    assert sweep.sticking_out(rows) == set()
    sweep.require_smooth(rows, 0.05)
    rows = [dataclasses.replace(row, peer=False) for row in rows]
    assert sweep.sticking_out(rows) == {(f"N={n}", "bench") for n in (2, 3, 4)}


@pytest.mark.parametrize(
    ("op", "axis", "lens", "state", "shape"),
    [
        ("decode", "N", (1,), "float32", "H=96"),
        ("decode", "N", (1,), "bfloat16", "H=96 bf16 state"),
        ("decode", "H", (1,) * 8, "float32", "N=8"),
        ("prefill", "T", (1024,), "float32", "H=96"),
        ("prefill", "H", (1024,), "float32", "T=1024"),
        ("prefill", "T", (64, 64), "float32", "N=2 H=96"),
    ],
)
def test_a_series_says_what_its_points_have_in_common(op, axis, lens, state, shape):
    problem = Problem(op, lens, 96, 96, state_dtype=state)
    assert sweep.Series("k", op, "bench", (), axis, (row(problem=problem),)).shape == shape


# Half-lives of gates


def gates(half_life, tokens=100, heads=2, K=8):
    """Activated gates whose channels all have this half-life, but jitter from token to token."""
    problem = Problem(Op.PREFILL, (tokens,), heads, heads, K=K, V=8, g_dtype="float32", options=Options(gate=Gate.NONE))
    inputs = make_inputs(problem)
    mean = -math.log(2) / half_life
    jitter = torch.tensor([0.5, 1.5]).repeat(tokens // 2)[None, :, None, None]
    return dataclasses.replace(inputs, g=torch.full_like(inputs.g, mean) * jitter)


@pytest.mark.parametrize(("half_life", "at"), [(0.4, 0), (2.0, 1), (10.0, 2), (700.0, 5), (1e6, 8)])
def test_the_half_life_of_a_channel(half_life, at):
    found = halflife.half_lives(gates(half_life))
    assert found.p50 == pytest.approx(half_life, rel=1e-4)
    assert found.counts == [16 if i == at else 0 for i in range(9)]
    assert found.tokens == 100


def test_half_lives_differ_by_channel_and_come_from_raw_gates():
    """Half of the channels forget in a token (dt_bias large), the others remember (dt_bias small)."""
    options = Options(gate=Gate.SAFE, lower_bound=-5.0)
    inputs = make_inputs(Problem(Op.PREFILL, (32,), 1, 1, K=8, V=8, options=options))
    bias = torch.tensor([20.0, -12.0]).repeat(4)
    inputs = dataclasses.replace(inputs, g=torch.zeros_like(inputs.g), A_log=torch.zeros(1), dt_bias=bias)
    found = halflife.half_lives(inputs)
    assert found.p10 == pytest.approx(math.log(2) / 5, rel=1e-3)
    assert found.p90 == pytest.approx(math.log(2) * math.exp(12) / 5, rel=1e-3)
    text = halflife.lines(found)
    assert "< 1   50%  ████" in text[1]
    assert ">= 16384   50%  ████" in text[-1]
    assert text[0].endswith("median 22563, 10th to 90th percentile 0.139 to 22563 (from 32 tokens).")
    assert max(map(len, text[1:])) <= 80


def test_gates_that_never_forget():
    inputs = gates(1.0)
    found = halflife.half_lives(dataclasses.replace(inputs, g=torch.zeros_like(inputs.g)))
    assert found.p50 == math.inf
    assert found.counts[-1] == 16


# Layers


def test_the_cost_of_a_models_layers():
    """69 layers of 100 us and 8192 tokens: 6.9 ms, 1187 tokens a ms."""
    one = row("k", gates="init", low_us=99.0, high_us=102.0, problem=dataclasses.replace(SMALL, seq_lens=(8192,)))
    found = layer.costs("kimi-k3", 8, [one, failed_row()])
    assert found.kda_layers == PRESETS["kimi-k3"].kda_layers == 69
    (cost,) = found.rows
    assert (cost.ms, cost.low_ms, cost.high_ms) == pytest.approx((6.9, 6.831, 7.038))
    assert cost.tokens_per_ms == pytest.approx(8192 / 6.9)


def test_what_the_fusion_of_a_step_saves():
    """Of the kernels of the same batch, and of no other op."""
    step = dataclasses.replace(SMALL, op=Op.STEP, seq_lens=(1, 1), packed=False)
    rows = [row("cute-step", us=10.0, op="step", problem=step), row("sglang-chain", us=14.0, op="step", problem=step)]
    fused, chain, other = layer.costs("kimi-k3", 8, [*rows, row("k")]).rows
    assert fused.saved_ms == pytest.approx(69 * 4e-3)
    assert chain.saved_ms is None and other.saved_ms is None
    (table,) = layer_tables(layer.LayerCosts("kimi-k3", 8, 69, 93, [fused, chain]))
    narrow = rich.console.Console(width=80)
    with narrow.capture() as shown:
        narrow.print(table)
    assert "sglang-chain" in shown.get() and "saved ms" in shown.get(), "on a terminal of 80 columns nothing is cut"
