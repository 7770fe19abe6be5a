"""What a failure says: the smallest case, what it looks like, where it is, and files that others open."""

import dataclasses
import json

import pytest
import torch
from click.testing import CliRunner

from kda_kernels import registry
from kda_kernels.problem import Op
from kda_kernels.tensors import Outputs
from kdacli import dumps
from kdacli.judge import Reference, expect, judge
from kdacli.main import cli
from kdacli.verify.cases import spec
from kdacli.verify.checks.check import Bench, check
from kdacli.verify.failures.diagnose import diagnose
from kdacli.verify.failures.error_map import error_map
from kdacli.verify.failures.shrink import shrink, steps
from tests.mutants.score import MUTANTS


@pytest.fixture
def mutant(monkeypatch):
    """Registers a mutant for one test, by name."""

    def add(name: str) -> registry.Kernel:
        kernel = MUTANTS[name].kernel()
        monkeypatch.setitem(registry._KERNELS, name, kernel)
        return kernel

    return add


def kda(*args: str):
    return CliRunner(env={"COLUMNS": "100"}).invoke(cli, ["verify", "--device", "cpu", *args])


def looks_like(name: str, word: str) -> list[str]:
    kernel, bench = MUTANTS[name].kernel(), Bench.of_case(spec.parse(word), 0, "cpu")
    result = check(kernel, bench)
    assert result.status == "fail"
    return diagnose(bench.inputs, result.outputs, bench.problem.op, result.verdicts)


# --- what it looks like


@pytest.mark.parametrize(
    ("name", "word", "said"),
    [
        ("decode-bias-dropped", "decode-any/lens=3,2", "dt_bias was dropped"),
        ("gate-rate-dropped", "gate-any", "A_log was dropped"),
        ("decode-sigmoid-missing", "decode-any/lens=3", "beta had no sigmoid"),
        ("decode-eigval-ignored", "decode-any/lens=3/neg_eigval=yes", "factor 2 of allow_neg_eigval"),
        ("prefill-power-of-two", "prefill-any", "a power of 2"),
        ("decode-bound-ignored", "decode-any/lens=3", "other activation"),
        ("decode-norm-missing", "decode-any/lens=1", "not normalised"),
        ("decode-scale-ignored", "decode-any/lens=3/scale=0.5", "o: it is 0.353"),
        ("decode-groups-interleaved", "decode-any/lens=3/H=2/HV=4", "query head h % H"),
        ("prefill-state-ignored", "prefill-any/lens=9/gates=weak", "incoming state was taken as zero"),
        ("decode-state-read-transposed", "decode-any/lens=3", "read transposed"),
        ("decode-state-written-transposed", "decode-any/lens=3", "final_state: it is transposed"),
        ("decode-state-not-written", "decode-any/pool=3", "final_state: it is the state that came in"),
        ("decode-indices-ignored", "decode-any/lens=1,1/pool=2", "sequence n took slot n"),
        ("prefill-q-contiguous", "prefill-any/H=2/HV=2/transforms=packed-projection", "q was read as if contiguous"),
        ("decode-off-by-one-token", "decode-any/lens=5", "gate of the one before"),
        ("step-taps-reversed", "step-any/lens=3/pool=2", "taps were read the other way round"),
        ("step-window-of-zeros", "step-any/lens=2/pool=2", "started from zeros"),
        ("step-not-shifted", "step-any/lens=2/pool=2", "conv_states: they are as they came in"),
        ("step-norm-weight-forgotten", "step-any/lens=3/pool=2", "the norm's weight was dropped"),
        ("decode-epsilon-missing", "decode-any/lens=9/transforms=zero-keys", "NaN or Inf from sequence 0, token 1"),
    ],
)
def test_usual_mistakes_are_named(name, word, said):
    found = looks_like(name, word)
    assert any(said in line for line in found), found


