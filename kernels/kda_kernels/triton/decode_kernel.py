"""Device half of the decode kernel: one V-slice of one head's state, through every token of its sequence.

Memory is all that counts: a state tile is read once, kept in fp32 registers over all tokens, and written once. All
loads of the state and of the first token are issued before anything waits for one of them, and the tokens after it are
fetched one ahead.

Compiled for sm_90a (Triton 3.9; bf16, fp32 state, K = V = 128, BV = 16, 1 warp): 128 registers, no spills; 16 loads and
16 stores of the state, each of 16 bytes a lane; reductions over K by shuffles in the warp, 32 bytes of shared memory.
"""

import triton
import triton.language as tl

from kda_kernels.triton.common import beta_value, cast, exp2, gate_parameters, load_slot, log2_decay


@triton.jit
def _fetch(p_q, p_k, p_g, p_v, p_beta, m_k, m_v, live):
    """The tensors of one token as they lie in memory, 0 where there is none."""
    m_k = (m_k & live) != 0  # != 0: to the interpreter the conjunction is an int
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
def _fill_row(p_o, value, m_v):
    """A row of o becomes `value`."""
    tl.store(p_o, tl.full(p_o.shape, value, tl.float32).to(p_o.dtype.element_ty), mask=m_v)


@triton.jit
def _fill_tail(p_o, cu_seqlens, i_n, sequences, T, stride_o_t, m_v):
    """By the last sequence, the first row behind which is `p_o`: what is behind it becomes zero."""
    if cu_seqlens is not None:
        first = tl.load(cu_seqlens + sequences).to(tl.int32) if i_n == sequences - 1 else T
        for _ in range(first, T):
            _fill_row(p_o, 0.0, m_v)
            p_o += stride_o_t


