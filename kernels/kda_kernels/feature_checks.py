"""Checks of what a call uses beyond the operation itself: shapes of the features, and what indices and lengths hold."""

from itertools import pairwise

import torch

from kda_kernels.dtypes import name_of
from kda_kernels.errors import InputError
from kda_kernels.problem import CHUNK, CONV_WIDTHS
from kda_kernels.tensor_checks import (
    FLOAT_DTYPES,
    INDEX_DTYPES,
    check_contiguous,
    check_last_stride,
    check_states,
    check_tensor,
    shape_error,
)
from kda_kernels.tensors import Checkpoints, Convolution, Dims, GatedNorm, Inputs

BOOL = frozenset((torch.bool,))
_BYTES = frozenset((torch.uint8,))
_FP32 = frozenset((torch.float32,))
_INT64 = frozenset((torch.int64,))


def check_features(inputs: Inputs, dims: Dims) -> None:
    """Shapes, dtypes and devices of the features that checked tensors come with. Raises `InputError`."""
    N, pooled = dims.N, inputs.state_indices is not None
    for name in ("null_slot", "num_accepted_tokens"):
        if getattr(inputs, name) is not None and not pooled:
            raise InputError(name, "is given without a state pool", "it should come with one")
    if not inputs.update_state and not pooled:
        raise InputError("update_state", "is False without a state pool", "only a pool is updated")
    if inputs.has_initial_state is not None and inputs.state is None:
        raise InputError("has_initial_state", "is given without a state", "it should come with one")
    for name, dtypes in (
        ("has_initial_state", BOOL),
        ("num_accepted_tokens", INDEX_DTYPES),
        ("token_state_indices", INDEX_DTYPES),
    ):
        if (t := getattr(inputs, name)) is not None:
            check_tensor(name, t, dtypes, inputs.q, "q")
            if t.shape != (N,):
                raise shape_error(name, t, f"[N] = [{N}], one for each sequence")
            check_contiguous(name, t)
    if inputs.token_states is not None or inputs.token_state_indices is not None:
        _check_token_states(inputs, dims)
    if inputs.checkpoints is not None:
        _check_checkpoints(inputs.checkpoints, inputs, N)
    if inputs.state_scales is not None:
        _check_scales(inputs.state_scales, inputs)
    if inputs.rounding_seed is not None:
        _check_seed(inputs.rounding_seed, inputs, dims)
    if inputs.workspace is not None:
        check_tensor("workspace", inputs.workspace, _BYTES, inputs.q, "q")
        check_contiguous("workspace", inputs.workspace)
    if inputs.conv is not None:
        _check_conv(inputs.conv, inputs, dims)
    if inputs.norm is not None:
        _check_norm(inputs.norm, inputs, dims)


def _check_scales(scales: torch.Tensor, inputs: Inputs) -> None:
    state = inputs.state
    if state is None or state.dtype is not torch.int16:
        found = "no state" if state is None else f"a state in {name_of(state.dtype)}"
        raise InputError("state_scales", f"is given with {found}", "it should come with a pool in int16 only")
    if not inputs.state_v_first:
        raise InputError("state", "is int16 and K-first", "a pool in int16 should be V-first: [P, HV, V, K]")
    check_tensor("state_scales", scales, _FP32, inputs.q, "q")
    if scales.shape != state.shape[:3]:
        raise shape_error("state_scales", scales, f"[P, HV, V] = {list(state.shape[:3])}, one for each row of a state")
    size = scales[:1].numel()
    if not scales[:1].is_contiguous() or (len(scales) > 1 and scales.stride(0) < size):
        wanted = f"slots should be contiguous, and HV * V = {size} or more apart"
        raise InputError("state_scales", f"has strides {list(scales.stride())}", wanted)


def _check_seed(seed: torch.Tensor, inputs: Inputs, dims: Dims) -> None:
    check_tensor("rounding_seed", seed, _INT64, inputs.q, "q")
    if seed.shape != (1,):
        raise shape_error("rounding_seed", seed, "[1]")
    if inputs.state is None or inputs.state_indices is None or inputs.state.dtype is torch.float32:
        raise InputError("rounding_seed", "is given", "it should come with a pool in bfloat16, float16 or int16 only")
    if dims.K % 8:
        raise InputError("rounding_seed", f"is given with K = {dims.K}", "K should be a multiple of 8")


