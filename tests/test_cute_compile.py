"""What the CuTe decode kernel compiles to, read from the binary. No GPU is needed."""

import dataclasses
import functools

import cute_cases
import fake_gpu
import pytest
import torch

from kda_kernels import registry
from kda_kernels.checks import problem_of
from kda_kernels.cute import cache
from kda_kernels.cute.decode import host as module
from kda_kernels.cute.decode.config import DecodeConfig, DecodeSpec
from kda_kernels.cute.runtime import missing_packages
from kda_kernels.cute.variant import CuteVariant
from kda_kernels.problem import Gate, Op, Options, Problem
from kda_kernels.variant import H100, Built
from kdacli.compile import sass, toolchain, worker
from kdacli.compile.arch import parse
from kdacli.synthetic import make_inputs

pytestmark = pytest.mark.skipif(missing_packages() is not None, reason=str(missing_packages()))

BF16_STATE = {"state_dtype": "bfloat16"}
DRAFT = {"seq_lens": (4,) * 128}
DECODE = Problem(Op.DECODE, (1,) * 128, H=32, HV=32, packed=False, pool_slots=256)


@pytest.fixture(autouse=True)
def no_files(monkeypatch):
    monkeypatch.setenv("KDA_CACHE_DIR", "")


def build(spec: DecodeSpec) -> Built:
    def compile(arch: str, options: str):
        return module.build(spec, arch, options)

    variant = CuteVariant("case", compile, lambda arch: module.label(spec, arch), 1, spec.shared_bytes)
    return variant.build("sm_90a")


USUAL = list(module.variants()) if missing_packages() is None else []


@functools.cache
def usual(variant: CuteVariant) -> Built:
    return variant.build("sm_90a")


@functools.cache
def listing_of(variant: CuteVariant) -> str:
    return sass.disassemble(usual(variant).cubin, toolchain.tool("nvdisasm"))


def counts(built: Built) -> dict[str, int]:
    return sass.count(sass.disassemble(built.cubin, toolchain.tool("nvdisasm")))


def spec_of(case: cute_cases.Case) -> DecodeSpec:
    inputs = case.inputs
    ht = inputs.new_final_state() if inputs.state_indices is None and inputs.output_final_state else None
    return module.spec_of(dataclasses.replace(inputs, token_states=case.token_states), ht, case.config)


def bytes_of(dtype: str | None) -> int:
    return 0 if dtype is None else getattr(torch, dtype).itemsize


def wide_accesses(spec: DecodeSpec, dtype: str | None) -> int:
    """How many 16-byte accesses a thread needs for the CTA's part of a state; none if there is no such state, or its
    rows are no multiple of 128 bytes, or its elements are narrower than those that share its loop."""
    elements = spec.config.rows * spec.K // spec.config.threads
    widest = max(map(bytes_of, (spec.h0, spec.ht, spec.token_states)))
    per_access = 16 // bytes_of(dtype) if dtype else 0
    return elements // per_access if dtype and bytes_of(dtype) == widest and spec.K % (8 * per_access) == 0 else 0


