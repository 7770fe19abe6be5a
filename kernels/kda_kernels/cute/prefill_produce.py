"""The half of the prefill kernel that makes chunks ready for the chain; see `prefill_kernel.py`."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32
from cutlass.cute.nvgpu import cpasync, warpgroup

from kda_kernels.cute.math import LOG2_E, reciprocal, rsqrt, sigmoid
from kda_kernels.cute.prefill_config import CHUNK, PARTS, STAGES, Part, PrefillSpec
from kda_kernels.cute.prefill_shared import (
    BLOCK, L_BLOCK, L_PITCH, TILE, TILE_PITCH, Kind, operand, swizzled, tile, vector,
)  # fmt: skip
from kda_kernels.cute.ptx import (
    bfloat16_pair, exp2_approx, fresh, load_matrices, load_transposed, multiply_16x8x16, rest, select,
)  # fmt: skip
from kda_kernels.problem import Gate

HALF = CHUNK // 2  # tokens a thread has, of two channels
L2_EPS = 1e-6
LOADER = 3  # the warp that asks for the next chunk: not the one that inverts


class Producer:
    """A warpgroup: thread p has channels 2 (p % 64) and the next of tokens 16 (p // 64) to 15 more."""

    spec: PrefillSpec

    @cute.jit
    def produce(
        self, shared, atoms, inputs, beta, A_log, dt_bias, b: Int32, first: Int32, n_tokens: Int32, n_chunks: Int32,
        i_h: Int32, i_hv: Int32, scale: Float32, lower_bound: Float32, group: Int32, gram: cute.TiledMma,
    ):  # fmt: skip
        spec = self.spec
        p = cute.arch.thread_idx()[0] & 127
        warp, lane, pair, half = p >> 5, p & 31, p & 63, p >> 6

        A = Float32(LOG2_E)
        bias = cute.make_rmem_tensor(2, Float32)
        bias.fill(0.0)
        if cutlass.const_expr(A_log is not None):
            A = cute.math.exp2(A_log[i_hv].to(Float32) * LOG2_E) * LOG2_E
        if cutlass.const_expr(dt_bias is not None):
            for e in cutlass.range_constexpr(2):
                bias[e] = dt_bias[i_hv * spec.K + 2 * pair + e].to(Float32) * A

        raw_q = shared.raw + group * (2 * CHUNK * spec.K)
        raw_k = raw_q + CHUNK * spec.K
        raw_g = shared.raw_g + group * (CHUNK * spec.K)
        scratch = shared.solve + group * (3 * TILE)
        sums = shared.sums + group * (4 * CHUNK)

        rows = operand(shared.rows, Kind.K_SW128, (2 * CHUNK, spec.K, STAGES), (0, 1, 2))
        cols = operand(shared.cols, Kind.K_SW128, (CHUNK, spec.K, PARTS * STAGES), (0, 1, 2))
        thread = gram.get_slice(p)
        gram_a = gram.make_fragment_A(thread.partition_A(rows))
        gram_b = gram.make_fragment_B(thread.partition_B(cols))
        acc = cute.make_rmem_tensor(gram.partition_shape_C((2 * CHUNK, CHUNK)), Float32)

        atom_q, atom_k, atom_v, atom_g = atoms
        q, q_tiles = self.tiles(atom_q, inputs[0], raw_q, b, first, i_h)
        k, k_tiles = self.tiles(atom_k, inputs[1], raw_k, b, first, i_h)
        g, g_tiles = self.tiles(atom_g, inputs[3], raw_g, b, first, i_hv)
        loaded = shared.loaded + group
        summary = cutlass.const_expr(spec.part is Part.SUMMARY)  # needs no q
        size = CHUNK * spec.K * ((16 if summary else 32) + raw_g.dtype.width) // 8
        if warp == LOADER:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(loaded, size)
            if cutlass.const_expr(not summary):
                cute.copy(atom_q, q[None, group], q_tiles, tma_bar_ptr=loaded)
            cute.copy(atom_k, k[None, group], k_tiles, tma_bar_ptr=loaded)
            cute.copy(atom_g, g[None, group], g_tiles, tma_bar_ptr=loaded)

        raw_beta = self.fetch_beta(beta, b, first, group * CHUNK + lane, n_tokens, i_hv)
        for chunk in cutlass.range(group, n_chunks, 2, unroll=1):
            p = fresh(p)
            warp, lane, pair, half = p >> 5, p & 31, p & 63, p >> 6
            stage = cute.arch.make_warp_uniform(chunk % STAGES)
            tokens = n_tokens - chunk * CHUNK
            cute.arch.mbarrier_wait(loaded, chunk >> 1 & 1)

            if tokens < CHUNK:
                if cutlass.const_expr(not summary):
                    self.clear(raw_q, tokens, p)
                self.clear(raw_k, tokens, p)
                self.barrier(group)
            G = self.gates(raw_g, A, bias, lower_bound, pair, half, tokens)
            cute.arch.mbarrier_wait(shared.empty + stage, (chunk // STAGES & 1) ^ 1)
            if warp == LOADER:
                full = shared.full + stage
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(full, CHUNK * spec.V * 2)
                place = shared.v + stage * (CHUNK * spec.V)
                v, v_tiles = self.tiles(atom_v, inputs[2], place, b, first, i_hv)
                cute.copy(atom_v, v[None, chunk], v_tiles, tma_bar_ptr=full)
            decay = shared.decay + stage * (2 * spec.K)
            self.operands(shared, raw_q, raw_k, G, decay, stage, pair, half, sums, warp, lane)
            if warp == 0:
                value = raw_beta
                if cutlass.const_expr(spec.beta_is_logit):
                    value = sigmoid(raw_beta)
                    if cutlass.const_expr(spec.allow_neg_eigval):
                        value = 2.0 * value
                vector(sums, 3 * CHUNK + lane, 1)[0] = value
            raw_beta = self.fetch_beta(beta, b, first, (chunk + 2) * CHUNK + lane, n_tokens, i_hv)
            cute.arch.fence_proxy("async.shared", space="cta")
            self.barrier(group)

            warpgroup.fence()
            for i in cutlass.range_constexpr(spec.K // 16):
                gram.set(warpgroup.Field.ACCUMULATE, i != 0)
                cute.gemm(gram, acc, gram_a[None, None, i, stage], gram_b[None, None, i, PARTS * stage], acc)
            warpgroup.commit_group()

            if warp == LOADER:
                if chunk + 2 < n_chunks:
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive_and_expect_tx(loaded, size)
                    if cutlass.const_expr(not summary):
                        cute.copy(atom_q, q[None, chunk + 2], q_tiles, tma_bar_ptr=loaded)
                    cute.copy(atom_k, k[None, chunk + 2], k_tiles, tma_bar_ptr=loaded)
                    cute.copy(atom_g, g[None, chunk + 2], g_tiles, tma_bar_ptr=loaded)
                self.factors(shared.token + stage * (3 * CHUNK), sums, scale, lane, tokens)
            warpgroup.wait_group(0)
            mix = shared.mix + stage * (2 * CHUNK * CHUNK)
            self.spread(acc, scratch, mix + CHUNK * CHUNK, sums, warp, lane, tokens)
            cute.arch.fence_proxy("async.shared", space="cta")
            self.barrier(group)
            if warp == 0:
                self.invert(scratch, mix, lane)
                cute.arch.fence_proxy("async.shared", space="cta")
                cute.arch.sync_warp()
                if lane == 0:
                    cute.arch.mbarrier_arrive(shared.full + stage)

    @cute.jit
    def barrier(self, group: Int32):
        """Among the threads of this warpgroup."""
        cute.arch.barrier(barrier_id=1 + group, number_of_threads=128)

    @cute.jit
    def fetch_beta(self, beta, b: Int32, first: Int32, token: Int32, n_tokens: Int32, i_hv: Int32):
        """beta of a token as it comes; 0 after the end."""
        raw = Float32(0.0)
        if token < n_tokens:
            raw = beta[b, first + token, i_hv].to(Float32)
        return raw

    @cute.jit
    def tiles(self, atom: cute.CopyAtom, source, target, b: Int32, first: Int32, head: Int32):
        """A head's chunks from token `first` on, and the tile at `target` that takes one, as TMA wants them."""
        size = source.shape[1]
        chunks = cute.local_tile(cute.domain_offset((first, 0), source[None, None, head, b]), (CHUNK, size), (None, 0))
        there, here = cpasync.tma_partition(
            atom, 0, cute.make_layout(1), cute.group_modes(tile(target, target.dtype, size), 0, 2),
            cute.group_modes(chunks, 0, 2),
        )  # fmt: skip
        return here, there

    @cute.jit
    def clear(self, raw, tokens: Int32, p: Int32):
        """Zeros after the last token: what follows it in memory is another's, and may be no number."""
        zeros = cute.make_rmem_tensor(8, raw.dtype)
        zeros.fill(0.0)
        for row in cutlass.range(tokens + (p >> 4), CHUNK, 8, unroll=1):
            vector(raw, swizzled(row, p & 15, 8, raw.dtype), 8).store(zeros.load())

    @cute.jit
    def raw_pairs(self, source, pair: Int32, half: Int32, first: cutlass.Constexpr[int], size: cutlass.Constexpr[int]):
        """Two channels of `size` of this thread's tokens as they lie in shared memory: [2, size]."""
        raw = cute.make_rmem_tensor((2, size), source.dtype)
        start = source + half * (HALF * 1024 // source.dtype.width)
        for i in cutlass.range_constexpr(size):
            raw[None, i].store(vector(start, swizzled(first + i, pair, 2, source.dtype)).load())
        return raw

    @cute.jit
    def pair_of(self, raw, i: cutlass.Constexpr[int]):
        """Pair i of `raw_pairs`, fp32."""
        if cutlass.const_expr(raw.element_type is BFloat16):
            return bfloat16_pair(cute.recast_tensor(raw, Int32)[i])
        else:
            return raw[0, i].to(Float32), raw[1, i].to(Float32)

    @cute.jit
    def gates(self, raw_g, A: Float32, bias, lower_bound: Float32, pair: Int32, half: Int32, tokens: Int32):
        """The sums of log2 decays from the middle of the chunk to each token, and over this half: [2, HALF + 1].

        Tokens after the end do not decay.
        """
        raw = self.raw_pairs(raw_g, pair, half, 0, HALF)
        log2 = cute.make_rmem_tensor((2, HALF), Float32)
        for i in cutlass.range_constexpr(HALF):
            values = self.pair_of(raw, i)
            for e in cutlass.range_constexpr(2):
                if cutlass.const_expr(self.spec.gate is Gate.SAFE):
                    log2[e, i] = reciprocal(1.0 + exp2_approx(values[e] * -A - bias[e]))
                else:
                    log2[e, i] = values[e]
        if tokens < CHUNK:
            last = fresh(tokens)  # a branch, where the compiler would select for every chunk
            for i in cutlass.range_constexpr(HALF):
                if half * HALF + i >= last:
                    for e in cutlass.range_constexpr(2):
                        log2[e, i] = Float32(0.0)
        factor = Float32(LOG2_E)
        if cutlass.const_expr(self.spec.gate is Gate.SAFE):
            factor = lower_bound * LOG2_E
        G = cute.make_rmem_tensor((2, HALF + 1), Float32)
        if half == 0:  # backwards from the middle
            for e in cutlass.range_constexpr(2):
                total = Float32(0.0)
                for i in cutlass.range_constexpr(HALF - 1, -1, -1):
                    G[e, i] = -total
                    total = total + log2[e, i] * factor
                G[e, HALF] = total
        else:
            for e in cutlass.range_constexpr(2):
                total = Float32(0.0)
                for i in cutlass.range_constexpr(HALF):
                    total = total + log2[e, i] * factor
                    G[e, i] = total
                G[e, HALF] = total
        return G

    @cute.jit
    def operands(
        self, shared, raw_q, raw_k, G, decay, stage: Int32, pair: Int32, half: Int32, sums, warp: Int32, lane: Int32,
    ):  # fmt: skip
        """kE, qE and kI into shared memory, the decays of both halves, and q.q, k.k and q.k to `sums`.

        The sums are diagonals of products of 16 rows a warp, q or k, with themselves and with k. Their instructions wait
        behind the consumers' products, so they are spread over the work.
        """
        K = self.spec.K
        summary = cutlass.const_expr(self.spec.part is Part.SUMMARY)
        batch = HALF // 2  # tokens read at once: before others are written, which the compiler does not move loads over
        for e in cutlass.range_constexpr(2):
            vector(decay, half * K + 2 * pair + e, 1)[0] = exp2_approx(G[e, HALF])
        rows = shared.rows + (stage * (2 * CHUNK * K) + half * (HALF * 64))
        cols = shared.cols + (stage * (PARTS * CHUNK * K) + half * (HALF * 64))
        kind = cutlass.const_expr("bf16" if raw_q.dtype is BFloat16 else "f16")
        row = (warp & 1) * 16 + (lane >> 3 & 1) * 8 + (lane & 7)
        own = cute.make_rmem_tensor((4, 2), Float32)
        cross = cute.make_rmem_tensor((4, 2), Float32)
        own.fill(0.0)
        cross.fill(0.0)
        mine = raw_k if summary else raw_q + (warp >> 1) * (CHUNK * 128)
        for i in cutlass.range_constexpr(HALF):
            place = swizzled(row, 2 * (i // 2) + (lane >> 4), 8, raw_q.dtype)
            if cutlass.const_expr(i % 2 == 0):
                a = load_matrices(mine + place)
                self.diagonals(own, a, a, kind)
            elif cutlass.const_expr(not summary):  # the warps of k for nothing: a branch would cost more
                self.diagonals(cross, a, load_matrices(raw_k + place), kind)
            if cutlass.const_expr(i % batch == 0):
                k = self.raw_pairs(raw_k, pair, half, i, batch)
                q = k if summary else self.raw_pairs(raw_q, pair, half, i, batch)
            x, y = self.pair_of(q, i % batch), self.pair_of(k, i % batch)
            out = cute.make_rmem_tensor((2, 3), Float32)
            for e in cutlass.range_constexpr(2):
                grow = exp2_approx(G[e, i])
                out[e, 0] = y[e] * grow
                out[e, 1] = x[e] * grow
                out[e, 2] = y[e] * exp2_approx(-G[e, i])
            for j, target in ((0, rows), (2, cols)) if summary else ((0, rows), (1, rows + CHUNK * 64), (2, cols)):
                place = swizzled(i, pair, 2, BFloat16, CHUNK if j == 2 else 2 * CHUNK)
                rounded = cute.make_rmem_tensor(2, BFloat16)
                rounded.store(out[None, j].load().to(BFloat16))
                vector(target, place).store(rounded.load())
                if cutlass.const_expr(j == 2 and PARTS == 2):
                    rest(out[None, j], rounded)
                    vector(target + CHUNK * K, place).store(out[None, j].load().to(BFloat16))
        if cutlass.const_expr(summary):
            if warp < 2:
                self.write_diagonals(own, sums + CHUNK + warp * 16, lane)
        else:
            self.write_diagonals(own, sums + warp * 16, lane)
            if warp < 2:
                self.write_diagonals(cross, sums + 2 * CHUNK + warp * 16, lane)

    @cute.jit
    def diagonals(self, acc, a, b, kind: cutlass.Constexpr[str]):
        """acc + the two 8 x 8 blocks on the diagonal of a b^T, in the places of 16 x 8 products."""
        for half in cutlass.range_constexpr(2):
            before = tuple(acc[e, half] for e in range(4))
            after = multiply_16x8x16(before, a, (b[half], b[half + 2]), kind)
            for e in cutlass.range_constexpr(4):
                acc[e, half] = after[e]

    @cute.jit
    def write_diagonals(self, acc, target, lane: Int32):
        if lane & 3 == lane >> 3:
            odd = lane >> 2 & 1 == 1
            vector(target, lane >> 2, 1)[0] = select(odd, acc[1, 0], acc[0, 0])
            vector(target, (lane >> 2) + 8, 1)[0] = select(odd, acc[3, 1], acc[2, 1])

    @cute.jit
    def norms(self, sums, token):
        """1 / |k| and 1 / |q| of a token; 1 where they come normalised."""
        norm_k, norm_q = Float32(1.0), Float32(1.0)
        if cutlass.const_expr(self.spec.qk_l2norm):
            qq, kk = (vector(sums, i * CHUNK + token, 1)[0] for i in range(2))
            norm_k, norm_q = rsqrt(kk + L2_EPS), rsqrt(qq + L2_EPS)
        return norm_k, norm_q

    @cute.jit
    def factors(self, target, sums, scale: Float32, lane: Int32, tokens: Int32):
        """a, b and the factor of o of the token of this lane; 0 after the end."""
        norm_k, norm_q = self.norms(sums, lane)
        a = vector(sums, 3 * CHUNK + lane, 1)[0] * norm_k
        b = a * norm_k
        vector(target, lane, 1)[0] = a if lane < tokens else Float32(0.0)
        vector(target, lane + CHUNK, 1)[0] = b if lane < tokens else Float32(0.0)
        vector(target, lane + 2 * CHUNK, 1)[0] = norm_q * scale

    @cute.jit
    def spread(self, acc, scratch, mix, sums, warp: Int32, lane: Int32, tokens: Int32):
        """[kE; qE] kI^T, 16 rows a warp: L's blocks on and under the diagonal to `scratch`, tril(qE kI^T) to `mix`."""
        for w in cutlass.range_constexpr(4):
            if warp == w:
                for h in cutlass.range_constexpr(2):
                    if cutlass.const_expr(w < 2):
                        self.spread_k(acc, scratch, sums, w, h, lane, tokens)
                    elif cutlass.const_expr(self.spec.part is not Part.SUMMARY):
                        self.spread_q(acc, mix, sums, w - 2, h, lane)

    @cute.jit
    def spread_k(self, acc, scratch, sums, w: cutlass.Constexpr[int], h: cutlass.Constexpr[int], lane: Int32, tokens: Int32):
        """8 rows of kE kI^T, times b."""
        col, row = 2 * (lane & 3), (lane >> 2) + 8 * h
        norm_k, norm_q = self.norms(sums, 16 * w + row)
        factor = vector(sums, 3 * CHUNK + 16 * w + row, 1)[0] * norm_k * norm_k
        factor = select(16 * w + row < tokens, factor, Float32(0.0))
        diagonal, tiles = scratch + (w * L_BLOCK + row), cute.recast_ptr(scratch, dtype=BFloat16)
        for j in cutlass.range_constexpr(2 * w + h + 1):
            values = [acc[4 * j + 2 * h + e] * factor for e in range(2)]
            if cutlass.const_expr(w == 1 and j < 2):  # the lower left block, in two parts
                pair = cute.make_rmem_tensor(2, Float32)
                for e in cutlass.range_constexpr(2):
                    pair[e] = values[e]
                rounded = cute.make_rmem_tensor(2, BFloat16)
                place = 4 * TILE + row * TILE_PITCH + 8 * j + col
                for part in cutlass.range_constexpr(2):
                    rounded.store(pair.load().to(BFloat16))
                    vector(tiles, place + part * TILE).store(rounded.load())
                    rest(pair, rounded)
            else:
                for e in cutlass.range_constexpr(2):
                    vector(diagonal, (8 * (j - 2 * w) + col + e) * L_PITCH, 1)[0] = values[e]

    @cute.jit
    def spread_q(self, acc, mix, sums, w: cutlass.Constexpr[int], h: cutlass.Constexpr[int], lane: Int32):
        """8 rows of tril(qE kI^T); the diagonal, without decays, as it was summed from q and k themselves."""
        col, row = 2 * (lane & 3), 16 * w + (lane >> 2) + 8 * h
        for j in cutlass.range_constexpr(2 * w + h + 1):
            pair = cute.make_rmem_tensor(2, Float32)
            for e in cutlass.range_constexpr(2):
                pair[e] = acc[4 * j + 2 * h + e]
                if cutlass.const_expr(j == 2 * w + h):
                    pair[e] = select(col + e < lane >> 2, pair[e], Float32(0.0))
                    pair[e] = select(col + e == lane >> 2, vector(sums, 2 * CHUNK + row, 1)[0], pair[e])
            vector(mix, row * CHUNK + (j ^ (row >> 1 & 3)) * 8 + col).store(pair.load().to(BFloat16))

    @cute.jit
    def invert(self, scratch, mix, lane: Int32):
        """(I + L)^-1 - I to `mix`, transposed.

        The inverses X of both diagonal blocks by substitution in fp32, a lane making a column (what lies over L's diagonal
        is not used). Then the lower left block, -X1 L10 X0: products of operands in two bf16 parts, 16 bits together.
        """
        block, n = lane >> 4, lane & 15
        L, tiles = scratch + block * L_BLOCK, cute.recast_ptr(scratch, dtype=BFloat16)
        x = [select(n == i, Float32(1.0), Float32(0.0)) for i in range(BLOCK)]
        for m in cutlass.range_constexpr(BLOCK - 1):
            for quad in cutlass.range_constexpr((m + 1) // 4, BLOCK // 4):
                entries = vector(L, m * L_PITCH + 4 * quad, 4).load()
                for e in cutlass.range_constexpr(4):
                    if cutlass.const_expr(4 * quad + e > m):
                        x[4 * quad + e] = x[4 * quad + e] - entries[e] * x[m]
        cute.arch.sync_warp()  # all have read L: X takes its place
        upper, lower = self.parts(x)
        column = tiles + (block * (2 * TILE) + n * TILE_PITCH)
        row = lane * CHUNK
        for piece in cutlass.range_constexpr(2):
            half = upper[None, piece].load()
            vector(column, 8 * piece, 8).store(half)
            vector(column, TILE + 8 * piece, 8).store(lower[None, piece].load())
            vector(mix, row + ((2 * block + piece) ^ (lane >> 1 & 3)) * 8, 8).store(half)
        vector(mix, row + ((lane >> 3) ^ (lane >> 1 & 3)) * 8 + (lane & 7), 1)[0] = BFloat16(0.0)  # the diagonal
        cute.arch.sync_warp()

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
                vector(mix, target).store(pair.load().to(BFloat16))

    @cute.jit
    def parts(self, values):
        """16 or 8 numbers as two of bf16 each, [8, n / 8]."""
        exact = cute.make_rmem_tensor((8, len(values) // 8), Float32)
        for i in cutlass.range_constexpr(len(values)):
            exact[i] = values[i]
        upper = cute.make_rmem_tensor(exact.shape, BFloat16)
        lower = cute.make_rmem_tensor(exact.shape, BFloat16)
        upper.store(exact.load().to(BFloat16))
        rest(exact, upper)
        lower.store(exact.load().to(BFloat16))
        return upper, lower

    @cute.jit
    def three(self, a, b):
        """The 16 x 16 product of operands in two parts each, but for that of the lower ones."""
        out = []
        for tile_n in cutlass.range_constexpr(2):
            acc = (Float32(0.0),) * 4
            for i, j in ((1, 0), (0, 1), (0, 0)):
                acc = multiply_16x8x16(acc, a[i], b[j][tile_n], "bf16")
            out.extend(acc)
        return out