# Whatever changes from call to call must not compile a new kernel: the batch, its strides, where rows of single numbers
# begin, and values in general. Only what decides about 16-byte loads is specialised (by Triton: a multiple of 16?).
NUMBERS = (
    *("beta", "state_indices", "cu_seqlens", "has_initial_state", "num_accepted_tokens", "token_state_indices"),
    *("sequences", "T", "pool", "null_slot", "columns", "kept_rows", "kept_tokens"),
    *("stride_indices_n", "stride_indices_c", "stride_beta_s", "stride_beta_t", "stride_beta_h"),
    *("stride_o_s", "stride_o_t", "stride_o_h"),
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
    T,  # tokens a batch row
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
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    STATE_V_FIRST: tl.constexpr,
    GATE: tl.constexpr,
    BETA_LOGIT: tl.constexpr,
    NEG_EIGVAL: tl.constexpr,
    L2NORM: tl.constexpr,
):
    """One program: V-slice i_v of value head i_hv of sequence i_n. Grid: (cdiv(V, BV) * HV * N,), V-slices fastest."""
    NV: tl.constexpr = (V + BV - 1) // BV
    FULL: tl.constexpr = BK == K and V % BV == 0
    pid = tl.program_id(0)
    # Slots times their stride pass 2^31 in large pools, and so do tokens times theirs: offsets are 64-bit throughout.
    i_n = (pid // (NV * HV)).to(tl.int64)
    i_hv = ((pid // NV) % HV).to(tl.int64)
    i_h = i_hv // (HV // H)
    o_k = tl.arange(0, BK)
    o_v = (pid % NV) * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_h = m_v[:, None] & m_k[None, :]

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
    first = i_n
    n_tokens = T
    if cu_seqlens is not None:
        first = tl.load(cu_seqlens + i_n).to(tl.int64)
        n_tokens = (tl.load(cu_seqlens + i_n + 1).to(tl.int64) - first).to(tl.int32)
    p_o = o + first * stride_o_s + i_hv * stride_o_h + o_v

    if state_indices is not None:
        # padding, a slot that is not there, or no tokens: the pool is neither read nor written
        if (slot < 0) | (slot >= pool) | (n_tokens == 0):
            for _ in range(n_tokens):
                _fill_row(p_o, tl.where(slot < 0, 0.0, float("nan")), m_v)
                p_o += stride_o_t
            _fill_tail(p_o, cu_seqlens, i_n, sequences, T, stride_o_t, m_v)
            return

    if STATE_V_FIRST:
        o_h = i_hv * (K * V) + o_v[:, None] * K + o_k[None, :]
    else:
        o_h = i_hv * (K * V) + o_k[None, :] * V + o_v[:, None]
    b_h = tl.zeros([BV, BK], dtype=tl.float32)
    if h0 is not None:
        p_h0 = h0 + slot * stride_h0_n + o_h
        if has_initial_state is not None:
            b_h = tl.load(p_h0, mask=m_h & tl.load(has_initial_state + i_n), other=0.0).to(tl.float32)
        else:
            b_h = (tl.load(p_h0) if FULL else tl.load(p_h0, mask=m_h, other=0.0)).to(tl.float32)
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
    b_bias = tl.zeros([BK], dtype=tl.float32)
    if dt_bias is not None:
        b_bias = tl.load(dt_bias + i_hv * K + o_k, mask=m_k, other=0.0).to(tl.float32)
    A = 1.0
    if A_log is not None:
        A, b_bias = gate_parameters(tl.load(A_log + i_hv), b_bias, GATE)

    # A loop even for a single token: ptxas reorders freely within a block of straight code, and there it put the loads
    # of the state behind the norms, which wait for q and k: two trips to memory, one after the other.
    for t in range(n_tokens):
        b_q, b_k = _normalised(next_q, L2NORM) * scale, _normalised(next_k, L2NORM)
        b_g, b_v = next_g.to(tl.float32), next_v.to(tl.float32)
        b_beta = beta_value(next_beta, BETA_LOGIT, NEG_EIGVAL)
        p_q += stride_q_t
        p_k += stride_k_t
        p_v += stride_v_t
        p_g += stride_g_t
        p_beta += stride_beta_t
        next_q, next_k, next_g, next_v, next_beta = _fetch(p_q, p_k, p_g, p_v, p_beta, m_k, m_v, t + 1 < n_tokens)

        # Channels past K: their gate is not zero, but the state, q and k are, so nothing of it is seen.
        b_h *= exp2(log2_decay(b_g, A, b_bias, lower_bound, GATE))[None, :]
        # o = (S + k u^T)^T q = S^T q + (k.q) u: both reductions over the tile are of the decayed state, so that they
        # run at the same time, and o does not wait for the update.
        hk = tl.sum(b_h * b_k[None, :], 1)
        hq = tl.sum(b_h * b_q[None, :], 1)
        b_u = b_beta * (b_v - hk)
        b_o = hq + tl.sum(b_k * b_q) * b_u
        tl.store(p_o, cast(b_o, p_o.dtype.element_ty), mask=m_v)
        p_o += stride_o_t
        b_h += b_u[:, None] * b_k[None, :]
        if token_states is not None:
            kept = m_h
            if token_state_indices is not None:
                kept = m_h & (i_kept >= 0) & (i_kept < kept_rows) & (t < kept_tokens)
            tl.store(p_ts, cast(b_h, p_ts.dtype.element_ty), mask=kept)
            p_ts += stride_ts_t
        if (ht is not None) & (num_accepted_tokens is not None):
            if t < columns:
                slot = load_slot(state_indices + i_n * stride_indices_n, t, stride_indices_c, null_slot)
                live = m_h & (slot >= 0) & (slot < pool)
                tl.store(ht + slot * stride_ht_n + o_h, cast(b_h, ht.dtype.element_ty), mask=live)

    if (ht is not None) & (num_accepted_tokens is None):
        p_ht = ht + slot * stride_ht_n + o_h
        b_ht = cast(b_h, p_ht.dtype.element_ty)
        if FULL:
            tl.store(p_ht, b_ht)
        else:
            tl.store(p_ht, b_ht, mask=m_h)
    _fill_tail(p_o, cu_seqlens, i_n, sequences, T, stride_o_t, m_v)