def _check_conv(conv: Convolution, inputs: Inputs, dims: Dims) -> None:
    # as many tokens as a sequence may have: all of a dense batch, a column each with accepted ones
    drafts = inputs.num_accepted_tokens is not None and inputs.cu_seqlens is None
    least = conv.width - 1 + (max(dims.T - 1, 0) if drafts else 0)
    check_conv(conv, 2 * dims.H * dims.K + dims.HV * dims.V, dims.N, least, inputs.q, "q")
    states = conv.states
    if not states[:1].is_contiguous():
        wanted = "each slot should be contiguous; only the stride between slots is free"
        raise InputError("conv.states", f"has strides {list(states.stride())}", wanted)


def check_conv(conv: Convolution, D: int, N: int, least: int, owner: torch.Tensor, who: str) -> None:
    """Of D channels and N sequences, with `least` entries in each state, on the device of `owner`, called `who`.

    Raises `InputError`.
    """
    check_tensor("conv.weight", conv.weight, FLOAT_DTYPES, owner, who)
    if conv.weight.ndim != 2 or conv.weight.shape[0] != D or conv.weight.shape[1] not in CONV_WIDTHS:
        raise shape_error("conv.weight", conv.weight, f"[2 * H * K + HV * V, W] = [{D}, W] with W of {CONV_WIDTHS}")
    check_contiguous("conv.weight", conv.weight)
    if conv.bias is not None:
        check_tensor("conv.bias", conv.bias, FLOAT_DTYPES, owner, who)
        if conv.bias.shape != (D,):
            raise shape_error("conv.bias", conv.bias, f"[2 * H * K + HV * V] = [{D}]")
        check_contiguous("conv.bias", conv.bias)
    states, named = conv.states, f"[P, L, {D}]" if conv.tokens_first else f"[P, {D}, L]"
    check_tensor("conv.states", states, FLOAT_DTYPES, owner, who)
    if states.ndim != 3 or conv.entries[0] != D:
        raise shape_error("conv.states", states, named)
    L = conv.entries[1]
    if L < least:
        raise shape_error("conv.states", states, f"{named} with L = {least} or more")
    if states.shape[0] > 1 and states.stride(0) < D * L:
        wanted = f"it should be at least D * L = {D * L}, so that no two slots share memory"
        raise InputError("conv.states", f"has stride {states.stride(0)} between slots", wanted)
    if conv.indices is not None:
        check_tensor("conv.indices", conv.indices, INDEX_DTYPES, owner, who)
        if conv.indices.ndim != 1 or conv.indices.shape[0] < N:
            raise shape_error("conv.indices", conv.indices, f"[N] = [{N}], one slot for each sequence")


def _check_norm(norm: GatedNorm, inputs: Inputs, dims: Dims) -> None:
    check_tensor("norm.gate", norm.gate, FLOAT_DTYPES, inputs.q, "q")
    if norm.gate.shape != inputs.v.shape:
        raise shape_error("norm.gate", norm.gate, f"[B, T, HV, V] = {list(inputs.v.shape)}, as v")
    check_last_stride("norm.gate", norm.gate)
    check_tensor("norm.weight", norm.weight, FLOAT_DTYPES, inputs.q, "q")
    if norm.weight.shape != (dims.V,):
        raise shape_error("norm.weight", norm.weight, f"[V] = [{dims.V}]")
    check_contiguous("norm.weight", norm.weight)
    if not norm.eps > 0:
        raise InputError("norm.eps", f"is {norm.eps}", "it should be over 0")


def _check_token_states(inputs: Inputs, dims: Dims) -> None:
    """Contiguous from HV on, and room for every token."""
    states = inputs.token_states
    if states is None:
        raise InputError("token_state_indices", "is given without token_states", "it should name rows of them")
    check_tensor("token_states", states, FLOAT_DTYPES, inputs.q, "q")
    inner = inputs.state_shape(1)[1:]
    if inputs.token_state_indices is None:
        if states.shape != (dims.B, dims.T, *inner):
            raise shape_error("token_states", states, str([dims.B, dims.T, *inner]))
    elif states.ndim != 5 or states.shape[2:] != inner:
        raise shape_error("token_states", states, f"[R, S, {', '.join(map(str, inner))}]")
    elif inputs.cu_seqlens is None and states.shape[1] < dims.T:
        raise shape_error("token_states", states, f"[R, S, ..] with room for T = {dims.T} tokens in S")
    if not states[:1, :1].is_contiguous():
        wanted = "it should be contiguous from HV on"
        raise InputError("token_states", f"has strides {list(states.stride())}", wanted)


