"""The random search: our kernels hold in a small budget, a fault that needs two options is found and shrunk."""

import json
import re

import pytest
from click.testing import CliRunner

from kda_kernels import registry
from kda_kernels.errors import InputError
from kda_kernels.problem import Op
from kda_kernels.registry import Kernel
from kdacli.main import cli
from kdacli.verify.cases import spec, suites
from kdacli.verify.cases.case import Case
from kdacli.verify.checks.check import pairs
from kdacli.verify.processes.checker import Checker
from kdacli.verify.search import search
from kdacli.verify.transforms import LAYOUTS, SERVING
from tests.mutants.score import MUTANTS


@pytest.mark.parametrize(
    ("name", "examples"),
    [("torch-decode", 30), ("torch-prefill", 15), ("triton-decode", 8), ("triton-prefill", 2), ("triton-gate", 4)],
)
def test_our_kernels_hold(name, examples):
    found = search(registry.get(name), "cpu", seconds=60, seed=1, examples=examples)
    assert found.failure is None and 0 < found.tried <= examples


def test_a_rare_fault_is_found_and_can_be_written_down():
    found = search(MUTANTS["decode-indices-of32-bits"].kernel(), "cpu", seconds=60, examples=500)
    case, result = found.failure
    assert not result.ok and "int64-indices" in case.transforms
    assert spec.parse(case.name).problem == case.problem


def test_the_same_seed_draws_the_same_cases():
    names = [search(MUTANTS["decode-sigmoid-always"].kernel(), "cpu", 60, seed=4, examples=200) for _ in range(2)]
    assert names[0].failure[0] == names[1].failure[0] and names[0].tried == names[1].tried


def test_what_engines_pass_is_drawn():
    cases: list[Case] = []
    search(registry.get("torch-decode"), "cpu", 60, seed=2, examples=40, before=cases.append)
    drawn = {name for case in cases for name in case.transforms}
    assert len(drawn & SERVING.keys()) > 3 and drawn & LAYOUTS.keys()


def test_the_time_is_kept():
    assert search(registry.get("torch-decode"), "cpu", seconds=0).tried == 0


def test_suite_stress_searches_and_reports(monkeypatch):
    monkeypatch.setattr("kdacli.verify.cases.suites._STRESS_SEEDS", ())
    from kdacli.verify.cases.suites import suite

    suite.cache_clear()
    monkeypatch.setitem(registry._KERNELS, "always", MUTANTS["gate-chunk-of32"].kernel())
    words = ["--kernel", "always", "--suite", "stress", "--seconds", "5", "--shrink", "0", "--json", "-"]
    result = CliRunner().invoke(cli, ["verify", "--device", "cpu", *words])
    suite.cache_clear()
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and re.fullmatch(
        r"searched: gate-chunk-of32: \d+ random cases in \d s, one failed", report["searched"][0]
    )
    assert report["complete"] is True
    assert list(report["seconds"]) == ["compiling", "checking", "searching", "explaining"]
    assert report["rows"][-1]["op"] == Op.GATE and report["rows"][-1]["case"].startswith("gate-any")


def test_an_interrupted_search_says_who_was_not_searched(monkeypatch):
    """The cases before it are all checked: that alone would look like the whole run."""
    search = Checker.search

    def until_ctrl_c(self, kernel, *how):
        if kernel.name == "torch-prefill":
            raise KeyboardInterrupt
        return search(self, kernel, *how)

    monkeypatch.setattr(Checker, "search", until_ctrl_c)
    cases = [spec.parse("decode-fp16"), spec.parse("prefill-any")]
    monkeypatch.setattr("kdacli.verify.verification.select_table", lambda names, kernels, *more: pairs(kernels, cases))
    words = ["--kernel", "torch-decode", "--kernel", "torch-prefill", "--suite", "stress", "--seconds", "0.2"]
    result = CliRunner().invoke(cli, ["verify", "--device", "cpu", *words])
    assert result.exit_code == 130
    assert "2 checks: 2 passed; ended early, 1 of 2 kernels were not searched to the end" in result.stdout
    assert re.search(r"searched: torch-decode: \d+ random cases in 0 s, none failed", result.stdout)


def test_cases_are_changed_to_what_a_kernel_supports(monkeypatch):
    """Those of a kernel for K = V = 128 and bf16 would all be refused otherwise."""

    def supports(self, problem=None):
        wrong = problem is not None and (problem.K, problem.V, problem.dtype) != (128, 128, "bfloat16")
        return "K = V = 128 and bf16 only" if wrong else None

    monkeypatch.setattr(Kernel, "unsupported", supports)
    names: list[str] = []
    found = search(registry.get("torch-decode"), "cpu", 60, 1, examples=12, before=lambda case: names.append(case.name))
    assert (found.tried, found.refused, found.failure) == (12, 0, None)
    for name in names:  # as --case takes it
        problem = spec.parse(name).problem
        assert (problem.K, problem.V, problem.dtype) == (128, 128, "bfloat16")


def test_layouts_that_a_kernel_refuses_are_left_out(monkeypatch):
    """What it refuses when it sees it: no problem says anything of addresses."""
    seen: list[bool] = []

    def run(self, inputs):
        seen.append(inputs.q.is_contiguous() and inputs.k.is_contiguous())
        if not seen[-1]:
            raise InputError("contiguous tensors only")
        return good(self, inputs)

    good = Kernel.run
    monkeypatch.setattr(Kernel, "run", run)
    found = search(registry.get("torch-decode"), "cpu", 60, 1, examples=12)
    assert (found.tried, found.refused, found.failure) == (12, 0, None)
    assert not all(seen)


class TestShards:
    def test_every_case_is_in_one_of_them(self):
        found = []
        for part in ("1/3", "2/3", "3/3"):
            words = ["--op", "gate", "--kernel", "triton-gate", "--shard", part, "--json", "-"]
            result = CliRunner().invoke(cli, ["verify", "--device", "cpu", *words])
            assert result.exit_code == 0
            report = json.loads(result.stdout)
            assert report["shard"] == part
            found.append([row["case"] for row in report["rows"]])
        cases = [case.name for case in suites.cases_for("cpu", "quick") if case.problem.op is Op.GATE]
        assert sorted(name for names in found for name in names) == sorted(cases)
        assert max(map(len, found)) - min(map(len, found)) <= 1

    def test_their_random_cases_differ(self):
        drawn = []
        for part in (1, 1, 2):
            names: list[str] = []
            note = names.append
            found = search(registry.get("triton-gate"), "cpu", 60, 1, part, 8, lambda case, note=note: note(case.name))
            assert found.tried == len(names) == 8
            drawn.append(names)
        assert drawn[0] == drawn[1] != drawn[2]

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--shard", "4/3"], "'--shard': 4/3: the first number should lie between 1 and the second"),
            (["--shard", "0/3"], "'--shard': 0/3: the first number should lie between 1 and the second"),
            (["--shard", "two"], "'--shard': two is not a part such as 2/8"),
            (["--shard", "1/3", "-T", "5"], "--shard is given with --tokens: it takes a part of a suite"),
            (["--shard", "1/3", "--case", "gate-weak"], "--shard is given with --case: it takes a part of a suite"),
            (["--shard", "1/3", "--list"], "--shard is given with --list, which lists whole suites: leave one out"),
            (["--shard", "1/900", "--op", "gate"], "--shard 1/900: there are 18 cases to share out"),
        ],
    )
    def test_what_is_none(self, words, said):
        result = CliRunner().invoke(cli, ["verify", "--device", "cpu", *words])
        assert result.exit_code == 2 and said in result.stderr
