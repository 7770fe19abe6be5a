"""Cases brought within what a kernel supports: what they are about stays, and their names say what does not."""

import dataclasses

import pytest
from click.testing import CliRunner

from kda_kernels import registry
from kda_kernels.checks import check_inputs
from kda_kernels.problem import Gate, Op, Problem
from kda_kernels.reference import plain_recurrent
from kdacli.main import cli
from kdacli.peers import fla, here
from kdacli.synthetic import make_inputs
from kdacli.userkernels import resolve
from kdacli.verify.adapt import adapt, adapted
from kdacli.verify.cases import spec
from kdacli.verify.cases.suites import cases_for
from kdacli.verify.selection import select_table
from kdacli.verify.transforms import SERVING, possible, transformed


@pytest.fixture(autouse=True)
def everything_is_installed(monkeypatch):
    """So that a peer's contract alone decides."""
    for name in ("missing_package", "wrong_gpu", "not_loadable"):
        monkeypatch.setattr(here, name, lambda *asked: None)
    for name in ("missing", "not_loadable"):
        monkeypatch.setattr(here.VllmLibrary, name, lambda library: None)
    monkeypatch.setattr(fla, "unsupported_here", lambda: None)
    monkeypatch.setattr("kdacli.peers.cudnn_prefill._no_engine", lambda: None)


def suite(name: str) -> list:
    return cases_for("cuda", "full", registry.get(name).op)


@pytest.mark.parametrize(
    ("name", "least", "about"),
    [
        ("sglang-decode", 110, {"pool-with-gaps", "large-state", "mixed-gates", "extreme-betas", "repeated-keys"}),
        ("cula-decode", 115, {"pool-with-gaps", "large-state", "mixed-gates", "extreme-betas", "repeated-keys"}),
        ("fla-decode", 135, {"pool-with-gaps", "far-pool"}),
        ("flashkda-prefill", 140, {"pool-with-gaps", "large-state", "sudden-gates", "extreme-betas"}),
        ("cudnn-prefill", 145, {"pool-with-gaps", "large-state", "sudden-gates", "extreme-betas"}),
        ("fla-prefill", 150, {"pool-with-gaps"}),
    ],
)
def test_a_narrow_kernel_gets_most_cases(name, least, about):
    kernel, cases = registry.get(name), suite(name)
    table = adapted([kernel], cases)
    assert len(table) == len(cases)
    taken = [case for case, _ in table if kernel.unsupported(case.problem) is None]
    assert len(taken) >= least
    assert about <= {transform for case in taken for transform in case.transforms}
    assert {p for case in taken for p in case.properties} >= {"neighbours", "graph", "streams", "after-nan"}


@pytest.mark.parametrize("name", ["sglang-decode", "cudnn-prefill"])
def test_only_the_problem_is_changed_and_the_name_is_the_case(name):
    for old, (new, _) in zip(suite(name), adapted([registry.get(name)], suite(name)), strict=True):
        plain = {"name": "", "about": (), "problem": old.problem}
        assert dataclasses.replace(old, **plain) == dataclasses.replace(new, **plain)
        parsed = spec.parse(new.name)
        assert (parsed.problem, parsed.transforms, parsed.seed) == (new.problem, new.transforms, new.seed)
        assert new.name.split("/")[0] == old.name.split("/")[0]


@pytest.mark.parametrize(
    ("name", "case", "reason"),
    [
        ("sglang-decode", "decode-neg-eigval", "no allow_neg_eigval"),
        ("sglang-decode", "decode-lengths", "one token per sequence"),
        ("sglang-decode", "decode-nobody", "padding rows"),
        ("sglang-decode", "decode-plain-values", "scale is 0.5"),
        ("cula-decode", "decode-other-bound", "the gate is safe"),
        ("flashkda-prefill", "prefill-grouped", "no grouped heads"),
        ("flashkda-prefill", "prefill-fp32", "q, k and v are fp32"),
        ("cudnn-prefill", "prefill-k-first", "V-first states only"),
        ("fla-prefill", "prefill-nothing", "no tokens"),
    ],
)
def test_a_case_keeps_its_point_and_is_refused_for_it(name, case, reason):
    """However much else of it was brought within the contract."""
    kernel = registry.get(name)
    found = adapt(kernel, next(c for c in suite(name) if c.name.split("/")[0] == case))
    assert reason in kernel.unsupported(found.problem)


