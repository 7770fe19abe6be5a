"""The outputs that a dump recorded, in the shapes of `kda_kernels.tensors.Outputs`."""

from collections.abc import Mapping
from typing import Any

import torch

from kda_kernels.errors import InputError
from kda_kernels.problem import Op
from kda_kernels.tensor_checks import FLOAT_DTYPES
from kda_kernels.tensors import Dims, Inputs, Outputs
from kdacli.dumps.shapes import fit, usable


def build_outputs(
    found: Mapping[str, tuple[str, Any]], inputs: Inputs, dims: Dims, op: Op, notes: list[str]
) -> Outputs | None:
    """What the dumping engine computed; None if the dump does not hold o.

    Raises:
        InputError: an output is no usable tensor or has a shape that does not belong to `inputs`.
    """
    tensors = {key: _float(name, usable(name, value), key) for key, (name, value) in found.items()}
    if "o" not in tensors:
        if tensors:
            notes.append(f"{' and '.join(tensors)} not used, since there is no o beside them")
        return None
    channels = dims.K if op is Op.GATE else dims.V
    o = _shaped("o", tensors["o"], (dims.B, dims.T, dims.HV, channels), notes)
    if (state := tensors.get("final_state")) is not None:
        _check_scales(state, tensors.get("state_scales"), inputs)
        state = _final_state("final_state", state, inputs.state, inputs.state_shape(1)[1:], inputs, notes)
        if (scales := tensors.get("state_scales")) is not None:
            tensors["state_scales"] = _final_state(
                "state_scales", scales, inputs.state_scales, inputs.state_shape(1)[1:3], inputs, notes
            )
    into = {
        "token_states": inputs.token_states,
        "checkpoints": None if inputs.checkpoints is None else inputs.checkpoints.states,
        "conv_states": None if inputs.conv is None else inputs.conv.states,
        "state_scales": inputs.state_scales,
    }
    written = {
        name: _shaped(name, tensors[name], tuple(room.shape), notes)
        for name, room in into.items()
        if name in tensors and room is not None
    }
    return Outputs(o, state, **written)


def _float(name: str, tensor: torch.Tensor, key: str) -> torch.Tensor:
    if tensor.dtype not in {*FLOAT_DTYPES, torch.float64, *([torch.int16] if key == "final_state" else [])}:
        raise InputError(
            f"{name} is {tensor.dtype}: it should be a floating type of 16 bits or more".replace("torch.", "")
        )
    return tensor


def _shaped(name: str, tensor: torch.Tensor, shape: tuple[int, ...], notes: list[str]) -> torch.Tensor:
    tensor = fit(name, tensor, shape, notes)
    if tuple(tensor.shape) != shape:
        raise InputError(f"{name} has shape {list(tensor.shape)}: it should be {list(shape)}, from the inputs")
    return tensor


def _check_scales(state: torch.Tensor, scales: torch.Tensor | None, inputs: Inputs) -> None:
    """Integers have scales, and stand for states in the same form before the call."""
    integers = state.dtype is torch.int16
    if integers != (scales is not None) or integers != (inputs.state_scales is not None):
        have = ["no state_scales" if x is None else "state_scales" for x in (inputs.state_scales, scales)]
        found = f"is {str(state.dtype).removeprefix('torch.')} with {have[0]} before the call and {have[1]} after it"
        raise InputError("final_state", found, "a pool in int16 should be int16 with scales both before and after")


def _final_state(
    name: str,
    state: torch.Tensor,
    before: torch.Tensor | None,
    inner: tuple[int, ...],
    inputs: Inputs,
    notes: list[str],
) -> torch.Tensor:
    """Of the final state of each sequence, or the whole pool, as it was after the call.

    Args:
        name: of `state`: final_state, or state_scales. before: the same before the call. inner: its shape, of one slot.
    """
    N = inputs.N
    if before is not None and _same_memory(state, before):
        raise InputError(
            f"{name} is the same memory as {'state' if name == 'final_state' else name}: it was dumped after the call,"
            " clone it before"
        )
    if inputs.state_indices is None or before is None:
        return _shaped(name, state, (N, *inner), notes)
    indices, slots = inputs.state_indices, before.shape[0]
    if indices.ndim != 1 or tuple(state.shape) != (N, *inner) or slots == N:
        return _shaped(name, state, (slots, *inner), notes)
    notes.append(f"{name} holds one state for each sequence: set into a copy of the pool at state_indices")
    pool = before.to(state.dtype, copy=True)
    indices = indices[:N].long()
    used = indices >= 0 if inputs.null_slot is None else (indices >= 0) & (indices != inputs.null_slot)
    pool[indices[used]] = state[used]
    return pool


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.numel() > 0 and a.data_ptr() == b.data_ptr()