def test_nothing_is_named_that_does_not_fit():
    assert looks_like("prefill-tail-decays", "prefill-any/lens=70/gates=weak") == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda o: o.roll(1, 1), "each token holds the result of the one before: off by one"),
        (lambda o: o.roll(-1, 1), "each token holds the result of the next: off by one"),
        (lambda o: o.flip(2), "its heads are permuted: they hold those of [2, 1, 0]"),
        (lambda o: o * 2, "it is 2 times what it should be"),
        (lambda o: o * 0, "it is all zeros"),
    ],
)
def test_numbers_alone_say_a_lot(change, said):
    bench = Bench.of_case(spec.parse("prefill-any/lens=30/H=3/HV=3"), 0, "cpu")
    good = registry.get("torch-prefill").run(bench.inputs)
    bad = dataclasses.replace(good, o=change(good.o))
    verdicts = judge(Reference(bench.inputs, Op.PREFILL), bad)
    assert f"o: {said}" in diagnose(bench.inputs, bad, Op.PREFILL, verdicts)
    assert diagnose(bench.inputs, good, Op.PREFILL, judge(Reference(bench.inputs, Op.PREFILL), good)) == []


# --- where it is


def test_the_map_shows_the_place():
    bench = Bench.of_case(spec.parse("prefill-any/lens=5,70/H=2/HV=2"), 0, "cpu")
    exact = expect(bench.inputs, Op.PREFILL)
    o = exact.o.clone()
    o[0, 5 + 66, 1, 7] = torch.nan
    o[0, 5 + 2, 0] += 100
    verdict, _ = judge(bench.reference, Outputs(o, exact.final_state))
    title, first, second = error_map(bench.inputs, "o", o, exact.o, verdict)
    assert title == "o, sequence 1: 2 heads down, 70 tokens across"
    line = first.split()[-1]
    assert line.count("|") == 1 and line[1] == "#" and line.replace("|", "")[2:].strip(".") == ""
    assert "N" in second.split("|")[1] and "N" not in second.split("|")[0]


def test_the_map_of_a_state_shows_its_worst_head():
    bench = Bench.of_case(spec.parse("prefill-any/lens=5/H=2/HV=2/K=16/V=8"), 0, "cpu")
    exact = expect(bench.inputs, Op.PREFILL)
    state = exact.final_state.clone()
    state[0, 1, 3, 12] += 1
    _, verdict = judge(bench.reference, Outputs(exact.o, state))
    title, *rows = error_map(bench.inputs, "final_state", state, exact.final_state, verdict)
    assert title == "final_state, sequence 0, head 1: 8 v down, 16 k across"
    assert [row.split()[-1] for row in rows] == ["." * 12 + "#..." if v == 3 else "." * 16 for v in range(8)]


# --- the smallest case


@pytest.mark.parametrize(
    ("name", "word", "smallest"),
    [
        ("prefill-gates-clamped", "prefill-lengths", {"N": 1}),
        ("prefill-last-token-dropped", "prefill-weak-gates", {"seq_lens": (65,), "K": 16, "H": 1}),
        ("decode-groups-interleaved", "decode-grouped", {"H": 2, "HV": 4, "seq_lens": (1,), "pool_slots": None}),
        ("decode-padding-written", "decode-kimi-k3", {"padding": 1, "HV": 1, "K": 16}),
    ],
)
def test_a_failure_shrinks_to_what_matters(name, word, smallest):
    kernel, case = MUTANTS[name].kernel(), spec.parse(word)
    result = check(kernel, Bench.of_case(case, 0, "cpu"))
    found = shrink(kernel, case, result, 0, "cpu", seconds=30)
    assert found.complete and not found.result.ok
    for field, value in smallest.items():
        assert getattr(found.case.problem, field) == value, found.case
    again = check(MUTANTS[name].kernel(), Bench.of_case(spec.parse(found.case.name), 0, "cpu"))
    assert not again.ok


def test_shrinking_keeps_the_property_that_failed_and_stops_in_time():
    kernel = MUTANTS["prefill-tail-masked-by-zero"].kernel()
    case = spec.parse("prefill-neighbours/properties=after-error+neighbours")
    result = check(kernel, Bench.of_case(case, 0, "cpu"))
    assert shrink(kernel, case, result, 0, "cpu", seconds=20).case.properties == ("neighbours",)
    assert not shrink(kernel, case, result, 0, "cpu", seconds=0).complete


def test_every_step_is_a_case_and_simpler_in_one_thing():
    case = spec.parse("prefill-pool")
    for simpler in steps(case):
        assert simpler != case and spec.parse(spec.write(simpler)).problem == simpler.problem


