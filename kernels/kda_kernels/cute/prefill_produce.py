"""The half of the prefill kernel that makes chunks ready for the chain; see `prefill_kernel.py`."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32
from cutlass.cute.nvgpu import cpasync, warpgroup

from kda_kernels.cute.math import LOG2_E, reciprocal, rsqrt, sigmoid
from kda_kernels.cute.prefill_config import CHUNK, STAGES, PrefillSpec
from kda_kernels.cute.prefill_shared import (
    INVERSE_PITCH, Kind, operand, swizzled, tile, vector,
)  # fmt: skip
from kda_kernels.cute.ptx import (
    bfloat16_pair, exp2_approx, fresh, load_matrices, multiply_16x8x16, select,
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
        p = cute.arch.thread_idx()[0] % 128
        warp, lane = p // 32, p % 32
        pair, half = p % 64, p // 64

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
        L = shared.L + group * (CHUNK * INVERSE_PITCH)
        sums = shared.sums + group * (3 * CHUNK)

        rows = operand(shared.rows, Kind.K_SW128, (2 * CHUNK, spec.K, STAGES), (0, 1, 2))
        cols = operand(shared.cols, Kind.K_SW128, (CHUNK, spec.K, STAGES), (0, 1, 2))
        thread = gram.get_slice(p)
        gram_a = gram.make_fragment_A(thread.partition_A(rows))
        gram_b = gram.make_fragment_B(thread.partition_B(cols))
        acc = cute.make_rmem_tensor(gram.partition_shape_C((2 * CHUNK, CHUNK)), Float32)

        atom_q, atom_k, atom_v, atom_g = atoms
        q, q_tiles = self.tiles(atom_q, inputs[0], raw_q, b, first, i_h)
        k, k_tiles = self.tiles(atom_k, inputs[1], raw_k, b, first, i_h)
        g, g_tiles = self.tiles(atom_g, inputs[3], raw_g, b, first, i_hv)
        loaded = shared.loaded + group
        size = CHUNK * spec.K * (16 + 16 + raw_g.dtype.width) // 8
        if warp == LOADER:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(loaded, size)
            cute.copy(atom_q, q[None, group], q_tiles, tma_bar_ptr=loaded)
            cute.copy(atom_k, k[None, group], k_tiles, tma_bar_ptr=loaded)
            cute.copy(atom_g, g[None, group], g_tiles, tma_bar_ptr=loaded)

        for chunk in cutlass.range(group, n_chunks, 2, unroll=1):
            p = fresh(p)
            warp, lane, pair, half = p // 32, p % 32, p % 64, p // 64
            stage, tokens = chunk % STAGES, n_tokens - chunk * CHUNK
            cute.arch.mbarrier_wait(shared.empty + stage, (chunk // STAGES % 2) ^ 1)
            if warp == LOADER:
                full = shared.full + stage
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(full, CHUNK * spec.V * 2)
                place = shared.v + stage * (CHUNK * spec.V)
                v, v_tiles = self.tiles(atom_v, inputs[2], place, b, first, i_hv)
                cute.copy(atom_v, v[None, chunk], v_tiles, tma_bar_ptr=full)
            raw_beta = Float32(0.0)
            if warp == 0 and lane < tokens:
                raw_beta = beta[b, first + chunk * CHUNK + lane, i_hv].to(Float32)
            cute.arch.mbarrier_wait(loaded, chunk // 2 % 2)

            if tokens < CHUNK:
                self.clear(raw_q, tokens, p)
                self.clear(raw_k, tokens, p)
                self.barrier(group)
            if cutlass.const_expr(spec.qk_l2norm):
                self.squares(raw_q, sums, warp, lane)
            G = self.gates(raw_g, A, bias, lower_bound, pair, half, tokens, shared.decay + stage * (2 * spec.K))
            self.operands(shared, raw_q, raw_k, G, stage, pair, half)
            if warp == 0:
                value = raw_beta
                if cutlass.const_expr(spec.beta_is_logit):
                    value = sigmoid(raw_beta)
                    if cutlass.const_expr(spec.allow_neg_eigval):
                        value = 2.0 * value
                vector(sums, 2 * CHUNK + lane, 1)[0] = value
            cute.arch.fence_proxy("async.shared", space="cta")
            self.barrier(group)

            warpgroup.fence()
            for i in cutlass.range_constexpr(spec.K // 16):
                gram.set(warpgroup.Field.ACCUMULATE, i != 0)
                cute.gemm(gram, acc, gram_a[None, None, i, stage], gram_b[None, None, i, stage], acc)
            warpgroup.commit_group()

            if warp == LOADER:
                if chunk + 2 < n_chunks:
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive_and_expect_tx(loaded, size)
                    cute.copy(atom_q, q[None, chunk + 2], q_tiles, tma_bar_ptr=loaded)
                    cute.copy(atom_k, k[None, chunk + 2], k_tiles, tma_bar_ptr=loaded)
                    cute.copy(atom_g, g[None, chunk + 2], g_tiles, tma_bar_ptr=loaded)
                self.factors(shared.token + stage * (3 * CHUNK), sums, scale, lane, tokens)
            warpgroup.wait_group(0)
            mix = shared.mix + stage * (2 * CHUNK * CHUNK)
            self.spread(acc, L, mix + CHUNK * CHUNK, sums, warp, lane, tokens)
            cute.arch.fence_proxy("async.shared", space="cta")
            self.barrier(group)
            if warp == 0:
                self.invert(L, mix, lane)
                cute.arch.fence_proxy("async.shared", space="cta")
                cute.arch.sync_warp()
                if lane == 0:
                    cute.arch.mbarrier_arrive(shared.full + stage)

    @cute.jit
    def barrier(self, group: Int32):
        """Among the threads of this warpgroup."""
        cute.arch.barrier(barrier_id=1 + group, number_of_threads=128)

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
        for row in cutlass.range(tokens + p // 16, CHUNK, 8, unroll=1):
            vector(raw, swizzled(row, p % 16, 8, raw.dtype), 8).store(zeros.load())

    @cute.jit
    def raw_pairs(self, source, pair: Int32, half: Int32):
        """Two channels of this thread's tokens as they lie in shared memory: [2, HALF]."""
        raw = cute.make_rmem_tensor((2, HALF), source.dtype)
        start = source + half * (HALF * 1024 // source.dtype.width)
        for i in cutlass.range_constexpr(HALF):
            raw[None, i].store(vector(start, swizzled(i, pair, 2, source.dtype)).load())
        return raw

    @cute.jit
    def pair_of(self, raw, i: cutlass.Constexpr[int]):
        """Pair i of `raw_pairs`, fp32."""
        if cutlass.const_expr(raw.element_type is BFloat16):
            return bfloat16_pair(cute.recast_tensor(raw, Int32)[i])
        else:
            return raw[0, i].to(Float32), raw[1, i].to(Float32)

    @cute.jit
    def gates(self, raw_g, A: Float32, bias, lower_bound: Float32, pair: Int32, half: Int32, tokens: Int32, decay):
        """The sums of log2 decays from the middle of the chunk to each token: [2, HALF]; the whole decay of this half.

        Tokens after the end do not decay.
        """
        raw = self.raw_pairs(raw_g, pair, half)
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
        G = cute.make_rmem_tensor((2, HALF), Float32)
        whole = cute.make_rmem_tensor(2, Float32)
        if half == 0:  # backwards from the middle
            for e in cutlass.range_constexpr(2):
                total = Float32(0.0)
                for i in cutlass.range_constexpr(HALF - 1, -1, -1):
                    G[e, i] = -total
                    total = total + log2[e, i] * factor
                whole[e] = total
        else:
            for e in cutlass.range_constexpr(2):
                total = Float32(0.0)
                for i in cutlass.range_constexpr(HALF):
                    total = total + log2[e, i] * factor
                    G[e, i] = total
                whole[e] = total
        for e in cutlass.range_constexpr(2):
            vector(decay, half * self.spec.K + 2 * pair + e, 1)[0] = exp2_approx(whole[e])
        return G

    @cute.jit
    def operands(self, shared, raw_q, raw_k, G, stage: Int32, pair: Int32, half: Int32):
        """kE, qE and kI into shared memory."""
        K = self.spec.K
        q, k = self.raw_pairs(raw_q, pair, half), self.raw_pairs(raw_k, pair, half)
        rows = shared.rows + (stage * (2 * CHUNK * K) + half * (HALF * 64))
        cols = shared.cols + (stage * (CHUNK * K) + half * (HALF * 64))
        for i in cutlass.range_constexpr(HALF):
            x, y = self.pair_of(q, i), self.pair_of(k, i)
            out = cute.make_rmem_tensor((2, 3), Float32)
            for e in cutlass.range_constexpr(2):
                grow = exp2_approx(G[e, i])
                out[e, 0] = y[e] * grow
                out[e, 1] = x[e] * grow
                out[e, 2] = y[e] * exp2_approx(-G[e, i])
            for j, target in enumerate((rows, rows + CHUNK * 64, cols)):
                place = swizzled(i, pair, 2, BFloat16, CHUNK if j == 2 else 2 * CHUNK)
                vector(target, place).store(out[None, j].load().to(BFloat16))

    @cute.jit
    def squares(self, raw, sums, warp: Int32, lane: Int32):
        """q.q and k.k of all tokens: the diagonal of a product of 16 rows of a warp, q or k, with themselves."""
        kind = cutlass.const_expr("bf16" if raw.dtype is BFloat16 else "f16")
        row = lane // 8 % 2 * 8 + lane % 8
        upper, lower = ((Float32(0.0),) * 4,) * 2
        for i in cutlass.range_constexpr(self.spec.K // 16):
            a = load_matrices(raw + warp // 2 * (CHUNK * 128) + swizzled(warp % 2 * 16 + row, 2 * i + lane // 16, 8, raw.dtype))
            upper = multiply_16x8x16(upper, a, (a[0], a[2]), kind)
            lower = multiply_16x8x16(lower, a, (a[1], a[3]), kind)
        if lane % 4 == lane // 8:
            odd = lane // 4 % 2 == 1
            vector(sums, warp * 16 + lane // 4, 1)[0] = select(odd, upper[1], upper[0])
            vector(sums, warp * 16 + lane // 4 + 8, 1)[0] = select(odd, lower[3], lower[2])

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
        a = vector(sums, 2 * CHUNK + lane, 1)[0] * norm_k
        b = a * norm_k
        vector(target, lane, 1)[0] = a if lane < tokens else Float32(0.0)
        vector(target, lane + CHUNK, 1)[0] = b if lane < tokens else Float32(0.0)
        vector(target, lane + 2 * CHUNK, 1)[0] = norm_q * scale

    @cute.jit
    def spread(self, acc, L, mix, sums, warp: Int32, lane: Int32, tokens: Int32):
        """Of [kE; qE] kI^T, the upper half times b to L, the lower without what lies over its diagonal to `mix`."""
        col = 2 * (lane % 4)
        for h in cutlass.range_constexpr(2):
            row = 16 * warp + lane // 4 + 8 * h
            if row < CHUNK:
                norm_k, norm_q = self.norms(sums, row)
                factor = vector(sums, 2 * CHUNK + row, 1)[0] * norm_k * norm_k if row < tokens else Float32(0.0)
                for j in cutlass.range_constexpr(CHUNK // 8):
                    for e in cutlass.range_constexpr(2):
                        value = acc[4 * j + 2 * h + e] * factor if 8 * j + col + e < row else Float32(0.0)
                        vector(L, (8 * j + col + e) * INVERSE_PITCH + row, 1)[0] = value
            else:
                i = row - CHUNK
                for j in cutlass.range_constexpr(CHUNK // 8):
                    pair = cute.make_rmem_tensor(2, Float32)
                    for e in cutlass.range_constexpr(2):
                        pair[e] = acc[4 * j + 2 * h + e] if 8 * j + col + e <= i else Float32(0.0)
                    vector(mix, i * CHUNK + (j ^ (i // 2 % 4)) * 8 + col).store(pair.load().to(BFloat16))

    @cute.jit
    def invert(self, L, mix, lane: Int32):
        """(I + L)^-1 - I = Z by substitution in fp32: (I + L) Z = -L, lane n making column n. L is strictly lower."""
        x = []  # of -Z
        for quad in cutlass.range_constexpr(CHUNK // 4):
            entries = vector(L, lane * INVERSE_PITCH + 4 * quad, 4).load()
            x.extend([entries[e] for e in range(4)])
        for m in cutlass.range_constexpr(1, CHUNK - 1):
            for quad in cutlass.range_constexpr((m + 1) // 4, CHUNK // 4):
                entries = vector(L, m * INVERSE_PITCH + 4 * quad, 4).load()
                for e in cutlass.range_constexpr(4):
                    if cutlass.const_expr(4 * quad + e > m):
                        x[4 * quad + e] = x[4 * quad + e] - entries[e] * x[m]
        for piece in cutlass.range_constexpr(CHUNK // 8):
            column = cute.make_rmem_tensor(8, Float32)
            for e in cutlass.range_constexpr(8):
                column[e] = -x[8 * piece + e]
            offset = lane * CHUNK + (piece ^ (lane // 2 % 4)) * 8  # 64-byte swizzle
            vector(mix, offset, 8).store(column.load().to(BFloat16))
