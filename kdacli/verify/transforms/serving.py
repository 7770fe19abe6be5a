"""What engines pass beside the tensors of the operation: padding of every kind, drafts, checkpoints, buckets.

Each takes `Inputs` and returns new ones. Where nothing may be read there is NaN, and every row that nobody may write is
looked at afterwards.
"""

import dataclasses

import torch

from kda_kernels.errors import InputError
from kda_kernels.problem import CHUNK
from kda_kernels.serving import prefill_workspace_bytes
from kda_kernels.tensors import Checkpoints, Convolution, Inputs
from kdacli.judge.layout import Layout
from kdacli.synthetic import nothing

_NEGATIVE = (-1, -2, -100, -(2**31))
_SPARE = 2  # rows of a buffer that nobody uses


def any_negative(inputs: Inputs) -> Inputs:
    """Padding rows carry -2, -100 and so on, not -1 alone."""
    indices = _pool(inputs)[1].clone()
    padding = indices < 0
    values = torch.tensor(_NEGATIVE, dtype=indices.dtype, device=indices.device)
    indices[padding] = values[1 + torch.arange(int(padding.sum())) % (len(values) - 1)]
    return dataclasses.replace(inputs, state_indices=indices)


def null_slot(inputs: Inputs) -> Inputs:
    """Slot 0, which holds NaN, is padding too: every padding row but the first carries it."""
    state, indices = (t.clone() for t in _pool(inputs))
    free = next((slot for slot in range(len(state)) if slot not in indices.tolist()), None)
    if free is None:
        raise InputError(
            "pool", f"has {len(state)} slots", "it should have one that no sequence uses, to be the null slot"
        )
    state[[0, free]] = state[[free, 0]]
    if (scales := inputs.state_scales) is not None:
        scales = scales.clone()
        scales[[0, free]] = scales[[free, 0]]
    conv = inputs.conv
    if conv is not None:
        conv = dataclasses.replace(conv, states=conv.states.clone())
        conv.states[[0, free]] = conv.states[[free, 0]]
    padding = (indices < 0).nonzero().squeeze(1)[1:]
    indices[indices == 0] = free
    indices[padding] = 0
    return dataclasses.replace(inputs, state=state, state_scales=scales, state_indices=indices, null_slot=0, conv=conv)


def fresh_states(inputs: Inputs) -> Inputs:
    """Every second sequence has no initial state: what its slot holds is NaN."""
    layout = Layout.of(inputs)
    has = torch.arange(inputs.N, device=inputs.q.device) % 2 == 1
    state, conv, scales = _pool(inputs)[0].clone(), inputs.conv, inputs.state_scales
    scales = None if scales is None else scales.clone()
    if conv is not None:
        conv = dataclasses.replace(conv, states=conv.states.clone())
    for n, slot in enumerate(layout.slots):
        if slot >= 0 and not has[n] and layout.lens[n]:
            state[slot] = nothing(state)
            if scales is not None:
                scales[slot] = torch.nan
            if conv is not None:
                conv.states[layout.conv_slots[n]] = torch.nan
        has[n] |= layout.lens[n] == 0
    return dataclasses.replace(inputs, state=state, state_scales=scales, has_initial_state=has, conv=conv)


def own_conv_slots(inputs: Inputs) -> Inputs:
    """States of the convolution in a pool of their own, in other slots than those of the recurrence."""
    conv, layout = inputs.conv, Layout.of(inputs)
    if conv is None:
        return inputs
    slots = torch.arange(inputs.N, dtype=torch.int32, device=inputs.q.device).flip(0) + 1
    states = conv.states.new_full((inputs.N + 2, *conv.states.shape[1:]), torch.nan)
    for n, slot in enumerate(layout.conv_slots):
        if slot >= 0:
            states[slots[n]] = conv.states[slot]
    return dataclasses.replace(inputs, conv=dataclasses.replace(conv, states=states, indices=slots))


def strided_indices(inputs: Inputs) -> Inputs:
    """state_indices as a column of a table, and longer than there are sequences."""
    state, indices = _pool(inputs)
    table = torch.full((len(indices) + 3, 3), len(state) - 1, dtype=indices.dtype, device=indices.device)
    table[: len(indices), 1] = indices
    return dataclasses.replace(inputs, state_indices=table[:, 1])


def long_indices(inputs: Inputs) -> Inputs:
    """state_indices longer than there are sequences, as buffers of a bucket are."""
    _, indices = _pool(inputs)
    spare = torch.zeros(3, dtype=indices.dtype, device=indices.device)
    return dataclasses.replace(inputs, state_indices=torch.cat([indices, spare]))


