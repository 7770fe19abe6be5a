"""Which chunk is whose: one table, prepared once per batch and passed to every stage of the prefill."""

from typing import Any

import torch
import triton
import triton.language as tl

from kda_kernels.ints import cdiv
from kda_kernels.problem import CHUNK
from kda_kernels.triton.launch import launch
from kda_kernels.triton.runtime import on_device, require_device

BLOCK, WARPS = 256, 2  # chunks a step, of one program per sequence


def max_chunks(total_tokens: int, num_seqs: int, chunk_size: int = CHUNK) -> int:
    """Upper bound of sum(ceil(len / chunk_size)), known without reading the lengths.

    floor(start / chunk_size) + n is at least the number of chunks before sequence n, so it also serves as the slot of
    that sequence's first chunk in a workspace of this size: no prefix sum is needed on the device.
    """
    return total_tokens // chunk_size + num_seqs


def in_order(h: torch.Tensor, cu_seqlens: torch.Tensor | None, B: int) -> torch.Tensor:
    """Workspace slots -> [B, NT, HV, K, V] without the gaps that ragged sequences leave."""
    if cu_seqlens is None:
        return h.view(B, -1, *h.shape[1:])
    ends = cu_seqlens.tolist()
    slots = [
        first // CHUNK + n + chunk
        for n, (first, last) in enumerate(zip(ends, ends[1:], strict=False))
        for chunk in range(cdiv(last - first, CHUNK))
    ]
    return h[slots].unsqueeze(0)


@triton.jit(do_not_specialize=["cu_seqlens", "total"])
def chunk_indices_kernel(cu_seqlens, out, total, C: tl.constexpr, BLOCK: tl.constexpr):
    """Rows from the first slot of sequence n up to that of the next, or to all of them; one program per sequence."""
    n = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_seqlens + n).to(tl.int64)
    end = tl.load(cu_seqlens + n + 1).to(tl.int64)
    slot = start // C + n
    slots = tl.where(n + 1 < tl.num_programs(0), end // C + n + 1, total) - slot
    chunks = tl.cdiv(end - start, C)
    for first in range(0, slots, BLOCK):
        chunk = first + tl.arange(0, BLOCK)
        known = chunk < chunks
        tl.store(out + 2 * (slot + chunk), tl.where(known, n, -1), mask=chunk < slots)
        tl.store(out + 2 * (slot + chunk) + 1, tl.where(known, chunk, -1), mask=chunk < slots)


def prepare_chunk_indices(cu_seqlens: torch.Tensor, total_tokens: int, chunk_size: int = CHUNK) -> torch.Tensor:
    """The (sequence, chunk within the sequence) of every chunk, on the device: one launch, no host synchronisation.

    Args:
        cu_seqlens: int32 or int64 [N + 1], cumulative lengths.
        total_tokens: T, the length of the packed tensors.
        chunk_size: tokens per chunk.

    Returns:
        int32 [T // chunk_size + N, 2], chunks in order; rows that no chunk needs hold -1: there, kernels leave at once.
    """
    require_device(cu_seqlens)
    N = len(cu_seqlens) - 1
    out = torch.empty((max_chunks(total_tokens, N, chunk_size), 2), dtype=torch.int32, device=cu_seqlens.device)
    if N:
        fill_chunk_indices(out, cu_seqlens, out.shape[0], chunk_size)
    return out


def fill_chunk_indices(out: Any, cu_seqlens: torch.Tensor, chunks: int, chunk_size: int = CHUNK) -> None:
    """`prepare_chunk_indices` into `out`, int32 [chunks, 2]; there is at least one sequence."""
    with on_device(cu_seqlens):
        sequences = cu_seqlens.shape[0] - 1
        kind = (cu_seqlens.device, cu_seqlens.dtype, chunk_size)
        arguments = (cu_seqlens, out, chunks, chunk_size, BLOCK)
        launch(chunk_indices_kernel, (sequences,), kind, arguments, num_warps=WARPS)
