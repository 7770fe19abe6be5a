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
    **dict.fromkeys(("q", "k", "v", "g", "beta", "o", "token_states"), 2),
    **dict.fromkeys(("A_log", "dt_bias"), 0),
    **dict.fromkeys(("state", "final_state", "state_scales"), 1),
}


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
    for part in parts[1:]:
        same = ("options", "state_v_first", "output_final_state", "update_state", "null_slot")
        if part.op is not first.op or any(getattr(part.inputs, x) != getattr(first.inputs, x) for x in same):
            raise InputError(f"--join: the ranks of call {name} were called with other options")
    for held in ("checkpoints", "conv", "norm"):
        if any(getattr(part.inputs, held) is not None for part in parts):
            raise InputError(f"--join: the ranks of call {name} hold {held}, which is not joined")
    inputs = dataclasses.replace(first.inputs, **_side_by_side(name, [part.inputs for part in parts]))
    recorded = [part.outputs for part in parts if part.outputs is not None]
    outputs = Outputs(**_side_by_side(name, recorded)) if len(recorded) == len(parts) else None
    notes = [*first.notes, f"the heads of {len(parts)} ranks, side by side"]
    return dataclasses.replace(first, inputs=inputs, outputs=outputs, notes=notes, call=name)


def _side_by_side(name: str, parts: Sequence[Inputs] | Sequence[Outputs]) -> dict[str, Any]:
    tensors = [part.tensors() for part in parts]
    joined: dict[str, Any] = {}
    for key in tensors[0]:
        if any(key not in one for one in tensors):
            raise InputError(f"--join: {key} of call {name} is not there on every rank")
        each = [one[key] for one in tensors]
        try:
            joined[key] = torch.cat(each, dim=_HEADS[key]) if key in _HEADS else each[0]
        except RuntimeError as error:  # other sizes beside the heads
            raise InputError(f"--join: {key} of call {name} has other sizes on its ranks") from error
        if key not in _HEADS and not all(torch.equal(one, each[0]) for one in each):
            raise InputError(f"--join: {key} of call {name} is not the same on every rank")
    return joined