def bucket(inputs: Inputs) -> Inputs:
    """More tokens than the sequences have, all of them NaN."""

    def longer(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([t, t.new_full((1, 7, *t.shape[2:]), torch.nan)], 1)

    return inputs.map_tokens(longer)


def drafts(inputs: Inputs) -> Inputs:
    """A slot for the state after each token: the state comes from the column of the last accepted one.

    The last column of the second sequence is padding.
    """
    lens = Layout.of(inputs).lens
    N, C = len(lens), max(lens) + 1
    order = torch.arange(N * C, device=inputs.q.device).flip(0).view(N, C) + 1
    accepted = torch.arange(N, device=inputs.q.device) % C + 1
    pool, slots = _pool(inputs)
    order[slots < 0] = -1

    def spread(t: torch.Tensor) -> torch.Tensor:
        wide = t.new_full((N * C + 1 + _SPARE, *t.shape[1:]), nothing(t))
        for n, slot in enumerate(slots.tolist()):
            if slot >= 0:
                wide[order[n, accepted[n] - 1]] = t[slot]
        return wide

    state, scales = spread(pool), inputs.state_scales
    if N > 1 and accepted[1] != C - 1 and C > 2:  # the first column may name the slot of a convolution
        order[1, C - 2] = -1
    indices = order.to(slots.dtype)
    return dataclasses.replace(
        inputs,
        state=state,
        state_scales=None if scales is None else spread(scales),
        state_indices=indices,
        num_accepted_tokens=accepted.to(indices.dtype),
        conv=None if inputs.conv is None else _drafted(inputs.conv, inputs, order, accepted, len(state)),
    )


def _drafted(conv: Convolution, inputs: Inputs, order: torch.Tensor, accepted: torch.Tensor, slots: int) -> Convolution:
    """Its states in the slots of the first column, with room for drafts, each window behind the accepted ones."""
    kept, layout = conv.width - 1, Layout.of(inputs)
    L = kept - 1 + order.shape[1] + 1  # one entry more than anybody needs
    states = conv.by_channel.new_full((slots, conv.by_channel.shape[1], L), torch.nan)
    for n, slot in enumerate(layout.conv_slots):
        if slot >= 0:
            first = int(accepted[n]) - 1
            states[order[n, 0], :, first : first + kept] = conv.by_channel[slot, :, :kept]
    return dataclasses.replace(conv, states=states.mT.contiguous() if conv.tokens_first else states)


def read_only(inputs: Inputs) -> Inputs:
    """An engine's verify: the pool stays as it is, and the states of tokens go to rows of a buffer, or nowhere."""
    rows = torch.arange(inputs.N, device=inputs.q.device, dtype=torch.int32).flip(0)
    rows[-1:] = -1 if len(rows) > 1 else 0
    return dataclasses.replace(_with_rows(inputs, rows), update_state=False)


def token_rows(inputs: Inputs) -> Inputs:
    """The states of tokens beside the pool's update: [B, T, HV, V, K]."""
    B, T = inputs.q.shape[:2]
    states = inputs.v.new_full((B, T, *inputs.state_shape(1)[1:]), torch.nan, dtype=torch.float32)
    return dataclasses.replace(inputs, token_states=states)


def checkpoint_of_each(inputs: Inputs) -> Inputs:
    """One checkpoint a sequence, at its last whole chunk; none where it has none (vLLM)."""
    lens = torch.tensor(Layout.of(inputs).lens, device=inputs.q.device)
    return _kept(inputs, torch.arange(len(lens), device=inputs.q.device).flip(0), lens // CHUNK * CHUNK)


def checkpoints_of_chunks(inputs: Inputs) -> Inputs:
    """Several checkpoints a sequence, some of them nowhere or past its end (SGLang)."""
    N = inputs.N
    rows = torch.arange(N * 3, device=inputs.q.device).view(N, 3)
    offsets = torch.tensor([2 * CHUNK, CHUNK, 100 * CHUNK], device=inputs.q.device).expand(N, 3).contiguous()
    rows[1:2, 1] = -1
    return _kept(inputs, rows, offsets)


def checkpoints_every(inputs: Inputs) -> Inputs:
    """A checkpoint every 64 tokens (FlashInfer)."""
    columns = max(Layout.of(inputs).lens) // CHUNK + 1
    return _kept(inputs, torch.arange(inputs.N * columns, device=inputs.q.device).view(-1, columns), None, "bfloat16")


def checkpoints_in_pool(inputs: Inputs) -> Inputs:
    """Checkpoints that go to slots of the pool itself."""
    lens = torch.tensor(Layout.of(inputs).lens, device=inputs.q.device)
    pool, rows = _pool(inputs)[0], torch.arange(inputs.N, dtype=torch.int32, device=inputs.q.device)
    P, scales = len(pool), inputs.state_scales

    def longer(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([t, t.new_full((inputs.N, *t.shape[1:]), nothing(t))])

    wider = longer(pool)
    kept = Checkpoints(wider, rows + P, ((lens - 1).clamp(min=0) // CHUNK * CHUNK).to(torch.int32))
    scales = None if scales is None else longer(scales)
    return dataclasses.replace(inputs, state=wider, state_scales=scales, checkpoints=kept)


def workspace(inputs: Inputs) -> Inputs:
    """Scratch memory from the caller, as much as it was told to bring; NaN at first, in every dtype."""
    size = prefill_workspace_bytes(inputs.q[..., 0, 0].numel(), inputs.v.shape[2], inputs.N, device=inputs.q.device)
    memory = torch.full((size,), 0xFF, dtype=torch.uint8, device=inputs.q.device)
    return dataclasses.replace(inputs, workspace=memory)


def _pool(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The pool and state_indices. Raises `InputError` where there are none."""
    if inputs.state is None or inputs.state_indices is None:
        raise InputError("pool", "is none", "it should be a number of slots, for what engines do with them")
    return inputs.state, inputs.state_indices


def _with_rows(inputs: Inputs, rows: torch.Tensor) -> Inputs:
    longest = max(Layout.of(inputs).lens)
    shape = (len(rows) + _SPARE, longest + 1, *inputs.state_shape(1)[1:])
    states = inputs.v.new_full(shape, torch.nan, dtype=torch.float32)
    return dataclasses.replace(inputs, token_states=states, token_state_indices=rows)


def _kept(inputs: Inputs, rows: torch.Tensor, offsets: torch.Tensor | None, dtype: str = "float32") -> Inputs:
    shape = inputs.state_shape(rows.numel() + _SPARE)
    states = inputs.v.new_full(shape, torch.nan, dtype=getattr(torch, dtype))
    every = CHUNK if offsets is None else None
    kept = Checkpoints(states, rows.int(), None if offsets is None else offsets.int(), every)
    return dataclasses.replace(inputs, checkpoints=kept)
