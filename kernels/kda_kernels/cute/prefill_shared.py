"""Shared memory of the prefill kernel: what lies where, and how it is swizzled."""

import dataclasses
from typing import Any

import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64
from cutlass.cute.nvgpu import warpgroup
from cutlass.utils import SmemAllocator

from kda_kernels.cute.prefill_config import CHUNK, STAGES, PrefillSpec

Kind = warpgroup.SmemLayoutAtomKind
INVERSE_PITCH = CHUNK + 4  # floats a column of L: 16-byte aligned, and four columns begin in different banks


@dataclasses.dataclass(frozen=True)
class Shared:
    """Pointers; sizes are in elements. Everything before `raw` has a copy for each stage.

    rows:  kE, then qE: [2 CHUNK, K], 64 channels beside each other, rows of 128 bytes, 128-byte swizzle
    cols:  kI: [CHUNK, K], the same
    mix:   (I + L)^-1 - I, transposed: [CHUNK, CHUNK], 64-byte swizzle; then tril(qE kI^T), not transposed
    v:     [CHUNK, V] as it comes, rows of 2 V bytes, 16-byte pieces xor token % 8; o on its way out
    token: a, b and the factor of o: [3, CHUNK], fp32
    decay: exp2(m) [K], then exp2(G_31 - m), fp32
    raw:   for each producing warpgroup q, k and g of its next chunk, as v
    L:     for each producing warpgroup, transposed, fp32
    sums:  for each producing warpgroup q.q, k.k and sigmoid(beta): [3, CHUNK]
    """

    full: Any
    empty: Any
    rows: Any
    cols: Any
    mix: Any
    v: Any
    token: Any
    decay: Any
    raw: Any
    raw_g: Any
    L: Any
    sums: Any


def allocate(spec: PrefillSpec, g_dtype) -> Shared:
    smem = SmemAllocator()

    def array(dtype, size, align=16):
        return smem.allocate_tensor(dtype, cute.make_layout(size), byte_alignment=align).iterator

    K, V = spec.K, spec.V
    return Shared(
        rows=array(BFloat16, STAGES * 2 * CHUNK * K, 1024),
        cols=array(BFloat16, STAGES * CHUNK * K, 1024),
        mix=array(BFloat16, STAGES * 2 * CHUNK * CHUNK, 1024),
        v=array(BFloat16, STAGES * CHUNK * V, 1024),
        raw=array(BFloat16, 2 * 2 * CHUNK * K, 1024),
        raw_g=array(g_dtype, 2 * CHUNK * K, 1024),
        token=array(Float32, STAGES * 3 * CHUNK),
        decay=array(Float32, STAGES * 2 * K),
        L=array(Float32, 2 * CHUNK * INVERSE_PITCH),
        sums=array(Float32, 2 * 3 * CHUNK),
        full=array(Int64, STAGES, 8),
        empty=array(Int64, STAGES, 8),
    )


def operand(pointer, kind, shape, order):
    """The tensor at `pointer` that a product reads: atoms of `kind` side by side in `order`, then the stages."""
    layout = cute.tile_to_shape(warpgroup.make_smem_layout_atom(kind, BFloat16), shape, order=order)
    return cute.make_tensor(cute.recast_ptr(pointer, layout.inner, BFloat16), layout.outer)


def vector(pointer, offset, size: int = 2):
    """`size` elements from `offset` on, a multiple of it."""
    return cute.make_tensor(pointer + cute.assume(offset, divby=size), cute.make_layout(size))


def swizzled_token(token, piece):
    """Where 16-byte piece `piece` of a token's 128 16-bit elements lies."""
    return token * 128 + (piece ^ (token % 8)) * 8