@pytest.mark.parametrize("row", cute_cases.rows(), ids=cute_cases.name)
def test_every_two_options_compile(row):
    """To 16-byte accesses of the state, no more of them than it takes, and without spilling."""
    spec = spec_of(cute_cases.case_of(row))
    built = build(spec)
    found = counts(built)
    out = spec.h0 if spec.pooled else spec.ht
    through_shared = spec.bulk and out is not None
    stores = 0 if through_shared else wide_accesses(spec, out)
    stores += wide_accesses(spec, spec.token_states) // spec.pieces  # that are a loop
    assert found["LDG.128"] == (0 if spec.bulk else wide_accesses(spec, spec.h0))
    assert found["STG.128"] == stores
    assert found["UBLKCP"] == spec.pieces * spec.bulk + through_shared
    assert found["STS.128"] >= (wide_accesses(spec, spec.h0) // spec.pieces if through_shared else 0)
    # With several tokens the channels of two are held next to the state: a few of them may lie in local memory.
    assert found["local"] <= (0 if spec.one_token else 24)
    assert f"llvm.mlir.constant({spec.shared_bytes} : i64)" in built.ir["mlir"]


@pytest.mark.parametrize("variant", USUAL, ids=lambda v: v.name)
def test_usual_variants_spill_nothing(variant):
    built = usual(variant)
    found = sass.count(listing_of(variant))
    resources = sass.resources_of_binary(built.cubin, toolchain.tool("cuobjdump"), found)
    assert resources["spill_bytes"] == 0
    assert resources["registers"] <= 65536 // (32 * built.num_warps * 2), "two CTAs fit on a multiprocessor"
    assert found["LDG.128"] + found["UBLKCP"] > 0
    assert f"llvm.mlir.constant({built.shared_bytes} : i64)" in built.ir["mlir"]
    assert built.ptx and not built.cached


@pytest.mark.parametrize("variant", USUAL, ids=lambda v: v.name)
def test_nothing_is_made_before_all_loads_are_on_their_way(variant):
    """The first token's channels do not wait for the slot, nor the state for the gates."""
    opcodes = [
        op
        for op in sass.INSTRUCTION.findall(listing_of(variant))
        if op.split(".")[0] in ("LDG", "UBLKCP", "MUFU", "BAR")
    ]
    made = next(i for i, op in enumerate(opcodes) if op.startswith(("MUFU", "BAR")))
    ahead = opcodes[:made]
    assert {"LDG.E.128", "UBLKCP.S.G"} & set(ahead)
    if "packed" not in variant.name:  # whose loop asks for the next token in between
        assert not any(op.startswith("LDG") for op in opcodes[made:])


@pytest.mark.parametrize(
    ("change", "exact"),
    [({}, True), (BF16_STATE, False), ({**BF16_STATE, "dtype": "float32"}, True), ({**BF16_STATE, **DRAFT}, False)],
    ids=["fp32", "bf16", "bf16, fp32 out", "bf16 draft"],
)
def test_the_hardware_approximates_only_what_is_rounded(change, exact):
    """MUFU.EX2 is the approximation of exp; without it there is the polynomial."""
    (variant,) = module.variants(dataclasses.replace(DECODE, **change))
    listing = sass.disassemble(variant.build("sm_90a").cubin, toolchain.tool("nvdisasm"))
    assert ("MUFU.EX2" in listing) == (not exact)


def test_variants_are_what_launches_look_for(monkeypatch, tmp_path):
    """`kda compile` leaves a file, and the cache finds it under the label of the spec that a launch asks for."""
    monkeypatch.setenv("KDA_CACHE_DIR", str(tmp_path))
    (variant,) = module.variants(DECODE)
    variant.build("sm_90a")
    spec = module._problem_spec(DECODE, H100)

    def compiles():
        raise AssertionError("compiled again")

    mine = cache.CompileCache()
    mine.make("key", module.label(spec, "sm_90a"), compiles)
    assert [entry.origin for entry in mine.entries()] == ["disk"]


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "gfx942"])
def test_architectures_it_is_not_meant_for(arch):
    row = worker.compile_variant(registry.get("cute-decode"), DECODE, "softplus", parse(arch))
    assert row == {"unsupported": f"CuTe DSL kernels are for sm_90a and newer, not {arch}"}


def test_it_compiles_for_blackwell():
    (variant,) = module.variants(DECODE)
    assert counts(variant.build("sm_100a"))["instructions"] > 0


# --- the spec of a problem and that of its tensors

CHANGES = {
    "usual": {},
    "few": {"seq_lens": (1,), "pool_slots": 2},
    "bf16 state": BF16_STATE,
    "bf16 state, few": {"seq_lens": (1,), **BF16_STATE},
    "packed": {"packed": True},
    "draft": DRAFT,
    "draft, bf16 state": {**DRAFT, **BF16_STATE},
    "packed draft": {"packed": True, "seq_lens": (3, 0, 5), "pool_slots": 4},
    "padding": {"padding": 3},
    "plain": {"pool_slots": None},
    "plain, not wanted": {"pool_slots": None, "final_state": False},
    "no state": {"pool_slots": None, "initial_state": False},
    "no state, not wanted": {"pool_slots": None, "initial_state": False, "final_state": False},
    "plain bf16": {"pool_slots": None, **BF16_STATE},
    "dtypes": {"dtype": "float16", "g_dtype": "float32", "beta_dtype": "float32", "param_dtype": "bfloat16"},
    "heads": {"H": 4, "HV": 12},
    "sizes": {"K": 96, "V": 48},
    "safe": {"options": Options(Gate.SAFE, -5.0, allow_neg_eigval=True)},
    "given": {"options": Options(Gate.NONE, beta_is_logit=False, qk_l2norm=False)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_the_spec_of_a_problem_is_that_of_its_launch(monkeypatch, change):
    """`kda compile` asks for what a launch on an H100 will ask for."""
    small = {"H": 2, "HV": 2, "K": 32, "V": 32} | change
    problem = dataclasses.replace(DECODE, **small)
    inputs = make_inputs(problem)
    assert problem_of(inputs, Op.DECODE) == problem
    made = fake_gpu.install(monkeypatch)
    module.decode(inputs)
    (function,) = made
    assert function.spec == module._problem_spec(problem, H100)


# --- tuning choices


@pytest.mark.parametrize("one_token", [True, False])
@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("sms", [1, 78, 132, 148])
def test_chosen_configs_fit_every_size(sms, narrow, one_token):
    for K in range(64 if narrow else 32, 257, 64 if narrow else 32):
        for V in range(16, 257, 16):
            for heads in (1, 7, 12, 100, 132, 133, 500, 1000, 3000, 100_000):
                config = DecodeConfig.choose(heads, K, V, narrow, one_token, sms)
                assert config.threads % 32 == 0 and config.rows % (config.threads // 8) == 0, (K, V, heads, config)
                assert V % config.rows == 0, (K, V, heads, config)
                assert config.threads >= min(K, 128), "sums over K keep their order"
                if K > 128:
                    assert config == DecodeConfig.choose(1, K, V, narrow, one_token, sms), "one order for each size"
