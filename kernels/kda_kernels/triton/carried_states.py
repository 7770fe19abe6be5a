"""The states before the units of a sequence that began on a former rank (`kda_kernels.parallel.prefill`).

Three steps; the first before ranks exchange their summaries, so that what is left after it runs side by side:

    prefixes  of unit u: E and T of all units before it; of the last, the summary of the whole part
    chain     S before the part, from the summaries of former ranks
    apply     S T + E of each prefix: states before units, and the final one

Products take S and T in two bf16 parts each, 16 bits together, as `segment_scan`; sums are fp32. K = V.
"""

import torch
import triton
import triton.language as tl

from kda_kernels.triton.common import dot, split
from kda_kernels.triton.launch import dtype_of, launch
from kda_kernels.triton.runtime import multiprocessors
from kda_kernels.triton.segment_scan import Segments, slot_of

# Rows of a state in a program, each of which reads a T. 11 units on an H200, by hand: the prefixes of 96 heads in 154
# us (16 rows: 187; 128: 156), of 12 in 35 (34; 71); states before units 115 and 22 (16 rows: 243 and 33).
APPLY_ROWS, CHAIN_ROWS = 128, 16
NUM_WARPS, NUM_STAGES = 4, 2  # where T comes in bf16
WIDE_WARPS = 8  # in fp32


@triton.jit(do_not_specialize=["units", "HV"])
def prefixes_kernel(summaries, prefixes, units, HV, K: tl.constexpr, BV: tl.constexpr):
    """summaries: of a split, [2 units, HV, K, K], T in bf16 parts; prefixes: [units + 1, HV, 2 K, K]."""
    i_r, i_hv = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows, k = i_r * BV + tl.arange(0, BV), tl.arange(0, K)
    size = HV.to(tl.int64) * (K * K)
    values = i_r * BV < K
    inside = i_hv * (K * K) + rows[:, None] * K + k[None, :]
    square = k[:, None] * K + k[None, :]
    target = prefixes + i_hv * (2 * K * K) + rows[:, None] * K + k[None, :]
    transition = (summaries + size + i_hv * (K * K)).to(tl.pointer_type(tl.bfloat16), bitcast=True)
    S = tl.where(rows[:, None] - K == k[None, :], 1.0, 0.0)
    for _ in range(units):
        tl.store(target, S)
        E = tl.load(summaries + inside, mask=(values & (rows[:, None] < K)) != 0, other=0.0)
        T_upper, T_lower = tl.load(transition + square), tl.load(transition + K * K + square)
        S_upper, S_lower = split(S)
        S = dot(S_upper, T_upper, dot(S_lower, T_upper, dot(S_upper, T_lower))) + E
        summaries += 2 * size
        transition += 4 * size
        target += 2 * size
    tl.store(target, S)


@triton.jit(do_not_specialize=["count", "HV"])
def chain_kernel(summaries, before, count, HV, K: tl.constexpr, BV: tl.constexpr):
    """summaries: [count, HV, 2 K, K], E above T; before: [HV, K, K]. The first T meets no state."""
    i_r, i_hv = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows, k = i_r * BV + tl.arange(0, BV), tl.arange(0, K)
    size = HV.to(tl.int64) * (2 * K * K)
    inside = rows[:, None] * K + k[None, :]
    summaries += i_hv * (2 * K * K)
    S = tl.load(summaries + inside)
    for _ in range(count - 1):
        summaries += size
        S = _moved(S, summaries, inside, K)
    tl.store(before + i_hv * (K * K) + inside, S)


@triton.jit(
    do_not_specialize=["units", "slots", "null_slot", "stride_final", "HV"],
    do_not_specialize_on_alignment=["state_indices"],
)
def apply_kernel(
    prefixes,  # [units + 1, HV, 2 K, K]
    before,  # [HV, K, K]
    starts,  # [units, HV, K, K]: states before units
    final,  # the pool of `state_indices`, or None
    state_indices,  # [1]
    units,
    slots,
    null_slot,
    stride_final,  # in pieces of 16 bytes
    HV,
    K: tl.constexpr,
    BV: tl.constexpr,
):
    i_r, i_hv, unit = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows, k = i_r * BV + tl.arange(0, BV), tl.arange(0, K)
    inside = rows[:, None] * K + k[None, :]
    size = HV.to(tl.int64) * (K * K)
    S = tl.load(before + i_hv * (K * K) + inside)
    S = _moved(S, prefixes + unit * 2 * size + i_hv * (2 * K * K), inside, K)
    if unit < units:
        tl.store(starts + unit * size + i_hv * (K * K) + inside, S)
    elif final is not None:
        slot = slot_of(state_indices, 1, slots, null_slot, tl.zeros([], tl.int32))
        if slot >= 0:
            pieces: tl.constexpr = 128 // final.dtype.element_ty.primitive_bitwidth
            at = final + slot * stride_final * pieces + i_hv * (K * K) + inside
            tl.store(at, S.to(final.dtype.element_ty))


@triton.jit
def _moved(S, summary, inside, K: tl.constexpr):
    """S T + E, of E above T at `summary`."""
    k = tl.arange(0, K)
    T_upper, T_lower = split(tl.load(summary + K * K + k[:, None] * K + k[None, :]))
    S_upper, S_lower = split(S)
    return dot(S_upper, T_upper, dot(S_lower, T_upper, dot(S_upper, T_lower))) + tl.load(summary + inside)


def prefixes_of(segments: Segments, prefixes: torch.Tensor) -> None:
    """Fills `prefixes` [units + 1, HV, 2 K, K], fp32, from the summaries in a workspace of one sequence."""
    units, HV, K = prefixes.shape[0] - 1, prefixes.shape[1], prefixes.shape[3]
    summaries = segments.workspace[(1 + units) * HV * K * K :]
    rows = 16 if prefixes.is_cuda and 2 * K * HV <= 16 * multiprocessors(prefixes.device) else 32
    launch(
        prefixes_kernel, (2 * K // rows, HV), (prefixes.device, K, rows), (summaries, prefixes, units, HV, K, rows),
        num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip


def carry_states(segments: Segments, prefixes: torch.Tensor, summaries: torch.Tensor, ends: bool) -> None:
    """Fills the states before units and, if the sequence `ends` with this part, the final state in `segments.final`.

    Args:
        prefixes: of `prefixes_of`. summaries: [R, HV, 2 K, K], fp32, contiguous, of former ranks.
    """
    units, HV, K = prefixes.shape[0] - 1, prefixes.shape[1], prefixes.shape[3]
    before = prefixes.new_empty((HV, K, K))
    launch(
        chain_kernel, (K // CHAIN_ROWS, HV), (prefixes.device, K),
        (summaries, before, summaries.shape[0], HV, K, CHAIN_ROWS), num_warps=WIDE_WARPS,
    )  # fmt: skip
    final, indices = segments.final if ends else None, segments.state_indices
    stride = 0 if final is None else final.stride(0) * final.element_size() // 16
    starts = segments.workspace[HV * K * K :]
    arguments = (
        prefixes, before, starts, final, indices, units, 0 if final is None else final.shape[0],
        segments.null_slot, stride, HV, K, APPLY_ROWS,
    )  # fmt: skip
    kind = (prefixes.device, dtype_of(final), dtype_of(indices), K)
    launch(apply_kernel, (K // APPLY_ROWS, HV, units + 1), kind, arguments, num_warps=WIDE_WARPS)
