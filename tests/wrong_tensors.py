"""Calls of the decode kernel that have one tensor wrong: a change of good inputs, and the argument that it is about."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from kda_kernels.tensors import Inputs


class Wrong(NamedTuple):
    """argument: what the message has to begin with. change: from good inputs to fields of them that are not."""

    argument: str
    change: Callable[[Inputs], dict[str, Any]]


def _strided(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


def _elsewhere(x: torch.Tensor) -> torch.Tensor:
    return x.cpu() if x.is_cuda else x.to("meta")


def _overlapping(state: torch.Tensor) -> torch.Tensor:
    return state.as_strided(state.shape, (state.stride(0) // 2, *state.stride()[1:]))


def _misaligned(state: torch.Tensor) -> torch.Tensor:
    memory = torch.zeros(state.numel() + 4, dtype=state.dtype, device=state.device)
    return memory[1:][: state.numel()].view(state.shape)


DENSE = {
    "q of integers": Wrong("q", lambda x: {"q": x.q.int()}),
    "q without a batch": Wrong("q", lambda x: {"q": x.q[0]}),
    "q flat": Wrong("q", lambda x: {"q": x.q.flatten()}),
    "q no tensor": Wrong("q", lambda x: {"q": x.q.tolist()}),
    "q strided": Wrong("q", lambda x: {"q": _strided(x.q)}),
    "k in another dtype": Wrong("k", lambda x: {"k": x.k.float()}),
    "k with other heads": Wrong("k", lambda x: {"k": x.k[:, :, :1]}),
    "k elsewhere": Wrong("k", lambda x: {"k": _elsewhere(x.k)}),
    "v elsewhere": Wrong("v", lambda x: {"v": _elsewhere(x.v)}),
    "v flat": Wrong("v", lambda x: {"v": x.v.flatten()}),
    "v of other tokens": Wrong("v", lambda x: {"v": x.v.repeat(1, 2, 1, 1)}),
    "v of another batch": Wrong("v", lambda x: {"v": x.v[:1]}),
    "v with other heads": Wrong("g", lambda x: {"v": x.v[:, :, :2]}),  # q and v say what g has to be
    "v strided": Wrong("v", lambda x: {"v": _strided(x.v)}),
    "g elsewhere": Wrong("g", lambda x: {"g": _elsewhere(x.g)}),
    "g of q's heads": Wrong("g", lambda x: {"g": x.g[:, :, :2]}),
    "g strided": Wrong("g", lambda x: {"g": _strided(x.g)}),
    "g in float64": Wrong("g", lambda x: {"g": x.g.double()}),
    "beta elsewhere": Wrong("beta", lambda x: {"beta": _elsewhere(x.beta)}),
    "beta of q's heads": Wrong("beta", lambda x: {"beta": x.beta[:, :, :2]}),
    "beta in 4 dimensions": Wrong("beta", lambda x: {"beta": x.beta[..., None]}),
    "beta in float64": Wrong("beta", lambda x: {"beta": x.beta.double()}),
    "A_log elsewhere": Wrong("A_log", lambda x: {"A_log": _elsewhere(x.A_log)}),
    "A_log missing": Wrong("A_log", lambda x: {"A_log": None}),
    "A_log short": Wrong("A_log", lambda x: {"A_log": x.A_log[:1]}),
    "A_log strided": Wrong("A_log", lambda x: {"A_log": _strided(x.A_log)}),
    "A_log no tensor": Wrong("A_log", lambda x: {"A_log": x.A_log.tolist()}),
    "dt_bias elsewhere": Wrong("dt_bias", lambda x: {"dt_bias": _elsewhere(x.dt_bias)}),
    "dt_bias short": Wrong("dt_bias", lambda x: {"dt_bias": x.dt_bias[:1]}),
    "dt_bias K first": Wrong("dt_bias", lambda x: {"dt_bias": x.dt_bias.T.contiguous()}),
    "dt_bias transposed": Wrong("dt_bias", lambda x: {"dt_bias": x.dt_bias.T}),
    "dt_bias strided": Wrong("dt_bias", lambda x: {"dt_bias": _strided(x.dt_bias)}),
    "dt_bias no tensor": Wrong("dt_bias", lambda x: {"dt_bias": x.dt_bias.tolist()}),
    "state in float64": Wrong("state", lambda x: {"state": x.state.double()}),
    "state of other heads": Wrong("state", lambda x: {"state": x.state[:, :2]}),
    "state of one sequence": Wrong("state", lambda x: {"state": x.state[0]}),
    "state transposed": Wrong("state", lambda x: {"state": x.state.transpose(2, 3)}),
    "state of slots that overlap": Wrong("state", lambda x: {"state": _overlapping(x.state)}),
    "state elsewhere": Wrong("state", lambda x: {"state": _elsewhere(x.state)}),
    "state missing": Wrong("state_indices", lambda x: {"state": None}),
    "state_indices of floats": Wrong("state_indices", lambda x: {"state_indices": x.state_indices.float()}),
    "state_indices in 2 dimensions": Wrong("state_indices", lambda x: {"state_indices": x.state_indices[:, None]}),
    "state_indices a number": Wrong("state_indices", lambda x: {"state_indices": x.state_indices[0]}),
    "state_indices short": Wrong("state_indices", lambda x: {"state_indices": x.state_indices[:2]}),
    "state_indices no tensor": Wrong("state_indices", lambda x: {"state_indices": x.state_indices.tolist()}),
    "state_indices elsewhere": Wrong("state_indices", lambda x: {"state_indices": _elsewhere(x.state_indices)}),
    "cu_seqlens of a dense batch": Wrong("q", lambda x: {"cu_seqlens": torch.arange(4, device=x.q.device)}),
}
PACKED = {
    "state_indices short": Wrong("state_indices", lambda x: {"state_indices": x.state_indices[:2]}),
    "cu_seqlens of floats": Wrong("cu_seqlens", lambda x: {"cu_seqlens": x.cu_seqlens.float()}),
    "cu_seqlens in 2 dimensions": Wrong("cu_seqlens", lambda x: {"cu_seqlens": x.cu_seqlens[:, None]}),
    "cu_seqlens a number": Wrong("cu_seqlens", lambda x: {"cu_seqlens": x.cu_seqlens[0]}),
    "cu_seqlens empty": Wrong("cu_seqlens", lambda x: {"cu_seqlens": x.cu_seqlens[:0]}),
    "cu_seqlens strided": Wrong("cu_seqlens", lambda x: {"cu_seqlens": _strided(x.cu_seqlens)}),
    "cu_seqlens no tensor": Wrong("cu_seqlens", lambda x: {"cu_seqlens": x.cu_seqlens.tolist()}),
    "cu_seqlens elsewhere": Wrong("cu_seqlens", lambda x: {"cu_seqlens": _elsewhere(x.cu_seqlens)}),
    "a batch of two": Wrong("q", lambda x: {name: getattr(x, name).repeat(2, *[1] * (getattr(x, name).ndim - 1))
                                            for name in ("q", "k", "v", "g", "beta")}),
}  # fmt: skip
# without a pool: the state of each sequence
PLAIN = {
    "a state too many": Wrong("state", lambda x: {"state": x.state.repeat(2, 1, 1, 1)}),
    "a state too few": Wrong("state", lambda x: {"state": x.state[:1]}),
}
# what CuTe's kernel has no code for, though it would be right elsewhere
NOT_CUTE = {
    "state misaligned": Wrong("cute-decode: a slot of the state", lambda x: {"state": _misaligned(x.state)}),
    "state K first": Wrong("cute-decode: the state is K-first", lambda x: {"state_v_first": False}),
}


def apply(wrong: Wrong, inputs: Inputs) -> Inputs:
    return dataclasses.replace(inputs, **wrong.change(inputs))


def message(wrong: Wrong) -> str:
    return rf"^{wrong.argument}\b"


class Buffer(NamedTuple):
    """argument: of `decode`. make: from the inputs to a tensor that cannot serve as it."""

    argument: str
    make: Callable[[Inputs], torch.Tensor]


def _token_states(x: Inputs, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return x.state.new_empty((*x.q.shape[:2], *x.state.shape[1:]), dtype=dtype)


BUFFERS = {
    "out in float32": Buffer("out", lambda x: torch.empty_like(x.v, dtype=torch.float32)),
    "out of another shape": Buffer("out", lambda x: torch.empty_like(x.v)[:, :, :1]),
    "out strided": Buffer("out", lambda x: _strided(torch.empty_like(x.v))),
    "out elsewhere": Buffer("out", lambda x: _elsewhere(x.v)),
    "token_states in float64": Buffer("token_states", lambda x: _token_states(x, torch.float64)),
    "token_states of other tokens": Buffer("token_states", lambda x: _token_states(x).repeat(1, 2, 1, 1, 1)),
    "token_states transposed": Buffer("token_states", lambda x: _token_states(x).transpose(3, 4)),
    "token_states elsewhere": Buffer("token_states", lambda x: _elsewhere(_token_states(x))),
}
