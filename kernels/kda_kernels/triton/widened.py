"""A prefill on fp32 states, for pools rounded stochastically or in int16: states are read before and stored behind it.

A kernel that knows neither runs as it is. Floor: the states of the sequences and their checkpoints read and written
once more in fp32, 2 * 4 * N * HV * V * K bytes: N=8, H=96: 100 MB, 25 us at 4 TB/s, beside a prefill of 8 * 1024 tokens
in 450.
"""

import dataclasses
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from kda_kernels.ints import cdiv, next_power_of_2
from kda_kernels.ranges import stage
from kda_kernels.tensors import Checkpoints, Inputs, Outputs
from kda_kernels.triton.common import load_slot
from kda_kernels.triton.launch import dtype_of, launch, usual
from kda_kernels.triton.runtime import on_device
from kda_kernels.triton.stored import load_state, store_state

BV = 16  # rows of a state per program


@triton.jit(
    do_not_specialize=["pool", "null_slot", "indices_n", "scales_n", "HV"],
    do_not_specialize_on_alignment=["state_indices"],
)
def read_kernel(
    state,  # [pool, HV, V, K], slots pool_n apart
    scales,  # fp32 [pool, HV, V] or None
    wide,  # fp32 [N, HV, V, K]
    own,  # int32 [N]: n, or -1 for padding, or N for a slot that is not there
    state_indices,
    pool,
    null_slot,
    indices_n,
    scales_n,
    pool_n: tl.int64,
    HV,
    V: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Grid: (cdiv(V, BV) * HV * N,)."""
    i_v = tl.program_id(0) % ((V + BV - 1) // BV)
    i_hv = tl.program_id(0) // ((V + BV - 1) // BV) % HV
    i_n = (tl.program_id(0) // ((V + BV - 1) // BV * HV)).to(tl.int64)
    slot = load_slot(state_indices, i_n, indices_n, null_slot)
    there = (slot >= 0) & (slot < pool)
    if (i_v == 0) & (i_hv == 0):
        absent = tl.where(slot < 0, -1, tl.num_programs(0))
        tl.store(own + i_n, tl.where(there, i_n, absent).to(tl.int32))
    row = i_hv * V + i_v * BV + tl.arange(0, BV)
    ok_v = ((i_v * BV + tl.arange(0, BV) < V) & there) != 0  # to the interpreter, an int, and no mask
    k = tl.arange(0, BK)
    at = row[:, None] * K + k[None, :]
    ok = ok_v[:, None] & (k < K)[None, :]
    p_scales = None
    if scales is not None:
        p_scales = scales + slot * scales_n + row
    x = load_state(state + slot * pool_n + at, ok, p_scales, ok_v, 1)
    tl.store(wide + i_n * (HV * V * K) + at, x, mask=ok)


@triton.jit(
    do_not_specialize=["T", "pool", "null_slot", "indices_n", "scales_n", "kept", "columns", "every", "HV"],
    do_not_specialize_on_alignment=["rounding_seed", "state_indices", "cu_seqlens", "rows", "offsets"],
)
def store_kernel(
    wide,  # fp32 [N, HV, V, K], or of checkpoints [N * columns, ..]
    state,  # where they go, [kept, HV, V, K], slots state_n apart
    scales,  # fp32 [kept, HV, V] or None
    rounding_seed,  # int64 [1] or None
    state_indices,
    cu_seqlens,  # or None
    rows,  # of checkpoints: [N, columns], else None
    offsets,  # of checkpoints: as rows, or None
    T,
    pool,
    null_slot,
    indices_n,
    scales_n,
    kept,
    columns,
    every,
    state_n: tl.int64,
    HV,
    V: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Grid: (cdiv(V, BV) * HV * N * columns,)."""
    i_v = tl.program_id(0) % ((V + BV - 1) // BV)
    i_hv = tl.program_id(0) // ((V + BV - 1) // BV) % HV
    i_w = (tl.program_id(0) // ((V + BV - 1) // BV * HV)).to(tl.int64)
    i_n = i_w // columns
    slot = load_slot(state_indices, i_n, indices_n, null_slot)
    length = tl.full([], 0, tl.int64) + T
    if cu_seqlens is not None:
        length = (tl.load(cu_seqlens + i_n + 1) - tl.load(cu_seqlens + i_n)).to(tl.int64)
    to, position = slot, length
    if rows is not None:
        to = tl.load(rows + i_w).to(tl.int64)
        position = tl.load(offsets + i_w).to(tl.int64) if offsets is not None else (i_w % columns + 1) * every
    live = (slot >= 0) & (slot < pool) & (to >= 0) & (to < kept) & (position > 0) & (position <= length)
    row = i_hv * V + i_v * BV + tl.arange(0, BV)
    ok_v = ((i_v * BV + tl.arange(0, BV) < V) & live) != 0
    k = tl.arange(0, BK)
    at = row[:, None] * K + k[None, :]
    ok = ok_v[:, None] & (k < K)[None, :]
    x = tl.load(wide + i_w * (HV * V * K) + at, mask=ok, other=0.0)
    odd = tl.sum(tl.where(x == x, 0.0, float("nan")), 1)
    p_scales = None
    if scales is not None:
        p_scales = scales + to * scales_n + row
    seed = None
    if rounding_seed is not None:
        seed = tl.load(rounding_seed)
    store_state(state + to * state_n + at, x, ok, p_scales, ok_v, odd, seed, slot, position - 1, row, K, BK)


def is_widened(inputs: Inputs) -> bool:
    """Whether a call is one that `widened` is for."""
    return inputs.rounding_seed is not None or inputs.state_scales is not None


def widened(inputs: Inputs, run: Callable[[Inputs], Outputs]) -> Outputs:
    """`run` on a copy of the states in fp32, whose results are then stored as `inputs` ask for it.

    Args:
        inputs: a checked call with a V-first pool and one slot for each sequence. Allocates fp32 states for its
            sequences and, where they are not fp32 already, checkpoints.
        run: a prefill that updates the pool of what it is given, and writes its checkpoints.
    """
    (state, indices), (_, T, N, _, HV, K, V) = inputs.pool, inputs.dims
    wide = torch.empty((N, HV, V, K), dtype=torch.float32, device=state.device)
    own = torch.empty(N, dtype=torch.int32, device=state.device)
    sizes = (HV, V, K, next_power_of_2(K), BV)
    pool = (state.shape[0], -1 if inputs.null_slot is None else inputs.null_slot, indices.stride(0))
    scales, tiles, step = inputs.state_scales, cdiv(V, BV) * HV, state.stride(0)
    if N:
        scales_n = 0 if scales is None else scales.stride(0)
        kind = None
        if usual((state, scales, wide, own), (step,), (pool[0], pool[2], scales_n)):
            kind = (state.device, V, K, *map(dtype_of, (state, scales, indices)))
        with stage("states to fp32"), on_device(state):
            launch(
                read_kernel, (tiles * N,), kind,
                (state, scales, wide, own, indices, *pool, scales_n, step, *sizes), num_warps=1,
            )  # fmt: skip
    kept, room = inputs.checkpoints, inputs.checkpoints
    if kept is not None and kept.states.dtype is not torch.float32:
        buffer = wide.new_empty((kept.rows.numel(), HV, V, K))
        numbers = torch.arange(kept.rows.numel(), dtype=torch.int32, device=state.device).view(kept.rows.shape)
        room = Checkpoints(buffer, numbers, kept.offsets, kept.every)
    outputs = run(
        dataclasses.replace(
            inputs, state=wide, state_indices=own, null_slot=None, state_scales=None, rounding_seed=None,
            checkpoints=room,
        )
    )  # fmt: skip

    def store(made: torch.Tensor, to: torch.Tensor, scales: torch.Tensor | None, marks: Checkpoints | None) -> None:
        rows, offsets, every = (None, None, 1) if marks is None else (marks.rows, marks.offsets, marks.every or 1)
        columns = 1 if rows is None else max(rows.numel() // N, 1)
        seed, offsets_of, step = inputs.rounding_seed, inputs.cu_seqlens, to.stride(0)
        numbers = (0 if scales is None else scales.stride(0), to.shape[0], columns, every)
        kind = None
        if usual((made, to, scales), (step,), (T, pool[0], pool[2], *numbers)):
            typed = (to, scales, seed, indices, offsets_of, rows, offsets)
            kind = (state.device, V, K, *map(dtype_of, typed))
        with on_device(state):
            launch(
                store_kernel, (tiles * len(made),), kind,
                (made, to, scales, seed, indices, offsets_of, rows, offsets, T, *pool, *numbers, step, *sizes),
                num_warps=1,
            )  # fmt: skip

    with stage("states to the pool"):
        if N:
            store(wide, state, inputs.state_scales, None)
        if kept is not None and room is not kept and room is not None and len(room.states):
            store(room.states, kept.states, inputs.state_scales if kept.states is state else None, kept)
    final = state if inputs.output_final_state else None
    return Outputs(outputs.o, final, state_scales=inputs.state_scales)
