"""Shared memory of the prefill kernel: what lies where, and how it is swizzled."""

import dataclasses
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import cpasync, warpgroup

from kda_kernels.cute.dsl import SmemAllocator
from kda_kernels.cute.prefill.config import CHUNK, PARTS, SLOTS, STAGES, PrefillSpec
from kda_kernels.cute.prefill.work import TOLD

Kind = warpgroup.SmemLayoutAtomKind
SQUARE = CHUNK // 2  # the inverse is made of 2 x 2 squares
# Columns are 16-byte aligned, and those accessed at once begin in different banks; also of both diagonal blocks.
L_PITCH, L_HALF = SQUARE + 4, SQUARE * (SQUARE + 4) + 16  # floats
TILE_PITCH = SQUARE + 8  # elements
TILE = SQUARE * TILE_PITCH


@dataclasses.dataclass(frozen=True)
class Shared:
    """Pointers; sizes are in elements. Everything before `raw` has a copy for each stage.

    rows:  kE, then qE: [2 CHUNK, K], 64 channels beside each other, rows of 128 bytes, 128-byte swizzle. Where gates
           have no bound [K, 2 CHUNK], a channel's tokens beside each other, or kE alone: [K, CHUNK], 64-byte swizzle
    cols:  kI: [CHUNK, K], the same, in PARTS parts. Where the state is written in tf32: [K, CHUNK], fp32, rows of 128
           bytes, 128-byte swizzle, of 8 tokens the even ones first
    near:  where the state is written in tf32 and gates have a bound, for each producing warpgroup kI in bf16:
           [CHUNK, K], as `rows`
    mix:   (I + L)^-1 - I, transposed: [CHUNK, CHUNK], 64-byte swizzle, in one or two parts; then tril(qE kI^T), not
           transposed
    v:     [CHUNK, V], as `cols`
    token: a, b and the factor of o: [3, CHUNK], fp32
    decay: decays from the middle of the last chunk to that of this one [K], or, if the state has decayed to the last
           one's end, from there; then those to this one's end [K]; fp32. Where gates have no bound:
           decays over the chunk [K]
    out:   o on its way out, for each consuming warpgroup one or two: [CHUNK, 64], 128-byte swizzle
    raw:   for each producing warpgroup q and k of its next chunk: [CHUNK, K], as `cols`; raw_g with g
    loaded: for each producing warpgroup, that raw is there
    ended: for each stage, that decays to the chunk's end are there
    inverted: for each stage, that the inverse is there
    related: for each producing warpgroup, that its tokens are related, so that `near` has been read; where gates have
           no bound, that its tokens' q and k have been multiplied with themselves, so that others do not read them
    solve: for each producing warpgroup the diagonal blocks of L, transposed, fp32; then in their place, in two bf16
           parts each, those of (I + L)^-1, transposed, and after them L's lower left block
    sums:  for each producing warpgroup, and for this and its next chunk, [.., CHUNK]: sigmoid(beta) and q.k; where
           gates have no bound q.q, k.k, q.k and sigmoid(beta)
    zeros: 8 of them
    bias:  where gates have no bound, for each producing warpgroup `Rates`
    items: what `Work.words` are of this item and of those around it, if CTAs stay: [SLOTS, ..]
    told:  for each of these, that it is there; done: that all warps are done with it
    """

    full: Any
    empty: Any
    loaded: Any
    ended: Any
    inverted: Any
    related: Any
    zeros: Any
    bias: Any
    rows: Any
    cols: Any
    near: Any
    mix: Any
    v: Any
    token: Any
    decay: Any
    out: Any
    raw: Any
    raw_g: Any
    solve: Any
    sums: Any
    items: Any
    told: Any
    done: Any


