"""Each property: good kernels have it, a kernel without it fails by that name, and what cannot be asked is said."""

import pytest

from kda_kernels import registry
from kda_kernels.problem import FEATURES, Op
from kdacli.verify.cases import spec
from kdacli.verify.checks.check import Bench, Result, check
from kdacli.verify.properties import PROPERTIES
from kdacli.verify.reports.tables import refusals
from tests.mutants.score import MUTANTS
from tests.mutants.victim import Chunked, VictimKernel

ANY = "lens=9,0,20/gates=init/pool=5"


def ask(kernel: registry.Kernel, word: str) -> Result:
    return check(kernel, Bench.of_case(spec.parse(word), 0, "cpu"))


@pytest.mark.parametrize("op", list(Op))
@pytest.mark.parametrize("name", [name for name, found in PROPERTIES.items() if not found.gpu_only])
def test_good_kernels_have_it(op, name):
    kernel = {Op.GATE: "triton-gate"}.get(op, f"torch-{op}")
    if op not in PROPERTIES[name].ops:
        return
    pool = "" if op is Op.GATE else "/pool=5"
    states = "/state_dtype=int16/state_rounding=stochastic" if name == "rounding" else ""
    lens = "9,3,20" if name == "drift" else "9,0,20"
    word = f"{op}-any/lens={lens}/param_dtype=bfloat16{pool}{states}/properties={name}"
    result = ask(registry.get(kernel), word)
    (held,) = result.properties
    refused = (op is Op.GATE and name == "threads") or name == "alone"  # plain torch does not promise it
    assert result.status == "pass" and held.status == ("refused" if refused else "pass"), result


@pytest.mark.parametrize(
    ("mutant", "name", "word"),
    [
        ("prefill-tail-masked-by-zero", "neighbours", f"prefill-any/{ANY}"),
        ("decode-shared-scale", "neighbours", f"decode-any/{ANY}"),
        ("prefill-stale-workspace", "after-nan", f"prefill-any/{ANY}"),
        ("decode-broken-by-error", "after-error", f"decode-any/{ANY}"),
        ("decode-cached-by-shape", "dtype-change", f"decode-any/{ANY}/param_dtype=bfloat16"),
        ("decode-one-buffer-for-all", "threads", f"decode-any/{ANY}"),
        ("decode-k-first-ignored", "k-first", f"decode-any/{ANY}"),
        ("decode-sums-by-batch", "alone", f"decode-any/{ANY}"),
        ("decode-stray-slot-clamped", "stray", f"decode-any/{ANY}"),
        ("prefill-stray-slot-clamped", "stray", f"prefill-any/{ANY}"),
        ("prefill-values-scaled-by-chunk", "future", f"prefill-any/{ANY}"),
        ("prefill-decays-from-the-last-token", "future", "prefill-any/lens=70/gates=init"),
        ("gate-sums-from-the-end", "future", "gate-any/lens=20"),
    ],
)
def test_a_kernel_without_it_fails_by_name(mutant, name, word):
    kernel = MUTANTS[mutant].kernel()
    assert ask(kernel, word).status == "pass"
    result = ask(kernel, f"{word}/properties={name}")
    assert result.status == "fail"
    assert [(held.name, held.status) for held in result.properties] == [(name, "fail")]
    assert result.properties[0].notes


def test_a_split_that_loses_the_state_fails():
    """The state between two calls is what a prefill that starts from zero does not know."""
    result = ask(MUTANTS["prefill-state-ignored"].kernel(), "prefill-any/lens=20/initial_state=no/properties=split")
    assert [(held.name, held.status) for held in result.properties] == [("split", "fail")]


class Carried(Chunked):
    """States lose a millionth on their way out: within any tolerance, and once more for each call."""

    def store(self, inputs, final, slot, S):
        super().store(inputs, final, slot, S * (1 - 2**-20))


@pytest.mark.parametrize(("victim", "status"), [(Chunked(), "pass"), (Carried(), "fail")], ids=["bits", "a millionth"])
def test_a_cached_prefix_changes_no_bit(victim, status):
    class Declared(VictimKernel):
        features = FEATURES

    result = ask(Declared.of("declared", victim, ""), "prefill-any/lens=70,9/gates=weak/pool=5/properties=alone")
    (held,) = result.properties
    assert held.status == status and all("cut at a multiple of 64" in note for note in held.notes), result


def test_rounding_from_the_future_is_told_of_a_kernel_that_does_not_rule_it_out():
    class Undeclared(VictimKernel):
        causal_in_bits = False

    fault = MUTANTS["prefill-decays-from-the-last-token"]
    result = ask(
        Undeclared.of(fault.name, fault.make(), fault.fault), "prefill-any/lens=70/gates=init/properties=future"
    )
    (held,) = result.properties
    assert result.status == "pass" and held.status == "pass" and "within rounding" in held.notes[0]
    assert any(held.notes[0] in line for line in refusals([result]))
    result = ask(MUTANTS["prefill-not-causal"].kernel(), "prefill-any/lens=70/properties=future")
    assert result.status == "fail"


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("decode-any/properties=neighbours", "one sequence"),
        ("decode-any/packed=no/properties=split", "packed"),
        ("decode-any/state_dtype=bfloat16/properties=split", "less than fp32"),
        ("decode-any/gate=none/lower_bound=none/g_dtype=float32/beta_dtype=float32/properties=dtype-change", "already"),
        ("decode-any/properties=graph", "no GPU"),
        ("decode-any/properties=streams", "no GPU"),
    ],
)
def test_what_cannot_be_asked_is_said_and_no_failure(word, reason):
    result = ask(registry.get("torch-decode"), word)
    (held,) = result.properties
    assert result.status == "pass" and held.status == "refused" and reason in held.notes[0]


@pytest.mark.parametrize("mutant", ["decode-writes-past-end", "gate-writes-past-end"])
def test_guard_zones_notice_writes_beside_tensors(mutant):
    op = MUTANTS[mutant].make.op
    result = ask(MUTANTS[mutant].kernel(), f"{op}-any")
    assert result.status == "fail" and "bytes after a" in result.notes[0] and "allocated" in result.notes[0]