def _check_checkpoints(kept: Checkpoints, inputs: Inputs, N: int) -> None:
    check_states("checkpoints.states", kept.states, inputs, "R", written=True)
    check_tensor("checkpoints.rows", kept.rows, INDEX_DTYPES, inputs.q, "q")
    if kept.rows.ndim not in (1, 2) or kept.rows.shape[0] != N:
        raise shape_error("checkpoints.rows", kept.rows, f"[N] = [{N}] or [N, C]")
    check_contiguous("checkpoints.rows", kept.rows)
    if (kept.offsets is None) == (kept.every is None):
        given = "neither" if kept.offsets is None else "both"
        raise InputError("checkpoints", f"has {given} of offsets and every", "it should have one of them")
    if kept.offsets is not None:
        check_tensor("checkpoints.offsets", kept.offsets, INDEX_DTYPES, inputs.q, "q")
        if kept.offsets.shape != kept.rows.shape:
            raise shape_error("checkpoints.offsets", kept.offsets, f"{list(kept.rows.shape)}, as checkpoints.rows")
        check_contiguous("checkpoints.offsets", kept.offsets)
    elif kept.every is not None and (kept.every < 1 or kept.every % CHUNK):
        raise InputError("checkpoints.every", f"is {kept.every}", f"it should be a multiple of {CHUNK}")


def check_values(inputs: Inputs, dims: Dims) -> None:
    """What lengths and indices hold; reads them, for which the host waits for a GPU. Raises `InputError`."""
    if inputs.cu_seqlens is not None:
        check_offsets(inputs.cu_seqlens, dims.T)
        if inputs.cu_seqlens_cpu is not None and inputs.cu_seqlens_cpu.tolist() != inputs.cu_seqlens.tolist():
            raise InputError("cu_seqlens_cpu", "differs from cu_seqlens", "it should be the same on the host")
    lens = seq_lens(inputs, dims)
    if inputs.state_indices is not None:
        if inputs.num_accepted_tokens is not None:
            _check_accepted(inputs, lens)
        _check_slots(inputs, lens)
    if inputs.conv is not None:
        _check_conv_values(inputs.conv, inputs, lens)
    if inputs.token_states is not None and inputs.token_state_indices is not None:
        room = inputs.token_states.shape[1]
        if max(lens, default=0) > room:
            wanted = f"it should have room for {max(lens)} tokens"
            raise InputError("token_states", f"has S = {room} rows per sequence", wanted)
        _check_rows("token_state_indices", inputs.token_state_indices, inputs.token_states.shape[0])
    if (kept := inputs.checkpoints) is not None:
        _check_rows("checkpoints.rows", kept.rows, kept.states.shape[0])
        for offset in [] if kept.offsets is None else kept.offsets.flatten().tolist():
            if offset > 0 and offset % CHUNK:
                raise InputError("checkpoints.offsets", f"holds {offset}", f"they should be multiples of {CHUNK}")


def check_offsets(cu_seqlens: torch.Tensor, T: int, *, exact: bool = False) -> None:
    """`exact`: no tokens may lie behind the last sequence."""
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise InputError("cu_seqlens", f"starts at {offsets[0]}", "it should start at 0")
    for position, (start, end) in enumerate(pairwise(offsets), 1):
        if end < start:
            found = f"falls from {start} to {end} (at position {position})"
            raise InputError("cu_seqlens", found, "it should never decrease")
    if offsets[-1] > T or (exact and offsets[-1] != T):
        wanted = f"it should end at T = {T}, the number of tokens" + ("" if exact else ", or before")
        raise InputError("cu_seqlens", f"ends at {offsets[-1]}", wanted)


def seq_lens(inputs: Inputs, dims: Dims) -> list[int]:
    """Tokens of each sequence (reads cu_seqlens, which synchronises a GPU)."""
    if inputs.cu_seqlens is None:
        return [dims.T] * dims.N
    return [end - start for start, end in pairwise(inputs.cu_seqlens.tolist())]


def loaded_slots(inputs: Inputs) -> list[int]:
    """The slot of a pool that each sequence loads its state from, -1 for padding (synchronises a GPU)."""
    slots = inputs.pool[1][: inputs.N].tolist()
    if inputs.num_accepted_tokens is not None:
        slots = [row[n - 1] for row, n in zip(slots, inputs.num_accepted_tokens.tolist(), strict=True)]
    conv = slots if inputs.conv is None else _conv_indices(inputs.conv, inputs)
    nobody = {inputs.null_slot}
    return [
        -1 if slot < 0 or slot in nobody or other < 0 or other in nobody else slot
        for slot, other in zip(slots, conv, strict=True)
    ]


