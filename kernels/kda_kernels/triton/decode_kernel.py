"""Device half of the decode kernel: one V-slice of one head's state, through every token of its sequence.

With a convolution one program has all the value heads of a query/key head, and with a norm all of V: whoever shifts a
channel's state is the only one that reads it, and whoever scales o has all of it.

Memory is all that counts: a state tile is read once, kept in fp32 registers over all tokens, and written once. All
loads of the state and of the first token are issued before anything waits for one of them, and the tokens after it are
fetched one ahead. States of two bytes, of one token each, are taken in pieces of a few rows where that is faster.

Compiled for sm_90a (Triton 3.9; bf16, fp32 state, K = V = 128, BV = 16, 1 warp): 128 registers, no spills; 16 loads and
16 stores of the state, each of 16 bytes per lane; reductions over K by shuffles in the warp, 32 bytes of shared memory.
"""

import triton
import triton.language as tl

from kda_kernels.triton.common import (
    beta_value,
    cast,
    conv_taps,
    convolved,
    exp2,
    gate_parameters,
    load_slot,
    log2_decay,
    sigmoid,
)
from kda_kernels.triton.stored import load_state, store_state


@triton.jit
def _fetch(p_q, p_k, p_g, p_v, p_beta, m_k, m_v, live):
    """The tensors of one token as they lie in memory, 0 where there is none."""
    m_k = (m_k & live) != 0  # to the interpreter the conjunction with a single value is an int, and no mask
    m_v = (m_v & live) != 0
    b_q = tl.load(p_q, mask=m_k, other=0.0)
    b_k = tl.load(p_k, mask=m_k, other=0.0)
    b_g = tl.load(p_g, mask=m_k, other=0.0)
    b_v = tl.load(p_v, mask=m_v, other=0.0)
    b_beta = tl.load(p_beta, mask=live, other=0.0)
    return b_q, b_k, b_g, b_v, b_beta


@triton.jit
def _normalised(x, L2NORM: tl.constexpr):
    x = x.to(tl.float32)
    if L2NORM:
        x = x * tl.rsqrt(tl.sum(x * x) + 1e-6)
    return x


@triton.jit
def _entries(p_states, channels, entry, length, D: tl.constexpr, TOKENS_FIRST: tl.constexpr):
    """Where an entry of a state of the convolution lies, for these channels."""
    return p_states + (entry * D + channels if TOKENS_FIRST else channels * length + entry)


@triton.jit
def _window(p_states, channels, mask, first, length, W: tl.constexpr, D: tl.constexpr, TOKENS_FIRST: tl.constexpr):
    """The raw tokens before the first, fp32, the newest first; zeros for those that the convolution does not see."""
    entry = first + (W - 2)
    x1 = tl.load(
        _entries(p_states, channels, entry, length, D, TOKENS_FIRST), mask=(mask & (entry < length)) != 0, other=0.0
    ).to(tl.float32)
    x2 = tl.zeros_like(x1)
    x3 = tl.zeros_like(x1)
    if W > 2:
        x2 = tl.load(
            _entries(p_states, channels, entry - 1, length, D, TOKENS_FIRST),
            mask=(mask & (entry - 1 < length)) != 0,
            other=0.0,
        ).to(tl.float32)
    if W > 3:
        x3 = tl.load(
            _entries(p_states, channels, entry - 2, length, D, TOKENS_FIRST),
            mask=(mask & (entry - 2 < length)) != 0,
            other=0.0,
        ).to(tl.float32)
    return x1, x2, x3


@triton.jit
def _keep_all(
    p_states, c_q, c_k, c_v, m_qk, m_v, b_q, b_k, b_v, entry, length, D: tl.constexpr, TOKENS_FIRST: tl.constexpr
):
    """`_keep` of the channels of q, k and v."""
    _keep(p_states, c_q, m_qk, b_q, entry, length, D, TOKENS_FIRST)
    _keep(p_states, c_k, m_qk, b_k, entry, length, D, TOKENS_FIRST)
    _keep(p_states, c_v, m_v, b_v, entry, length, D, TOKENS_FIRST)


