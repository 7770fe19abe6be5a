"""How the decode kernel's states lie in memory, on the device: in fp32, or in the two bytes that a pool stores them in.

Eight lanes share a row of K channels. A lane's registers S are [elements an access, accesses a row, rows], fp32.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

from kda_kernels.cute.decode.config import LANES, DecodeSpec
from kda_kernels.cute.decode.work import Rounding, Work
from kda_kernels.cute.math import load_now
from kda_kernels.cute.ptx import LOWER, pick_bytes, select
from kda_kernels.cute.stored import (
    bf16_stochastic,
    fp16_stochastic,
    int16_nearest,
    int16_stochastic,
    random_fractions,
    random_words,
    row_scales,
    upper_integer,
)

TOGETHER = 2  # rows of a thread whose rounding overlaps


class States:
    """Loads and stores a thread's part of a state.

    Arguments that its functions share: `first`, the address of this thread's first element; `scales`: see `Rounding`.

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
    def scale_row(self, work: Work):
        """The row of a state whose scale this lane keeps."""
        return work.row + self.row(cutlass.min(work.lane % LANES, self.passes - 1))

    @cute.jit
    def fetch_scales(self, pool: cute.Tensor, slot, work: Work):
        """As `scales`, of a slot [HV, V]."""
        scales = cute.make_rmem_tensor(1, Float32)
        scales[0] = load_now(pool, (slot, work.i_hv, self.scale_row(work)))
        return scales

    @cute.jit
    def store_scales(self, pool: cute.Tensor, slot, scales, work: Work):
        if work.lane % LANES < self.passes:
            pool[slot, work.i_hv, self.scale_row(work)] = scales[0]

    @cute.jit
    def load(self, S, first: cute.Pointer, scales, first_pass, lane: Int32):
        """Rows from `first_pass` on."""
        raw = cute.make_rmem_tensor(S.shape, first.dtype)
        for p in cutlass.range_constexpr(cute.size(S, mode=[2])):
            for s in cutlass.range_constexpr(self.spec.steps):
                raw[None, s, p].store(self.vectors(first, s, p).load())
        if cutlass.const_expr(self.scaled):
            words = cute.recast_tensor(raw, Int32)
            for p in cutlass.range_constexpr(cute.size(S, mode=[2])):
                scale = cute.arch.shuffle_sync(scales[0], lane // LANES * LANES + first_pass + p)
                for s in cutlass.range_constexpr(self.spec.steps):
                    for i in cutlass.range_constexpr(self.spec.vector // 2):
                        S[2 * i, s, p] = raw[2 * i, s, p].to(Float32) * scale
                        S[2 * i + 1, s, p] = upper_integer(words[i, s, p]) * scale
        else:
            S.store(raw.load().to(Float32))

    @cute.jit
    def store(self, S, first: cute.Pointer, rounding: Rounding, t: Int32, first_pass, lane: Int32):
        """S, the rows from `first_pass` on of the state after token t, rounded to the dtype of `first`; the scales of
        an int16 pool go to those of `rounding`."""
        dtype, passes = first.dtype, cute.size(S, mode=[2])
        if cutlass.const_expr(dtype is cutlass.Int16 or (self.spec.stochastic and dtype.width == 16)):
            for p in cutlass.range_constexpr(0, passes, TOGETHER):
                rows = range(p, min(p + TOGETHER, passes))
                if cutlass.const_expr(dtype is cutlass.Int16):
                    words = self.quantised(S, rounding, t, rows, first_pass, lane)
                else:
                    words = self.rounded(S, dtype, rounding, t, rows, first_pass, lane)
                for i in cutlass.range_constexpr(len(rows)):
                    for s in cutlass.range_constexpr(self.spec.steps):
                        narrow = cute.recast_tensor(words, dtype)
                        self.vectors(first, s, rows[i]).store(narrow[None, s, i].load())
        else:
            for p in cutlass.range_constexpr(passes):
                for s in cutlass.range_constexpr(self.spec.steps):
                    self.vectors(first, s, p).store(S[None, s, p].load().to(dtype))

    @cute.jit
    def numbers(self, s: cutlass.Constexpr[int], row: Int32, rounding: Rounding, t: Int32, lane: Int32):
        """The random numbers of access s in this thread's row after token t, two to a word."""
        vector, K = self.spec.vector, self.spec.K
        element = (rounding.row + row) * K + lane % LANES * vector + s * LANES * vector
        words = random_words(rounding.keys, rounding.slot, Uint32(t), Uint32(element // 8))
        if cutlass.const_expr(vector == 4):
            upper = element % 8 != 0
            return tuple(Uint32(cutlass.select_(upper, words[i + 2], words[i])) for i in range(2))
        else:
            return words

    @cute.jit
    def words(self, rows: cutlass.Constexpr):
        """For these rows of a thread, two elements to a word."""
        return cute.make_rmem_tensor((self.spec.vector // 2, self.spec.steps, len(rows)), Int32)

    @cute.jit
    def rounded(
        self, S, dtype: cutlass.Constexpr, rounding: Rounding, t: Int32, rows: cutlass.Constexpr, first_pass,
        lane: Int32,
    ):  # fmt: skip
        """`words` of S in bf16 or fp16, rounded stochastically. One branch for all rows: their arithmetic overlaps."""
        out, odd, finite = self.words(rows), rounding.odd, True
        for n in cutlass.range_constexpr(len(rows)):
            p = rows[n]
            for s in cutlass.range_constexpr(self.spec.steps):
                numbers = self.numbers(s, self.row(first_pass) + self.row(p), rounding, t, lane)
                for i in cutlass.range_constexpr(self.spec.vector // 2):
                    a, b = S[2 * i, s, p], S[2 * i + 1, s, p]
                    if cutlass.const_expr(dtype is cutlass.BFloat16):
                        out[i, s, n] = bf16_stochastic(a, b, numbers[i])
                    else:
                        out[i, s, n] = fp16_stochastic(a, b, numbers[i])
            finite = finite and odd[p] * 0.0 == 0.0
        if not finite:  # NaN stays; all ones behind the sign are NaN in either
            for n in cutlass.range_constexpr(len(rows)):
                for s in cutlass.range_constexpr(self.spec.steps):
                    for i in cutlass.range_constexpr(self.spec.vector):
                        x = S[i, s, rows[n]]
                        if x != x:
                            out[i // 2, s, n] = out[i // 2, s, n] | (0x7FFF << 16 * (i % 2))
        return out

    @cute.jit
    def quantised(self, S, rounding: Rounding, t: Int32, rows: cutlass.Constexpr, first_pass, lane: Int32):
        """`words` of S in int16; the rows' scales go to those of `rounding`."""
        odd, scales = rounding.odd, rounding.scales
        out = self.words(rows)
        for n in cutlass.range_constexpr(len(rows)):
            p, row = rows[n], first_pass + rows[n]
            most = self.largest(S, p)
            w, scale = row_scales(most, odd[p] * 0.0)  # odd - odd may be fused with what made odd
            scales[0] = select(lane % LANES == row, scale, scales[0])
            for s in cutlass.range_constexpr(self.spec.steps):
                numbers: Any = None
                if cutlass.const_expr(self.spec.stochastic):
                    numbers = self.numbers(s, self.row(first_pass) + self.row(p), rounding, t, lane)
                for i in cutlass.range_constexpr(self.spec.vector // 2):
                    a, b = S[2 * i, s, p], S[2 * i + 1, s, p]
                    if cutlass.const_expr(self.spec.stochastic):
                        low, high = random_fractions(numbers[i])
                        low, high = int16_stochastic(a, w, low), int16_stochastic(b, w, high)
                    else:
                        low, high = int16_nearest(a, w), int16_nearest(b, w)
                    out[i, s, n] = pick_bytes(low, high, LOWER)
        return out

    @cute.jit
    def largest(self, S, p: cutlass.Constexpr[int]):
        """The largest |x| of row p that is no NaN."""
        found = [Float32(0.0)] * 4  # of every fourth: no long chain
        for s in cutlass.range_constexpr(self.spec.steps):
            for i in cutlass.range_constexpr(self.spec.vector):
                found[i % 4] = cute.arch.fmax(found[i % 4], cute.arch.fmax(S[i, s, p], -S[i, s, p]))
        most = cute.arch.fmax(cute.arch.fmax(found[0], found[1]), cute.arch.fmax(found[2], found[3]))
        return cute.arch.warp_reduction(most, cute.arch.fmax, threads_in_group=LANES)
