"""How the prefill kernel relates the tokens of a chunk: norms, products, the inverse; see `kernel.py`."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from kda_kernels.cute.math import L2_EPS, float_bits, float_of, rsqrt, sum_in_pairs
from kda_kernels.cute.prefill.config import BLOCK, CHUNK, MOST_NORM, SHIFT, PrefillSpec
from kda_kernels.cute.prefill.shared import L_HALF, L_PITCH, TILE, TILE_PITCH, arrive, piece, swizzled, vector
from kda_kernels.cute.ptx import (
    load_matrices,
    load_transposed,
    multiply_16x8x8,
    multiply_16x8x16,
    multiply_pairs,
    rest,
    select,
)


class Relater:
    """Norms, what becomes of [kE; qE] kI^T, and the inverse. Thread p is lane p % 32 of warp p // 32."""

    spec: PrefillSpec
    element: type

    @cute.jit
    def squares(self, raw, warp: Int32, lane: Int32):
        """Products of 8 tokens' q and k per warp, 16 rows, with k and with q, each in two sums."""
        summary = cutlass.const_expr(not self.spec.part.reads)
        with_k, with_q = [[(Float32(0.0),) * 4] * 2 for _ in range(2)]
        for both in self.token_rows(raw, warp, lane):
            for n in cutlass.range_constexpr(2):
                q, k = both[2 * n : 2 * n + 2]
                with_k[n] = multiply_16x8x8(with_k[n], (q, k), k, self.element)
                if cutlass.const_expr(not summary):
                    with_q[n] = multiply_16x8x8(with_q[n], (q, k), q, self.element)
        return with_k, with_q

    def token_rows(self, raw, warp: Int32, lane: Int32):
        """16 channels at a time of 8 tokens per warp: q and k of 8 channels, then of the others. Without q, k twice."""
        reads = self.spec.part.reads
        rows = raw + (lane >> 3 & 1) * (CHUNK * 128) if reads else raw + CHUNK * 128
        start = (rows + swizzled(8 * warp + (lane & 7), lane >> 4, 8, raw.dtype)).toint().to(Int32)
        line = 128 * CHUNK  # bytes: of 64 channels of all tokens
        for i in range(self.spec.K // 16):
            place = (start ^ (32 * (i % 4)) if i % 4 else start) + i // 4 * line
            yield load_matrices(cute.make_ptr(raw.dtype, place, cute.AddressSpace.smem, assumed_align=16))

    @cute.jit
    def keep_squares(self, squares: tuple, sums, warp: Int32, lane: Int32):
        """q.q, k.k and q.k: diagonals of what `squares` returns."""
        with_k, with_q = ([x + y for x, y in zip(*two, strict=True)] for two in squares)
        if lane & 3 == lane >> 3:
            odd, token = lane >> 2 & 1 == 1, 8 * warp + (lane >> 2)
            vector(sums, CHUNK + token, 1)[0] = select(odd, with_k[3], with_k[2])
            if cutlass.const_expr(self.spec.part.reads):
                vector(sums, token, 1)[0] = select(odd, with_q[1], with_q[0])
                vector(sums, 2 * CHUNK + token, 1)[0] = select(odd, with_k[1], with_k[0])

    @cute.jit
    def factors_of_o(self, raw, target, own, scale: Float32, warp: Int32, lane: Int32):
        """Of 8 tokens per warp the factor of o to `target`, and q.k to `own`: diagonals of products of both with q."""
        sums = [(Float32(0.0),) * 4 for _ in range(4)]  # apart, so that products need not wait for each other
        for i, both in enumerate(self.token_rows(raw, warp, lane)):
            for n in cutlass.range_constexpr(2):
                q, k = both[2 * n : 2 * n + 2]
                one = i % 2 * 2 + n
                sums[one] = multiply_16x8x8(sums[one], (q, k), q, self.element)
        total = [sum_in_pairs([four[i] for four in sums]) for i in range(4)]
        odd, token = lane >> 2 & 1 == 1, 8 * warp + (lane >> 2)
        square = select(odd, total[1], total[0])
        norm = rsqrt(square + L2_EPS, False) if self.spec.qk_l2norm else Float32(1.0)
        factor = norm * scale * select(warp < 2, Float32(2.0**SHIFT), Float32(2.0**-SHIFT))
        if lane & 3 == lane >> 3:
            vector(target, token, 1)[0] = select(square <= MOST_NORM**2, factor, Float32(float("nan")))
            vector(own, token, 1)[0] = select(odd, total[3], total[2])

    @cute.jit
    def scale_tokens(self, raw, sums, warp: Int32, lane: Int32):
        """q and k of 8 tokens a warp times powers of two that make them 1 to 2 long, so that fp16 holds their products.

        Of `sums`, in the place of q.q and k.k: what they are to be multiplied by; and q.k as they are now.
        """
        row, token = lane & 7, 8 * warp + (lane & 7)
        cute.arch.sync_warp()
        diagonal = vector(sums, 2 * CHUNK + token, 1)[0]
        factors = []
        for i in cutlass.range_constexpr(0 if self.spec.part.reads else 1, 2):
            square = vector(sums, i * CHUNK + token, 1)[0]
            # at least 2^-15: the inverse has to be an fp16 number
            exponent = cutlass.max(((float_bits(square) >> 23) - 127) >> 1, -15)
            factor = float_of((127 + exponent) << 23)
            inverse = float_of((127 - exponent) << 23)
            diagonal = diagonal * inverse
            if cutlass.const_expr(self.spec.qk_l2norm):
                factor = factor * rsqrt(square + L2_EPS, False)
            factors.append((i, factor))
            pair = cute.make_rmem_tensor(2, self.element)
            pair.fill(inverse.to(self.element))
            word = cute.recast_tensor(pair, Int32)[0]
            for n in cutlass.range_constexpr(4):
                place = i * (CHUNK * self.spec.K) + swizzled(8 * warp + row, (lane >> 3) + 4 * n, 8, raw.dtype)
                values = vector(cute.recast_ptr(raw, dtype=Int32), place >> 1, 4)
                scaled = cute.make_rmem_tensor(4, Int32)
                scaled.store(values.load())
                for j in cutlass.range_constexpr(4):
                    scaled[j] = multiply_pairs(scaled[j], word, self.element)
                values.store(scaled.load())
        cute.arch.sync_warp()  # all have read sums
        if lane < 8:
            for i, factor in factors:
                vector(sums, i * CHUNK + token, 1)[0] = factor
            vector(sums, 2 * CHUNK + token, 1)[0] = diagonal

    @cute.jit
    def norms(self, sums, token):
        """1 / |k| and 1 / |q| of a token; 1 where they come normalised. They undo `scale_tokens`, too."""
        norm_k, norm_q = Float32(1.0), Float32(1.0)
        if cutlass.const_expr(self.spec.scaled):
            norm_q, norm_k = (vector(sums, i * CHUNK + token, 1)[0] for i in range(2))
        elif cutlass.const_expr(self.spec.qk_l2norm):
            qq, kk = (vector(sums, i * CHUNK + token, 1)[0] for i in range(2))
            norm_k, norm_q = rsqrt(kk + L2_EPS, False), rsqrt(qq + L2_EPS, False)
        return norm_k, norm_q

    @cute.jit
    def factors(self, target, sums, scale: Float32, lane: Int32):
        """a, b and the factor of o of the token of this lane; after the end a and b are 0, as beta is."""
        norm_k, norm_q = self.norms(sums, lane)
        a = vector(sums, 3 * CHUNK + lane, 1)[0] * norm_k
        b = a * norm_k
        if cutlass.const_expr(not self.spec.scaled):
            longest = vector(sums, CHUNK + lane, 1)[0]
            if cutlass.const_expr(self.spec.part.reads):
                longest = cute.arch.fmax(longest, vector(sums, lane, 1)[0], nan=True)
            a = select(longest <= MOST_NORM**2, a, Float32(float("nan")))
        vector(target, lane, 1)[0] = a
        vector(target, lane + CHUNK, 1)[0] = b
        vector(target, lane + 2 * CHUNK, 1)[0] = norm_q * scale

    @cute.jit
    def spread(self, acc, scratch, mix, token, sums, warp: Int32, lane: Int32):
        """[kE; qE] kI^T, 16 rows per warp: L's blocks on and under the diagonal to scratch, tril(qE kI^T) to `mix`."""
        beta, own = sums, sums + CHUNK
        for w in cutlass.range_constexpr(4):
            if warp == w:
                for h in cutlass.range_constexpr(2):
                    if cutlass.const_expr(w < 2):
                        b = self.factors_of(acc, token, beta, w, h, lane)
                        self.spread_k(acc, scratch, b, w, h, lane)
                    elif cutlass.const_expr(self.spec.part.reads):
                        self.spread_q(acc, mix, own, w - 2, h, lane)

    @cute.jit
    def factors_of(
        self, acc, token, beta, w: cutlass.Constexpr[int], h: cutlass.Constexpr[int], lane: Int32
    ):  # fmt: skip
        """a and b of 8 tokens to `token`; returns b of this lane's row.

        k.k is the diagonal of kE kI^T, where decays cancel.
        """
        row, place = lane >> 2, 16 * w + 8 * h + (lane >> 2)
        mine = select(row & 1 == 1, acc[4 * (2 * w + h) + 2 * h + 1], acc[4 * (2 * w + h) + 2 * h])
        square = cute.arch.shuffle_sync(mine, (lane & 28) | (row >> 1))
        norm = rsqrt(square + L2_EPS, False) if self.spec.qk_l2norm else Float32(1.0)
        a = vector(beta, place, 1)[0] * norm
        b = a * norm
        a = select(square <= MOST_NORM**2, a * 2.0 ** (-SHIFT if w == 0 else SHIFT), Float32(float("nan")))
        if lane & 3 == 0:
            vector(token, place, 1)[0] = a
            vector(token, place + CHUNK, 1)[0] = b
        return b

    @cute.jit
    def spread_k(self, acc, scratch, b, w: cutlass.Constexpr[int], h: cutlass.Constexpr[int], lane: Int32):
        """8 rows of kE kI^T, times b."""
        col, row = 2 * (lane & 3), (lane >> 2) + 8 * h
        diagonal, tiles = scratch + (w * L_HALF + row), cute.recast_ptr(scratch, dtype=self.element)
        for j in cutlass.range_constexpr(2 * w + h + 1):
            values = [acc[4 * j + 2 * h + e] * b for e in range(2)]
            if cutlass.const_expr(w == 1 and j < 2):  # the lower left block, in two parts
                pair = cute.make_rmem_tensor(2, Float32)
                for e in cutlass.range_constexpr(2):
                    pair[e] = values[e]
                rounded = cute.make_rmem_tensor(2, self.element)
                place = 4 * TILE + row * TILE_PITCH + 8 * j + col
                for part in cutlass.range_constexpr(2):
                    rounded.store(pair.load().to(self.element))
                    vector(tiles, place + part * TILE).store(rounded.load())
                    rest(pair, rounded)
            else:
                for e in cutlass.range_constexpr(2):
                    vector(diagonal, (8 * (j - 2 * w) + col + e) * L_PITCH, 1)[0] = values[e]

    @cute.jit
    def spread_q(self, acc, mix, own, w: cutlass.Constexpr[int], h: cutlass.Constexpr[int], lane: Int32):
        """8 rows of tril(qE kI^T); the diagonal, without decays, is q.k of each token, at `own`."""
        col, row = 2 * (lane & 3), 16 * w + (lane >> 2) + 8 * h
        for j in cutlass.range_constexpr(2 * w + h + 1):
            pair = cute.make_rmem_tensor(2, Float32)
            for e in cutlass.range_constexpr(2):
                pair[e] = acc[4 * j + 2 * h + e]
                if cutlass.const_expr(j == 2 * w + h):
                    pair[e] = select(col + e < lane >> 2, pair[e], Float32(0.0))
                    pair[e] = select(col + e == lane >> 2, vector(own, row, 1)[0], pair[e])
            vector(mix, row * CHUNK + (j ^ (row >> 1 & 3)) * 8 + col).store(pair.load().to(self.element))

    @cute.jit
    def invert_in_turn(self, shared, chunk: Int32, stage: Int32, group: Int32, warp: Int32, lane: Int32):
        """One of the warps that run the chain, which wait for chunks anyway, makes the inverse of this one."""
        if group == chunk & 1 and warp == chunk >> 1 & 3:
            scratch = piece(shared.solve, chunk & 1, 3 * TILE)
            self.invert(scratch, self.mix(shared, stage, 0), lane)
            cute.arch.fence_proxy("async.shared", space="cta")
            arrive(shared.inverted + stage, lane, self.spec.each_arrives)

    @cute.jit
    def invert(self, scratch, mix, lane: Int32):
        """(I + L)^-1 - I to `mix`, transposed; its second part behind it.

        The inverses of the diagonal's blocks of 8 by substitution in fp32, a lane making a column (what lies over L's
        diagonal is not used). What lies under them by products of operands in two parts, of bf16 16 bits together:
        first in both squares of 16, then the lower left one.
        """
        block, n, g, col = lane >> 3, lane & 7, lane >> 2, 2 * (lane & 3)
        half, late = block >> 1, block & 1
        tiles = cute.recast_ptr(scratch, dtype=self.element)
        L = piece(piece(scratch, half, L_HALF), late, BLOCK * (L_PITCH + 1))
        x = [select(n == i, Float32(1.0), Float32(0.0)) for i in range(BLOCK)]
        for m in cutlass.range_constexpr(BLOCK - 1):
            for quad in cutlass.range_constexpr((m + 1) // 4, BLOCK // 4):
                entries = vector(L, m * L_PITCH + 4 * quad, 4).load()
                for e in cutlass.range_constexpr(4):
                    if cutlass.const_expr(4 * quad + e > m):
                        x[4 * quad + e] = x[4 * quad + e] - entries[e] * x[m]
        under = [
            vector(scratch, i * L_HALF + (col + e) * L_PITCH + (BLOCK + g), 1)[0] for i in range(2) for e in range(2)
        ]
        cute.arch.sync_warp()  # all have read L: X takes its place
        zeros = cute.make_rmem_tensor(8, self.element)
        zeros.fill(0.0)
        column = piece(piece(tiles, half, 2 * TILE), BLOCK * late + n, TILE_PITCH)
        for part, values in enumerate(self.parts(x)):
            vector(column, part * TILE + BLOCK * late, 8).store(values[None, 0].load())
            vector(column, part * TILE + BLOCK * (1 - late), 8).store(zeros.load())
            if cutlass.const_expr(part < self.spec.inverse_parts):
                place = part * (CHUNK * CHUNK) + lane * CHUNK + (block ^ (lane >> 1 & 3)) * 8
                vector(mix, place, 8).store(values[None, 0].load())
        vector(mix, lane * CHUNK + (block ^ (lane >> 1 & 3)) * 8 + n, 1)[0] = self.element(0.0)  # the diagonal
        cute.arch.sync_warp()

        # of both squares at once, one in the upper left of a left operand, one in its lower right
        place = tiles + ((block & 1) * (2 * TILE) + (block >> 1) * TILE + n * TILE_PITCH)
        inner = self.both(load_matrices(place), self.words(under))  # X0^T L10^T
        last = load_transposed(place + (BLOCK * TILE_PITCH + BLOCK))
        outer = self.both(self.words(inner), last)  # that times X1^T
        for i in cutlass.range_constexpr(2):
            pair = cute.make_rmem_tensor(2, Float32)
            for e in cutlass.range_constexpr(2):
                pair[e] = -outer[2 * i + e]
            rounded = cute.make_rmem_tensor(2, self.element)
            row = 2 * BLOCK * i + g
            for part in cutlass.range_constexpr(2):
                rounded.store(pair.load().to(self.element))
                vector(tiles, (2 * i + part) * TILE + g * TILE_PITCH + BLOCK + col).store(rounded.load())
                if cutlass.const_expr(part < self.spec.inverse_parts):
                    target = part * (CHUNK * CHUNK) + row * CHUNK + ((2 * i + 1) ^ (row >> 1 & 3)) * 8 + col
                    vector(mix, target).store(rounded.load())
                rest(pair, rounded)
        cute.arch.sync_warp()
        self.join(tiles, mix, lane)

    @cute.jit
    def join(self, tiles, mix, lane: Int32):
        """The inverse's lower left square, -X1 L10 X0, from its diagonal ones."""
        place = tiles + (((lane >> 3 & 1) * 8 + (lane & 7)) * TILE_PITCH + (lane >> 4) * 8)
        X0, L10 = ([load_matrices(place + (i + part) * TILE) for part in range(2)] for i in (0, 4))
        X1 = [load_transposed(place + (2 + part) * TILE) for part in range(2)]
        L10 = [[(a[0], a[2]), (a[1], a[3])] for a in L10]
        X1 = [[(a[0], a[1]), (a[2], a[3])] for a in X1]
        inner = self.three(X0, L10)  # X0^T L10^T
        upper, lower = self.parts(inner)
        words = [cute.recast_tensor(part, Int32) for part in (upper, lower)]
        outer = self.three([tuple(w[i] for i in range(4)) for w in words], X1)
        for tile_n in cutlass.range_constexpr(2):
            for h in cutlass.range_constexpr(2):
                pair = cute.make_rmem_tensor(2, Float32)
                for e in cutlass.range_constexpr(2):
                    pair[e] = -outer[4 * tile_n + 2 * h + e]
                j = (lane >> 2) + 8 * h
                target = j * CHUNK + ((2 + tile_n) ^ (j >> 1 & 3)) * 8 + 2 * (lane & 3)
                rounded = cute.make_rmem_tensor(2, self.element)
                for part in cutlass.range_constexpr(self.spec.inverse_parts):
                    rounded.store(pair.load().to(self.element))
                    vector(mix, target + part * (CHUNK * CHUNK)).store(rounded.load())
                    rest(pair, rounded)

    @cute.jit
    def parts(self, values):
        """16 or 8 numbers in two parts, [8, n / 8]."""
        exact = cute.make_rmem_tensor((8, len(values) // 8), Float32)
        for i in cutlass.range_constexpr(len(values)):
            exact[i] = values[i]
        upper = cute.make_rmem_tensor(exact.shape, self.element)
        lower = cute.make_rmem_tensor(exact.shape, self.element)
        upper.store(exact.load().to(self.element))
        rest(exact, upper)
        lower.store(exact.load().to(self.element))
        return upper, lower

    @cute.jit
    def three(self, a, b):
        """The 16 x 16 product of operands in two parts each, but for that of the lower ones."""
        out = []
        for tile_n in cutlass.range_constexpr(2):
            acc = (Float32(0.0),) * 4
            for i, j in ((1, 0), (0, 1), (0, 0)):
                acc = multiply_16x8x16(acc, a[i], b[j][tile_n], self.element)
            out.extend(acc)
        return out

    @cute.jit
    def words(self, values):
        """Four numbers in two parts: the words of the upper ones, then those of the lower."""
        upper, lower = self.parts([*values, *(Float32(0.0),) * 4])
        return tuple(cute.recast_tensor(part, Int32)[i] for part in (upper, lower) for i in range(2))

    @cute.jit
    def both(self, a: tuple, b: tuple):
        """Products of two pairs of 8 x 8, words of two parts as in `words`, but for those of the lower parts."""
        acc, zero = (Float32(0.0),) * 4, Int32(0)
        for i, j in ((2, 0), (0, 2), (0, 0)):
            acc = multiply_16x8x16(acc, (a[i], zero, zero, a[i + 1]), (b[j], b[j + 1]), self.element)
        return acc
