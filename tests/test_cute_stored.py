"""Pools of two bytes in the CuTe decode kernel: the same bits as the plain definition."""

import dataclasses

import pytest
import torch
from decode_inputs import DEVICE, decaying, stores_as_defined

from kda_kernels.cute.decode.config import DecodeConfig
from kda_kernels.cute.decode.host import decode

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiled_here")]
KERNEL = "cute-decode"
CONFIGS = {"registers": DecodeConfig(rows=32), "bulk": DecodeConfig(rows=128, ctas=3, bulk=True, together=2)}


@pytest.mark.parametrize(
    ("config", "T", "K", "drafts"),
    [("registers", 2, 128, False), ("bulk", 1, 128, False), ("registers", 1, 96, False), ("registers", 2, 128, True)],
)
@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int16"])
def test_bits_are_those_of_the_definition(dtype, stochastic, config, T, K, drafts):
    inputs = decaying(dtype, stochastic, T, K, drafts=drafts)
    stores_as_defined(inputs, lambda x: decode(x, config=CONFIGS[config] if x.state is inputs.state else None))


def test_a_second_seed_and_other_sequences():
    """Other numbers for another seed; the same for a sequence whatever the others are, and by the calls that follow."""
    inputs = decaying("bfloat16", True, 1)
    pools, slots = [], inputs.state_indices.tolist()
    for seed in (1, 2, 1):
        mine = dataclasses.replace(inputs.fresh(), rounding_seed=torch.tensor([seed], device=DEVICE))
        decode(mine)
        pools.append(mine.state.nan_to_num())
    assert torch.equal(pools[0], pools[2]) and not torch.equal(pools[0], pools[1])
    mine = dataclasses.replace(inputs.fresh(), rounding_seed=torch.tensor([1], device=DEVICE))
    names = ("q", "k", "v", "g", "beta", "state_indices")
    decode(dataclasses.replace(mine, **{name: getattr(mine, name)[1:2] for name in names}))
    assert torch.equal(mine.state[slots[1]].nan_to_num(), pools[0][slots[1]])
