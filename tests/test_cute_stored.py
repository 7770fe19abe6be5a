"""Pools of two bytes in the CuTe decode kernel: the same bits as the plain definition."""

import dataclasses

import pytest
import torch
from decode_inputs import DEVICE, SAFE

from kda_kernels.cute.decode.config import DecodeConfig
from kda_kernels.cute.decode.host import decode
from kda_kernels.dtypes import torch_dtype
from kda_kernels.problem import Op, Problem
from kda_kernels.reference.stored import Stored, stored
from kda_kernels.tensors import Inputs
from kdacli.synthetic import make_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiled_here")]
KERNEL = "cute-decode"
SLOTS = [3, 0, 5]
CONFIGS = {"registers": DecodeConfig(rows=32), "bulk": DecodeConfig(rows=128, ctas=3, bulk=True, together=2)}


def decaying(dtype: str, stochastic: bool, T: int, K: int = 128) -> Inputs:
    """Steps that only decay: no sum can change their fp32 state. A row has NaN, and another is 0."""
    options = dataclasses.replace(SAFE, beta_is_logit=False)
    shape = {"H": 2, "HV": 2, "K": K, "V": 128, "packed": False, "pool_slots": 7, "state_dtype": dtype}
    rounding = "stochastic" if stochastic else "nearest"
    problem = Problem(Op.DECODE, (T,) * 3, dtype="float32", options=options, state_rounding=rounding, **shape)
    inputs = make_inputs(problem, device=DEVICE)
    start = torch.randn(7, 2, 128, K) * torch.logspace(-9, 3, 128)[:, None]
    start[:, 0, 69, 3], start[:, 1, 8] = torch.nan, 0.0
    held = stored(start.flatten(0, 1), inputs.state.dtype)
    inputs.state.copy_(held.state.view(start.shape))
    if held.scales is not None:
        inputs.state_scales.copy_(held.scales.view(7, 2, 128))
    slots = torch.tensor(SLOTS, dtype=torch.int32, device=DEVICE)
    return dataclasses.replace(inputs, beta=torch.zeros_like(inputs.beta), state_indices=slots)


@pytest.mark.parametrize(("config", "T", "K"), [("registers", 2, 128), ("bulk", 1, 128), ("registers", 1, 96)])
@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int16"])
def test_bits_are_those_of_the_definition(dtype, stochastic, config, T, K):
    inputs = decaying(dtype, stochastic, T, K)
    values = Stored(inputs.state, inputs.state_scales).values(torch.float32)
    wide = decode(dataclasses.replace(inputs, state=values, state_scales=None, rounding_seed=None)).final_state
    decode(inputs, config=CONFIGS[config])
    seed = None if inputs.rounding_seed is None else int(inputs.rounding_seed)
    for slot in SLOTS:
        want = stored(wide[slot].cpu(), torch_dtype(dtype), seed, slot, T - 1)
        rows = slice(None) if want.scales is None else want.scales.isfinite()  # of others the integers may be any
        assert torch.equal(inputs.state[slot].cpu()[rows].nan_to_num(7), want.state[rows].nan_to_num(7))
        if want.scales is not None:
            assert torch.equal(inputs.state_scales[slot].cpu().nan_to_num(-1), want.scales.nan_to_num(-1))


def test_a_second_seed_and_other_sequences():
    """Other numbers for another seed; the same for a sequence whatever the others are, and by the calls that follow."""
    inputs = decaying("bfloat16", True, 1)
    pools = []
    for seed in (1, 2, 1):
        mine = dataclasses.replace(inputs.fresh(), rounding_seed=torch.tensor([seed], device=DEVICE))
        decode(mine)
        pools.append(mine.state.nan_to_num())
    assert torch.equal(pools[0], pools[2]) and not torch.equal(pools[0], pools[1])
    mine = dataclasses.replace(inputs.fresh(), rounding_seed=torch.tensor([1], device=DEVICE))
    names = ("q", "k", "v", "g", "beta", "state_indices")
    decode(dataclasses.replace(mine, **{name: getattr(mine, name)[1:2] for name in names}))
    assert torch.equal(mine.state[SLOTS[1]].nan_to_num(), pools[0][SLOTS[1]])