def test_no_more_is_changed_than_need_be():
    kernel = registry.get("cula-decode")
    (case,) = [case for case in suite("cula-decode") if case.name == "decode-kimi-linear"]
    assert adapt(kernel, case) is case
    (case,) = [case for case in suite("cula-decode") if case.name == "decode-serving"]
    found = adapt(kernel, case)
    assert spec.changed(case, found) == ["padding"] and found.name == "decode-serving/padding=0"
    (case,) = [case for case in suite("cula-decode") if case.name.startswith("decode-sudden/")]
    found = adapt(kernel, case).problem
    assert found.seq_lens == (1,) * 45 and found.pool_slots == 47 and found.options.gate is Gate.SOFTPLUS


def test_cases_that_differ_run_for_their_kernels_only():
    """A good kernel keeps the case as it is beside one for which it is changed."""
    kernels = [registry.get("torch-decode"), registry.get("sglang-decode")]
    (case,) = [case for case in suite("sglang-decode") if case.name == "decode-weak-gates"]
    table = adapted(kernels, [case])
    assert [(c is case, [k.name for k in ks]) for c, ks in table] == [
        (True, ["torch-decode"]),
        (False, ["sglang-decode"]),
    ]


def test_a_kernel_without_a_contract_is_asked(monkeypatch):
    """It names its first reason only: up to two changes are tried."""
    narrow = lambda p: (  # noqa: E731
        None if p is None else "K is not 64" if p.K != 64 else "K-first" if not p.state_v_first else None
    )
    monkeypatch.setattr(plain_recurrent, "unsupported", narrow)
    kernel = registry.get("torch-decode")
    case = next(c for c in cases_for("cpu", "full", Op.DECODE) if c.name == "decode-pair-01")
    assert not case.problem.state_v_first or case.problem.K != 64
    assert kernel.unsupported(adapt(kernel, case).problem) is None


def test_named_cases_are_not_changed():
    kernel = registry.get("sglang-decode")
    ((case, _),) = select_table(["decode-weak-gates"], [kernel], "cuda")
    assert case.name == "decode-weak-gates"


def test_the_command_shows_what_was_changed(monkeypatch):
    """A run of a suite, with a kernel that has no safe gate."""
    refuse = lambda p: "no safe gate" if p is not None and p.options.gate is Gate.SAFE else None  # noqa: E731
    monkeypatch.setattr(plain_recurrent, "unsupported", refuse)
    asked = ["verify", "--device", "cpu", "--kernel", "torch-decode", "--verbose"]
    result = CliRunner(env={"COLUMNS": "160"}).invoke(cli, asked)
    assert result.exit_code == 0, result.output
    assert "decode-kimi-k3/gate=softplus/lower_bound=none" in result.stdout
    refused = [line for line in result.stdout.splitlines() if line.startswith("refused:") and "safe" in line]
    assert refused == ["refused: torch-decode, decode-other-bound: no safe gate"]


def test_what_a_case_changes_keeps_what_it_needs(tmp_path):
    """A kernel without pools is refused a case about what slots hold; it is not given the case without its pool."""
    path = tmp_path / "mine.py"
    path.write_text("def decode(q, k, v, g, beta, A_log, dt_bias, scale, initial_state):\n    raise AssertionError\n")
    kernel = resolve(f"{path}:decode")
    for case in cases_for("cpu", "full", Op.DECODE):
        assert possible(adapt(kernel, case).problem, case.transforms), case.name


@pytest.mark.parametrize("name", SERVING)
def test_what_engines_ask_for_without_a_pool(name):
    """Where it means nothing, that is known before tensors are made: `kda verify` would end."""
    for problem in (Problem(Op.PREFILL, (3, 2), 1, 1, K=16, V=16), Problem(Op.DECODE, (2, 1), 1, 1, K=16, V=16)):
        if possible(problem, (name,)):
            check_inputs(transformed(make_inputs(problem), (name,)))
