"""Where the states of a call go: to which rows of which tensor, after how many tokens of which sequence."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from kda_kernels.checks import loaded_slots, seq_lens
from kda_kernels.feature_checks import stored_slots
from kda_kernels.reference.batch import Batch, load_states, prepare
from kda_kernels.reference.fused import gated_norm, shifted_states
from kda_kernels.reference.recurrent import After
from kda_kernels.reference.stored import pool_values, stored
from kda_kernels.tensors import Inputs, Outputs

Recurrence = Callable[[Batch, torch.Tensor, After], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Target:
    """The state of a sequence after so many of its tokens, and an index of a tensor."""

    sequence: int
    tokens: int
    index: tuple[int, ...]


def targets(inputs: Inputs, lens: list[int]) -> dict[str, list[Target]]:
    """By field of `Outputs`, in the order of sequences and tokens. Of checked inputs, whose `lens` are given.

    Checkpoints that go to the pool are there under final_state. final_state is there whether it was asked for or not;
    of a pool that is not updated, empty.
    """
    slots = range(inputs.N) if inputs.state_indices is None else loaded_slots(inputs)
    live = [n for n, slot in enumerate(slots) if slot >= 0]
    found = {"final_state": _finals(inputs, lens)}
    if inputs.token_states is not None:
        rows, start, indices = [], 0, inputs.token_state_indices
        first = range(inputs.N) if indices is None else indices.tolist()
        for n, length in enumerate(lens):
            packed = indices is None and inputs.cu_seqlens is not None
            if n in live and first[n] >= 0:
                rows += [Target(n, t + 1, (0, start + t) if packed else (first[n], t)) for t in range(length)]
            start += length
        found["token_states"] = rows
    if (kept := inputs.checkpoints) is not None:
        into = "final_state" if kept.states is inputs.state else "checkpoints"
        columns = kept.rows.view(len(kept.rows), -1).tolist()
        offsets = (
            [[(j + 1) * (kept.every or 0) for j in range(len(row))] for row in columns]
            if kept.offsets is None
            else kept.offsets.view(len(kept.rows), -1).tolist()
        )
        found.setdefault(into, [])
        for n in live:
            at = zip(offsets[n], columns[n], strict=True)
            found[into] += [Target(n, tokens, (row,)) for tokens, row in at if row >= 0 and 0 < tokens <= lens[n]]
    return {name: sorted(every, key=lambda t: (t.sequence, t.tokens)) for name, every in found.items()}


def _finals(inputs: Inputs, lens: list[int]) -> list[Target]:
    """The final states, or, with num_accepted_tokens, those after each token: of two in one slot the later."""
    if inputs.state_indices is None:
        return [Target(n, length, (n,)) for n, length in enumerate(lens)]
    if not inputs.update_state:
        return []
    each = inputs.num_accepted_tokens is not None
    by_slot = {
        slot: Target(n, t + 1 if each else lens[n], (slot,))
        for n, stored in enumerate(stored_slots(inputs, lens))
        for t, slot in enumerate(stored)
        if slot >= 0
    }
    return list(by_slot.values())


class Snapshots:
    """The states of sequences after some of their tokens, taken while a recurrence goes through a batch.

    Args:
        asked: (number of the sequence, tokens of it). Of what the batch does not run nothing is found.
    """

    def __init__(self, batch: Batch, asked: set[tuple[int, int]]) -> None:
        rows = {sequence.number: row for row, sequence in enumerate(batch.sequences)}
        self.found: dict[tuple[int, int], torch.Tensor] = {}  # [HV, V, K]
        self._wanted: dict[int, list[tuple[int, tuple[int, int]]]] = {}
        for number, tokens in sorted(asked):
            if number in rows and tokens:
                self._wanted.setdefault(tokens, []).append((rows[number], (number, tokens)))

    def after(self, tokens: int, running: torch.Tensor) -> None:
        """What a recurrence calls as it goes."""
        for row, key in self._wanted.pop(tokens, ()):
            self.found[key] = running[row].clone()

    def end(self, states: torch.Tensor) -> dict[tuple[int, int], torch.Tensor]:
        """All of them, once it is through: sequences may have ended inside a chunk."""
        for left in self._wanted.values():
            self.found |= {key: states[row] for row, key in left}
        return self.found


def store(
    inputs: Inputs,
    every: dict[str, list[Target]],
    states: dict[tuple[int, int], torch.Tensor],
    o: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
) -> Outputs:
    """The outputs of a call, its states in the layout of `inputs`; a sequence with no tokens keeps the state it had.

    Args:
        every: `targets`. states: by sequence and tokens.
        dtype: of states, which go to copies; None: they are written where `inputs` say, and a plain final state is in
            the dtype of the incoming one, fp32 where there is none.
    """
    kept = inputs.checkpoints
    where = {"token_states": inputs.token_states, "checkpoints": None if kept is None else kept.states}
    given = {name: t for name in every if (t := where.get(name)) is not None}
    made: dict[str, Any] = {n: t if dtype is None else t.to(dtype, copy=True) for n, t in given.items()}
    made["final_state"] = _room(inputs, dtype)
    seed = None if inputs.rounding_seed is None else int(inputs.rounding_seed)
    slots = range(inputs.N) if inputs.state_indices is None else loaded_slots(inputs)
    for name, tensor in made.items():
        for target in every[name]:
            if (state := states.get((target.sequence, target.tokens))) is not None:
                if dtype is None:
                    state, scales = stored(state, tensor.dtype, seed, slots[target.sequence], target.tokens - 1)
                    if scales is not None:
                        assert inputs.state_scales is not None
                        inputs.state_scales[target.index] = scales
                tensor[target.index] = (state if inputs.state_v_first else state.mT).to(tensor.dtype)
    if not inputs.output_final_state:
        del made["final_state"]
    return Outputs(o, **made, state_scales=inputs.state_scales if dtype is None else None)


def _room(inputs: Inputs, dtype: torch.dtype | None) -> torch.Tensor:
    """The final states before a call."""
    pooled, state = inputs.state_indices is not None, inputs.state
    if state is None:
        return inputs.new_final_state().zero_().to(dtype or torch.float32)
    if pooled and dtype is None:
        return state
    state = pool_values(inputs, dtype or state.dtype)
    if not pooled and inputs.has_initial_state is not None:
        state[~inputs.has_initial_state] = 0.0
    return state


def run_batch(inputs: Inputs, dtype: torch.dtype, run: Recurrence, *, exact: bool = False) -> Outputs:
    """All of a call, in `dtype`, by the token recurrence or the chunk form.

    Args:
        exact: o and states (but those of a convolution) stay in `dtype`, and nothing of `inputs` is written; else o is
            rounded to the dtype of v, a state once, to its own, and pools are updated in place.

    Raises:
        InputError: see `check_inputs`.
    """
    inputs = inputs.without_spare_slots()
    batch = prepare(inputs, dtype)
    every, states = targets(inputs, seq_lens(inputs, batch.dims)), load_states(inputs, batch)
    snapshots = Snapshots(batch, {(t.sequence, t.tokens) for one in every.values() for t in one})
    o = run(batch, states, snapshots.after)
    if (norm := inputs.norm) is not None:
        rows = batch.index([row for s in batch.sequences for row in range(s.start, s.start + s.length)])
        o[rows] = gated_norm(o[rows], norm, norm.gate.reshape(o.shape)[rows])
    o, found = o.view(inputs.v.shape), snapshots.end(states)
    made = store(inputs, every, found, o if exact else o.to(inputs.v.dtype), dtype=dtype if exact else None)
    if inputs.conv is not None:
        after = shifted_states(inputs, batch.dims)
        made.conv_states = after if exact else inputs.conv.states.copy_(after)
    return made
