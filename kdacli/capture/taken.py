"""Copies of a call's tensors: all of its inputs before it runs, its outputs afterwards.

Every copy is made on the current stream, so the call sees what it would have seen. `OnHost` copies to the CPU and
waits: of a state pool the slots in use, one by one and with no temporary memory on the GPU, numbered anew; or all of
it.
"""

from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from kdacli.capture.arguments import Call
from kdacli.dumps.strides import copies, copy_with_strides, layout

Tensors = dict[str, torch.Tensor]
Kept = TypeVar("Kept")


POOLS = ("state", "conv_states", "state_scales")


class Recorded(NamedTuple):
    """A call as its dump holds it."""

    inputs: Tensors
    outputs: Tensors
    options: dict[str, Any]
    meta: dict[str, Any]


class Keeper(Protocol[Kept]):
    """How copies are kept: of whole tensors, and of those rows of a pool that indices name."""

    def whole(self, tensors: Tensors) -> dict[str, Kept]: ...

    def rows(self, pool: torch.Tensor, indices: torch.Tensor) -> Kept: ...


class OnHost:
    """Keeps copies on the CPU. `whole_pool`: of pools, too."""

    def __init__(self, whole_pool: bool) -> None:
        self.whole_pool = whole_pool

    def whole(self, tensors: Tensors) -> Tensors:
        return copies(tensors)

    def rows(self, pool: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        if self.whole_pool:
            return copy_with_strides(pool)
        slots = self.slots(indices)
        out = torch.empty((len(slots), *pool.shape[1:]), dtype=pool.dtype)
        for i, slot in enumerate(slots):
            out[i].copy_(pool[slot])
        return out

    def slots(self, indices: torch.Tensor) -> list[int]:
        """Those that are used, in order."""
        return indices[indices >= 0].unique().tolist()

    def numbered(self, indices: torch.Tensor) -> torch.Tensor:
        """The numbers that indices have among the slots that are kept; -1 where padding was."""
        if self.whole_pool:
            return indices
        numbers = torch.searchsorted(torch.tensor(self.slots(indices), dtype=indices.dtype), indices)
        return torch.where(indices < 0, -1, numbers).to(indices.dtype)


def size(call: Call, whole_pool: bool) -> int:
    """Bytes that the dump of a call will take, roughly: its inputs, and outputs in the sizes of v and the state."""
    total, tensors = 0, call.tensors
    for name, tensor in tensors.items():
        count, times = layout(tensor)[0], 1
        if name in POOLS and call.pooled and not whole_pool:
            count = tensor[:1].numel() * tensors["state_indices"].numel()
        if name == "token_states":
            count = tensor[:1].numel() * len(tensors["token_state_indices"])
        if name == "v" or (name in POOLS and call.writes_state):
            times = 2
        total += times * count * tensor.element_size()
    if "state" not in tensors and call.writes_state:
        q, v = tensors["q"], tensors["v"]
        sequences = len(tensors["cu_seqlens"]) - 1 if "cu_seqlens" in tensors else q.shape[0]
        total += 4 * sequences * v.shape[-2] * v.shape[-1] * q.shape[-1]
    return total


def before(call: Call, keeper: Keeper[Kept]) -> dict[str, Kept]:
    """The inputs; token_states and the states of checkpoints are outputs."""
    apart = {"token_states", "checkpoint_states"} | (set(POOLS) if call.pooled else set())
    kept = keeper.whole({name: tensor for name, tensor in call.tensors.items() if name not in apart})
    if call.pooled:
        for name in POOLS:
            if name in call.tensors:
                kept[name] = keeper.rows(call.tensors[name], call.tensors["state_indices"])
    return kept


def after(call: Call, result: Any, keeper: Keeper[Kept]) -> dict[str, Kept]:
    """What the call returned, and what it left in place."""
    returned = [x for x in (result if isinstance(result, tuple | list) else [result]) if isinstance(x, torch.Tensor)]
    tensors, whole = call.tensors, {}
    o = returned[0] if returned else call.out
    if o is not None:
        whole["o"] = o.detach()
    if call.writes_state and not call.pooled and len(returned) > 1 and returned[1].ndim == 4:
        whole["final_state"] = returned[1].detach()
    if "checkpoint_states" in tensors:
        whole["checkpoints"] = tensors["checkpoint_states"]
    kept = keeper.whole(whole)
    if "token_state_indices" in tensors:
        kept["token_states"] = keeper.rows(tensors["token_states"], tensors["token_state_indices"])
    if call.writes_state and call.pooled:
        kept["final_state"] = keeper.rows(tensors["state"], tensors["state_indices"])
    for name in ("conv_states", "state_scales"):
        if call.writes_state and call.pooled and name in tensors:
            kept[name] = keeper.rows(tensors[name], tensors["state_indices"])
    return kept
