"""The states between the segments of a prefill that is split, from the summaries of its units.

A unit, a segment that is not the first of its sequence, makes S T + E of the state S [V, K] before it. Products take S
and T in two bf16 parts each, 16 bits together; sums are fp32. V * K * K multiplications a unit and head, and 4 * K * K
bytes to read for each BV rows of the state.
"""

import torch
import triton
import triton.language as tl

from kda_kernels.triton.common import dot, split
from kda_kernels.triton.launch import launch

BV = 16  # rows of a state in a program: 64, for wgmma, leave most SMs idle (24 us where this takes 15, by hand)
NUM_WARPS, NUM_STAGES = 4, 2


class Segments:
    """One round of a prefill that is split.

    Attributes:
        workspace: fp32, one behind the other: `starts` [N + units, HV, V, K], states after this round and before each
            unit; `summaries` [2 * units, HV, V, K], E of unit u at 2 u and both bf16 parts of T, [2, K, K], at 2 u + 1;
            and in bf16 `reads` [units * segment, HV, K].
        final: the pool of `state_indices`, or [N, HV, V, K], where final states go; or None.
        N: sequences. units: most segments that are not first ones.
        null_slot: see `kda_kernels.tensors.Inputs`; -1: none.
        segment: tokens of segments that are not first ones; those are of `lead`. begin, limit: see `units_of`.
        arguments: those that all kernels share. kind: what compiled kernels differ by.
    """

    def __init__(
        self,
        workspace: torch.Tensor,
        final: torch.Tensor | None,
        state_indices: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        N: int,
        units: int,
        null_slot: int | None,
        lead: int,
        segment: int,
        begin: int,
        limit: int,
    ) -> None:
        self.workspace, self.final, self.state_indices, self.N, self.units = workspace, final, state_indices, N, units
        self.segment, self.null_slot = segment, -1 if null_slot is None else null_slot
        stride, slots = 0, 0
        if state_indices is not None:
            stride, slots = state_indices.stride()[0], 0 if final is None else final.shape[0]
        self.arguments = (
            workspace, state_indices, cu_seqlens, N, units, lead, segment, begin, limit, stride, slots, self.null_slot
        )  # fmt: skip
        self.kind = (
            workspace.device, None if final is None else final.dtype,
            None if state_indices is None else state_indices.dtype, None if cu_seqlens is None else cu_seqlens.dtype,
        )  # fmt: skip


SHARED = ("N", "units", "lead", "segment", "begin", "limit", "stride_index", "slots", "null_slot", "HV")


@triton.jit
def units_of(length, lead, segment, begin, limit):
    """How many segments a sequence has behind its first, in the round that runs `limit` tokens from `begin` on."""
    length = tl.minimum(length - begin, limit)
    return tl.maximum(length - lead + (segment - 1), 0) // segment


@triton.jit
def slot_of(state_indices, stride_index, slots, null_slot, i_n):
    """The slot of a sequence; -1: padding, or there is no such slot."""
    slot = tl.zeros([], tl.int64) + i_n
    if state_indices is not None:
        slot = tl.load(state_indices + slot * stride_index).to(tl.int64)
        slot = tl.where((slot >= slots) | (slot < 0) | (slot == null_slot), -1, slot)
    return slot


@triton.jit(
    do_not_specialize=[*SHARED, "T", "stride_final"], do_not_specialize_on_alignment=["state_indices", "cu_seqlens"]
)
def segment_scan_kernel(
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
    final,
    T,
    stride_final,  # in pieces of 16 bytes
    HV,
    V: tl.constexpr,
    K: tl.constexpr,
    BV: tl.constexpr,
):
    i_v, i_hv, i_n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = T
    unit = 0
    if cu_seqlens is not None:
        for m in range(i_n):
            before = (tl.load(cu_seqlens + m + 1) - tl.load(cu_seqlens + m)).to(tl.int32)
            unit += units_of(before, lead, segment, begin, limit)
        length = (tl.load(cu_seqlens + i_n + 1) - tl.load(cu_seqlens + i_n)).to(tl.int32)
    else:
        unit = i_n * units_of(T, lead, segment, begin, limit)
    count = units_of(length, lead, segment, begin, limit)
    slot = slot_of(state_indices, stride_index, slots, null_slot, i_n)
    if count == 0 or slot < 0:
        return

    rows = i_v * BV + tl.arange(0, BV)
    k = tl.arange(0, K)
    size = HV.to(tl.int64) * (V * K)
    inside = i_hv * (V * K) + rows[:, None] * K + k[None, :]
    square = k[:, None] * K + k[None, :]
    start = workspace + (N + unit) * size
    summary = workspace + (N + units + 2 * unit) * size
    transition = (summary + size + i_hv * (V * K)).to(tl.pointer_type(tl.bfloat16), bitcast=True)
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
        tl.store(workspace + i_n * size + inside, S)
    elif final is not None:
        pieces: tl.constexpr = 128 // final.dtype.element_ty.primitive_bitwidth  # elements of 16 bytes, as slots lie
        tl.store(final + slot * stride_final * pieces + inside, S.to(final.dtype.element_ty))


def scan_segments(segments: Segments, T: int, HV: int, V: int = 128, K: int = 128) -> None:
    """Fills `starts`, but for what stands before first units, and `final`; V = K.

    Args:
        T: tokens of each sequence, where there are no `cu_seqlens`.
    """
    final = segments.final
    stride = 0 if final is None else final.stride()[0] * final.element_size() // 16
    arguments = (final, T, stride, HV, V, K, BV)
    launch(
        segment_scan_kernel, (V // BV, HV, segments.N), (segments.kind, V, K), segments.arguments + arguments,
        num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
