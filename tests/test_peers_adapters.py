"""Adapters of other people's kernels: what they refuse and why, and, through stand-ins, what they hand over.

A stand-in has the peer's signature and asserts what the peer's own checks and documentation ask for; it computes with
the oracle. So a wrong argument, layout or dtype of an adapter's shows here, without a GPU; the kernels themselves are
run by tests/test_peers_gpu.py.
"""

import dataclasses
import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
import types

import pytest
import torch

from kda_kernels.errors import InputError, UnavailableError
from kda_kernels.problem import Gate, Op, Options, Parts, Problem
from kda_kernels.reference.fused import gated_norm
from kda_kernels.reference.oracle import recurrence
from kda_kernels.tensors import GatedNorm, Inputs, Outputs
from kdacli.judge import judge
from kdacli.judge.reference import Reference, pool_as_final_state
from kdacli.peers import flashkda_prefill, given, here, sglang_packed_decode
from kdacli.synthetic import make_inputs
from tests import engine_sources

SAFE, SOFTPLUS, NONE = Options(Gate.SAFE, -5.0), Options(Gate.SOFTPLUS), Options(Gate.NONE)
PREFILL = Problem(Op.PREFILL, (5, 0, 3), 2, 2, options=SAFE)
DECODE = Problem(Op.DECODE, (1, 1, 1), 2, 2, packed=False, pool_slots=5, options=SOFTPLUS)
BF16_PARAMS, BF16_STATE = {"param_dtype": "bfloat16"}, {"state_dtype": "bfloat16"}
ADAPTERS = (
    "flashkda_prefill",
    "cudnn_prefill",
    "sglang_decode",
    "sglang_packed_decode",
    "sglang_prefill",
    "cula_decode",
    "flashinfer_decode",
    "flashinfer_prefill",
)


def adapter(name: str) -> types.ModuleType:
    return importlib.import_module(f"kdacli.peers.{name}")


def problem_for(name: str, **change) -> Problem:
    return dataclasses.replace(PREFILL if name.endswith("prefill") else DECODE, **change)


