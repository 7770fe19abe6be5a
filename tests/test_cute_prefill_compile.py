"""What the CuTe prefill compiles to, read from the binary. No GPU is needed."""

import dataclasses

import fake_prefill
import pytest
import torch
from prefill_inputs import split

from kda_kernels.checks import problem_of
from kda_kernels.cute import cache
from kda_kernels.cute.prefill import functions as prefill_functions
from kda_kernels.cute.prefill import host as module
from kda_kernels.cute.prefill.config import CHUNK, Part
from kda_kernels.cute.prefill.plan import Split
from kda_kernels.cute.runtime import missing_packages
from kda_kernels.cute.variant import launched_shared_bytes
from kda_kernels.errors import UnavailableError
from kda_kernels.problem import Gate, Op, Options, Problem
from kda_kernels.variant import H100
from kdacli.compile import sass, toolchain
from kdacli.synthetic import make_inputs

SAFE = Options(Gate.SAFE, -5.0)
PREFILL = Problem(Op.PREFILL, (70, 3), H=1, HV=2, pool_slots=4, options=SAFE)
here = pytest.mark.skipif(missing_packages() is not None, reason=str(missing_packages()))


@here
def test_a_usual_variant(monkeypatch, tmp_path):
    """Tiles come by TMA, products are wgmma's, nothing spills; and a launch finds the file. Of the others
    `test_compile_baseline` says so.
    """
    monkeypatch.setenv("KDA_CACHE_DIR", str(tmp_path))
    (variant,) = (v for v in module.variants() if v.name == "safe")
    assert variant.missing("sm_90a") is not None
    built = variant.build("sm_90a")
    found = sass.count(sass.disassemble(built.cubin, toolchain.tool("nvdisasm")))
    resources = sass.resources_of_binary(built.cubin, toolchain.tool("cuobjdump"), found)
    assert found["HGMMA"] >= 5 and found["UTMALDG"] >= 4, "five products a chunk, four tensors"
    assert found["local"] == resources["spill_bytes"] == 0
    assert resources["registers"] * 32 * built.num_warps <= 65536, "one CTA fits on a multiprocessor"
    assert 150_000 < built.shared_bytes <= H100.shared
    assert variant.missing("sm_90a") is None

    def compiles():
        raise AssertionError("compiled again")

    mine = cache.CompileCache()
    mine.make("key", variant.label("sm_90a"), compiles)
    assert [entry.origin for entry in mine.entries()] == ["disk"]


@here
@pytest.mark.parametrize("arch", ["sm_80", "sm_100a", "sm_120a", "gfx942"])
def test_architectures_it_is_not_meant_for(arch):
    (variant,) = module.variants(PREFILL)
    with pytest.raises(UnavailableError, match=f"not {arch}$"):
        variant.build(arch)


def test_shared_memory_of_a_module_without_a_launch():
    with pytest.raises(ValueError, match="does not say how much shared memory"):
        launched_shared_bytes("llvm.func @nothing()")


def test_names_are_unique():
    names = [variant.name for variant in module.variants()]
    assert len(set(names)) == len(names) == 8


# --- the spec of a problem and that of its tensors

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="stand-ins are for machines without a GPU")

CHANGES = {
    "usual": {},
    "bf16 state": {"state_dtype": "bfloat16"},
    "dense": {"packed": False, "seq_lens": (37, 37)},
    "padding": {"padding": 1},
    "plain": {"pool_slots": None},
    "K-first": {"pool_slots": None, "state_v_first": False},
    "plain bf16": {"pool_slots": None, "state_dtype": "bfloat16"},
    "plain, not wanted": {"pool_slots": None, "final_state": False},
    "no state": {"pool_slots": None, "initial_state": False},
    "no state, not wanted": {"pool_slots": None, "initial_state": False, "final_state": False},
    "dtypes": {"g_dtype": "float32", "beta_dtype": "float32", "param_dtype": "bfloat16"},
    "fp16": {"dtype": "float16", "g_dtype": "float16", "beta_dtype": "float16"},
    "heads": {"H": 2, "HV": 6},
    "2 sigmoid": {"options": Options(Gate.SAFE, -5.0, allow_neg_eigval=True)},
    "softplus": {"options": Options()},
    "bound -8": {"options": Options(Gate.SAFE, -8.0)},
    "given, no bound": {"options": Options(Gate.NONE, beta_is_logit=False, qk_l2norm=False)},
    "given": {"options": Options(Gate.NONE, -5.0, beta_is_logit=False, qk_l2norm=False)},
}


@pytest.mark.parametrize(
    ("change", "parts"), [("usual", 1), ("2 sigmoid", 2), ("given", 2), ("given, no bound", 2), ("K-first", 2)]
)
def test_the_inverse_is_in_two_parts_where_beta_may_be_over_one(change, parts):
    problem = dataclasses.replace(PREFILL, **CHANGES[change])
    assert prefill_functions.problem_spec(problem, Part.WHOLE).inverse_parts == parts


@no_gpu
@pytest.mark.parametrize("part", [Part.WHOLE, Part.SPLIT])
@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_the_spec_of_a_problem_is_that_of_its_launch(monkeypatch, part, change):
    """`kda compile` asks for what launches will ask for."""
    problem = dataclasses.replace(PREFILL, **change)
    inputs = make_inputs(problem)
    assert problem_of(inputs, Op.PREFILL) == problem
    made = fake_prefill.install(monkeypatch)
    split(monkeypatch, None if part is Part.WHOLE else Split(CHUNK, CHUNK, 2 * CHUNK))
    module.prefill(dataclasses.replace(inputs, q=inputs.q.as_subclass(fake_prefill.OnGpu)))
    parts = (part,) if part is Part.WHOLE else prefill_functions.cut_into(problem.dtype == "bfloat16", False)
    assert [function.spec for function in made] == [prefill_functions.problem_spec(problem, one) for one in parts]
