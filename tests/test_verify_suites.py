"""The suites: what their cases cover, the pairwise cover, and cases as words."""

import dataclasses
import itertools
import subprocess
import sys

import pytest

from kda_kernels.errors import InputError
from kda_kernels.problem import Op, Problem
from kdacli.judge import Reference
from kdacli.judge.layout import Layout
from kdacli.synthetic import make_inputs
from kdacli.verify.cases import spec
from kdacli.verify.cases.cover import pairs, pairwise_cover
from kdacli.verify.cases.pairs import AXES, axes_of
from kdacli.verify.cases.suites import NAMES, cases_for, suite
from kdacli.verify.checks.check import inputs_of
from kdacli.verify.properties import PROPERTIES
from kdacli.verify.transforms import LAYOUTS, REGIMES, SERVING, TRANSFORMS, transformed


def test_quick_is_part_of_full_and_full_of_stress():
    quick, full, stress = map(suite, NAMES)
    assert set(quick) < set(full) < set(stress)
    for cases in (quick, full, stress):
        assert len({case.name for case in cases}) == len(cases)
        assert all(case.why for case in cases)
    with pytest.raises(InputError, match="nonsense is unknown"):
        suite("nonsense")


_CHECKPOINTS = {name for name in TRANSFORMS if name.startswith("checkpoint")}
_PREFILLS = _CHECKPOINTS | {"workspace"}


@pytest.mark.parametrize("name", ["quick", "full"])
def test_every_regime_layout_and_property_is_in_every_op_it_is_about(name):
    for op in (Op.PREFILL, Op.DECODE, *((Op.STEP,) if name == "full" else ())):
        cases = cases_for("cpu", name, op)
        held = {p for case in cases for p in case.properties}
        assert held == {p for p, found in PROPERTIES.items() if op in found.ops}
        used = {t for case in cases for t in case.transforms}
        elsewhere = {"drafts", "read-only", "token-rows"} if op is Op.PREFILL else _PREFILLS
        elsewhere = elsewhere if op is Op.STEP else {*elsewhere, "own-conv-slots"}
        missing = TRANSFORMS.keys() - used - elsewhere - {"far-pool"}  # for a GPU
        later = {"every-second-token", "huge-keys", "token-rows", "strided-indices"} | _CHECKPOINTS
        assert missing <= (later if name == "quick" else set())


def test_lengths_lie_around_every_tile_edge():
    lengths = {n for case in cases_for("cpu", "full", Op.PREFILL) for n in case.problem.seq_lens}
    edges = {edge + by for edge in (8, 16, 32, 64, 128, 256) for by in (0, 1)} - {256}
    assert edges | {0, 1, 7, 15, 31, 63, 127, 191} <= lengths
    assert max(n for case in cases_for("cuda", "full", Op.PREFILL) for n in case.problem.seq_lens) > 1 << 16


def test_on_a_gpu_narrow_cases_come_with_model_sizes():
    cases = {case.name: case for case in cases_for("cuda", "quick")}
    assert "prefill-forget" not in cases and cases["prefill-head-sizes"].problem.V == 64
    wide = cases["prefill-forget/K=128/V=128"]
    assert wide.problem.K == wide.problem.V == 128 and spec.parse(wide.name).problem == wide.problem
    assert not any(case.gpu_only or "K=128" in case.name for case in cases_for("cpu", "full"))


# --- the pairwise cover


def test_every_two_values_that_fit_meet_in_some_row():
    axes = {"a": (1, 2, 3), "b": ("x", "y"), "c": (True, False), "d": (0, 1, 2, 3)}

    def mend(row):
        return row | {"b": "x"} if row["c"] else row  # c and y do not go together

    rows = [row for row, _ in pairwise_cover(axes, mend)]
    found = {pair for row in rows for pair in pairs(row)}
    wanted = {
        (a, x, b, y)
        for a, b in itertools.combinations(axes, 2)
        for x, y in itertools.product(axes[a], axes[b])
        if not (a == "b" and x == "y" and y is True and b == "c")
    }
    assert wanted - {("b", "y", "c", True)} == found
    assert len(rows) <= 14  # of 48 combinations; 12 is the least that can do


@pytest.mark.parametrize("op", list(Op))
def test_the_cover_of_full_holds_every_option_and_says_why(op):
    cases = [case for case in suite("full") if case.name.startswith(f"{op}-pair")]
    assert 20 < len(cases) < 110
    assert all(case.why.startswith("pairs: ") for case in cases)
    for transform in axes_of(op)["layout"] + axes_of(op)["values"]:
        assert any(transform in case.transforms for case in cases) or transform in (None, "pool-with-gaps"), transform
    if op is not Op.GATE:
        states = {(c.problem.initial_state, c.problem.pool_slots is None, c.problem.padding) for c in cases}
        assert len(states) == 5 and {c.problem.dtype for c in cases} == set(AXES["dtype"])


