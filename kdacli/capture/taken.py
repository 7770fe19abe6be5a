"""Copies of a call's tensors on the CPU: all of its inputs before it runs, its outputs afterwards.

Every copy is made on the current stream and waited for, so the call sees what it would have seen. Of a state pool the
slots in use are copied, one after another and with no temporary memory on the GPU, and numbered anew; or all of it.
"""

from typing import Any

import torch

from kdacli.capture.arguments import Call
from kdacli.dumps.strides import copy_with_strides, extent

Tensors = dict[str, torch.Tensor]


def size(call: Call, whole_pool: bool) -> int:
    """Bytes that the dump of a call will take, roughly: its inputs, and outputs in the sizes of v and the state."""
    total, tensors = 0, call.tensors
    for name, tensor in tensors.items():
        count, times = extent(tensor), 1
        if name == "state" and call.pooled and not whole_pool:
            count = tensor[:1].numel() * tensors["state_indices"].numel()
        if name == "token_states":
            count = tensor[:1].numel() * len(tensors["token_state_indices"])
        if name == "v" or (name == "state" and call.writes_state):
            times = 2
        total += times * count * tensor.element_size()
    if "state" not in tensors and call.writes_state:
        q, v = tensors["q"], tensors["v"]
        sequences = len(tensors["cu_seqlens"]) - 1 if "cu_seqlens" in tensors else q.shape[0]
        total += 4 * sequences * v.shape[-2] * v.shape[-1] * q.shape[-1]
    return total


def before(call: Call, whole_pool: bool) -> tuple[Tensors, list[int] | None]:
    """The inputs, and which slots of the pool they hold (None: no pool, or all of it)."""
    large = ("state", "token_states")
    copies = {name: copy_with_strides(tensor) for name, tensor in call.tensors.items() if name not in large}
    slots = None
    if call.pooled and not whole_pool:
        slots, copies["state_indices"] = _numbered(copies["state_indices"])
        copies["state"] = _gather(call.tensors["state"], slots)
    elif "state" in call.tensors:
        copies["state"] = copy_with_strides(call.tensors["state"])
    if "token_states" in call.tensors:
        call.rows, copies["token_state_indices"] = _numbered(copies["token_state_indices"])
    return copies, slots


def after(call: Call, result: Any, slots: list[int] | None) -> Tensors:
    """o, final_state and token_states, as far as the call returned them or left them in place."""
    returned = [x for x in (result if isinstance(result, tuple | list) else [result]) if isinstance(x, torch.Tensor)]
    outputs = {}
    o = returned[0] if returned else call.out
    if o is not None:
        outputs["o"] = copy_with_strides(o.detach())
    if call.rows is not None:
        outputs["token_states"] = _gather(call.tensors["token_states"], call.rows)
    if not call.writes_state:
        return outputs
    if call.pooled:
        pool = call.tensors["state"]
        outputs["final_state"] = copy_with_strides(pool) if slots is None else _gather(pool, slots)
    elif len(returned) > 1 and returned[1].ndim == 4:
        outputs["final_state"] = copy_with_strides(returned[1].detach())
    return outputs


def _numbered(indices: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    """The slots that are used, in order, and the indices by their numbers there; -1 where padding was."""
    used = indices[indices >= 0].unique()
    numbers = torch.searchsorted(used, indices)
    return used.tolist(), torch.where(indices < 0, -1, numbers).to(indices.dtype)


def _gather(pool: torch.Tensor, slots: list[int]) -> torch.Tensor:
    out = torch.empty((len(slots), *pool.shape[1:]), dtype=pool.dtype)
    for i, slot in enumerate(slots):
        out[i].copy_(pool[slot])
    return out
