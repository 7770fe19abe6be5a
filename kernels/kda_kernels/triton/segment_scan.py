"""The states at the beginning of all segments of a prefill that is split, from the summaries of the segments.

A segment makes S T + E of the state S [V, K] before it. Done in fp32 (products as three of tf32): V * K * K
multiplications a segment and head, and K * K * 4 bytes to read, for each BV rows of the state.
"""

import torch
import triton
import triton.language as tl

BV = 16  # rows of a state in a program: enough programs for few heads
NUM_WARPS, NUM_STAGES = 8, 2  # 4 warps spill


@triton.jit
def segment_scan_kernel(
    summaries,  # fp32 [2 * units, HV, V, K]: E of unit u is 2 u, T is 2 u + 1
    h0,
    starts,  # fp32 [units, HV, V, K]
    state_indices,
    cu_seqlens,
    T,
    segment,
    stride_h0,
    HV: tl.constexpr,
    V: tl.constexpr,
    K: tl.constexpr,
    BV: tl.constexpr,
    HAS_STATE: tl.constexpr,
    POOLED: tl.constexpr,
    PACKED: tl.constexpr,
):
    i_v, i_hv, i_n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    unit = 0
    length = T
    if PACKED:
        for m in range(i_n):
            before = (tl.load(cu_seqlens + m + 1) - tl.load(cu_seqlens + m)).to(tl.int32)
            unit += tl.maximum(tl.cdiv(before, segment), 1)
        length = (tl.load(cu_seqlens + i_n + 1) - tl.load(cu_seqlens + i_n)).to(tl.int32)
    else:
        unit = i_n * tl.maximum(tl.cdiv(T, segment), 1)
    count = tl.maximum(tl.cdiv(length, segment), 1)
    slot = i_n.to(tl.int64)
    if POOLED:
        slot = tl.load(state_indices + i_n).to(tl.int64)
        if slot < 0:
            return

    rows = i_v * BV + tl.arange(0, BV)
    k = tl.arange(0, K)
    inside = i_hv * (V * K) + rows[:, None] * K + k[None, :]
    square = i_hv * (V * K) + k[:, None] * K + k[None, :]
    S = tl.zeros([BV, K], tl.float32)
    if HAS_STATE:
        S = tl.load(h0 + slot * stride_h0 + inside).to(tl.float32)
    base = unit.to(tl.int64) * (HV * V * K)
    for _ in range(count - 1):
        tl.store(starts + base + inside, S)
        E = tl.load(summaries + 2 * base + inside)
        transition = tl.load(summaries + 2 * base + HV * V * K + square)
        S = tl.dot(S, transition, acc=E, input_precision="tf32x3")
        base += HV * V * K
    tl.store(starts + base + inside, S)


def scan_segments(
    summaries: torch.Tensor,
    h0: torch.Tensor | None,
    starts: torch.Tensor,
    state_indices: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    batch: int,
    tokens: int,
    segment: int,
) -> None:
    """Writes `starts` [units, HV, V, K]. `batch` sequences of `tokens` each, or those of `cu_seqlens`."""
    _, HV, V, K = starts.shape
    N = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    segment_scan_kernel[(V // BV, HV, N)](
        summaries, h0, starts, state_indices, cu_seqlens, tokens, segment, 0 if h0 is None else h0.stride(0),
        HV=HV, V=V, K=K, BV=BV, HAS_STATE=h0 is not None, POOLED=state_indices is not None,
        PACKED=cu_seqlens is not None, num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
