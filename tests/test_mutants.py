"""The suites have teeth: quick kills nine in ten of the deliberately wrong kernels, full all; the right one passes."""

import collections

import pytest

from kda_kernels.problem import Op
from kdacli.verify.cases.suites import cases_for
from kdacli.verify.checks.check import Bench, check
from tests.mutants.score import MUTANTS, hunt, mutants, score
from tests.mutants.step import Prompts, Step
from tests.mutants.victim import Chunked, GateStage, Recurrent, VictimKernel


def test_quick_kills_nine_in_ten_and_full_the_rest():
    """And each dies by a case that has to do with it, not by one that kills whatever differs."""
    deaths = score("full")
    assert [death.mutant.name for death in deaths if death.case is None] == []
    known = {case.name for case in cases_for("cpu")}
    late = [death for death in deaths if death.case not in known]
    assert len(late) <= len(deaths) / 10, late
    assert len({death.case for death in deaths}) >= 25


def test_the_table_is_as_large_as_it_claims():
    faults = {type(m.make).__name__ and m.fault for m in MUTANTS.values()}
    ops = collections.Counter(m.make.op for m in MUTANTS.values())
    assert len(faults) >= 60 and min(ops.values()) >= 10
    assert [m.name for m in MUTANTS.values() if m not in mutants("cpu")] == ["decode-offsets-of32-bits"]


@pytest.mark.parametrize("base", [Recurrent, Chunked, GateStage, Step, Prompts])
def test_the_kernels_that_they_spoil_are_right(base):
    kernel = VictimKernel.of("victim", base(), "right")
    for case in cases_for("cpu", "quick" if base is Step else "full", base.op):
        if base.op is Op.PREFILL and ("conv" in case.problem.features) != (base is Prompts):
            continue
        result = check(kernel, Bench.of_case(case, 0, "cpu"))
        assert result.status == "pass", (case.name, result)


@pytest.mark.gpu
def test_offsets_of_32_bits_die_on_a_gpu():
    cases = [case for case in cases_for("cuda", op=Op.DECODE) if "far-pool" in case.transforms]
    (death,) = hunt([MUTANTS["decode-offsets-of32-bits"]], cases, "cuda")
    assert death.case == "decode-far-pool"