@triton.jit
def _keep(p_states, channels, mask, x, entry, length, D: tl.constexpr, TOKENS_FIRST: tl.constexpr):
    """An entry of a state becomes `x`, if there is such an entry."""
    p = _entries(p_states, channels, entry, length, D, TOKENS_FIRST)
    tl.store(p, cast(x, p.dtype.element_ty), mask=(mask & (entry >= 0) & (entry < length)) != 0)


@triton.jit
def _slot(
    state_indices, num_accepted_tokens, i_n, pool, null_slot, columns, stride_indices_n, stride_indices_c
):  # fmt: skip
    """Of sequence i_n the slot that its state is taken from: under 0 it is padding, from `pool` on there is none."""
    slot = i_n
    if state_indices is not None:
        if num_accepted_tokens is None:
            slot = load_slot(state_indices, i_n, stride_indices_n, null_slot)
        else:  # of its drafts, so many were kept; a column that is not there is no slot either
            column = tl.load(num_accepted_tokens + i_n).to(tl.int64) - 1
            slot += pool
            if (column >= 0) & (column < columns):
                p_slots = state_indices + i_n * stride_indices_n
                slot = load_slot(p_slots, column, stride_indices_c, null_slot)
    return slot


@triton.jit
def _fill_row(p_o, value, m_v):
    """A row of o becomes `value`."""
    tl.store(p_o, tl.full(p_o.shape, value, tl.float32).to(p_o.dtype.element_ty), mask=m_v)


@triton.jit
def _fill_tail(p_o, cu_seqlens, i_n, sequences, T, stride_o_t, m_v):
    """By the last sequence, the first row behind which is `p_o`: what is behind it becomes zero."""
    if cu_seqlens is not None:
        first = tl.load(cu_seqlens + sequences).to(tl.int32) if i_n == sequences - 1 else T
        for _ in range(T - first):  # from 0: Triton 3.5 fails where a branch chooses where a loop begins
            _fill_row(p_o, 0.0, m_v)
            p_o += stride_o_t


@triton.jit
def _at_once(b_h, b_q, b_k, b_v, b_beta):
    """One token's o, and what times k is added to its decayed state; both fp32 [BV]. b_q: scaled."""
    # o = (S + k u^T)^T q = S^T q + (k.q) u: both reductions over the tile are of the decayed state, so that they run at
    # the same time, and o does not wait for the update.
    hk = tl.sum(b_h * b_k[None, :], 1)
    hq = tl.sum(b_h * b_q[None, :], 1)
    b_u = b_beta * (b_v - hk)
    return hq + tl.sum(b_k * b_q) * b_u, b_u


