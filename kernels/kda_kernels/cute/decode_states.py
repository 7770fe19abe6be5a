"""How the decode kernel's states lie in memory, on the device: in fp32, or in the two bytes that a pool stores them in.

Eight lanes share a row of K channels. A lane's registers S are [elements an access, accesses a row, rows], fp32.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

from kda_kernels.cute.decode_config import LANES, DecodeSpec
from kda_kernels.cute.math import load_now
from kda_kernels.cute.ptx import lower_halves, select
from kda_kernels.cute.stored import (
    LARGEST,
    bf16_stochastic,
    fp16_stochastic,
    int16_nearest,
    int16_stochastic,
    large_numbers,
    random_words,
    row_scales,
    within_int16,
)


class States:
    """Loads and stores a thread's part of a state.

    Arguments that its functions share: `first`, the address of this thread's first element; `scales`, fp32 [1]: of an
    int16 pool that of the thread's row l, where l is this lane's number among those that share rows.

    Attributes:
        passes: rows of a thread. together: how many of them are in registers at once. of_warp: rows of its warp then,
            which lie together.
    """

    def __init__(self, spec: DecodeSpec):
        self.spec, self.passes = spec, spec.passes
        self.together = spec.passes // spec.pieces
        self.apart = 32 // LANES
        self.of_warp = self.apart * self.together
        self.scaled = spec.h0 == "int16"

    @cute.jit
    def registers(self, passes: cutlass.Constexpr[int]):
        """For so many rows a thread."""
        return cute.make_rmem_tensor((self.spec.vector, self.spec.steps, passes), Float32)

    def row(self, p):
        """How many rows of a state a thread's row p is behind its first."""
        piece = self.of_warp * (self.spec.config.threads // 32)
        return p // self.together * piece + p % self.together * self.apart

    @cute.jit
    def vectors(self, first: cute.Pointer, s: cutlass.Constexpr[int], p: cutlass.Constexpr[int]):
        """This thread's columns of access s in row p of those that are in registers."""
        offset = p * self.apart * self.spec.K + s * LANES * self.spec.vector
        return cute.make_tensor(first + offset, cute.make_layout(self.spec.vector))

    @cute.jit
    def scale_row(self, row: Int32, lane: Int32):
        """The row of a state whose scale this lane keeps; `row`: the thread's first."""
        return row + self.row(cutlass.min(lane % LANES, self.passes - 1))

    @cute.jit
    def fetch_scales(self, pool: cute.Tensor, slot, i_hv: Int32, row: Int32, lane: Int32):
        """As `scales`, of a slot [HV, V]."""
        scales = cute.make_rmem_tensor(1, Float32)
        scales[0] = load_now(pool, (slot, i_hv, self.scale_row(row, lane)))
        return scales

    @cute.jit
    def store_scales(self, pool: cute.Tensor, slot, scales, i_hv: Int32, row: Int32, lane: Int32):
        if lane % LANES < self.passes:
            pool[slot, i_hv, self.scale_row(row, lane)] = scales[0]

    @cute.jit
    def load(self, S, first: cute.Pointer, scales, first_pass: cutlass.Constexpr[int], lane: Int32):
        """Rows from `first_pass` on."""
        raw = cute.make_rmem_tensor(S.shape, first.dtype)
        for p in cutlass.range_constexpr(cute.size(S, mode=[2])):
            for s in cutlass.range_constexpr(self.spec.steps):
                raw[None, s, p].store(self.vectors(first, s, p).load())
        S.store(raw.load().to(Float32))
        if cutlass.const_expr(self.scaled):
            for p in cutlass.range_constexpr(cute.size(S, mode=[2])):
                scale = cute.arch.shuffle_sync(scales[0], lane // LANES * LANES + first_pass + p)
                for s in cutlass.range_constexpr(self.spec.steps):
                    S[None, s, p].store(S[None, s, p].load() * scale)

    @cute.jit
    def store(self, S, first: cute.Pointer, odd, scales, first_pass: cutlass.Constexpr[int], stamp, lane: Int32):
        """Rounds to the dtype of `first`; scales of rows from `first_pass` on go to `scales`.

        Args:
            odd: [passes] not finite where a row may hold NaN. stamp: what random numbers are keyed by, and the thread's
                first row among all of a state: (halves of the seed, slot, token, row).
        """
        dtype = first.dtype
        for p in cutlass.range_constexpr(cute.size(S, mode=[2])):
            if cutlass.const_expr(dtype is cutlass.Int16):
                self.store_int16(S, first, odd, scales, p, first_pass + p, stamp, lane)
            elif cutlass.const_expr(self.spec.stochastic and dtype.width == 16):
                for s in cutlass.range_constexpr(self.spec.steps):
                    words = self.rounded(S, dtype, odd, s, p, first_pass + p, stamp, lane)
                    self.vectors(first, s, p).store(cute.recast_tensor(words, dtype).load())
            else:
                for s in cutlass.range_constexpr(self.spec.steps):
                    self.vectors(first, s, p).store(S[None, s, p].load().to(dtype))

    @cute.jit
    def numbers(self, s: cutlass.Constexpr[int], row: cutlass.Constexpr[int], stamp, lane: Int32):
        """The random numbers of access s in this thread's row, two to a word."""
        keys, slot, token, first_row = stamp
        vector, K = self.spec.vector, self.spec.K
        element = (first_row + self.row(row)) * K + lane % LANES * vector + s * LANES * vector
        words = random_words(keys, slot, token, Uint32(element // 8))
        if cutlass.const_expr(vector == 4):
            upper = element % 8 != 0
            return tuple(Uint32(cutlass.select_(upper, words[i + 2], words[i])) for i in range(2))
        else:
            return words

    @cute.jit
    def rounded(self, S, dtype: cutlass.Constexpr, odd, s, p, row, stamp, lane: Int32):
        """Access s of row p, rounded stochastically to bf16 or fp16, two to a word."""
        numbers = self.numbers(s, row, stamp, lane)
        out = cute.make_rmem_tensor(self.spec.vector // 2, Int32)
        for i in cutlass.range_constexpr(self.spec.vector // 2):
            a, b = S[2 * i, s, p], S[2 * i + 1, s, p]
            if cutlass.const_expr(dtype is cutlass.BFloat16):
                out[i] = bf16_stochastic(a, b, numbers[i])
            else:
                out[i] = fp16_stochastic(a, b, numbers[i])
        finite = odd[row] - odd[row] == 0.0
        if not finite:  # NaN stays; all ones behind the sign are NaN in either
            for i in cutlass.range_constexpr(self.spec.vector // 2):
                for j in cutlass.range_constexpr(2):
                    x = S[2 * i + j, s, p]
                    if x != x:
                        out[i] = out[i] | (0x7FFF << 16 * j)
        return out

    @cute.jit
    def store_int16(self, S, first: cute.Pointer, odd, scales, p, row, stamp, lane: Int32):
        most = Float32(0.0)
        for s in cutlass.range_constexpr(self.spec.steps):
            for i in cutlass.range_constexpr(self.spec.vector):
                most = cute.arch.fmax(most, cute.arch.fmax(S[i, s, p], -S[i, s, p]))
        most = cute.arch.warp_reduction(most, cute.arch.fmax, threads_in_group=LANES)
        w, scale = row_scales(most, odd[row] - odd[row] == 0.0)
        scales[0] = select(lane % LANES == row, scale, scales[0])
        for s in cutlass.range_constexpr(self.spec.steps):
            out = cute.make_rmem_tensor(self.spec.vector // 2, Int32)
            numbers: Any = self.numbers(s, row, stamp, lane) if cutlass.const_expr(self.spec.stochastic) else None
            for i in cutlass.range_constexpr(self.spec.vector // 2):
                a, b = S[2 * i, s, p], S[2 * i + 1, s, p]
                if cutlass.const_expr(self.spec.stochastic):
                    low, high = large_numbers(numbers[i])
                    low, high = int16_stochastic(a, w, low), int16_stochastic(b, w, high)
                else:
                    low, high = int16_nearest(a, w), int16_nearest(b, w)
                out[i] = lower_halves(low, high)
            if cutlass.const_expr(self.spec.stochastic):
                if most * w > LARGEST:  # rounded up: some may be too far from 0
                    self.keep_within(out, S, s, p)
            self.vectors(first, s, p).store(cute.recast_tensor(out, cutlass.Int16).load())

    @cute.jit
    def keep_within(self, out, S, s, p):
        """Access s of row p, two integers to a word, of which few are -32768: see `within_int16`."""
        found = Int32(0)
        for i in cutlass.range_constexpr(self.spec.vector // 2):
            x = out[i] ^ -0x7FFF8000  # 0 in the half
            found |= (x - 0x00010001) & ~x & -0x7FFF8000
        if found != 0:
            for i in cutlass.range_constexpr(self.spec.vector // 2):
                out[i] = within_int16(out[i], S[2 * i, s, p], S[2 * i + 1, s, p])
