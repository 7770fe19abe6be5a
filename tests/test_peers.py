"""FLA's kernels as peers: what they refuse and why; on a GPU, that they get our inputs right."""

import contextlib
import importlib.util
import sys
import types

import pytest
import torch

from kda_kernels import registry
from kda_kernels.checks import problem_of
from kda_kernels.problem import Gate, Op, Options, Problem
from kda_kernels.reference.oracle import gate_cumsum, recurrence
from kda_kernels.tensors import Inputs, Outputs
from kdacli.peers import fla, fla_prefill
from kdacli.synthetic import make_inputs
from kdacli.verify.transforms.layouts import pool_with_gaps

PEERS = ("fla-decode", "fla-prefill", "fla-gate")


@pytest.mark.parametrize("name", PEERS)
def test_a_missing_peer_says_how_to_get_it(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    assert registry.get(name).unsupported() == "fla is not installed: pip install flash-linear-attention"


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("fla-decode", {"seq_lens": (1, 1), "pool_slots": 3, "padding": 1}, "no padding"),
        ("fla-decode", {"seq_lens": (1, 2), "pool_slots": 3}, "one token per sequence"),
        ("fla-prefill", {"seq_lens": (5, 6), "pool_slots": 3, "padding": 1}, "no padding"),
        ("fla-prefill", {"seq_lens": (0, 0)}, "no tokens"),
        ("fla-gate", {"seq_lens": ()}, "no tokens"),
    ],
)
def test_what_peers_cannot_do(name, fields, reason):
    peer = registry.get(name)
    assert reason in peer.unsupported(Problem(peer.op, H=1, HV=1, **fields))


def test_flash_kda_does_not_stand_in_for_fla(monkeypatch):
    """FLA calls FlashKDA where it is installed; a kernel named fla-prefill must not."""
    monkeypatch.setattr(fla, "unsupported_here", lambda: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: object())
    monkeypatch.delenv("FLA_FLASH_KDA", raising=False)
    assert "FLA_FLASH_KDA=0" in fla_prefill.unsupported()
    monkeypatch.setenv("FLA_FLASH_KDA", "0")
    assert fla_prefill.unsupported() is None


@pytest.mark.parametrize("pooled", [False, True])
def test_fla_gets_a_plain_state_contiguous_and_a_pool_as_it_is(pooled, monkeypatch):
    """FLA's kernel takes the stride from slot to slot of a pool; states that are no pool it addresses as contiguous."""
    given = {}

    def fused_recurrent_kda_fwd(q, k, v, g, beta, *, initial_state, out, **more):
        given.update(state=initial_state)
        return out, initial_state

    fake = types.SimpleNamespace(fused_recurrent_kda_fwd=fused_recurrent_kda_fwd)
    monkeypatch.setitem(sys.modules, "fla.ops.kda.fused_recurrent", fake)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    problem = Problem(Op.DECODE, (1, 1), 1, 1, 16, 16, options=Options(), pool_slots=3 if pooled else None)
    inputs = pool_with_gaps(make_inputs(problem))
    assert not inputs.state.is_contiguous()
    registry.get("fla-decode").run(inputs)
    assert given["state"].is_contiguous() != pooled
    assert torch.equal(given["state"].nan_to_num(), inputs.state.nan_to_num())
    assert (given["state"].data_ptr() == inputs.state.data_ptr()) == pooled


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="needs flash-linear-attention")
@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("gate", list(Gate))
@pytest.mark.parametrize("pooled", [False, True])
def test_peers_compute_the_operation(name, gate, pooled):
    """Through options, layouts and pools as we hand them over."""
    generator = torch.Generator().manual_seed(0)
    peer, T = registry.get(name), 1 if name == "fla-decode" else 70
    raw = gate is not Gate.NONE
    q, k, v = torch.randn(3, 2, T, 2, 64, generator=generator).bfloat16()
    g = torch.randn(2, T, 2, 64, generator=generator)
    state = torch.randn(5, 2, 64, 64, generator=generator)
    inputs = Inputs(
        q, k, v, g if raw else -g.abs(), torch.randn(2, T, 2, generator=generator).bfloat16(),
        Options(gate, -5.0 if gate is Gate.SAFE else None),
        A_log=torch.rand(2, generator=generator) if raw else None,
        dt_bias=torch.rand(2, 64, generator=generator) if raw else None,
        state=state if pooled else state[:2],
        state_indices=torch.tensor([3, 1], dtype=torch.int32) if pooled else None,
    ).to("cuda")  # fmt: skip
    assert peer.unsupported(problem_of(inputs, peer.op)) is None
    expected = Outputs(gate_cumsum(inputs)) if peer.op is Op.GATE else recurrence(inputs)
    outputs = peer.run(inputs)
    for name, tensor in expected.tensors().items():
        assert (getattr(outputs, name).double() - tensor).abs().max() <= 2e-2 * tensor.abs().max()
