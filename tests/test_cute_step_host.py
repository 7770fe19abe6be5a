"""The CuTe decode kernel with a convolution and a norm, without a GPU: what calls hand to it, what it compiles to."""

import dataclasses

import fake_gpu
import pytest
import torch
from decode_inputs import close

from kda_kernels import registry
from kda_kernels.cute.decode import host as module
from kda_kernels.cute.decode import step
from kda_kernels.cute.decode.config import MOST_CLUSTERED, DecodeConfig
from kda_kernels.cute.decode.host import decode
from kda_kernels.cute.runtime import missing_packages
from kda_kernels.errors import InputError
from kda_kernels.problem import Op, Parts, Problem
from kda_kernels.reference.oracle import recurrence
from kda_kernels.step import kda_step
from kda_kernels.tensors import Inputs
from kdacli.compile import sass, toolchain
from kdacli.synthetic import make_inputs

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="stand-ins are for machines without a GPU")


@pytest.fixture
def made(monkeypatch):
    return fake_gpu.install(monkeypatch)


def make(**parts) -> Inputs:
    """K = V = 32, two value heads for each of two heads, a row of padding."""
    shape = {"H": 2, "HV": 4, "K": 32, "V": 32, "pool_slots": 5, "padding": 1, "packed": False}
    return make_inputs(Problem(Op.STEP, (1,) * 3, **shape, parts=Parts(**parts)))


@without_gpu
@pytest.mark.parametrize(
    "parts",
    [{}, {"bias": True, "width": 3, "tokens_first": False}, {"norm": False}, {"width": 0, "norm_dtype": "float32"}],
    ids=str,
)
def test_calls(made, parts):
    inputs = make(**parts)
    expected = recurrence(inputs)
    for _ in range(2):  # the second takes the function of the first
        mine = inputs.fresh()
        close(decode(mine).o, expected.o)
        if mine.conv is not None:
            assert torch.equal(mine.conv.states.nan_to_num(7), expected.conv_states.nan_to_num(7))
    assert len(made) == 1 and made[0].calls == 2


@without_gpu
def test_steps_after_the_first_take_its_function(made):
    inputs = make(bias=True)
    expected = recurrence(inputs)
    decode(inputs.fresh())
    mine = inputs.fresh()
    mixed = torch.cat([x.flatten(2) for x in (mine.q, mine.k, mine.v)], 2)
    with torch.no_grad():
        o = kda_step(
            mixed[:, 0], mine.g[:, 0], mine.beta[:, 0], state=mine.state, state_indices=mine.state_indices,
            conv=mine.conv, norm=dataclasses.replace(mine.norm, gate=mine.norm.gate[:, 0]), A_log=mine.A_log,
            dt_bias=mine.dt_bias,
        )  # fmt: skip
    close(o, expected.o[:, 0])
    assert made[0].calls == 2


@without_gpu
def test_steps_that_round_stochastically_take_a_function_of_their_own(made):
    """An int16 pool with and without a seed, each again after the other."""
    problem = Problem(
        Op.STEP, (1,) * 3, H=2, HV=4, K=32, V=32, pool_slots=5, packed=False, state_dtype="int16",
        state_rounding="stochastic",
    )  # fmt: skip
    inputs = make_inputs(problem)
    for seed in (inputs.rounding_seed, None, inputs.rounding_seed):
        for _ in range(2):
            mine = dataclasses.replace(inputs.fresh(), rounding_seed=seed)
            expected = registry.get("torch-step").run(mine.fresh())
            decode(mine)
            assert torch.equal(mine.state, expected.final_state)
    assert len(made) == 2 and [function.calls for function in made] == [4, 2]
    with pytest.raises(InputError, match="^state_scales has shape"):
        decode(dataclasses.replace(inputs, state_scales=inputs.state_scales[1:]))


WRONG = {
    "conv.weight": lambda x: {"weight": x.weight[:-1]},
    "conv.bias": lambda x: {"bias": x.weight[:-1, 0].contiguous()},
    "conv.states": lambda x: {"states": x.states[:, 1:]},
    "conv.indices": lambda x: {"indices": torch.zeros(2, dtype=torch.int32)},
    "norm.gate": lambda x: {"gate": x.gate[:, :, 1:]},
    "norm.weight": lambda x: {"weight": x.weight[1:]},
    "norm.eps": lambda x: {"eps": 0.0},
}


@without_gpu
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_parts(made, name, warm):
    inputs = make()
    if warm:
        decode(inputs.fresh())
    part = name.split(".")[0]
    changed = dataclasses.replace(getattr(inputs, part), **WRONG[name](getattr(inputs, part)))
    with pytest.raises(InputError, match=rf"^{name}\b"):
        decode(dataclasses.replace(inputs, **{part: changed}))


@without_gpu
def test_heads_that_fit_no_cluster_are_refused(made):
    problem = Problem(Op.STEP, (1,), H=1, HV=16, packed=False, pool_slots=1)
    with pytest.raises(InputError, match="16 value heads of V x K = 128 x 128 share a key head"):
        decode(make_inputs(problem))
    assert "fit a cluster" in step.unsupported(problem)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("one_token", [False, True])
def test_every_choice_fits_a_cluster(one_token, narrow):
    for K, V in ((128, 128), (64, 48), (256, 256), (32, 16)):
        for group in (1, 2, 4, 8):
            if fitting := DecodeConfig.fitting(K, V, group):
                for heads in (1, 96, 384, 10**5):
                    config = DecodeConfig.choose_clustered(heads, K, V, narrow, one_token, 132, group)
                    assert V % config.rows == 0 and V // config.rows * group <= MOST_CLUSTERED, (fitting, config)
                    assert config.rows % (config.threads // 8) == 0 and config.rows <= config.threads


@pytest.mark.skipif(missing_packages() is not None, reason=str(missing_packages()))
@pytest.mark.parametrize("variant", list(step.variants()), ids=lambda v: v.name)
def test_usual_variants_keep_states_in_registers(monkeypatch, variant):
    """Of whole bf16 states, and of several tokens, a few channels may lie in local memory beside them."""
    monkeypatch.setenv("KDA_CACHE_DIR", "")
    built = variant.build("sm_90a")
    found = sass.count(sass.disassemble(built.cubin, toolchain.tool("nvdisasm")))
    resources = sass.resources_of_binary(built.cubin, toolchain.tool("cuobjdump"), found)
    assert found["local"] <= (0 if variant.name in ("many", "few") else 16), resources
    assert f"llvm.mlir.constant({built.shared_bytes} : i64)" in built.ir["mlir"]
    assert found["LDG.128"] + found["UBLKCP"] > 0 and module.FEATURES >= {"conv", "norm"}