# What each adapter takes: a change that is within its contract, to which each refusal below adds one thing.
TAKES = {
    "flashkda_prefill": {},
    "cudnn_prefill": {},
    "sglang_decode": BF16_PARAMS,
    "sglang_packed_decode": {},
    "sglang_prefill": {},
    "cula_decode": {},
    "flashinfer_decode": BF16_STATE,
    "flashinfer_prefill": BF16_STATE,
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_each_contract_takes_what_it_is_for(name):
    assert adapter(name).CONTRACT.refusal(problem_for(name, **TAKES[name])) is None


REFUSALS = [
    ("flashkda_prefill", {"dtype": "float16"}, "q, k and v are fp16: it takes bf16"),
    ("flashkda_prefill", {"g_dtype": "float32"}, "g is fp32"),
    ("flashkda_prefill", {"beta_dtype": "float32"}, "beta is fp32"),
    ("flashkda_prefill", {"options": SOFTPLUS}, "the gate is softplus: it has safe only"),
    ("flashkda_prefill", {"options": NONE}, "the gate is none"),
    ("flashkda_prefill", {"options": Options(Gate.SAFE, -7.0)}, "lower_bound is -7.0: it takes -5.0 or more"),
    ("flashkda_prefill", {"options": dataclasses.replace(SAFE, beta_is_logit=False)}, "beta as a logit"),
    ("flashkda_prefill", {"options": dataclasses.replace(SAFE, allow_neg_eigval=True)}, "allow_neg_eigval"),
    ("flashkda_prefill", {"options": dataclasses.replace(SAFE, qk_l2norm=False)}, "always normalises"),
    ("flashkda_prefill", {"HV": 4}, "no grouped heads"),
    ("flashkda_prefill", {"K": 64, "V": 64}, "K is 64: it takes 128"),
    ("flashkda_prefill", {"V": 64}, "V is 64: it takes V = K only"),
    ("flashkda_prefill", {"state_v_first": False}, "V-first"),
    ("flashkda_prefill", {"seq_lens": (0, 0)}, "no tokens"),
    ("flashkda_prefill", {"pool_slots": 5, "padding": 1}, "no padding"),
    ("cudnn_prefill", {"options": SOFTPLUS}, "the gate is softplus: it has safe or none only"),
    ("cudnn_prefill", {"dtype": "float16"}, "q, k and v are fp16"),
    ("cudnn_prefill", {"beta_dtype": "float16"}, "beta is fp16: it takes fp32 or bf16"),
    ("cudnn_prefill", {"options": dataclasses.replace(SAFE, allow_neg_eigval=True)}, "declines allow_neg_eigval"),
    ("cudnn_prefill", {"V": 64}, "V = K only"),
    ("cudnn_prefill", {"pool_slots": 5, "padding": 1}, "no padding"),
    ("sglang_decode", {"param_dtype": "float32"}, "--param-dtype bf16"),
    ("sglang_decode", {"options": SAFE}, "the gate is safe: it has softplus only"),
    ("sglang_decode", {"options": dataclasses.replace(SOFTPLUS, scale=0.5)}, "K ** -0.5 built in"),
    ("sglang_decode", {"options": dataclasses.replace(SOFTPLUS, qk_l2norm=False)}, "always normalises"),
    ("sglang_decode", {"state_dtype": "bfloat16"}, "the state is bf16: it takes fp32"),
    ("sglang_decode", {"pool_slots": None}, "a state pool in place"),
    ("sglang_decode", {"padding": 1}, "leaves the output of padding rows"),
    ("sglang_decode", {"seq_lens": (1, 2, 1), "packed": True}, "exactly one token"),
    ("sglang_decode", {"seq_lens": (1, 0, 1), "packed": True}, "exactly one token"),
    ("sglang_decode", {"V": 64}, "multiples of 128"),
    ("sglang_decode", {"state_v_first": False}, "V-first"),
    ("sglang_packed_decode", {"options": NONE}, "the gate is none: it has softplus or safe only"),
    ("sglang_packed_decode", {"pool_slots": None}, "a state pool in place"),
    ("sglang_packed_decode", {"seq_lens": (1, 2, 1), "packed": True}, "exactly one token"),
    ("sglang_prefill", {"HV": 4}, "no grouped heads"),
    ("sglang_prefill", {"options": Options(Gate.SAFE, -7.0)}, "lower_bound is -7.0: it takes -5.0 or more"),
    ("sglang_prefill", {"pool_slots": 5, "padding": 1}, "the output of a zero state"),
    ("cula_decode", {"options": SAFE}, "the gate is safe"),
    ("cula_decode", {"V": 96}, "multiples of 64"),
    ("cula_decode", {"padding": 1}, "leaves the output of padding rows"),
    ("cula_decode", {"state_dtype": "bfloat16"}, "it takes fp32"),
    ("cula_decode", {"options": dataclasses.replace(SOFTPLUS, scale=-1.0)}, "positive"),
    ("flashinfer_decode", {"state_dtype": "float32"}, "the state is fp32: it takes bf16"),
    ("flashinfer_decode", {"K": 32, "V": 32}, "K is 32: it takes 64 or 128"),
    ("flashinfer_decode", {"HV": 4}, "its A_log is [H]"),
    ("flashinfer_prefill", {"state_dtype": "float32"}, "the state is fp32: it takes bf16"),
    ("flashinfer_prefill", {"initial_state": False}, "the state is fp32"),
    ("flashinfer_prefill", {"seq_lens": (1, 1)}, "more tokens than sequences"),
]


@pytest.mark.parametrize(("name", "change", "reason"), REFUSALS)
def test_what_a_contract_refuses(name, change, reason):
    """The reason comes before any question of the machine, so it is the same everywhere."""
    assert reason in adapter(name).unsupported(problem_for(name, **{**TAKES[name], **change}))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("flashkda_prefill", "vllm is not installed: pip install vllm, or set KDA_FLASHKDA_LIB"),
        ("cudnn_prefill", "cudnn is not installed: pip install 'nvidia-cudnn-frontend>=1.32'"),
        ("sglang_decode", "sglang is not installed: pip install sglang"),
        ("sglang_packed_decode", "sglang is not installed: pip install sglang"),
        ("sglang_prefill", "sglang is not installed: pip install sglang"),
        ("cula_decode", "cula is not installed: pip install git+https://github.com/inclusionAI/cuLA"),
        ("flashinfer_decode", "flashinfer is not installed: pip install flashinfer-python"),
        ("flashinfer_prefill", "flashinfer is not installed: pip install flashinfer-python"),
    ],
)
def test_a_missing_peer_says_how_to_get_it(name, reason, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    monkeypatch.delenv(flashkda_prefill.LIBRARY.variable, raising=False)
    assert reason in adapter(name).unsupported()


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        ("flashkda_prefill", (8, 0)),
        ("cudnn_prefill", (10, 0)),
        ("sglang_decode", (8, 9)),
        ("cula_decode", (12, 0)),
        ("flashinfer_decode", (9, 0)),
        ("flashinfer_prefill", (9, 0)),
    ],
)
def test_the_wrong_gpu_is_named(name, capability, monkeypatch, tmp_path):
    (tmp_path / "lib.so").touch()
    monkeypatch.setenv(flashkda_prefill.LIBRARY.variable, str(tmp_path / "lib.so"))
    monkeypatch.setattr(here, "missing_package", lambda packages, how: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert f"the GPU is sm_{capability[0]}{capability[1]}" in adapter(name).unsupported()


def test_flashkda_is_found_in_an_installed_vllm(monkeypatch, tmp_path):
    monkeypatch.delenv(flashkda_prefill.LIBRARY.variable, raising=False)
    spec = importlib.machinery.ModuleSpec("vllm", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: spec if package == "vllm" else None)
    assert "vllm has no _flashkda_C" in flashkda_prefill.unsupported()
    library = tmp_path / "_flashkda_C.abi3.so"
    library.write_bytes(b"not a library")
    assert flashkda_prefill.LIBRARY.file == str(library)
    with pytest.raises(UnavailableError, match="cannot be loaded"):
        flashkda_prefill.LIBRARY.load()
    monkeypatch.setenv(flashkda_prefill.LIBRARY.variable, str(tmp_path / "other.so"))
    assert "there is no such file" in flashkda_prefill.unsupported()


def test_a_package_that_breaks_at_its_import_is_a_reason(monkeypatch, tmp_path):
    (tmp_path / "broken_peer.py").write_text("raise OSError('libfoo.so.1: not found')\n")
    monkeypatch.syspath_prepend(tmp_path)
    expected = "broken_peer cannot be imported: OSError: libfoo.so.1: not found"
    assert here.not_loadable(("not_there_at_all", "broken_peer")) == expected


def test_parameters_are_converted_once():
    A_log = torch.rand(4).bfloat16()
    first = given.parameter(A_log, torch.float32)
    assert torch.equal(first, A_log.float())
    assert given.parameter(A_log, torch.float32) is first
    A_log.add_(1)
    assert torch.equal(given.parameter(A_log, torch.float32), A_log.float())
    assert given.parameter(A_log, torch.bfloat16) is A_log


# --- stand-ins


class Bits:
    """The oracle on the tensors that a stand-in received."""

    def __init__(self, q, k, v, g, beta, **fields):
        self.inputs = Inputs(q, k, v, g, beta, **fields)

    def run(self) -> Outputs:
        return recurrence(self.inputs)


def flashkda_fwd(
    q, k, v, g, beta, scale, out, workspace, A_log, dt_bias, lower_bound, initial_state=None, final_state=None,
    cu_seqlens=None, checkpoint_state=None, checkpoint_offsets=None,
):  # fmt: skip
    """With the checks of csrc/flash_kda.cpp."""
    assert all(x.is_contiguous() and x.dtype == torch.bfloat16 for x in (q, k, v, g, out))
    assert k.shape == v.shape == g.shape == out.shape == q.shape
    assert q.shape[-1] == 128
    assert A_log.dtype == dt_bias.dtype == torch.float32
    assert A_log.shape == (q.shape[2],)
    assert dt_bias.shape == (q.shape[2], 128)
    assert workspace.dtype == torch.uint8
    assert workspace.numel() == 1000 * q.shape[0] * q.shape[1]
    assert -5 <= lower_bound < 0
    for state in (initial_state, final_state):
        assert state is None or state.is_contiguous()
    if initial_state is not None and final_state is not None:
        assert initial_state.dtype == final_state.dtype
        assert initial_state.data_ptr() != final_state.data_ptr()
    options = Options(Gate.SAFE, lower_bound, scale=scale)
    got = Bits(
        q, k, v, g, beta, options=options, A_log=A_log, dt_bias=dt_bias, state=initial_state, cu_seqlens=cu_seqlens
    )
    result = got.run()
    out.copy_(result.o)
    if final_state is not None:
        final_state.copy_(result.final_state)


def cudnn_op(
    q, k, v, g, beta, cu_seqlens, scale=None, initial_state=None, output_final_state=False,
    use_qk_l2norm_in_kernel=False, batch_invariant=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False,
    safe_gate=False, gate_lower_bound=None, gate_domain="log", a_log=None, dt_bias=None, checkpoint_every_n_tokens=0,
    checkpoint_dtype=None, plan_name=None, overwrite_initial_state=False, state_indices=None,
):  # fmt: skip
    """With the checks of the op and of the engine's check_support."""
    assert plan_name == "kda_hopper_cuda"
    assert q.dim() == k.dim() == v.dim() == g.dim() == 3
    assert beta.dtype in (torch.float32, q.dtype)
    assert cu_seqlens.dtype in (torch.int32, torch.int64)
    assert (a_log is not None) == (dt_bias is not None) == safe_gate
    options = Options(
        Gate.SAFE if safe_gate else Gate.NONE, gate_lower_bound, use_beta_sigmoid_in_kernel, allow_neg_eigval,
        use_qk_l2norm_in_kernel, scale,
    )  # fmt: skip
    got = Bits(
        *(x.unsqueeze(0) for x in (q, k, v, g, beta)), options=options, A_log=a_log, dt_bias=dt_bias,
        state=initial_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    result = got.run()
    dtype = torch.float32 if initial_state is None else initial_state.dtype
    final = result.final_state.to(dtype) if output_final_state else torch.empty(0, dtype=dtype)
    return result.o[0].to(q.dtype), final


def sglang_update(
    A_log, dt_bias, q, k, v, a, b, initial_state_source, initial_state_indices, cu_seqlens=None, scale=None,
    use_qk_l2norm_in_kernel=True, softplus_beta=1.0, softplus_threshold=20.0,
):  # fmt: skip
    """With what it is compiled with."""
    assert A_log.dtype == initial_state_source.dtype == torch.float32
    assert all(x.dtype == torch.bfloat16 for x in (dt_bias, q, k, v, a, b))
    assert initial_state_indices.dtype == torch.int32
    assert scale is None
    return _decode_in_place(q, k, v, a, b, SOFTPLUS, A_log, dt_bias, initial_state_source, initial_state_indices)


def sglang_packed(
    mixed_qkv, a, b, A_log, dt_bias, scale, initial_state, out, ssm_state_indices, use_qk_l2norm_in_kernel=False,
    lower_bound=None,
):  # fmt: skip
    """With its checks."""
    N, (HV, V, K) = len(mixed_qkv), initial_state.shape[1:]
    assert a.shape == (N, HV * K)
    assert b.shape == (N, HV)
    assert all(x.stride(-1) == 1 for x in (mixed_qkv, a, b, A_log, dt_bias, initial_state))
    assert A_log.shape == (HV,)
    assert dt_bias.shape == (HV * K,)
    assert out.is_contiguous()
    assert out.shape == (N, 1, HV, V)
    options = Options(
        Gate.SOFTPLUS if lower_bound is None else Gate.SAFE, lower_bound, qk_l2norm=use_qk_l2norm_in_kernel, scale=scale
    )
    q, k, v = mixed_qkv.split(((mixed_qkv.shape[1] - HV * V) // 2,) * 2 + (HV * V,), dim=1)
    heads = (q.view(N, 1, -1, K), k.view(N, 1, -1, K), v.view(N, 1, HV, V), a.view(N, 1, HV, K), b.view(N, 1, HV))
    out.copy_(_decode_in_place(*heads, options, A_log, dt_bias, initial_state, ssm_state_indices))
    return out, initial_state


def sglang_convolution(
    x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None
):  # fmt: skip
    """One token of each sequence; -1 is padding, whose row is not written."""
    assert activation == "silu" and cache_seqlens is None
    out = torch.full_like(x, torch.nan)
    for n, slot in enumerate(conv_state_indices.tolist()):
        if slot >= 0:
            window = torch.cat([conv_state[slot], x[n, :, None].to(conv_state.dtype)], 1)
            sums = (window.float() * weight.float()).sum(1) + (0.0 if bias is None else bias.float())
            out[n] = torch.nn.functional.silu(sums).to(x.dtype)
            conv_state[slot] = window[:, 1:]
    return out


def sglang_gated_norm(
    x, g, weight, bias, activation="swish", residual=None, prenorm=False, residual_in_fp32=False, eps=1e-6
):
    assert (bias, residual, activation) == (None, None, "sigmoid")
    norm = GatedNorm(g, weight, eps)
    return gated_norm(x.float(), norm, g).to(x.dtype)


def sglang_chunk(
    q, k, v, g, beta, scale=None, initial_state=None, initial_state_indices=None, use_qk_l2norm_in_kernel=False,
    cu_seqlens=None, A_log=None, dt_bias=None, lower_bound=None, output_intermediate_states=False, track_state=None,
    track_chunk_idx=None, beta_is_raw=False, chunk_indices=None, chunk_offsets=None, **kwargs,
):  # fmt: skip
    """With what its kernels take for granted; like them, it writes the output over a contiguous v."""
    assert q.shape[0] == 1
    assert dt_bias is None or dt_bias.ndim == 1
    assert initial_state.stride()[1:] == initial_state[:1].contiguous().stride()[1:]
    gate = Gate.NONE if A_log is None else Gate.SOFTPLUS if lower_bound is None else Gate.SAFE
    options = Options(gate, lower_bound, beta_is_raw, qk_l2norm=use_qk_l2norm_in_kernel, scale=scale)
    got = Bits(
        q, k, v, g, beta, options=options, A_log=A_log, dt_bias=dt_bias, state=initial_state,
        state_indices=initial_state_indices, cu_seqlens=cu_seqlens,
    ).run()  # fmt: skip
    initial_state.copy_(got.final_state)
    return v.contiguous().copy_(got.o)


def cula_decode(
    A_log, dt_bias, q, k, v, a, b, initial_state_source, initial_state_indices, cu_seqlens=None, scale=None,
    use_qk_l2norm_in_kernel=True, softplus_beta=1.0, softplus_threshold=20.0, out=None, state_layout="vk",
):  # fmt: skip
    """With what it is compiled with."""
    assert A_log.dtype == dt_bias.dtype == initial_state_source.dtype == torch.float32
    assert dt_bias.shape == (v.shape[2], q.shape[3])
    assert initial_state_source.is_contiguous()
    assert initial_state_indices.dtype == torch.int32
    options = dataclasses.replace(SOFTPLUS, qk_l2norm=use_qk_l2norm_in_kernel, scale=scale)
    return _decode_in_place(
        q, k, v, a, b, options, A_log, dt_bias, initial_state_source, initial_state_indices, state_layout == "vk"
    )


def flashinfer_kda(
    q, k, v, g, beta, A_log=None, dt_bias=None, scale=None, initial_state=None, output_final_state=False,
    use_qk_l2norm_in_kernel=True, use_gate_in_kernel=False, lower_bound=None, cu_seqlens=None, ssm_state_indices=None,
    num_spec_tokens=None, num_accepted_tokens=None, output=None, initial_state_source=None, initial_state_indices=None,
    beta_is_logit=False,
):  # fmt: skip
    """With the checks of run_recurrent_kda and of the packed prefill."""
    assert q.shape[0] == 1
    assert all(x.dtype == torch.bfloat16 and x.is_contiguous() for x in (q, k, v, g, beta))
    assert cu_seqlens is not None
    assert initial_state is None or initial_state.dtype == torch.bfloat16
    if use_gate_in_kernel:
        assert A_log.dtype == dt_bias.dtype == torch.float32
    gate = Gate.NONE if not use_gate_in_kernel else Gate.SOFTPLUS if lower_bound is None else Gate.SAFE
    options = Options(gate, lower_bound, beta_is_logit, False, use_qk_l2norm_in_kernel, scale)
    if ssm_state_indices is None:
        got = Bits(
            q, k, v, g, beta, options=options, A_log=A_log, dt_bias=dt_bias, state=initial_state, cu_seqlens=cu_seqlens
        ).run()
        initial_state.copy_(got.final_state)
        return got.o.bfloat16(), None
    assert ssm_state_indices.dtype == torch.int32
    o = _decode_in_place(
        q, k, v, g, beta, options, A_log, dt_bias, initial_state, ssm_state_indices, cu_seqlens=cu_seqlens
    )
    return o, None


def _decode_in_place(q, k, v, g, beta, options, A_log, dt_bias, pool, indices, v_first=True, cu_seqlens=None):
    if cu_seqlens is None and q.shape[0] == 1:
        cu_seqlens = torch.arange(q.shape[1] + 1, dtype=torch.int32)
    got = Bits(
        q, k, v, g, beta, options=options, A_log=A_log, dt_bias=dt_bias, state=pool, state_indices=indices,
        cu_seqlens=cu_seqlens, state_v_first=v_first,
    ).run()  # fmt: skip
    pool.copy_(got.final_state)
    return got.o.to(v.dtype)


STAND_INS = {
    "cudnn_prefill": {"kimi_delta_attention": cudnn_op},
    "sglang_decode": {"cutedsl_fused_sigmoid_gating_kda_update": sglang_update},
    "sglang_packed_decode": {"fused_recurrent_kda_packed_decode": sglang_packed},
    "sglang_prefill": {"chunk_kda": sglang_chunk},
    "cula_decode": {"kda_decode": cula_decode},
    "flashinfer_decode": {"recurrent_kda": flashinfer_kda},
    "flashinfer_prefill": {"recurrent_kda": flashinfer_kda},
}

HANDED_OVER = [
    ("flashkda_prefill", {}),
    ("flashkda_prefill", {"seq_lens": (4, 4), "packed": False}),
    ("flashkda_prefill", {"initial_state": False}),
    ("flashkda_prefill", {"final_state": False}),
    ("flashkda_prefill", {"initial_state": False, "final_state": False}),
    ("flashkda_prefill", {"pool_slots": 5, "state_dtype": "bfloat16"}),
    ("flashkda_prefill", {"pool_slots": 5, "final_state": False}),
    ("flashkda_prefill", {"param_dtype": "float16", "options": dataclasses.replace(SAFE, scale=0.5, lower_bound=-1.0)}),
    ("cudnn_prefill", {}),
    ("cudnn_prefill", {"seq_lens": (4, 4), "packed": False, "HV": 4}),
    ("cudnn_prefill", {"initial_state": False, "final_state": False}),
    ("cudnn_prefill", {"pool_slots": 5, "state_dtype": "bfloat16"}),
    ("cudnn_prefill", {"options": dataclasses.replace(NONE, beta_is_logit=False, qk_l2norm=False, scale=0.5)}),
    ("sglang_decode", {}),
    ("sglang_decode", {"packed": True, "HV": 4}),
    ("sglang_packed_decode", {}),
    ("sglang_packed_decode", {"packed": True, "HV": 4, "options": dataclasses.replace(SAFE, scale=0.5), "padding": 1}),
    ("sglang_prefill", {}),
    ("sglang_prefill", {"seq_lens": (4, 4), "packed": False, "initial_state": False}),
    ("sglang_prefill", {"pool_slots": 5, "state_dtype": "bfloat16", "options": SOFTPLUS}),
    ("sglang_prefill", {"options": dataclasses.replace(NONE, beta_is_logit=False, qk_l2norm=False, scale=0.5)}),
    ("cula_decode", {}),
    ("cula_decode", {"packed": True, "param_dtype": "bfloat16"}),
    ("cula_decode", {"state_v_first": False, "options": dataclasses.replace(SOFTPLUS, qk_l2norm=False, scale=0.5)}),
    ("flashinfer_decode", {}),
    ("flashinfer_decode", {"packed": True, "padding": 1, "options": dataclasses.replace(SAFE, beta_is_logit=False)}),
    ("flashinfer_decode", {"options": NONE}),
    ("flashinfer_prefill", {}),
    ("flashinfer_prefill", {"seq_lens": (4, 4), "packed": False, "pool_slots": 5}),
]  # fmt: skip


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(here.VllmLibrary, "load", lambda library: (flashkda_fwd, lambda T, H, N: 1000 * T))
    by_modules = {
        getattr(adapter(name), "MODULES", ("cudnn.linear_attention.ops",)): STAND_INS[name] for name in STAND_INS
    }
    monkeypatch.setattr(here, "load", lambda modules: types.SimpleNamespace(**by_modules[tuple(modules)]))


@pytest.mark.parametrize(("name", "change"), HANDED_OVER)
def test_what_an_adapter_hands_over_is_the_call(name, change, stand_ins):
    problem = problem_for(name, **{**TAKES[name], **change})
    assert adapter(name).CONTRACT.refusal(problem) is None
    inputs = make_inputs(problem, gates="init")
    before, expected = inputs.fresh(), recurrence(inputs)
    outputs = adapter(name).run(inputs)
    assert outputs.o.dtype == inputs.v.dtype
    torch.testing.assert_close(outputs.o.double(), expected.o, rtol=1e-2, atol=1e-3)
    assert (outputs.final_state is not None) == problem.final_state
    if problem.pool_slots is not None:
        assert outputs.final_state is None or outputs.final_state is inputs.state
        if problem.final_state:
            torch.testing.assert_close(
                inputs.state.double(), expected.final_state, rtol=1e-2, atol=1e-3, equal_nan=True
            )
        else:
            assert not torch.equal(inputs.state, before.state)
        return
    if before.state is not None:
        assert torch.equal(inputs.state, before.state)
    if problem.final_state:
        assert outputs.final_state.dtype == (torch.float32 if before.state is None else before.state.dtype)
        torch.testing.assert_close(outputs.final_state.double(), expected.final_state, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("parts", [Parts(width=4, bias=True), Parts(width=2, tokens_first=False, norm=False)], ids=str)
@pytest.mark.parametrize("packed", [True, False])
def test_sglangs_unfused_step_is_right_for_one_whose_convolution_rounds(parts, packed, monkeypatch):
    """In the layouts that the adapter hands over; padding included."""
    chain = adapter("sglang_chain")
    functions = {
        sglang_packed_decode.MODULES: {"fused_recurrent_kda_packed_decode": sglang_packed},
        chain.CONVOLUTION: {"causal_conv1d_update": sglang_convolution},
        chain.NORM: {"rms_norm_gated": sglang_gated_norm},
    }
    monkeypatch.setattr(here, "load", lambda modules: types.SimpleNamespace(**functions[modules]))
    problem = dataclasses.replace(DECODE, op=Op.STEP, packed=packed, padding=1, options=SAFE, K=64, V=64, parts=parts)
    assert chain.CONTRACT.refusal(problem) is None and chain.CONTRACT.rounded_convolution
    inputs = make_inputs(problem, gates="init")
    mine = inputs.fresh()
    outputs = pool_as_final_state(chain.run(mine), mine)
    assert all(torch.equal(getattr(mine, name), getattr(inputs, name)) for name in "qkvg")
    assert all(verdict.passed for verdict in judge(Reference(inputs, Op.STEP).granted(True), outputs))


@pytest.mark.parametrize("name", ["flashkda_prefill", "cudnn_prefill", "flashinfer_prefill"])
def test_a_raw_gate_without_bias_is_refused(name, stand_ins):
    inputs = make_inputs(problem_for(name, **TAKES[name]))
    with pytest.raises(InputError, match="dt_bias is missing"):
        adapter(name).run(dataclasses.replace(inputs, dt_bias=None))


def test_sglang_takes_slices_of_one_row_as_they_are():
    mixed = torch.arange(60.0).view(2, 30)[:, :28]
    q, k, v = (x[:, None].unflatten(2, (-1, 4)) for x in mixed.split((8, 8, 12), dim=1))
    assert sglang_packed_decode.side_by_side(q, k, v).data_ptr() == mixed.data_ptr()
    for parts in ((q, k, v), (k, q, v), (q.clone(), k, v)):
        assert torch.equal(sglang_packed_decode.side_by_side(*parts), torch.cat([x.flatten(1) for x in parts], dim=1))


RELEASED = [
    (sglang_update, "sglang/kernels/ops/attention/cutedsl_kda.py", "cutedsl_fused_sigmoid_gating_kda_update"),
    (sglang_packed, "sglang/kernels/ops/attention/fla/fused_recurrent.py", "fused_recurrent_kda_packed_decode"),
    (sglang_chunk, "sglang/kernels/ops/attention/fla/kda.py", "chunk_kda"),
    (sglang_convolution, "sglang/kernels/ops/mamba/causal_conv1d_triton.py", "causal_conv1d_update"),
    (sglang_gated_norm, "sglang/kernels/ops/attention/fla/fused_norm_gate.py", "rms_norm_gated"),
    (flashinfer_kda, "flashinfer/kda_decode.py", "recurrent_kda"),
    (flashinfer_kda, "flashinfer/kda.py", "recurrent_kda"),
]


@pytest.mark.parametrize(("stand_in", "path", "name"), RELEASED)
def test_stand_ins_have_the_signatures_of_the_released_functions(stand_in, path, name):
    """Or the first parameters of them: an adapter passes no other."""
    released = engine_sources.parameters(engine_sources.folder(path.partition("/")[0]).parent / path, name)
    assert (mine := list(inspect.signature(stand_in).parameters)) == released[: len(mine)]


def test_cula_refuses_a_pool_with_gaps(stand_ins):
    inputs = make_inputs(DECODE)
    pool = torch.zeros(10, *inputs.state.shape[1:])[::2]
    with pytest.raises(InputError, match="without gaps"):
        adapter("cula_decode").run(dataclasses.replace(inputs, state=pool))


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, one element off every alignment."""
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("sglang_decode", ("q", "beta", "dt_bias", "state")),
        ("cula_decode", ("q", "beta", "dt_bias", "state")),
        ("flashkda_prefill", ("q", "k", "v", "g", "beta", "dt_bias", "state")),
        ("cudnn_prefill", ("q", "k", "v", "dt_bias", "state")),
    ],
)
def test_unaligned_tensors_are_refused(name, tensors, stand_ins):
    """Each by its name: handed over, they would end the kernel's process."""
    inputs = make_inputs(problem_for(name, **TAKES[name]))
    for tensor in tensors:
        moved = dataclasses.replace(inputs, **{tensor: shifted(getattr(inputs, tensor))})
        with pytest.raises(InputError, match=f"^{tensor} is not aligned: .* multiple of 16 bytes"):
            adapter(name).run(moved)


@pytest.mark.parametrize("name", ["flashkda_prefill", "cudnn_prefill"])
def test_what_is_copied_anyway_may_lie_anywhere(name, stand_ins):
    """Pools are gathered, narrow parameters widened, strided tokens packed."""
    inputs = make_inputs(problem_for(name, **{**TAKES[name], "pool_slots": 5, "param_dtype": "bfloat16"}))
    wide = torch.zeros(*inputs.q.shape[:-1], inputs.q.shape[-1] + 1, dtype=inputs.q.dtype)
    q = wide[..., 1:].copy_(inputs.q)
    moved = dataclasses.replace(inputs, q=q, dt_bias=shifted(inputs.dt_bias), state=shifted(inputs.state))
    assert torch.equal(adapter(name).run(moved).o, adapter(name).run(inputs.fresh()).o)


def test_nothing_of_a_peer_is_imported_to_ask_about_it():
    for name in ADAPTERS:
        adapter(name).unsupported(problem_for(name, **TAKES[name]))
    assert not {"vllm", "sglang", "flashinfer", "cula"} & set(sys.modules)
