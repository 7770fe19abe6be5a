"""What the tokens of a prefill that is split read of the states before their segments, added to its output.

The output of a token is affine in the state S [V, K] before its segment: o = o' + S r, where o' is what it would be
without one, and r [K] what the segment's transition makes of its query. 768 bytes per token and head to move.

Both are taken in bf16, which holds what any decay leaves of a query. S in two parts would take half as long again (37
us instead of 26 for 12 heads and 6560 tokens, by hand). With outputs in fp16 r is in fp16, and products take tf32:
S may be larger than fp16 holds.
"""

import functools

import torch
import triton
import triton.language as tl

from kda_kernels.triton.common import cast, dot, operand
from kda_kernels.triton.launch import launch
from kda_kernels.triton.runtime import multiprocessors
from kda_kernels.triton.segment_scan import SHARED, Segments, slot_of, units_of

BT = 64  # tokens per step
# Tokens a program, each of which reads a state. On an H100 the fewest are best for which three programs per SM are
# enough: 1024 tokens of 4 heads 4.1 us, where 256 a program take 9.0; 8192 of 12 heads 20.2 (64 a program: 28.3). Where
# they are not, the most are best that leave each SM several turns, so that all end together. On an H200, by hand, 12
# heads, 146,000 tokens: 512 a program 354 us, 256 370, 2048 379; 500,000: 1214, 1288 and 1183.
SPANS, PROGRAMS, TURNS = (64, 128, 256, 512, 1024, 2048), 3, 7
NUM_WARPS, NUM_STAGES = 4, 2


@triton.jit(
    do_not_specialize=[*SHARED, "T", "stride_b", "stride_t", "stride_h", "span"],
    do_not_specialize_on_alignment=["state_indices", "cu_seqlens"],
)
def segment_outputs_kernel(
    workspace,
    state_indices,
    cu_seqlens,
    N,
    units,
    lead,
    segment,
    begin,
    limit,
    stride_index,
    slots,
    null_slot,
    o,  # [B, T, HV, V]: o', and then o
    T,
    stride_b,  # in pieces of 16 bytes, as rows lie
    stride_t,
    stride_h,
    HV,
    span,  # tokens a program
    V: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
):
    # last tokens first: they were written last, and are in the cache still
    i_hv, unit, i_s = tl.program_id(0), tl.program_id(1), tl.num_programs(2) - 1 - tl.program_id(2)
    i_n, index, first, length = -1, 0, tl.zeros([], tl.int64), T
    if cu_seqlens is not None:
        before = 0
        for n in range(N):
            at = tl.load(cu_seqlens + n).to(tl.int64)
            tokens = (tl.load(cu_seqlens + n + 1) - at).to(tl.int32)
            count = units_of(tokens, lead, segment, begin, limit)
            if unit >= before and unit < before + count:
                i_n, index, first, length = n, unit - before, at, tokens
            before += count
    else:
        count = tl.maximum(units_of(T, lead, segment, begin, limit), 1)
        i_n, index = unit // count, unit % count
        o += i_n.to(tl.int64) * stride_b * 8
    if i_n < 0 or i_n >= N:  # there is room for more units than there are
        return
    if slot_of(state_indices, stride_index, slots, null_slot, i_n) < 0:
        return

    offset = lead + index * segment
    n_tokens = tl.minimum(tl.minimum(length - begin, limit) - offset, segment)
    if i_s * span >= n_tokens:
        return
    first += begin + offset
    rows, k = tl.arange(0, V), tl.arange(0, K)
    size = HV.to(tl.int64) * (V * K)
    state = workspace + (N + unit) * size + i_hv * (V * K)
    reads = (workspace + (N + 3 * units) * size).to(tl.pointer_type(o.dtype.element_ty), bitcast=True)
    DOT: tl.constexpr = tl.bfloat16 if o.dtype.element_ty == tl.bfloat16 else tl.float32
    S = operand(tl.trans(tl.load(state + rows[:, None] * K + k[None, :])), DOT)  # [K, V]
    start = i_s * span
    stop = tl.minimum(start + span, n_tokens)
    o += i_hv.to(tl.int64) * stride_h * 8 + rows[None, :]
    reads += (unit.to(tl.int64) * segment * HV + i_hv) * K + k[None, :]
    t = start + tl.arange(0, BT)
    so_far = tl.load(o + (first + t[:, None]) * stride_t * 8, (t < stop)[:, None], 0.0)
    for _ in range(start, stop, BT):
        r = tl.load(reads + t[:, None].to(tl.int64) * HV * K, (t < stop)[:, None], 0.0)
        total = so_far.to(tl.float32) + dot(r.to(DOT), S)
        # the next ones are asked for before these are stored, which no load moves ahead of
        so_far = tl.load(o + (first + t[:, None] + BT) * stride_t * 8, (t + BT < stop)[:, None], 0.0)
        tl.store(o + (first + t[:, None]) * stride_t * 8, cast(total, o.dtype.element_ty), (t < stop)[:, None])
        t += BT


@functools.lru_cache(maxsize=4096)
def span_of(units: int, segment: int, sms: int) -> int:
    """Tokens a program, of so many units of all heads and their tokens, on so many multiprocessors."""
    turns = {span: units * -(-segment // span) / (PROGRAMS * sms) for span in SPANS}
    several = (span for span in reversed(SPANS) if turns[span] >= TURNS)
    return next((span for span in SPANS if turns[span] <= 1), next(several, 256))


def add_segment_outputs(segments: Segments, o: torch.Tensor, K: int = 128) -> None:
    """Completes `o` [B, T, HV, V] by what `segments.reads` [units * segment, HV, K] read of the states before units."""
    _, T, HV, V = o.shape
    batch, token, head, _ = o.stride()
    span = span_of(HV * segments.units, segments.segment, multiprocessors(o.device) if o.is_cuda else 1)
    arguments = (o, T, batch // 8, token // 8, head // 8, HV, span, V, K, BT)
    grid, kind = (HV, segments.units, -(-segments.segment // span)), (segments.kind, o.dtype, V, K)
    launch(
        segment_outputs_kernel, grid, kind, segments.arguments + arguments, num_warps=NUM_WARPS, num_stages=NUM_STAGES
    )