# --- what the command says and writes


def test_a_failure_is_shrunk_explained_saved_and_shown_again(tmp_path, mutant):
    mutant("decode-bias-dropped")
    folder = tmp_path / "found"
    args = ("--kernel", "decode-bias-dropped", "--case", "decode-kimi-k3")
    result = kda(*args, "--save", str(folder), "--json", str(tmp_path / "r.json"))
    assert result.exit_code == 1
    (row,) = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert row["smallest"] and any("dt_bias was dropped" in line for line in row["looks_like"])
    assert f"again:    {row['reproduce']}" in result.stdout and row["smallest"] in row["reproduce"]
    assert "looks like: it fits if dt_bias was dropped" in result.stdout and "heads down" in result.stdout
    again = CliRunner().invoke(cli, row["reproduce"].split()[1:])
    assert again.exit_code == 1 and "decode-bias-dropped failed" in again.output

    (path,) = folder.iterdir()
    assert dumps.load(path).op is Op.DECODE
    compared = CliRunner().invoke(cli, ["compare", str(path), "--kernel", "torch-decode", "--device", "cpu"])
    assert compared.exit_code == 1 and "the dump" in compared.output
    assert kda(*args, "--save", str(folder)).exit_code == 2  # never overwritten
    assert kda(*args, "--save", str(folder), "--force").exit_code == 1


def test_a_small_case_told_once_is_not_told_again(mutant):
    mutant("decode-sigmoid-missing")
    cases = ("--case", "decode-fp16", "--case", "decode-fp32", "--case", "decode-kimi-k3")
    result = kda("--kernel", "decode-sigmoid-missing", *cases)
    assert "as above" in result.stdout


def test_junit(tmp_path, mutant):
    junitparser = pytest.importorskip("junitparser")
    mutant("decode-sigmoid-always")
    path = tmp_path / "r.xml"
    cases = ("decode-plain-values", "decode-fp32")
    words = [word for case in cases for word in ("--case", case)]
    result = kda("--kernel", "decode-sigmoid-always", "--junit", str(path), "--shrink", "0", *words)
    assert result.exit_code == 1
    (suite,) = junitparser.JUnitXml.fromfile(str(path))
    assert (suite.name, suite.tests, suite.failures) == ("decode-sigmoid-always", 2, 1)
    tests = {test.name: test for test in suite}
    assert set(tests) == set(cases) and tests["decode-fp32"].is_passed
    assert "relative error" in tests["decode-plain-values"].result[0].message
    assert "kda verify --case" in tests["decode-plain-values"].result[0].text
    assert kda("--junit", str(path), "--case", "decode-fp32").exit_code == 2  # never overwritten


def test_many_results_are_a_table_of_kernels(mutant):
    mutant("decode-sigmoid-always")
    result = kda(
        "--op",
        "decode",
        "--kernel",
        "torch-decode",
        "--kernel",
        "decode-sigmoid-always",
        "--shrink",
        "0",
        "--workers",
        "1",
    )  # no other process knows the mutant
    lines = [line.split() for line in result.stdout.splitlines()]
    assert any(line[:1] == ["torch-decode"] and line[-1] == "pass" for line in lines)
    assert any(line[:1] == ["decode-sigmoid-always"] and line[-1] == "FAIL" for line in lines)
    assert "decode-kimi-linear" not in result.stdout
    assert all(len(line) <= 100 for line in result.stdout.split("FAIL decode")[0].splitlines())


@pytest.mark.parametrize(
    ("args", "fragment"),
    [
        (["--suite", "full", "--case", "decode-fp32"], "--suite is given with --case"),
        (["--suite", "full", "-T", "3"], "--suite is given with --tokens"),
        (["--seconds", "3"], "--seconds is given without --suite stress"),
        (["--junit", "-"], "--junit is -"),
        (["--save", __file__], "--save takes a directory"),
        (["--case", "decode-fp32/lens=x"], "whole number"),
    ],
)
def test_contradicting_flags_are_one_line_and_exit_2(args, fragment):
    result = kda(*args)
    assert result.exit_code == 2 and fragment in result.stderr and result.stderr.count("\n") == 1
