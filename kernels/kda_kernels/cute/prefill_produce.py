"""The half of the prefill kernel that makes chunks ready for the chain; see `prefill_kernel.py`."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64
from cutlass.cute.nvgpu import warpgroup

from kda_kernels.cute.math import LOG2_E, reciprocal, rsqrt, sigmoid
from kda_kernels.cute.prefill_config import CHUNK, STAGES, PrefillSpec
from kda_kernels.cute.prefill_shared import (
    INVERSE_PITCH, Kind, operand, vector,
)  # fmt: skip
from kda_kernels.cute.ptx import (
    bfloat16_pair, copy_16_bytes, exp2_approx, load_matrices, multiply_16x8x16, select,
)  # fmt: skip
from kda_kernels.problem import Gate

HALF = CHUNK // 2  # tokens a thread has, of two channels
L2_EPS = 1e-6


class Producer:
    """A warpgroup: thread p has channels 2 (p % 64) and the next of tokens 16 (p // 64) to 15 more."""

    spec: PrefillSpec

    @cute.jit
    def produce(
        self, shared, q, k, v, g, beta, A_log, dt_bias, b: Int32, first: Int32, n_tokens: Int32, n_chunks: Int32,
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

        self.fetch(raw_q, q, b, first, group * CHUNK, n_tokens, i_h, p)
        self.fetch(raw_k, k, b, first, group * CHUNK, n_tokens, i_h, p)
        self.fetch(raw_g, g, b, first, group * CHUNK, n_tokens, i_hv, p)
        cute.arch.cp_async_commit_group()
        for chunk in cutlass.range(group, n_chunks, 2, unroll=1):
            stage, at = chunk % STAGES, chunk * CHUNK
            tokens = n_tokens - at
            cute.arch.mbarrier_wait(shared.empty + stage, (chunk // STAGES % 2) ^ 1)
            self.fetch(shared.v + stage * (CHUNK * spec.V), v, b, first, at, n_tokens, i_hv, p)
            cute.arch.cp_async_commit_group()
            raw_beta = Float32(0.0)
            if warp == 0 and lane < tokens:
                raw_beta = beta[b, first + at + lane, i_hv].to(Float32)
            cute.arch.cp_async_wait_group(1)
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
                if lane >= tokens:
                    value = Float32(0.0)
                vector(sums, 2 * CHUNK + lane, 1)[0] = value
            cute.arch.fence_proxy("async.shared", space="cta")
            self.barrier(group)

            warpgroup.fence()
            for i in cutlass.range_constexpr(spec.K // 16):
                gram.set(warpgroup.Field.ACCUMULATE, i != 0)
                cute.gemm(gram, acc, gram_a[None, None, i, stage], gram_b[None, None, i, stage], acc)
            warpgroup.commit_group()

            self.fetch(raw_q, q, b, first, at + 2 * CHUNK, n_tokens, i_h, p)
            self.fetch(raw_k, k, b, first, at + 2 * CHUNK, n_tokens, i_h, p)
            self.fetch(raw_g, g, b, first, at + 2 * CHUNK, n_tokens, i_hv, p)
            cute.arch.cp_async_commit_group()
            if warp == 3:
                norm_k, norm_q = self.norms(sums, lane)
                value = vector(sums, 2 * CHUNK + lane, 1)[0]
                token = shared.token + stage * (3 * CHUNK)
                vector(token, lane, 1)[0] = value * norm_k
                vector(token, lane + CHUNK, 1)[0] = value * norm_k * norm_k
                vector(token, lane + 2 * CHUNK, 1)[0] = norm_q * scale
            warpgroup.wait_group(0)
            mix = shared.mix + stage * (2 * CHUNK * CHUNK)
            self.spread(acc, L, mix + CHUNK * CHUNK, sums, warp, lane)
            cute.arch.cp_async_wait_group(1)
            cute.arch.fence_proxy("async.shared", space="cta")
            self.barrier(group)
            if warp == 0:
                self.invert(L, mix, lane)
                cute.arch.fence_proxy("async.shared", space="cta")
                cute.arch.sync_warp()
                if lane == 0:
                    cute.arch.mbarrier_arrive(shared.full + stage)
        cute.arch.cp_async_wait_group(0)

    @cute.jit
    def barrier(self, group: Int32):
        """Among the threads of this warpgroup."""
        cute.arch.barrier(barrier_id=1 + group, number_of_threads=128)

    @cute.jit
    def fetch(self, target, source, b: Int32, first: Int32, at: Int32, n_tokens: Int32, head: Int32, p: Int32):
        """Asks for CHUNK tokens of a head from `at` on; zeros after the end."""
        size = 128 // source.element_type.width  # elements in 16 bytes
        pieces = 128 // size
        a_row = 128 // pieces  # rows that the threads cover at once
        piece, row = p % pieces, p // pieces
        base = Int64(b) * source.stride[0] + Int64(first + at + row) * source.stride[1] + Int64(head) * source.stride[2]
        start = source.iterator + cute.assume(base + piece * size, divby=size)
        for i in cutlass.range_constexpr(CHUNK // a_row):
            token = row + i * a_row
            step = cute.assume(Int64(i * a_row) * source.stride[1], divby=size)
            offset = token * 128 + (piece ^ (token % 8)) * size
            copy_16_bytes(target + offset, start + step, at + token < n_tokens)

    @cute.jit
    def raw_pairs(self, source, pair: Int32, half: Int32):
        """Two channels of this thread's tokens as they lie in shared memory: [2, HALF]."""
        raw = cute.make_rmem_tensor((2, HALF), source.dtype)
        for i in cutlass.range_constexpr(HALF):
            if cutlass.const_expr(source.dtype.width == 16):
                offset = (pair ^ (i % 8 * 4)) * 2 + (half * HALF + i) * 128
            else:
                offset = (pair ^ (i % 8 * 2)) * 2 + (half * HALF + i) * 128
            raw[None, i].store(vector(source, offset).load())
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
            for i in cutlass.range_constexpr(HALF):
                if half * HALF + i >= tokens:
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
        rows = shared.rows + (stage * (2 * CHUNK * K) + pair // 32 * (2 * CHUNK * 64) + half * (HALF * 64))
        cols = shared.cols + (stage * (CHUNK * K) + pair // 32 * (CHUNK * 64) + half * (HALF * 64))
        for i in cutlass.range_constexpr(HALF):
            x, y = self.pair_of(q, i), self.pair_of(k, i)
            out = cute.make_rmem_tensor((2, 3), Float32)
            for e in cutlass.range_constexpr(2):
                grow = exp2_approx(G[e, i])
                out[e, 0] = y[e] * grow
                out[e, 1] = x[e] * grow
                out[e, 2] = y[e] * exp2_approx(-G[e, i])
            place = ((pair % 32) ^ (i % 8 * 4)) * 2  # 128-byte swizzle
            for j, target in enumerate((rows, rows + CHUNK * 64, cols)):
                vector(target, place + i * 64).store(out[None, j].load().to(BFloat16))

    @cute.jit
    def squares(self, raw, sums, warp: Int32, lane: Int32):
        """q.q and k.k of all tokens: the diagonal of a product of 16 rows of a warp, q or k, with themselves."""
        kind = cutlass.const_expr("bf16" if raw.dtype is BFloat16 else "f16")
        row = lane // 8 % 2 * 8 + lane % 8
        upper, lower = ((Float32(0.0),) * 4,) * 2
        for i in cutlass.range_constexpr(self.spec.K // 16):
            a = load_matrices(raw + (warp * 16 + row) * 128 + ((2 * i + lane // 16) ^ (row % 8)) * 8)
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
    def spread(self, acc, L, mix, sums, warp: Int32, lane: Int32):
        """Of [kE; qE] kI^T, the upper half times b to L, the lower without what lies over its diagonal to `mix`."""
        col = 2 * (lane % 4)
        for h in cutlass.range_constexpr(2):
            row = 16 * warp + lane // 4 + 8 * h
            if row < CHUNK:
                norm_k, norm_q = self.norms(sums, row)
                factor = vector(sums, 2 * CHUNK + row, 1)[0] * norm_k * norm_k
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