@triton.jit
def _in_pieces(
    h0, ht, state_scales, stride_h0_n, stride_ht_n, stride_scales_n, b_q, b_k, b_decay, b_v, b_beta, seed, slot,
    first_row, K: tl.constexpr, BV: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """One token through BV rows of a state, PIECE of them at a time: the next two are on their way meanwhile.

    Args:
        h0, ht, state_scales: as in the kernel. b_q: scaled. first_row: hv V + v of the first.

    Returns:
        o, fp32 [BV].
    """
    p_ht = None
    if ht is not None:
        p_ht = ht + slot * stride_ht_n + first_row * K
    p_scales = None
    if state_scales is not None:
        p_scales = state_scales + slot * stride_scales_n + first_row
    p_h0 = h0 + slot * stride_h0_n + first_row * K
    o_k = tl.arange(0, K)
    pieces = tl.arange(0, BV // PIECE)[:, None]
    values = tl.reshape(b_v, [BV // PIECE, PIECE])
    outs = tl.zeros_like(values)
    b_qk = tl.sum(b_k * b_q)
    for i in tl.range(0, BV // PIECE, num_stages=3):
        o_v = i * PIECE + tl.arange(0, PIECE)
        m_v = o_v < BV
        o_h = o_v[:, None] * K + o_k[None, :]
        scales = None
        if p_scales is not None:
            scales = p_scales + o_v
        b_h = load_state(p_h0 + o_h, None, scales, m_v, 1) * b_decay[None, :]
        b_u = b_beta * (tl.sum(tl.where(pieces == i, values, 0.0), 0) - tl.sum(b_h * b_k[None, :], 1))
        b_o = tl.sum(b_h * b_q[None, :], 1) + b_qk * b_u
        outs = tl.where(pieces == i, b_o[None, :], outs)
        if p_ht is not None:
            b_h += b_u[:, None] * b_k[None, :]
            store_state(p_ht + o_h, b_h, None, scales, m_v, b_u, seed, slot, 0, first_row + o_v, K, K)
    return tl.reshape(outs, [BV])


# Whatever changes from call to call must not compile a new kernel: the batch, its strides, where rows of single numbers
# begin, and values in general. Only what decides about 16-byte loads is specialised (by Triton: a multiple of 16?).
NUMBERS = (
    *("beta", "state_indices", "cu_seqlens", "has_initial_state", "num_accepted_tokens", "token_state_indices"),
    *("sequences", "T", "pool", "null_slot", "columns", "kept_rows", "kept_tokens"),
    *("stride_indices_n", "stride_indices_c", "stride_beta_s", "stride_beta_t", "stride_beta_h"),
    *("stride_o_s", "stride_o_t", "stride_o_h"),
    *("conv_indices", "stride_conv_indices", "conv_slots", "conv_length"),
    *("rounding_seed", "stride_scales_n"),
)


@triton.jit(do_not_specialize=NUMBERS)
def decode_kernel(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    v,  # [B, T, HV, V]
    g,  # [B, T, HV, K]
    beta,  # [B, T, HV]
    A_log,  # [HV] or None
    dt_bias,  # [HV, K] or None
    o,  # [B, T, HV, V]
    h0,  # [P or N, HV, V, K] or [.., K, V]; None: zeros
    ht,  # like h0, which it may be; None: not wanted
    token_states,  # [B, T, HV, V, K] or [.., K, V], with token_state_indices [kept_rows, kept_tokens, ..]; or None
    state_indices,  # [N], or with num_accepted_tokens [N, columns]; or None
    cu_seqlens,  # [N + 1], or None for a dense batch
    has_initial_state,  # bool [N] or None
    num_accepted_tokens,  # [N] or None
    token_state_indices,  # [N] or None
    scale,
    lower_bound,
    sequences,
    T,  # tokens per batch row
    pool,  # slots of h0
    null_slot,
    columns,
    stride_indices_n,
    stride_indices_c,
    kept_rows,
    kept_tokens,
    stride_q_s: tl.int64,  # s: from sequence to sequence of a dense batch, from token to token of a packed one
    stride_q_t,  # t: from token to token
    stride_q_h,  # h: from head to head; the last dimension is contiguous
    stride_k_s: tl.int64,
    stride_k_t,
    stride_k_h,
    stride_v_s: tl.int64,
    stride_v_t,
    stride_v_h,
    stride_g_s: tl.int64,
    stride_g_t,
    stride_g_h,
    stride_beta_s: tl.int64,
    stride_beta_t,
    stride_beta_h,
    stride_o_s: tl.int64,
    stride_o_t,
    stride_o_h,
    stride_h0_n: tl.int64,  # n: from slot to slot; within a slot the state is contiguous
    stride_ht_n: tl.int64,
    stride_ts_s: tl.int64,
    stride_ts_t: tl.int64,
    conv_weight,  # [D, W], D = 2 H K + HV V; None: no convolution
    conv_bias,  # [D] or None
    conv_states,  # [conv_slots, conv_length, D] or [.., D, conv_length]
    conv_indices,  # [N]; None: as the state
    gate,  # [B, T, HV, V]; None: no norm
    norm_weight,  # [V]
    norm_eps,
    stride_conv_indices,
    conv_slots,
    conv_length,
    stride_conv_n: tl.int64,
    stride_gate_s: tl.int64,
    stride_gate_t,
    stride_gate_h,
    state_scales,  # fp32 [pool, HV, V], of an int16 pool; or None
    stride_scales_n,
    rounding_seed,  # int64 [1]; None: states are rounded to nearest
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PIECE: tl.constexpr,
    STATE_V_FIRST: tl.constexpr,
    GATE: tl.constexpr,
    BETA_LOGIT: tl.constexpr,
    NEG_EIGVAL: tl.constexpr,
    L2NORM: tl.constexpr,
    HEADS: tl.constexpr,
    W: tl.constexpr,
    TOKENS_FIRST: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """One program: V-slice i_v of HEADS value heads from i_first on, of sequence i_n.

    Grid: (cdiv(V, BV) * HV / HEADS * N,), V-slices fastest. With a convolution HEADS is HV / H, otherwise 1; with
    either part there is one V-slice. PIECE: see `_in_pieces`; 0: the slice lies in registers through all tokens.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    FULL: tl.constexpr = BK == K and V % BV == 0
    D: tl.constexpr = 2 * H * K + HV * V
    pid = tl.program_id(0)
    # Slots times their stride pass 2^31 in large pools, and so do tokens times theirs: offsets are 64-bit throughout.
    i_n = (pid // (NV * (HV // HEADS))).to(tl.int64)
    i_first = ((pid // NV) % (HV // HEADS)).to(tl.int64) * HEADS
    i_h = i_first // (HV // H)
    o_k = tl.arange(0, BK)
    o_v = (pid % NV) * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_h = m_v[:, None] & m_k[None, :]

    slot = _slot(state_indices, num_accepted_tokens, i_n, pool, null_slot, columns, stride_indices_n, stride_indices_c)
    conv_slot = slot
    if conv_indices is not None:
        conv_slot = load_slot(conv_indices, i_n, stride_conv_indices, null_slot)
    if conv_weight is not None:
        slot = tl.where((conv_slot >= conv_slots) & (slot >= 0), slot + pool, slot)
        slot = tl.where(conv_slot < 0, -1, slot)
    first = i_n
    n_tokens = T if PIECE == 0 else 1  # known then: no loop around that over pieces
    if cu_seqlens is not None:
        first = tl.load(cu_seqlens + i_n).to(tl.int64)
        n_tokens = (tl.load(cu_seqlens + i_n + 1).to(tl.int64) - first).to(tl.int32)
    p_first = o + first * stride_o_s + i_first * stride_o_h + o_v

    if state_indices is not None:
        # padding, a slot that is not there, or no tokens: the pool is neither read nor written
        if (slot < 0) | (slot >= pool) | (n_tokens == 0):
            for i_g in range(HEADS):
                p_o = p_first + i_g * stride_o_h
                for _ in range(n_tokens):
                    _fill_row(p_o, tl.where(slot < 0, 0.0, float("nan")), m_v)
                    p_o += stride_o_t
                _fill_tail(p_o, cu_seqlens, i_n, sequences, T, stride_o_t, m_v)
            return

    if conv_weight is not None:
        p_conv = conv_states + conv_slot * stride_conv_n
        c_q = i_h * K + o_k
        c_k = (H + i_h) * K + o_k
        oldest = 0
        if num_accepted_tokens is not None:
            oldest = tl.load(num_accepted_tokens + i_n).to(tl.int32) - 1
        fresh = False
        if has_initial_state is not None:
            fresh = tl.load(has_initial_state + i_n) == 0

    seed = None
    if rounding_seed is not None:
        seed = tl.load(rounding_seed)

    for i_g in range(HEADS):
        i_hv = i_first + i_g
        row = i_hv * V + o_v
        p_scales = None
        if state_scales is not None:
            p_scales = state_scales + slot * stride_scales_n + row
        p_o = p_first + i_g * stride_o_h
        if STATE_V_FIRST:
            o_h = i_hv * (K * V) + o_v[:, None] * K + o_k[None, :]
        else:
            o_h = i_hv * (K * V) + o_k[None, :] * V + o_v[:, None]
        b_h = tl.zeros([BV, BK], dtype=tl.float32)
        if (h0 is not None) & (PIECE == 0):
            p_h0 = h0 + slot * stride_h0_n + o_h
            if has_initial_state is not None:
                has = tl.load(has_initial_state + i_n)
                b_h = load_state(p_h0, (m_h & has) != 0, p_scales, (m_v & has) != 0, 1)
            else:
                b_h = load_state(p_h0, None if FULL else m_h, p_scales, m_v, 1)
        if token_states is not None:
            i_kept = first
            if token_state_indices is not None:
                i_kept = tl.load(token_state_indices + i_n).to(tl.int64)
            p_ts = token_states + i_kept * stride_ts_s + o_h

        p_q = q + first * stride_q_s + i_h * stride_q_h + o_k
        p_k = k + first * stride_k_s + i_h * stride_k_h + o_k
        p_v = v + first * stride_v_s + i_hv * stride_v_h + o_v
        p_g = g + first * stride_g_s + i_hv * stride_g_h + o_k
        p_beta = beta + first * stride_beta_s + i_hv * stride_beta_h
        next_q, next_k, next_g, next_v, next_beta = _fetch(p_q, p_k, p_g, p_v, p_beta, m_k, m_v, n_tokens > 0)
        if conv_weight is not None:
            c_v = 2 * H * K + i_hv * V + o_v
            m_window = m_k & (fresh == 0)
            q1, q2, q3 = _window(p_conv, c_q, m_window, oldest, conv_length, W, D, TOKENS_FIRST)
            k1, k2, k3 = _window(p_conv, c_k, m_window, oldest, conv_length, W, D, TOKENS_FIRST)
            v1, v2, v3 = _window(p_conv, c_v, m_v & (fresh == 0), oldest, conv_length, W, D, TOKENS_FIRST)
            wq0, wq1, wq2, wq3, wqb = conv_taps(conv_weight, conv_bias, c_q, m_k, W)
            wk0, wk1, wk2, wk3, wkb = conv_taps(conv_weight, conv_bias, c_k, m_k, W)
            wv0, wv1, wv2, wv3, wvb = conv_taps(conv_weight, conv_bias, c_v, m_v, W)
            # The last of the heads shifts what all of them read.
            m_last = m_k & (i_g == HEADS - 1)
            if SHIFT & (num_accepted_tokens is not None):
                tl.debug_barrier()
                for i in tl.static_range(1, W - 1):
                    x_q, x_k, x_v = (q1, k1, v1) if i == 1 else (q2, k2, v2)
                    entry = W - 2 - i
                    _keep_all(p_conv, c_q, c_k, c_v, m_last, m_v, x_q, x_k, x_v, entry, conv_length, D, TOKENS_FIRST)
        if gate is not None:
            p_gate = gate + first * stride_gate_s + i_hv * stride_gate_h + o_v
            b_scale = tl.load(norm_weight + o_v, mask=m_v, other=0.0).to(tl.float32)
            next_gate = tl.load(p_gate, mask=(m_v & (n_tokens > 0)) != 0, other=0.0)
        b_bias = tl.zeros([BK], dtype=tl.float32)
        if dt_bias is not None:
            b_bias = tl.load(dt_bias + i_hv * K + o_k, mask=m_k, other=0.0).to(tl.float32)
        A = 1.0
        if A_log is not None:
            A, b_bias = gate_parameters(tl.load(A_log + i_hv), b_bias, GATE)

        b_odd = tl.zeros([BV], dtype=tl.float32)
        # A loop even for a single token: ptxas reorders freely within a block of straight code, and there it put the
        # loads of the state behind the norms, which wait for q and k: two trips to memory, one after the other.
        for t in range(n_tokens):
            b_q, b_k, b_v = next_q, next_k, next_v
            if conv_weight is not None:
                q0, k0, v0 = next_q.to(tl.float32), next_k.to(tl.float32), next_v.to(tl.float32)
                b_q = convolved(q0, q1, q2, q3, wq0, wq1, wq2, wq3, wqb)
                b_k = convolved(k0, k1, k2, k3, wk0, wk1, wk2, wk3, wkb)
                b_v = convolved(v0, v1, v2, v3, wv0, wv1, wv2, wv3, wvb)
                q1, q2, q3, k1, k2, k3, v1, v2, v3 = q0, q1, q2, k0, k1, k2, v0, v1, v2
                if SHIFT & (num_accepted_tokens is not None):
                    _keep_all(p_conv, c_q, c_k, c_v, m_last, m_v, q0, k0, v0, W - 2 + t, conv_length, D, TOKENS_FIRST)
            b_q, b_k = _normalised(b_q, L2NORM) * scale, _normalised(b_k, L2NORM)
            b_g, b_v = next_g.to(tl.float32), b_v.to(tl.float32)
            b_beta = beta_value(next_beta, BETA_LOGIT, NEG_EIGVAL)
            p_q += stride_q_t
            p_k += stride_k_t
            p_v += stride_v_t
            p_g += stride_g_t
            p_beta += stride_beta_t
            next_q, next_k, next_g, next_v, next_beta = _fetch(p_q, p_k, p_g, p_v, p_beta, m_k, m_v, t + 1 < n_tokens)

            # Channels past K: their gate is not zero, but the state, q and k are, so nothing of it is seen.
            b_decay = exp2(log2_decay(b_g, A, b_bias, lower_bound, GATE))
            if PIECE > 0:
                b_o = _in_pieces(
                    h0, ht, state_scales, stride_h0_n, stride_ht_n, stride_scales_n, b_q, b_k, b_decay, b_v, b_beta,
                    seed, slot, i_hv * V + (pid % NV) * BV, K, BV, PIECE,
                )  # fmt: skip
            else:
                b_h *= b_decay[None, :]
                b_o, b_u = _at_once(b_h, b_q, b_k, b_v, b_beta)
            if gate is not None:
                b_gate = sigmoid(next_gate.to(tl.float32))
                p_gate += stride_gate_t
                next_gate = tl.load(p_gate, mask=(m_v & (t + 1 < n_tokens)) != 0, other=0.0)
                b_o = b_o * tl.rsqrt(tl.sum(b_o * b_o) * (1.0 / V) + norm_eps) * b_scale * b_gate
            tl.store(p_o, cast(b_o, p_o.dtype.element_ty), mask=m_v)
            p_o += stride_o_t
            if PIECE == 0:
                b_h += b_u[:, None] * b_k[None, :]
                b_odd = b_u  # of a row that has NaN, so is this, or infinite
            if token_states is not None:
                kept = m_h
                if token_state_indices is not None:
                    kept = (m_h & (i_kept >= 0) & (i_kept < kept_rows) & (t < kept_tokens)) != 0
                store_state(p_ts, b_h, kept, None, m_v, b_u, seed, slot, t, row, K, BK)
                p_ts += stride_ts_t
            if (ht is not None) & (num_accepted_tokens is not None):
                if t < columns:
                    to = load_slot(state_indices + i_n * stride_indices_n, t, stride_indices_c, null_slot)
                    live = (to >= 0) & (to < pool)
                    p_ht = ht + to * stride_ht_n + o_h
                    to_scales = None
                    if state_scales is not None:
                        to_scales = state_scales + to * stride_scales_n + row
                    m_to, m_rows = (m_h & live) != 0, (m_v & live) != 0
                    store_state(p_ht, b_h, m_to, to_scales, m_rows, b_u, seed, slot, t, row, K, BK)

        if (ht is not None) & (num_accepted_tokens is None) & (PIECE == 0):
            p_ht = ht + slot * stride_ht_n + o_h
            store_state(p_ht, b_h, None if FULL else m_h, p_scales, m_v, b_odd, seed, slot, n_tokens - 1, row, K, BK)
        if conv_weight is not None:
            if SHIFT & (num_accepted_tokens is None):
                tl.debug_barrier()  # every warp has read what is shifted now
                m_q, m_new = m_last & (n_tokens > 0), m_v & (n_tokens > 0)
                for i in tl.static_range(1, W):
                    x_q, x_k, x_v = (q1, k1, v1) if i == 1 else ((q2, k2, v2) if i == 2 else (q3, k3, v3))
                    entry = W - 1 - i
                    _keep_all(p_conv, c_q, c_k, c_v, m_q, m_new, x_q, x_k, x_v, entry, conv_length, D, TOKENS_FIRST)
        _fill_tail(p_o, cu_seqlens, i_n, sequences, T, stride_o_t, m_v)