def test_the_cover_is_the_same_in_another_process():
    """Hashes of strings differ from process to process; cases must not."""
    names = "[(c.name, str(c.problem.to_dict())) for c in suite('full')]"
    code = f"from kdacli.verify.cases.suites import suite; print(hash(repr({names})))"
    runs = {
        subprocess.run(
            [sys.executable, "-c", code.replace("hash(", "__import__('zlib').crc32(").replace("]))", "]).encode())")],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1


# --- transforms


@pytest.mark.parametrize("name", [n for n in LAYOUTS if n not in ("far-pool", "int64-indices")])
def test_a_layout_changes_memory_and_no_value(name):
    inputs = make_inputs(Problem(Op.PREFILL, (5, 3), H=1, HV=2, K=16, V=8, pool_slots=4))
    changed = LAYOUTS[name](inputs)
    for field, tensor in inputs.tensors().items():
        assert tensor.nan_to_num(7.0).equal(changed.tensors()[field].nan_to_num(7.0))
    moved = [t for t in changed.tensors().values() if not t.is_contiguous() or t.storage_offset()]
    assert moved


def test_checkpoints_in_a_pool_go_with_it():
    inputs = make_inputs(Problem(Op.PREFILL, (5, 3), H=1, HV=2, K=16, V=8, pool_slots=4))
    moved = transformed(inputs, ("checkpoints-in-pool", "pool-with-gaps"))
    assert moved.checkpoints.states is moved.state and not moved.state.is_contiguous()


def test_every_case_has_the_dtypes_that_its_problem_names():
    for case in cases_for("cpu", "full"):
        problem, inputs = case.problem, inputs_of(case, 0, "cpu")
        dtypes = dict.fromkeys(("q", "k", "v"), problem.dtype) | {"g": problem.g_dtype, "beta": problem.beta_dtype}
        dtypes |= dict.fromkeys(("A_log", "dt_bias"), problem.param_dtype) | {"state": problem.state_dtype}
        found = {name: str(t.dtype).removeprefix("torch.") for name, t in inputs.tensors().items() if name in dtypes}
        assert found == {name: dtypes[name] for name in found}, case.name


@pytest.mark.parametrize("name", list(REGIMES))
@pytest.mark.parametrize("lens", [(5, 3), (0,)])
def test_a_regime_keeps_shapes_dtypes_and_promises(name, lens):
    for case in cases_for("cpu", "full"):
        if case.transforms[:1] != (name,):
            continue
        problem = dataclasses.replace(case.problem, packed=True, seq_lens=lens, padding=0, pool_slots=None)
        inputs = inputs_of(dataclasses.replace(case, problem=problem), 0, "cpu")
        plain = inputs_of(dataclasses.replace(case, problem=problem, transforms=()), 0, "cpu")
        for field, tensor in plain.tensors().items():
            other = inputs.tensors()[field]
            assert other.shape == tensor.shape and other.dtype is tensor.dtype or case.transforms != (name,)
        if problem.options.lower_bound is not None and problem.options.gate == "none":
            assert (inputs.g >= problem.options.lower_bound - 0.02).all()
        assert len(Layout.of(inputs).lens) == len(lens)


# --- cases as words


def test_every_case_survives_being_written_and_read():
    for case in suite("full"):
        word = spec.write(dataclasses.replace(case, name="nobody"))
        again = spec.parse(word)
        same = ("problem", "gates", "keys", "transforms", "properties", "decode_steps", "seed")
        assert [getattr(again, f) for f in same] == [getattr(case, f) for f in same]
        assert spec.write(case) == case.name


def test_changes_of_a_case():
    case = spec.parse("prefill-lengths/lens=0,17/HV=2/gate=softplus/lower_bound=none/transforms=offset+open-gates")
    assert case.problem.seq_lens == (0, 17) and case.problem.HV == 2 and case.problem.options.lower_bound is None
    assert case.transforms == ("offset", "open-gates") and case.name.startswith("prefill-lengths/")


@pytest.mark.parametrize(
    ("word", "fragment"),
    [
        ("nonsense", "case nonsense is unknown"),
        ("prefill-lengths/x=1", "x is no field of a case"),
        ("prefill-lengths/lens=a", "whole number"),
        ("prefill-lengths/lens=-1", "whole number"),
        ("prefill-lengths/packed=1", "yes or no"),
        ("prefill-lengths/transforms=upside-down", "one of"),
        ("prefill-lengths/dtype=int8", "dtype is int8"),
        ("prefill-lengths/H=3/HV=4", "multiple of H"),
        ("prefill-lengths/gate=softplus", "lower_bound"),
        ("prefill-lengths/H=99999999999", "up to"),
    ],
)
def test_a_word_that_is_no_case_is_refused_in_one_line(word, fragment):
    with pytest.raises(InputError, match=fragment) as caught:
        spec.parse(word)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("op", [Op.PREFILL, Op.DECODE])
@pytest.mark.parametrize("name", SERVING)
def test_what_engines_pass_is_there_or_refused(op, name):
    """Shrinking, and the command line, ask for calls that cannot be: that is an error of the input, no other."""
    for word in ("lens=0", "lens=3,0/pool=2", "lens=2/pool=1", "lens=2/pool=2/padding=1", "lens=2", "packed=no/pool=3"):
        case = spec.parse(f"{op}-any/{word}/transforms={name}")
        try:
            reference = Reference(inputs_of(case, 0, "cpu"), op)
        except InputError:
            continue
        assert list(reference)
