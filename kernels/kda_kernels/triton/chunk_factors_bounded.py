"""`chunk_factors` for bounded gates: half the work, where |lower_bound| * 16 <= 80 (the models' -5 is).

Same results. Tokens of one half chunk meet at its middle: exp(G_i - G_r) stays within e^80 there, which bf16 and fp32
hold, times a key of up to 6000 where keys are not normalised (products of pairs above the diagonal may be inf; they are
never used). Tokens of different halves meet at the middle of the chunk, where both factors are <= 1.

The cumulative gates G go through a scratch buffer that a program writes and reads back from the cache: with the rows
15, 31, 47 and 63 of G at hand every decay is one subtraction, and the tiles come in the layout of k and q. In registers
a scan of the 64 x 128 tile took more instructions than all the rest.
"""

import triton
import triton.language as tl

from kda_kernels.triton.chunk_factors import NUMBERS, inverse_norm, load_tile
from kda_kernels.triton.common import beta_value, dot, exp2, gate_parameters, log2_decay, operand, place_of_chunk


@triton.jit
def scan_gates(
    g,
    A_log,
    dt_bias,
    G,
    lower_bound,
    left,
    i_hv,
    g_t,
    K: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    GATE: tl.constexpr,
):
    """Writes G [C, BK]: log2 of the decays, summed down the chunk. Each warp walks down a quarter of the tokens."""
    STEPS: tl.constexpr = C // 4
    quarter = tl.arange(0, 4)[:, None]
    col = tl.arange(0, BK)[None, :]
    bias = tl.zeros([1, BK], tl.float32)
    if dt_bias is not None:
        bias = tl.load(dt_bias + i_hv * K + col, mask=col < K, other=0.0).to(tl.float32)
    A = 1.0
    if A_log is not None:
        A, bias = gate_parameters(tl.load(A_log + i_hv), bias, GATE)
    total = tl.zeros([4, BK], tl.float32)
    sums = ()
    for t in tl.static_range(STEPS):
        row = quarter * STEPS + t
        live = (row < left) & (col < K)
        raw = tl.load(g + row * g_t + col, mask=live, other=0.0).to(tl.float32)
        # masked after the activation: the gate of a row that is not there is 0, whatever the bias
        total += tl.where(live, log2_decay(raw, A, bias, lower_bound, GATE), 0.0)
        sums = sums + (total,)
    before = tl.cumsum(total, 0) - total
    for t in tl.static_range(STEPS):
        tl.store(G + (quarter * STEPS + t) * BK + col, sums[t] + before)


@triton.jit
def load_row(G, row: tl.constexpr, col, BK: tl.constexpr):
    return tl.load(G + row * BK + col)


@triton.jit
def load_sums(G, col, BK: tl.constexpr, C: tl.constexpr):
    return tl.load(G + tl.arange(0, C)[:, None] * BK + col[None, :])


