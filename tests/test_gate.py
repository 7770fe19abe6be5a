"""The gate stages and the chunk table against plain fp64 torch and plain Python."""

import dataclasses
import itertools

import pytest
import torch
from decode_inputs import make as random_inputs

from kda_kernels.errors import InputError
from kda_kernels.problem import Gate, Options
from kda_kernels.reference.oracle import gate_cumsum
from kda_kernels.tensors import Inputs
from kda_kernels.triton import gate, gate_unfused
from kda_kernels.triton.chunk_indices import prepare_chunk_indices

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENS = [0, 1, 15, 16, 17, 63, 64, 65, 130]


def make(options: Options, lens=LENS, HV=2, K=48, scale=1.0) -> Inputs:
    inputs = random_inputs(lens=lens, H=HV, HV=HV, K=K, V=K, options=options, seed=3)
    return dataclasses.replace(inputs, g=inputs.g * scale)


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (gate, Options()),
        (gate, Options(Gate.SAFE, -5.0)),
        (gate, Options(Gate.NONE)),
        (gate_unfused, Options()),
        (gate_unfused, Options(Gate.SAFE, -5.0)),
    ],
)
def test_chunk_cumsum_is_the_reference(module, options):
    inputs = make(options)
    torch.testing.assert_close(module.run(inputs).o.double(), gate_cumsum(inputs), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("value", [-60.0, -20.0, -5.0, 0.0, 30.0, 88.0, 1e4])
def test_softplus_keeps_relative_precision_and_never_overflows(value):
    """A weak gate is a tiny softplus; a strong one must not become inf."""
    g = torch.full((1, 1, 1, 16), value, device=DEVICE)
    got = gate.kda_gate(g, torch.zeros(1, device=DEVICE)).double()
    expected = -torch.logaddexp(g.double(), torch.zeros((), dtype=torch.float64, device=DEVICE))
    # exp's argument is rounded: 2^-24 of up to 60
    torch.testing.assert_close(got, expected, rtol=60 * 2**-24 + 1e-6, atol=0)


@pytest.mark.parametrize("A_log", [59.0, 61.0, 90.0, 150.0])
def test_a_softplus_that_fp32_does_not_hold_counts_where_its_rate_is_large(A_log):
    inputs = make(Options(), lens=[9], HV=1, K=16)
    low = torch.linspace(-5.0, 3.0, 16, device=DEVICE) - A_log  # exp(A_log) * softplus: from e^-5 to e^3
    bias = inputs.dt_bias.reshape(1, 16)
    inputs = dataclasses.replace(
        inputs, g=(low - bias).expand_as(inputs.g), A_log=torch.full((1,), A_log, device=DEVICE)
    )
    torch.testing.assert_close(gate.run(inputs).o.double(), gate_cumsum(inputs), rtol=1e-4, atol=0)


def test_scale_chunk_size_and_row_strides():
    g = torch.randn(2, 70, 3, 40, device=DEVICE)[..., :32]  # rows of 40, of which 32 are ours
    got = gate.chunk_local_cumsum(g, scale=2.0, chunk_size=32)
    expected = torch.cat([part.cumsum(1) for part in g.split(32, dim=1)], 1) * 2
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_wrong_arguments_are_named():
    g = torch.randn(1, 8, 2, 16, device=DEVICE)
    with pytest.raises(InputError, match="A_log"):
        gate.kda_gate_chunk_cumsum(g, torch.zeros(3, device=DEVICE))
    with pytest.raises(InputError, match="lower_bound"):
        gate.kda_gate_chunk_cumsum(g, torch.zeros(2, device=DEVICE), lower_bound=5.0)
    with pytest.raises(InputError, match="out"):
        gate.chunk_local_cumsum(g, out=torch.empty(1, 8, 2, 16, dtype=torch.bfloat16, device=DEVICE))


@pytest.mark.parametrize("lens", [LENS, [0, 0], [64, 64], [1] * 100, [1000], [0, 300, 0]], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_chunk_indices_name_every_chunk_once(lens, dtype):
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lens)], dtype=dtype, device=DEVICE)
    table = prepare_chunk_indices(cu_seqlens, sum(lens)).tolist()
    expected = [[n, c] for n, length in enumerate(lens) for c in range((length + 63) // 64)]
    assert [row for row in table if row[0] >= 0] == expected
    assert all(row == [-1, -1] for row in table if row[0] < 0)
    assert len(table) == sum(lens) // 64 + len(lens)