def conv_slots(inputs: Inputs) -> list[int]:
    """The slot of the convolution's state of each sequence, -1 for padding (synchronises a GPU)."""
    assert inputs.conv is not None
    slots = _conv_indices(inputs.conv, inputs)
    if inputs.state_indices is None:
        return [-1 if slot < 0 or slot == inputs.null_slot else slot for slot in slots]
    return [-1 if loaded < 0 else slot for slot, loaded in zip(slots, loaded_slots(inputs), strict=True)]


def _conv_indices(conv: Convolution, inputs: Inputs) -> list[int]:
    """What is written there as the slots of its states."""
    indices = inputs.state_indices if conv.indices is None else conv.indices
    if indices is None:
        return list(range(inputs.N))
    return (indices if indices.ndim == 1 else indices[:, 0])[: inputs.N].tolist()


def stored_slots(inputs: Inputs, lens: list[int]) -> list[list[int]]:
    """The slots of a pool that each sequence stores states to, in order of its tokens; -1: nowhere.

    One for the final state; with num_accepted_tokens one for each token. Padding stores nothing.
    """
    loaded = loaded_slots(inputs)
    if inputs.num_accepted_tokens is None:
        return [[slot] for slot in loaded]
    rows = inputs.pool[1][: inputs.N].tolist()
    live = [row[:n] if slot >= 0 else [] for row, n, slot in zip(rows, lens, loaded, strict=True)]
    return [[-1 if slot < 0 or slot == inputs.null_slot else slot for slot in row] for row in live]


def _check_accepted(inputs: Inputs, lens: list[int]) -> None:
    columns = inputs.pool[1].shape[1]
    assert inputs.num_accepted_tokens is not None
    for position, accepted in enumerate(inputs.num_accepted_tokens.tolist()):
        if not 1 <= accepted <= columns:
            found = f"holds {accepted} (at position {position})"
            raise InputError("num_accepted_tokens", found, f"it should be 1 to {columns}, a column of state_indices")
    if max(lens, default=0) > columns:
        wanted = f"it should have a column for each of {max(lens)} tokens"
        raise InputError("state_indices", f"has {columns} columns", wanted)


def _check_slots(inputs: Inputs, lens: list[int]) -> None:
    """Slots of the pool, each of one sequence."""
    slots, owner = inputs.pool[0].shape[0], dict[int, int]()
    used = zip(loaded_slots(inputs), stored_slots(inputs, lens), strict=True)
    for position, (loaded, stored) in enumerate(used):
        for slot in (loaded, *stored):
            if slot >= slots:
                where = f"0 to {slots - 1}" if slots else "of which there are none"
                found = f"holds {slot} (at position {position})"
                raise InputError("state_indices", found, f"it should be negative or a slot of the pool, {where}")
            if slot >= 0 and owner.setdefault(slot, position) != position:
                found = f"holds {slot} twice (at positions {owner[slot]} and {position})"
                raise InputError("state_indices", found, "each slot should belong to one sequence")


def _check_conv_values(conv: Convolution, inputs: Inputs, lens: list[int]) -> None:
    """Slots of the convolution's states, each of one sequence, and room for what goes there."""
    check_conv_slots(conv, conv_slots(inputs), "state_indices" if conv.indices is None else "conv.indices")
    least = conv.width - 2 + max(lens, default=1)
    if inputs.num_accepted_tokens is not None:
        least = max(least, conv.width - 2 + max(inputs.num_accepted_tokens.tolist(), default=1))
        if (have := conv.by_channel.shape[2]) < least:
            raise InputError("conv.states", f"has L = {have}", f"it should be {least} or more")


def check_conv_slots(conv: Convolution, slots: list[int], name: str) -> None:
    """Of the sequences, by the tensor called `name`: each in the pool, and none twice. Raises `InputError`."""
    owner = dict[int, int]()
    for position, slot in enumerate(slots):
        if slot >= conv.states.shape[0]:
            found = f"holds {slot} (at position {position})"
            wanted = f"it should be negative or a slot of conv.states, of which there are {conv.states.shape[0]}"
            raise InputError(name, found, wanted)
        if slot >= 0 and owner.setdefault(slot, position) != position:
            found = f"holds {slot} twice (at positions {owner[slot]} and {position})"
            raise InputError("conv.indices", found, "each slot should belong to one sequence")


def _check_rows(name: str, rows: torch.Tensor, count: int) -> None:
    """Rows of a buffer of `count`, none of them twice."""
    seen = set()
    for row in rows.flatten().tolist():
        if row >= count:
            raise InputError(name, f"holds {row}", f"it should be negative or a row, of which there are {count}")
        if row >= 0 and row in seen:
            raise InputError(name, f"holds {row} twice", "each row should be written once")
        seen.add(row)
