"""The random search: our kernels hold in a small budget, a fault that needs two options is found and shrunk."""

import json
import re

import pytest
from click.testing import CliRunner

from kda_kernels import registry
from kda_kernels.problem import Op
from kdacli.main import cli
from kdacli.verify import spec
from kdacli.verify.checker import Checker
from kdacli.verify.runner import pairs
from kdacli.verify.search import search
from tests.mutants.score import MUTANTS


@pytest.mark.parametrize(
    ("name", "examples"),
    [("torch-decode", 60), ("torch-prefill", 40), ("triton-decode", 8), ("triton-prefill", 2), ("triton-gate", 4)],
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


def test_the_time_is_kept():
    assert search(registry.get("torch-decode"), "cpu", seconds=0).tried == 0


def test_suite_stress_searches_and_reports(monkeypatch):
    monkeypatch.setattr("kdacli.verify.suites._STRESS_SEEDS", ())
    from kdacli.verify.suites import suite

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

    def until_ctrl_c(self, kernel, seconds):
        if kernel.name == "torch-prefill":
            raise KeyboardInterrupt
        return search(self, kernel, seconds)

    monkeypatch.setattr(Checker, "search", until_ctrl_c)
    cases = [spec.parse("decode-fp16"), spec.parse("prefill-any")]
    monkeypatch.setattr("kdacli.verify.selection.select_table", lambda names, kernels, *more: pairs(kernels, cases))
    words = ["--kernel", "torch-decode", "--kernel", "torch-prefill", "--suite", "stress", "--seconds", "0.2"]
    result = CliRunner().invoke(cli, ["verify", "--device", "cpu", *words])
    assert result.exit_code == 130
    assert "2 checks: 2 passed; ended early, 1 of 2 kernels were not searched to the end" in result.stdout
    assert re.search(r"searched: torch-decode: \d+ random cases in 0 s, none failed", result.stdout)