def allocate(spec: PrefillSpec, element: type, g_dtype) -> Shared:
    """`element`: of operands, q, k, v and o."""
    smem = SmemAllocator()

    def array(dtype, size, align=16):
        return smem.allocate_tensor(dtype, cute.make_layout(size), byte_alignment=align).iterator

    K, V, stays = spec.K, spec.V, spec.stays
    return Shared(
        rows=array(element, STAGES * 2 * CHUNK * K, 1024),
        cols=array(element, STAGES * PARTS * CHUNK * K, 1024),
        near=array(element, 2 * CHUNK * K, 1024) if spec.bounded and spec.write_in_tf32 else None,
        mix=array(element, STAGES * (1 + spec.inverse_parts) * CHUNK * CHUNK, 1024),
        v=array(element, STAGES * CHUNK * V, 1024),
        out=array(element, 2 * spec.out_buffers * CHUNK * 64, 1024),
        raw=array(element, 2 * 2 * CHUNK * K, 1024),
        raw_g=array(g_dtype, 2 * CHUNK * K, 1024),
        token=array(Float32, STAGES * 3 * CHUNK),
        decay=array(Float32, STAGES * 2 * K),
        solve=array(Float32, 2 * 3 * TILE),
        sums=array(Float32, 2 * 2 * (2 if spec.bounded else 4) * CHUNK),
        full=array(Int64, STAGES, 8),
        empty=array(Int64, STAGES, 8),
        loaded=array(Int64, 2, 8),
        ended=array(Int64, STAGES, 8),
        inverted=array(Int64, STAGES, 8),
        related=array(Int64, 2, 8),
        zeros=array(element, 8),
        bias=None if spec.bounded else array(Float32, 2 * (K + 4)),
        items=array(Int32, SLOTS * len(TOLD)) if stays else None,
        told=array(Int64, SLOTS, 8) if stays else None,
        done=array(Int64, SLOTS, 8) if stays else None,
    )


@cute.jit
def arrive(barrier, lane: Int32, each: cutlass.Constexpr[bool]):
    """A warp says that it has done its part: its first lane, after all others; or each lane."""
    if cutlass.const_expr(not each):
        cute.arch.sync_warp()
    if each or lane == 0:
        cute.arch.mbarrier_arrive(barrier)


def operand(pointer, kind, shape, order):
    """The tensor at `pointer` that a product reads: atoms of `kind` side by side in `order`, then the stages."""
    layout = cute.tile_to_shape(warpgroup.make_smem_layout_atom(kind, pointer.dtype), shape, order=order)
    return cute.make_tensor(cute.recast_ptr(pointer, layout.inner, pointer.dtype), layout.outer)


def swizzled_rows(pointer, offset: Int32, line: int = 128):
    """The descriptor of what a product reads so many bytes behind: rows of 128 or 64 bytes, swizzled as wide."""
    swizzle = {128: 1, 64: 2 - 4}[line]  # the upper two bits of a signed number
    apart = 8 * line // 16  # 8 rows, in units of 16 bytes; the third number is for what is wider than a row
    return Int64((pointer.toint().to(Int32) + offset) >> 4) | Int64((swizzle << 62) | (apart << 32) | (1 << 16))


def vector(pointer, offset, size: int = 2):
    """`size` elements from `offset` on, a multiple of it."""
    if not isinstance(offset, int):
        offset = cute.assume(offset, divby=size)
    return cute.make_tensor(pointer + offset, cute.make_layout(size))


def piece(pointer, index, size: int):
    """Where number `index` of pieces of so many elements begins, aligned to such a piece."""
    return pointer + (index * size if isinstance(index, int) else cute.assume(index * size, divby=size))


def tile_layout(dtype, channels: int, rows: int = CHUNK):
    """[rows, channels], as of an input or o: 128 bytes of channels beside each other, rows of 128 bytes, swizzled."""
    return cute.tile_to_shape(warpgroup.make_smem_layout_atom(Kind.K_SW128, dtype), (rows, channels), order=(0, 1))


def by_chunk(atom: cute.CopyAtom, there, here, first, channels: int, rows: int = CHUNK):
    """What TMA moves between the tile at `here` and a head's tokens from `first` on, [T, K], by chunk and channels."""
    layout = tile_layout(here.dtype, channels, rows)
    tile = cute.make_tensor(cute.recast_ptr(here, layout.inner, here.dtype), layout.outer)
    chunks = cute.local_tile(cute.domain_offset((first, 0), there), (rows, channels), (None, None))
    return cpasync.tma_partition(
        atom, 0, cute.make_layout(1), cute.group_modes(tile, 0, 2), cute.group_modes(chunks, 0, 2)
    )


def swizzled(row, index, unit: int, dtype, rows: int = CHUNK):
    """Where a row's unit `index`, of so many elements (16 bytes at most), lies in a tile of so many rows.

    All sizes are powers of two: shifts and masks, since a signed division costs five instructions.
    """
    line, piece = 1024 // dtype.width // unit, 128 // dtype.width // unit  # units in 128 and in 16 bytes
    inside = (index & (line - 1)) ^ ((row & 7) * piece)
    return ((index >> (line.bit_length() - 1)) * (rows * line) + row * line + inside) * unit
