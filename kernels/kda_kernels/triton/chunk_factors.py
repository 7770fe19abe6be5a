"""First kernel of the prefill: everything of a chunk that does not need the incoming state.

For each chunk of C = 64 tokens and each value head, with G the cumulative log decay inside the chunk (inclusive):

    L   = strictly_lower(beta_i * k_i . k_j exp(G_i - G_j))      (inverted by `chunk_inverse`)
    Aqk = lower(scale * q_i . k_j exp(G_i - G_j))
    qg  = scale * q * exp(G),   kg = k * exp(G),   kd = k * exp(G_last - G),   decay = exp(G_last)

Raw gates go in: activation, bias and cumulative sums happen on the way, so the cumulative gate never exists in memory.
Reads 768 bytes per token and head (bf16, K = 128) and writes 1152.

No overflow and no division by a decay: exp(G_i - G_j), i >= j, is split at a reference token r between j and i into
exp(G_i - G_r) exp(G_r - G_j), both <= 1. Halving the chunk again and again (32, 16, ..., 1) gives every pair exactly
one level that separates it. A bounded gate needs only one: `chunk_factors_bounded`.

All those sums of log decays are linear in the decays of the tokens, so tensor cores make them, from constant matrices
(`chunk_sums`): a scan or a reduction would cost shuffles and selects for every token and each of the references.
"""

import functools

import torch
import triton
import triton.language as tl

from kda_kernels.problem import CHUNK
from kda_kernels.triton.common import beta_value, dot, exp2, gate_parameters, log2_decay, operand, place_of_chunk, split

# What differs from call to call in number only, and compiles nothing new: lengths, the strides that follow from them,
# and where tables and rows of single numbers begin.
NUMBERS = ("T", "slots", "q_b", "k_b", "g_b", "b_b", "b_t", "b_h", "beta", "cu_seqlens", "chunk_indices")

# 2 ** -150 is 0 in fp32: a stronger gate forgets no more than everything, and its sum would cost the others precision.
FORGET_ALL = tl.constexpr(-150.0)


@functools.lru_cache(maxsize=16)
def chunk_sums(device: torch.device) -> torch.Tensor:
    """The constant matrices bf16 [8, C, C]: row i of each says which tokens' log decays make up a decay seen from i.

    0: G_i, the tokens up to i. 1: G_last - G_i, those after i. 2 to 7: for blocks of 64, 32, ..., 2, from their middle
    to an i of the second half, and from an i of the first half to their middle.
    """
    i = torch.arange(CHUNK)[:, None]
    j = torch.arange(CHUNK)[None, :]

    def to_middle(size: int) -> torch.Tensor:
        same_half = i // (size // 2) == j // (size // 2)
        second = i // (size // 2) % 2 == 1
        return same_half & torch.where(second, j <= i, j > i)

    matrices = [j <= i, j > i, *(to_middle(size) for size in (64, 32, 16, 8, 4, 2))]
    return torch.stack(matrices).to(device, torch.bfloat16)


@triton.jit
def decays(sums, which, hi, lo, C: tl.constexpr):
    """sums[which] @ (hi + lo): log2 of decays between tokens, from the log2 decays of each.

    Two bf16 halves keep 16 bits of each log decay, and one that a sum leaves out contributes an exact 0: nothing
    cancels behind a strong gate.
    """
    row = tl.arange(0, C)
    weights = tl.load(sums + which * (C * C) + row[:, None] * C + row[None, :])
    return dot(weights, hi, dot(weights, lo))


@triton.jit
def pair_products(kk, qk, b_k, b_q, sums, hi, lo, level, DOT: tl.constexpr, C: tl.constexpr):
    """kk and qk with the products of those pairs added that the halving into blocks of 2**level tokens separates."""
    e = exp2(decays(sums, 7 - level, hi, lo, C))
    row = tl.arange(0, C)
    second = (row >> level) % 2 == 1
    pair = second[:, None] & ~second[None, :] & ((row >> level + 1)[:, None] == (row >> level + 1)[None, :])
    columns = tl.trans(operand(b_k * e, DOT))
    kk += tl.where(pair, dot(operand(b_k * e, DOT), columns), 0.0)
    qk += tl.where(pair, dot(operand(b_q * e, DOT), columns), 0.0)
    return kk, qk


