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
    tensors = {key: _float(name, usable(name, value)) for key, (name, value) in found.items()}
    if "o" not in tensors:
        if tensors:
            notes.append(f"{' and '.join(tensors)} not used, since there is no o beside them")
        return None
    channels = dims.K if op is Op.GATE else dims.V
    o = _shaped("o", tensors["o"], (dims.B, dims.T, dims.HV, channels), notes)
    if (state := tensors.get("final_state")) is not None:
        state = _final_state(state, inputs, dims, notes)
    into = {
        "token_states": inputs.token_states,
        "checkpoints": None if inputs.checkpoints is None else inputs.checkpoints.states,
        "conv_states": None if inputs.conv is None else inputs.conv.states,
    }
    written = {
        name: _shaped(name, tensors[name], tuple(room.shape), notes)
        for name, room in into.items()
        if name in tensors and room is not None
    }
    return Outputs(o, state, **written)


def _float(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype not in {*FLOAT_DTYPES, torch.float64}:
        raise InputError(
            f"{name} is {tensor.dtype}: it should be a floating type of 16 bits or more".replace("torch.", "")
        )
    return tensor


def _shaped(name: str, tensor: torch.Tensor, shape: tuple[int, ...], notes: list[str]) -> torch.Tensor:
    tensor = fit(name, tensor, shape, notes)
    if tuple(tensor.shape) != shape:
        raise InputError(f"{name} has shape {list(tensor.shape)}: it should be {list(shape)}, from the inputs")
    return tensor


def _final_state(state: torch.Tensor, inputs: Inputs, dims: Dims, notes: list[str]) -> torch.Tensor:
    """The final state of each sequence, or the whole pool as it was after the call."""
    inner = (dims.HV, dims.V, dims.K) if inputs.state_v_first else (dims.HV, dims.K, dims.V)
    if inputs.state is not None and _same_memory(state, inputs.state):
        raise InputError(
            "final_state is the same memory as state: the state was dumped after the call, clone it before"
        )
    if inputs.state_indices is None or inputs.state is None:
        return _shaped("final_state", state, (dims.N, *inner), notes)
    indices, slots = inputs.state_indices, inputs.state.shape[0]
    if indices.ndim != 1 or tuple(state.shape) != (dims.N, *inner) or slots == dims.N:
        return _shaped("final_state", state, (slots, *inner), notes)
    notes.append("final_state holds one state for each sequence: set into a copy of the pool at state_indices")
    pool = inputs.state.to(state.dtype, copy=True)
    indices = indices[: dims.N].long()
    used = indices >= 0 if inputs.null_slot is None else (indices >= 0) & (indices != inputs.null_slot)
    pool[indices[used]] = state[used]
    return pool


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.numel() > 0 and a.data_ptr() == b.data_ptr()
