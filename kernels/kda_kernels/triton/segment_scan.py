"""The states between the segments of a prefill that is split, from the summaries of its units.

A unit, a segment that is not the first of its sequence, makes S T + E of the state S [V, K] before it. Products take S
and T in two bf16 parts each, 16 bits together; sums are fp32. V * K * K multiplications a unit and head, and 4 * K * K
bytes to read for each BV rows of the state.
"""

import torch
import triton
import triton.language as tl

from kda_kernels.triton.common import dot, split

BV = 16  # rows of a state in a program: 64, for wgmma, leave most SMs idle (24 us where this takes 15, by hand)
NUM_WARPS, NUM_STAGES = 4, 2


@triton.jit
def units_of(length, lead, segment, begin, limit):
    """How many segments a sequence has behind its first, in the round that runs `limit` tokens from `begin` on."""
    length = tl.minimum(length - begin, limit)
    return tl.maximum(length - lead + (segment - 1), 0) // segment


@triton.jit
def segment_scan_kernel(
    summaries,  # fp32 [2 * units, HV, V, K]: E of unit u is 2 u
    transitions,  # the same memory as bf16: both parts of T of unit u, [2, K, K], are where 2 u + 1 is
    starts,  # fp32 [N + units, HV, V, K]: of sequences after this round, and before each unit
    final,  # [.., HV, V, K]: where final states go
    state_indices,
    cu_seqlens,
    N,
    T,
    lead,
    segment,
    begin,
    limit,
    stride_final,
    HV: tl.constexpr,
    V: tl.constexpr,
    K: tl.constexpr,
    BV: tl.constexpr,
    FINAL: tl.constexpr,
    POOLED: tl.constexpr,
    PACKED: tl.constexpr,
):
    i_v, i_hv, i_n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = T
    unit = 0
    if PACKED:
        for m in range(i_n):
            before = (tl.load(cu_seqlens + m + 1) - tl.load(cu_seqlens + m)).to(tl.int32)
            unit += units_of(before, lead, segment, begin, limit)
        length = (tl.load(cu_seqlens + i_n + 1) - tl.load(cu_seqlens + i_n)).to(tl.int32)
    else:
        unit = i_n * units_of(T, lead, segment, begin, limit)
    count = units_of(length, lead, segment, begin, limit)
    slot = i_n.to(tl.int64)
    if POOLED:
        slot = tl.load(state_indices + i_n).to(tl.int64)
    if count == 0 or slot < 0:
        return

    rows = i_v * BV + tl.arange(0, BV)
    k = tl.arange(0, K)
    inside = i_hv * (V * K) + rows[:, None] * K + k[None, :]
    square = k[:, None] * K + k[None, :]
    size = HV * V * K
    summary = summaries + unit.to(tl.int64) * (2 * size)
    transition = transitions + unit.to(tl.int64) * (4 * size) + 2 * (size + i_hv * (V * K))
    start = starts + (N + unit).to(tl.int64) * size
    S = tl.load(start + inside)
    for i in range(count):
        E = tl.load(summary + inside)
        T_upper, T_lower = tl.load(transition + square), tl.load(transition + K * K + square)
        S_upper, S_lower = split(S)
        S = dot(S_upper, T_upper, dot(S_lower, T_upper, dot(S_upper, T_lower))) + E
        summary += 2 * size
        transition += 4 * size
        start += size
        if i + 1 < count:
            tl.store(start + inside, S)
    if length > begin + limit:
        tl.store(starts + i_n.to(tl.int64) * size + inside, S)
    elif FINAL:
        tl.store(final + slot * stride_final + inside, S.to(final.dtype.element_ty))


def scan_segments(
    summaries: torch.Tensor,
    starts: torch.Tensor,
    final: torch.Tensor | None,
    state_indices: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    sequences: int,
    tokens: int,
    lead: int,
    segment: int,
    begin: int,
    limit: int,
) -> None:
    """Fills `starts` [sequences + units, HV, V, K], but for what stands before first units, and `final`; V = K.

    Args:
        final: a pool with `state_indices`, or [sequences, HV, V, K].
        tokens: of each sequence, where there are no `cu_seqlens`.
        lead, segment: tokens of first and of other segments. begin, limit: see `units_of`.
    """
    _, HV, V, K = starts.shape
    segment_scan_kernel[(V // BV, HV, sequences)](
        summaries, summaries.view(torch.bfloat16), starts, final, state_indices, cu_seqlens, sequences, tokens,
        lead, segment, begin, limit,
        0 if final is None else final.stride(0),
        HV=HV, V=V, K=K, BV=BV, FINAL=final is not None, POOLED=state_indices is not None,
        PACKED=cu_seqlens is not None, num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