@triton.jit
def load_tile(x, stride_t, col, here, K: tl.constexpr):
    """A chunk's rows and the channels `col` of one head, fp32; zeros where there is nothing."""
    row = tl.arange(0, here.shape[0])
    live = here[:, None] & (col < K)[None, :]
    return tl.load(x + row[:, None] * stride_t + col[None, :], mask=live, other=0.0).to(tl.float32)


@triton.jit
def inverse_norm(x, stride_t, here, K: tl.constexpr, BK: tl.constexpr):
    """1 / sqrt(sum x^2 + 1e-6) of each row, [C]."""
    x = load_tile(x, stride_t, tl.arange(0, BK), here, K)
    return tl.rsqrt(tl.sum(x * x, 1) + 1e-6)


@triton.jit(do_not_specialize=NUMBERS)
def chunk_factors_kernel(
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
    sums,  # bf16 [n, C, C], `chunk_sums`
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
    below = row[:, None] - row[None, :]
    k_norm = tl.zeros([C], tl.float32) + 1.0
    q_norm = tl.zeros([C], tl.float32) + scale
    if L2NORM:
        k_norm *= inverse_norm(k, k_t, here, K, BK)
        q_norm *= inverse_norm(q, q_t, here, K, BK)
    kk = tl.zeros([C, C], tl.float32)
    qk = tl.zeros([C, C], tl.float32)
    diagonal = tl.zeros([C], tl.float32)
    for i_k in tl.range(0, BK, KB, num_stages=1):
        col = i_k + tl.arange(0, KB)
        wide = row[:, None] * BK + col[None, :]
        bias = tl.zeros([KB], tl.float32)
        if dt_bias is not None:
            bias = tl.load(dt_bias + i_hv * K + col, mask=col < K, other=0.0).to(tl.float32)
        A = 1.0
        if A_log is not None:
            A, bias = gate_parameters(tl.load(A_log + i_hv), bias, GATE)
        raw = load_tile(g, g_t, col, here, K)
        step = tl.maximum(log2_decay(raw, A, bias[None, :], lower_bound, GATE), FORGET_ALL)
        # masked after the activation: the gate of a row that is not there is 0, whatever the bias
        step = tl.where(here[:, None] & (col < K)[None, :], step, 0.0)
        hi, lo = split(step)
        b_k = load_tile(k, k_t, col, here, K) * k_norm[:, None]
        b_q = load_tile(q, q_t, col, here, K) * q_norm[:, None]
        diagonal += tl.sum(b_q * b_k, 1)

        since = exp2(decays(sums, 0, hi, lo, C))
        tl.store(qg + wide, operand(b_q * since, DOT))
        tl.store(kg + wide, operand(b_k * since, DOT))
        until = exp2(decays(sums, 1, hi, lo, C))
        tl.store(kd + wide, operand(b_k * until, DOT))
        tl.store(decay + col, exp2(tl.sum(step, 0)))
        for level in tl.range(0, 6):  # a loop: unrolled, its operands would all be in registers at a time
            kk, qk = pair_products(kk, qk, b_k, b_q, sums, hi, lo, level, DOT, C)

    # the diagonal has no decay: in fp32, since under a strong gate it is most of the output
    # nothing reads the 16 x 16 blocks above the diagonal
    square = row[:, None] * C + row[None, :]
    needed = row[:, None] // 16 >= row[None, :] // 16
    tl.store(Aqk + square, operand(tl.where(below == 0, diagonal[:, None], qk), DOT), mask=needed)
    b_beta = beta_value(tl.load(beta + row.to(tl.int64) * b_t, mask=here, other=0.0), BETA_LOGIT, NEG_EIGVAL)
    tl.store(rate + row, b_beta)
    tl.store(L + square, tl.where(below > 0, kk * b_beta[:, None], 0.0), mask=needed)
