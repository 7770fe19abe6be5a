"""Last kernel of the prefill: the recurrence over chunks and the output in one pass, the state always in registers.

A program owns BV value channels of one head of one sequence. For each chunk, with S [K, BV] in fp32:

    r  = beta * (v - kg S)
    v' = r + Z r
    o  = qg S + Aqk v'
    S  = decay * S + kd^T v'

The unit diagonal of the inverse I + Z is never rounded, and r is small where the state already knows v: both keep bf16
products close to the exact result. Reads 1024 + 256 bytes a token and head (bf16, K = V = 128) and writes 256.
"""

import triton
import triton.language as tl

from kda_kernels.triton.common import cast, dot, operand


@triton.jit(do_not_specialize=["T", "slots"])
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
    state_indices,  # [N] or None
    cu_seqlens,  # [N + 1] or None
    T,
    slots,
    v_b, v_t, v_h,
    o_b, o_t, o_h,
    h0_n, h0_h, h0_k, h0_v,
    ht_n, ht_h, ht_k, ht_v,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    i_v = tl.program_id(0)
    i_hv = tl.program_id(1) % HV
    i_n = tl.program_id(1) // HV
    if cu_seqlens is not None:
        first = tl.load(cu_seqlens + i_n).to(tl.int64)
        length = (tl.load(cu_seqlens + i_n + 1) - first).to(tl.int32)
        slot0 = first // C + i_n
        i_b = 0
    else:
        first = tl.full([], 0, tl.int64)
        length = T
        slot0 = i_n.to(tl.int64) * tl.cdiv(T, C)
        i_b = i_n.to(tl.int64)
    i_s = i_n.to(tl.int64)
    if state_indices is not None:
        i_s = tl.load(state_indices + i_n).to(tl.int64)
    row = tl.arange(0, C)
    rk = tl.arange(0, BK)
    rv = i_v * BV + tl.arange(0, BV)
    ok_v = rv < V
    v += i_b * v_b + i_hv * v_h
    o += i_b * o_b + i_hv * o_h
    if i_s < 0:  # padding: neither read nor written, and its output rows are zero
        for i_t in range(tl.cdiv(length, C)):
            p_o = o + (first + i_t * C) * o_t + row[:, None] * o_t + rv[None, :]
            zero = tl.zeros([C, BV], o.dtype.element_ty)
            tl.store(p_o, zero, mask=(i_t * C + row < length)[:, None] & ok_v[None, :])
        return

    ok_s = (rk < K)[:, None] & ok_v[None, :]
    S = tl.zeros([BK, BV], tl.float32)
    if h0 is not None:
        p_h0 = h0 + i_s * h0_n + i_hv * h0_h + rk[:, None] * h0_k + rv[None, :] * h0_v
        S += tl.load(p_h0, mask=ok_s, other=0.0).to(tl.float32)
    tile = i_hv * slots.to(tl.int64) + slot0
    wide = row[:, None] * BK + rk[None, :]
    square = row[:, None] * C + row[None, :]
    DOT: tl.constexpr = qg.dtype.element_ty
    # blocks above the diagonal are not there
    needed = row[:, None] // 16 >= row[None, :] // 16
    for i_t in tl.range(0, tl.cdiv(length, C), num_stages=STAGES):
        ok_t = i_t * C + row < length
        ok = ok_t[:, None] & ok_v[None, :]
        # 64-bit offsets in scalars, 32-bit ones in tiles
        this = tile + i_t
        b_v = tl.load(v + (first + i_t * C) * v_t + row[:, None] * v_t + rv[None, :], mask=ok, other=0.0)
        b_beta = tl.load(rate + this * C + row)
        if h is not None:
            p_h = h + ((slot0 + i_t) * HV + i_hv) * (K * V) + rk[:, None] * V + rv[None, :]
            tl.store(p_h, cast(S, h.dtype.element_ty), mask=ok_s)
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

    if ht is not None:
        p_ht = ht + i_s * ht_n + i_hv * ht_h + rk[:, None] * ht_k + rv[None, :] * ht_v
        tl.store(p_ht, cast(S, ht.dtype.element_ty), mask=ok_s)
