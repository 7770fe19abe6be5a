"""Last kernel of the prefill: the recurrence over chunks and the output in one pass, the state always in registers.

A program owns BV value channels of one head of one sequence. For each chunk, with S [K, BV] in fp32:

    r  = beta * (v - kg S)
    v' = r + Z r
    o  = qg S + Aqk v'
    S  = decay * S + kd^T v'

The unit diagonal of the inverse I + Z is never rounded, and r is small where the state already knows v: both keep bf16
products close to the exact result. Reads 1024 + 256 bytes per token and head (bf16, K = V = 128) and writes 256.
"""

import triton
import triton.language as tl

from kda_kernels.triton.common import anew, cast, dot, load_slot, operand
from kda_kernels.triton.stored import load_state, store_state


@triton.jit
def next_checkpoint(offsets, every, i_n, after, columns, COLUMNS: tl.constexpr, C: tl.constexpr):
    """The first position behind `after` at which a checkpoint of the sequence is due; a large number: there is none."""
    if offsets is None:
        due = (after // every + 1) * every
        due = tl.where(due <= columns * every, due, 1 << 62)
    else:
        column = tl.arange(0, COLUMNS)
        due = tl.load(offsets + i_n * columns + column, mask=column < columns, other=0).to(tl.int64)
        due = tl.min(tl.where((due > after) & (due % C == 0), due, 1 << 62), 0)
    return due


@triton.jit
def store(to, S, ok_s, scales, seed, slot, token, row, ok_v, K: tl.constexpr, BK: tl.constexpr):
    """Stores a tile [BK, BV] of the state after a token; `to`: of each element, `row`: hv V + v of each column."""
    if (seed is None) & (scales is None):
        tl.store(to, cast(S, to.dtype.element_ty), mask=ok_s)
    else:
        odd = tl.sum(tl.where(S == S, 0.0, float("nan")), 0)
        store_state(tl.trans(to), tl.trans(S), tl.trans(ok_s), scales, ok_v, odd, seed, slot, token, row, K, BK)


@triton.jit
def keep(
    S, kept, at, kept_n, rows, offsets, every, i_n, position, columns, kept_rows, ok_s,
    scales, scales_n, seed, slot, row, ok_v, K: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Writes the state to each row of `kept` whose checkpoint is due at `position`."""
    first = position // every - 1 if offsets is None else position * 0
    last = first + 1 if offsets is None else position * 0 + columns
    for column in range(first, last):
        here = True if offsets is None else tl.load(offsets + i_n * columns + column) == position
        i_r = tl.load(rows + i_n * columns + column).to(tl.int64)
        if here & (i_r >= 0) & (i_r < kept_rows):
            p_scales = None
            if kept.dtype.element_ty == tl.int16:  # these are slots of the pool
                p_scales = scales + i_r * scales_n + row
            store(kept + i_r * kept_n + at, S, ok_s, p_scales, seed, slot, position - 1, row, ok_v, K, BK)


@triton.jit
def fill_rows(o, o_t, begin, end, stride, rv, ok_v, value, C: tl.constexpr):
    """Rows of o from `begin` to `end` become `value`, C at a time, every `stride`-th C of them."""
    row = tl.arange(0, C)
    for i in range(begin, end, stride):
        p_o = o + i * o_t + row[:, None] * o_t + rv[None, :]
        values = tl.zeros([C, rv.shape[0]], tl.float32) + value
        tl.store(p_o, values.to(o.dtype.element_ty), mask=(i + row < end)[:, None] & ok_v[None, :])


# What differs from call to call in number only, or in where a table begins: it compiles nothing new.
NUMBERS = (
    *("rate", "state_indices", "cu_seqlens", "has_initial_state", "rows", "offsets"),
    *("sequences", "T", "slots", "pool", "null_slot", "kept_rows", "columns", "every", "indices_n", "v_b", "o_b"),
    *("scales_n", "rounding_seed"),
)


@triton.jit(do_not_specialize=NUMBERS)
def chunk_chain_kernel(
    v,  # [B, T, HV, V], row strides given
    qg,  # [HV, slots, C, BK]
    kg,  # [HV, slots, C, BK]
    kd,  # [HV, slots, C, BK]
    Z,  # [HV, slots, C, C]
    Aqk,  # [HV, slots, C, C]
    decay,  # fp32 [HV, slots, BK]
    rate,  # fp32 [HV, slots, C]: beta, activated
    o,  # [B, T, HV, V], row strides given
    h0,  # initial state or None, strides given
    ht,  # final state or None, strides given
    h,  # [chunks in order, HV, K, V] or None: the state at the start of each chunk
    kept,  # [kept_rows, ..], strides given, or None: where checkpoints go
    state_indices,  # [N] or None
    cu_seqlens,  # [N + 1] or None
    has_initial_state,  # bool [N] or None
    rows,  # [N, columns]: of `kept`
    offsets,  # [N, columns]: positions of checkpoints; or None: at each multiple of `every`
    scales,  # fp32 [pool, HV, V], of an int16 pool; or None
    rounding_seed,  # int64 [1]; None: states are rounded to nearest
    sequences,
    T,
    slots,
    pool,  # slots of h0
    null_slot,
    kept_rows,
    columns,
    every,
    indices_n,
    scales_n,
    v_b: tl.int64, v_t, v_h,
    o_b: tl.int64, o_t, o_h,
    h0_n: tl.int64, h0_h, h0_k, h0_v,
    ht_n: tl.int64, ht_h, ht_k, ht_v,
    kept_n: tl.int64, kept_h, kept_k, kept_v,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,  # `columns` up to the next power of two
    STAGES: tl.constexpr,
):  # fmt: skip
    SLICES: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % SLICES
    i_hv = tl.program_id(0) // SLICES % HV
    i_n = (tl.program_id(0) // (SLICES * HV)).to(tl.int64)
    row = tl.arange(0, C)
    rk = tl.arange(0, BK)
    rv = i_v * BV + tl.arange(0, BV)
    ok_v = rv < V
    v += i_hv.to(tl.int64) * v_h
    o += i_hv.to(tl.int64) * o_h
    if cu_seqlens is not None:
        first = tl.load(cu_seqlens + i_n).to(tl.int64)
        length = (tl.load(cu_seqlens + i_n + 1) - first).to(tl.int32)
        slot0 = first // C + i_n
        # tokens behind the last sequence: all sequences share them
        end = tl.load(cu_seqlens + sequences).to(tl.int64)
        fill_rows(o, o_t, end + i_n * C, T, sequences * C, rv, ok_v, 0.0, C)
    else:
        first = tl.full([], 0, tl.int64)
        length = T
        slot0 = i_n * tl.cdiv(T, C)
        v += i_n * v_b
        o += i_n * o_b
    i_s = i_n
    if state_indices is not None:
        i_s = load_slot(state_indices, i_n, indices_n, null_slot)
        if i_s < 0 or i_s >= pool:  # padding, or a slot that is not there: nothing else is read or written
            fill_rows(o, o_t, first, first + length, C, rv, ok_v, tl.where(i_s < 0, 0.0, float("nan")), C)
            return

    ok_s = (rk < K)[:, None] & ok_v[None, :]
    S = tl.zeros([BK, BV], tl.float32)
    if h0 is not None:
        ok_0 = ok_s
        if has_initial_state is not None:
            ok_0 = (ok_s & tl.load(has_initial_state + i_n)) != 0  # to the interpreter, an int, and no mask
        p_h0 = h0 + i_s * h0_n + i_hv * h0_h + rk[:, None] * h0_k + rv[None, :] * h0_v
        if scales is None:
            S += tl.load(p_h0, mask=ok_0, other=0.0).to(tl.float32)
        else:
            S += load_state(p_h0, ok_0, scales + i_s * scales_n + i_hv * V + rv, ok_v, 0)
    seed = None
    if rounding_seed is not None:
        seed = tl.load(rounding_seed)
    if kept is not None:
        at = i_hv * kept_h + rk[:, None] * kept_k + rv[None, :] * kept_v
        due = next_checkpoint(offsets, every, i_n, i_n * 0, columns, COLUMNS, C)
    tile = i_hv * slots.to(tl.int64) + slot0
    wide = row[:, None] * BK + rk[None, :]
    square = row[:, None] * C + row[None, :]
    DOT: tl.constexpr = qg.dtype.element_ty
    # blocks above the diagonal are not there
    needed = row[:, None] // 16 >= row[None, :] // 16
    for i_t in tl.range(0, tl.cdiv(length, C), num_stages=STAGES):
        ok_t = i_t * C + row < length
        ok = ok_t[:, None] & ok_v[None, :]
        this = tile + i_t
        b_v = tl.load(v + (first + i_t * C) * v_t + row[:, None] * v_t + rv[None, :], mask=ok, other=0.0)
        b_beta = tl.load(rate + this * C + row)
        if h is not None:
            p_h = h + ((slot0 + i_t) * HV + i_hv) * (K * V) + rk[:, None] * V + rv[None, :]
            tl.store(p_h, cast(S, h.dtype.element_ty), mask=ok_s)
        if kept is not None:
            if i_t * C == due:
                keep(
                    S, kept, at, kept_n, rows, offsets, every, i_n, due, columns, kept_rows, ok_s,
                    scales, scales_n, seed, i_s, i_hv * V + rv, ok_v, K, BK,
                )  # fmt: skip
                due = next_checkpoint(offsets, every, i_n, due, columns, COLUMNS, C)
        Sd = operand(S, DOT)
        known = dot(tl.load(kg + this * (C * BK) + wide), Sd)
        out = dot(tl.load(qg + this * (C * BK) + wide), Sd)  # here, since Sd's shared memory is then free for r
        r = b_beta[:, None] * (b_v.to(tl.float32) - known)
        b_Z = tl.load(Z + this * (C * C) + square, mask=needed, other=0.0)
        new = operand(dot(b_Z, operand(r, DOT), r), DOT)
        b_A = tl.load(Aqk + this * (C * C) + square, mask=needed, other=0.0)
        out = dot(b_A, new, out)
        S *= tl.load(decay + this * BK + rk)[:, None]
        S = dot(tl.trans(tl.load(kd + this * (C * BK) + wide)), new, S)
        p_o = o + (first + i_t * C) * o_t + row[:, None] * o_t + rv[None, :]
        tl.store(p_o, cast(out, o.dtype.element_ty), mask=ok)

    if kept is not None:
        if length > 0 and length == due:
            keep(
                S, kept, at, kept_n, rows, offsets, every, i_n, due, columns, kept_rows, ok_s,
                scales, scales_n, seed, i_s, i_hv * V + rv, ok_v, K, BK,
            )  # fmt: skip
        if offsets is not None:  # a position inside a chunk has no state here: that is seen
            for column in range(columns):
                position = tl.load(offsets + i_n * columns + column)
                if position > 0 and position <= length and position % C > 0:
                    i_r = tl.load(rows + i_n * columns + column).to(tl.int64)
                    if i_r >= 0 and i_r < kept_rows:
                        nothing = tl.zeros([BK, BV], tl.float32) + float("nan")
                        if kept.dtype.element_ty == tl.int16:
                            p_scales = scales + i_r * scales_n + i_hv * V + rv
                            tl.store(p_scales, tl.zeros([BV], tl.float32) + float("nan"), mask=ok_v)
                        else:
                            tl.store(kept + i_r * kept_n + at, nothing.to(kept.dtype.element_ty), mask=ok_s)
    if ht is not None:
        rv = anew(tl.program_id(0)) % SLICES * BV + tl.arange(0, BV)  # or it is kept through the loop, and spilled
        ok_s = (rk < K)[:, None] & (rv < V)[None, :]
        p_ht = ht + i_s * ht_n + i_hv * ht_h + rk[:, None] * ht_k + rv[None, :] * ht_v
        p_scales = None
        if scales is not None:
            p_scales = scales + i_s * scales_n + i_hv * V + rv
            ok_s = (ok_s & (length > 0)) != 0  # integers stay what they are, and so must their scale
        store(p_ht, S, ok_s, p_scales, seed, i_s, length - 1, i_hv * V + rv, ((rv < V) & (length > 0)) != 0, K, BK)