@triton.jit
def middle_of_half(G, early, col, BK: tl.constexpr, C: tl.constexpr):
    """The sums at the middle of the half chunk that a row lies in."""
    first = load_row(G, C // 4 - 1, col, BK)[None, :]
    second = load_row(G, C // 4 * 3 - 1, col, BK)[None, :]
    return tl.where(early, first, second)


@triton.jit(do_not_specialize=NUMBERS)
def chunk_factors_bounded_kernel(
    q,  # [B, T, H, K], row strides given
    k,  # [B, T, H, K]
    g,  # [B, T, HV, K]
    beta,  # [B, T, HV], all strides given
    A_log,  # [HV] or None
    dt_bias,  # [HV * K] or None
    qg,  # [HV, slots, C, BK]
    kg,  # [HV, slots, C, BK]
    kd,  # [HV, slots, C, BK]
    L,  # fp32 [HV, slots, C, C]
    Aqk,  # [HV, slots, C, C]
    decay,  # fp32 [HV, slots, BK]
    rate,  # fp32 [HV, slots, C]: beta, activated
    G,  # fp32 [HV, slots, C, BK], scratch
    cu_seqlens,  # [N + 1] or None
    chunk_indices,  # [slots, 2] or None
    lower_bound,
    scale,
    T,
    slots,
    q_b: tl.int64, q_t, q_h,
    k_b: tl.int64, k_t, k_h,
    g_b: tl.int64, g_t, g_h,
    b_b: tl.int64, b_t, b_h,
    HV: tl.constexpr,
    GROUP: tl.constexpr,  # value heads a query/key head
    K: tl.constexpr,
    BK: tl.constexpr,  # K up to the next power of two
    KB: tl.constexpr,  # channels in registers at a time
    C: tl.constexpr,
    GATE: tl.constexpr,
    BETA_LOGIT: tl.constexpr,
    NEG_EIGVAL: tl.constexpr,
    L2NORM: tl.constexpr,
):  # fmt: skip
    i_hv = tl.program_id(0) % HV
    i_c = (tl.program_id(0) // HV).to(tl.int64)
    i_n = i_c
    if cu_seqlens is not None:
        i_n = tl.load(chunk_indices + 2 * i_c).to(tl.int64)
        if i_n < 0:
            return
    i_b, i_t, length, slot, token = place_of_chunk(cu_seqlens, chunk_indices, i_n, i_c, T, C)
    DOT: tl.constexpr = qg.dtype.element_ty

    i_hv = i_hv.to(tl.int64)
    tile = i_hv * slots + slot
    q += i_b * q_b + token * q_t + (i_hv // GROUP) * q_h
    k += i_b * k_b + token * k_t + (i_hv // GROUP) * k_h
    g += i_b * g_b + token * g_t + i_hv * g_h
    G += tile * (C * BK)
    beta += i_b * b_b + token * b_t + i_hv * b_h
    qg += tile * (C * BK)
    kg += tile * (C * BK)
    kd += tile * (C * BK)
    L += tile * (C * C)
    Aqk += tile * (C * C)
    decay += tile * BK
    rate += tile * C
    row = tl.arange(0, C)
    here = row < length - i_t * C
    square = row[:, None] * C + row[None, :]
    needed = row[:, None] // 16 >= row[None, :] // 16  # nothing reads the 16 x 16 blocks above the diagonal
    below = row[:, None] - row[None, :]
    early = (row < C // 2)[:, None]
    inside = (row // (C // 2))[:, None] == (row // (C // 2))[None, :]
    scan_gates(g, A_log, dt_bias, G, lower_bound, length - i_t * C, i_hv, g_t, K, BK, C, GATE)
    tl.debug_barrier()  # what some threads wrote, others read

    # Channels in parts of KB, first of k, then of q: whole tiles of both and G leave room for one program per SM
    k_norm = tl.zeros([C], tl.float32) + 1.0
    if L2NORM:
        k_norm = inverse_norm(k, k_t, here, K, BK)
    kk = tl.zeros([C, C], tl.float32)
    kk_far = tl.zeros([C, C], tl.float32)
    near = ()
    far = ()
    for i_k in tl.static_range(0, BK, KB):
        col = i_k + tl.arange(0, KB)
        wide = row[:, None] * BK + col[None, :]
        G_last = load_row(G, C - 1, col, BK)
        tl.store(decay + col, exp2(G_last))
        b_G = load_sums(G, col, BK, C)
        b_k = load_tile(k, k_t, col, here, K) * k_norm[:, None]
        tl.store(kg + wide, operand(b_k * exp2(b_G), DOT))
        tl.store(kd + wide, operand(b_k * exp2(G_last[None, :] - b_G), DOT))
        x = b_G - middle_of_half(G, early, col, BK, C)
        near = near + (tl.trans(operand(b_k * exp2(-x), DOT)),)
        kk = dot(operand(b_k * exp2(x), DOT), near[i_k // KB], kk)
        x = b_G - load_row(G, C // 2 - 1, col, BK)[None, :]
        k_far = operand(b_k * exp2(tl.where(early, -x, x)), DOT)
        far = far + (tl.trans(k_far),)
        kk_far = dot(k_far, far[i_k // KB], kk_far)
    b_beta = beta_value(tl.load(beta + row.to(tl.int64) * b_t, mask=here, other=0.0), BETA_LOGIT, NEG_EIGVAL)
    tl.store(rate + row, b_beta)
    kk = tl.where(below > 0, tl.where(inside, kk, kk_far), 0.0)
    tl.store(L + square, kk * b_beta[:, None], mask=needed)

    q_norm = tl.zeros([C], tl.float32) + scale
    if L2NORM:
        q_norm *= inverse_norm(q, q_t, here, K, BK)
    qk = tl.zeros([C, C], tl.float32)
    qk_far = tl.zeros([C, C], tl.float32)
    diagonal = tl.zeros([C], tl.float32)
    for i_k in tl.static_range(0, BK, KB):
        col = i_k + tl.arange(0, KB)
        wide = row[:, None] * BK + col[None, :]
        b_G = load_sums(G, col, BK, C)
        b_q = load_tile(q, q_t, col, here, K) * q_norm[:, None]
        tl.store(qg + wide, operand(b_q * exp2(b_G), DOT))
        # the diagonal has no decay: in fp32, since under a strong gate it is most of the output
        diagonal += tl.sum(b_q * load_tile(k, k_t, col, here, K), 1)
        x = b_G - middle_of_half(G, early, col, BK, C)
        qk = dot(operand(b_q * exp2(x), DOT), near[i_k // KB], qk)
        x = b_G - load_row(G, C // 2 - 1, col, BK)[None, :]
        qk_far = dot(operand(b_q * exp2(tl.where(early, -x, x)), DOT), far[i_k // KB], qk_far)
    qk = tl.where(below > 0, tl.where(inside, qk, qk_far), 0.0)
    qk = tl.where(below == 0, (diagonal * k_norm)[:, None], qk)
    tl.store(Aqk + square, operand(qk, DOT), mask=needed)
