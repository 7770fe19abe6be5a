"""Brings the shapes that engines dump into the ones of `kda_kernels.tensors.Inputs`, and says what it did.

Only changes that cannot be wrong are made: dimensions of size 1 are added or dropped, and a merged [.., HV * K] is
split. Anything else is left for the boundary check to refuse.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kda_kernels.errors import InputError
from kda_kernels.tensor_checks import FLOAT_DTYPES

Tensors = dict[str, torch.Tensor]

# What torch can compare and convert, more than any argument may be: the boundary check is the one to choose among them.
_DTYPES = (
    *FLOAT_DTYPES,
    *(torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def usable(name: str, value: Any) -> torch.Tensor:
    """`value`, if it is a tensor of a type that some kernel takes.

    Raises:
        InputError: it is not.
    """
    if not isinstance(value, torch.Tensor):
        raise InputError(f"{name} is a {type(value).__name__}: it should be a tensor")
    if value.dtype not in _DTYPES:
        raise InputError(f"{name} is {str(value.dtype).removeprefix('torch.')}: no kernel takes that type")
    return value.detach()


def fit(name: str, tensor: torch.Tensor, shape: Sequence[int], notes: list[str]) -> torch.Tensor:
    """`tensor` in `shape` if it only differs by dimensions of size 1 or by merged last two; else as it is."""
    shape = tuple(shape)
    if tuple(tensor.shape) == shape or tensor.numel() == 0:
        return tensor
    core = [n for n in tensor.shape if n != 1]
    merged = (*shape[:-2], shape[-2] * shape[-1]) if len(shape) > 1 else shape
    if core not in ([n for n in shape if n != 1], [n for n in merged if n != 1]):
        return tensor
    notes.append(f"{name} has shape {list(tensor.shape)}: taken as {list(shape)}")
    return tensor.reshape(shape)


def normalise(tensors: Mapping[str, torch.Tensor], notes: list[str]) -> Tensors:
    """Every input in the number of dimensions that `Inputs` wants, plus cu_seqlens where one token each is meant."""
    out = dict(tensors)
    qkv = {name: out[name] for name in ("q", "k", "v")}
    if any(t.ndim == 3 for t in qkv.values()):
        if any(t.ndim != 3 for t in qkv.values()):
            told = ", ".join(f"{name} {list(t.shape)}" for name, t in qkv.items())
            raise InputError(f"q, k and v are {told}: all should be [B, T, heads, size], or all without B")
        notes.append("q, k and v have no batch dimension: taken as a packed batch, B = 1")
        out.update({name: t.unsqueeze(0) for name, t in qkv.items()})
    for name in qkv:
        if out[name].ndim != 4:
            raise InputError(f"{name} has shape {list(out[name].shape)}: it should be [B, T, heads, size]")
    B, T, _, K = out["q"].shape
    HV, V = out["v"].shape[2:]
    for name, shape in {"g": (B, T, HV, K), "beta": (B, T, HV), "A_log": (HV,)}.items():
        if name in out:
            out[name] = fit(name, out[name], shape, notes)
    if "dt_bias" in out and out["dt_bias"].ndim != 1:
        out["dt_bias"] = fit("dt_bias", out["dt_bias"], (HV, K), notes)
    if "rounding_seed" in out:
        out["rounding_seed"] = fit("rounding_seed", out["rounding_seed"], (1,), notes)
    if "state" in out and out["state"].ndim == 3:
        notes.append(f"state has shape {list(out['state'].shape)}: taken as that of one sequence")
        out["state"] = out["state"].unsqueeze(0)
    return _one_token_each(out, B, T, notes)


def _one_token_each(tensors: Tensors, B: int, T: int, notes: list[str]) -> Tensors:
    """Packed decode [1, N, H, K] often comes without cu_seqlens; the number of states tells it apart."""
    per_sequence = tensors.get("state_indices", tensors.get("state"))
    if "cu_seqlens" in tensors or per_sequence is None or per_sequence.ndim < 1 or B != 1:
        return tensors
    if T > 1 and per_sequence.shape[0] == T:
        notes.append(f"cu_seqlens is not given: one token for each of the {T} states")
        return {**tensors, "cu_seqlens": torch.arange(T + 1, dtype=torch.int32)}
    return tensors
