"""Dumps of tensor-parallel ranks as the one call that they share: heads side by side, in the order of the ranks."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import torch

from kda_kernels.errors import InputError
from kda_kernels.tensors import Inputs, Outputs
from kdacli.dumps.load import Dump

_RANK = re.compile(r"rank(\d+)")
_HEADS = {  # the dimension of heads; other tensors are the same on every rank
    **dict.fromkeys(("q", "k", "v", "g", "beta", "o", "token_states", "norm.gate"), 2),
    **dict.fromkeys(("A_log", "dt_bias"), 0),
    **dict.fromkeys(("state", "final_state", "state_scales", "checkpoints.states", "checkpoints"), 1),
}
_CHANNELS = ("conv.weight", "conv.bias", "conv.states", "conv_states")  # a rank's q, its k and its v, side by side
_PARTS = ("checkpoints", "conv", "norm")  # of a call: objects with tensors of their own


def join(dumps: Sequence[Dump]) -> list[Dump]:
    """The calls of all ranks, joined, under the names that they have on rank 0.

    Raises:
        InputError: no name holds a rank (rank0, rank1, ..); a rank is missing, or ranks do not belong together.
    """
    groups: dict[str, dict[int, Dump]] = {}
    for dump in dumps:
        if (found := _RANK.search(dump.call)) is None:
            raise InputError(f"--join finds no rank in the name of call {dump.call}: it should hold rank0, rank1, ..")
        name = _RANK.sub("rank0", dump.call, count=1)
        groups.setdefault(name, {})[int(found[1])] = dump
    return [_joined(name, ranks) for name, ranks in groups.items()]


def _joined(name: str, ranks: dict[int, Dump]) -> Dump:
    if missing := set(range(max(ranks) + 1)) - ranks.keys():
        raise InputError(f"--join: rank {min(missing)} of call {name} is missing: it has {sorted(ranks)}")
    parts = [ranks[rank] for rank in sorted(ranks)]
    first = parts[0]
    if len(parts) == 1:
        return dataclasses.replace(first, call=name)
    if any(part.op is not first.op or _said(part.inputs) != _said(first.inputs) for part in parts):
        raise InputError(f"--join: the ranks of call {name} were called with other options")
    channels = _Channels.of([part.inputs for part in parts])
    inputs = _put(first.inputs, _side_by_side(name, [_tensors(part.inputs) for part in parts], channels))
    if inputs.conv is not None:
        inputs = _one_projection(inputs)
    recorded = [part.outputs.tensors() for part in parts if part.outputs is not None]
    outputs = Outputs(**_side_by_side(name, recorded, channels)) if len(recorded) == len(parts) else None
    notes = [*first.notes, f"the heads of {len(parts)} ranks, side by side"]
    return dataclasses.replace(first, inputs=inputs, outputs=outputs, notes=notes, call=name)


def _said(inputs: Inputs) -> list[Any]:
    """What a call was asked for, beside its tensors."""
    same = ("options", "state_v_first", "output_final_state", "update_state", "null_slot", "batch_invariant")
    said = [getattr(inputs, x) for x in same]
    for held in (getattr(inputs, part) for part in _PARTS):
        values = [] if held is None else vars(held).values()
        said.append(held is not None and [x for x in values if not isinstance(x, torch.Tensor)])
    return said


def _tensors(inputs: Inputs) -> dict[str, torch.Tensor]:
    """All of a call, those of its parts as "conv.weight"."""
    found = inputs.tensors()
    for part in _PARTS:
        held = getattr(inputs, part)
        for key, value in ({} if held is None else vars(held)).items():
            if isinstance(value, torch.Tensor):
                found[f"{part}.{key}"] = value
    return found


def _put(inputs: Inputs, tensors: dict[str, torch.Tensor]) -> Inputs:
    """A call with other tensors, named as in `_tensors`."""
    changed: dict[str, Any] = {key: value for key, value in tensors.items() if "." not in key}
    for part in _PARTS:
        own = {key.partition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{part}.")}
        if own:
            changed[part] = dataclasses.replace(getattr(inputs, part), **own)
    return dataclasses.replace(inputs, **changed)


def _one_projection(inputs: Inputs) -> Inputs:
    """A step with q, k and v as views of the rows that its kernels take."""
    tokens = (inputs.q, inputs.k, inputs.v)
    rows = torch.cat([x.flatten(2) for x in tokens], dim=2)
    parts = rows.split([x[0, 0].numel() for x in tokens], dim=2)
    q, k, v = (part.unflatten(2, x.shape[2:]) for part, x in zip(parts, tokens, strict=True))
    return dataclasses.replace(inputs, q=q, k=k, v=v)


@dataclasses.dataclass(frozen=True)
class _Channels:
    """Of a convolution: those of q, k and v on each rank, and the dimension of its states that holds them."""

    sizes: list[list[int]]
    dim: int

    @classmethod
    def of(cls, parts: Sequence[Inputs]) -> "_Channels":
        sizes = [[x.shape[2] * x.shape[3] for x in (part.q, part.k, part.v)] for part in parts]
        conv = parts[0].conv
        return cls(sizes, 2 if conv is not None and conv.tokens_first else 1)

    def joined(self, key: str, each: Sequence[torch.Tensor]) -> torch.Tensor:
        dim = self.dim if key in ("conv.states", "conv_states") else 0
        ranks = [tensor.split(sizes, dim) for tensor, sizes in zip(each, self.sizes, strict=True)]
        return torch.cat([rank[i] for i in range(3) for rank in ranks], dim)


def _side_by_side(
    name: str, tensors: Sequence[dict[str, torch.Tensor]], channels: _Channels
) -> dict[str, torch.Tensor]:
    joined: dict[str, torch.Tensor] = {}
    for key in tensors[0]:
        if any(key not in one for one in tensors):
            raise InputError(f"--join: {key} of call {name} is not there on every rank")
        each = [one[key] for one in tensors]
        try:
            if key in _CHANNELS:
                joined[key] = channels.joined(key, each)
            else:
                joined[key] = torch.cat(each, dim=_HEADS[key]) if key in _HEADS else each[0]
        except RuntimeError as error:  # other sizes beside the heads
            raise InputError(f"--join: {key} of call {name} has other sizes on its ranks") from error
        if key not in (*_HEADS, *_CHANNELS) and not all(torch.equal(one, each[0]) for one in each):
            raise InputError(f"--join: {key} of call {name} is not the same on every rank")
    return joined
