"""The half of the prefill kernel that makes chunks ready for the chain; see `prefill_kernel.py`."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64
from cutlass.cute.nvgpu import warpgroup

from kda_kernels.cute.math import LOG2_E, reciprocal, rsqrt, sigmoid
from kda_kernels.cute.prefill_config import CHUNK, STAGES, PrefillSpec
from kda_kernels.cute.prefill_shared import (
    DECAYS, INVERSE_PITCH, Kind, Shared, operand, swizzled_row, swizzled_token, vector,
)  # fmt: skip
from kda_kernels.cute.ptx import copy_16_bytes, exp2_approx, select
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
        channel, half = 2 * (p % 64), p // 64

        A = Float32(LOG2_E)
        bias = cute.make_rmem_tensor(2, Float32)
        bias.fill(0.0)
        if cutlass.const_expr(A_log is not None):
            A = cute.math.exp2(A_log[i_hv].to(Float32) * LOG2_E) * LOG2_E
        if cutlass.const_expr(dt_bias is not None):
            for e in cutlass.range_constexpr(2):
                bias[e] = dt_bias[i_hv * spec.K + channel + e].to(Float32) * A

        raw_q = shared.raw + group * (2 * CHUNK * spec.K)
        raw_k = raw_q + CHUNK * spec.K
        raw_g = shared.raw_g + group * (CHUNK * spec.K)
        L = shared.L + group * (CHUNK * INVERSE_PITCH)
        sums = shared.sums + group * (5 * CHUNK)

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

            G = self.gates(raw_g, A, bias, lower_bound, channel, half, tokens)
            self.operands(shared, raw_q, raw_k, G, sums, chunk, stage, channel, half, lane, p)
            if warp == 0:
                value = raw_beta
                if cutlass.const_expr(spec.beta_is_logit):
                    value = sigmoid(raw_beta)
                    if cutlass.const_expr(spec.allow_neg_eigval):
                        value = 2.0 * value
                if lane >= tokens:
                    value = Float32(0.0)
                vector(sums, 4 * CHUNK + lane, 1)[0] = value
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
                value = vector(sums, 4 * CHUNK + lane, 1)[0]
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
    def raw_pair(self, source, token, channel: Int32):
        """Two channels of a token, fp32."""
        size = cutlass.const_expr(128 // source.dtype.width)
        offset = token * 128 + ((channel // size) ^ (token % 8)) * size + channel % size
        return vector(source, offset).load().to(Float32)

    @cute.jit
    def gates(self, raw_g, A: Float32, bias, lower_bound: Float32, channel: Int32, half: Int32, tokens: Int32):
        """The sums of log2 decays from the middle of the chunk to each token: [2, HALF]. Tokens after the end do not decay."""
        G = cute.make_rmem_tensor((2, HALF), Float32)
        for i in cutlass.range_constexpr(HALF):
            raw = self.raw_pair(raw_g, half * HALF + i, channel)
            for e in cutlass.range_constexpr(2):
                if cutlass.const_expr(self.spec.gate is Gate.SAFE):
                    G[e, i] = reciprocal(1.0 + exp2_approx(-(raw[e] * A + bias[e])))
                else:
                    G[e, i] = raw[e]
        if tokens < CHUNK:
            for i in cutlass.range_constexpr(HALF):
                if half * HALF + i >= tokens:
                    for e in cutlass.range_constexpr(2):
                        G[e, i] = Float32(0.0)
        factor = Float32(LOG2_E)
        if cutlass.const_expr(self.spec.gate is Gate.SAFE):
            factor = lower_bound * LOG2_E
        for e in cutlass.range_constexpr(2):
            total = Float32(0.0)
            for i in cutlass.range_constexpr(HALF):
                total = total + G[e, i] * factor
                G[e, i] = total
        return G

    @cute.jit
    def operands(
        self, shared, raw_q, raw_k, G, sums, chunk: Int32, stage: Int32, channel: Int32, half: Int32, lane: Int32, p: Int32,
    ):  # fmt: skip
        """kE, qE and kI into shared memory, the decays of the halves, and the sums q.q and k.k over 64 channels."""
        K = self.spec.K
        # this half's whole decay: exp2(m) of the first, exp2(G_31 - m) of the second
        decay = vector(shared.decay, (half * DECAYS + chunk % DECAYS) * K + channel)
        for e in cutlass.range_constexpr(2):
            decay[e] = exp2_approx(G[e, HALF - 1])
        middle = cute.make_rmem_tensor(2, Float32)
        for e in cutlass.range_constexpr(2):
            middle[e] = G[e, HALF - 1] if half == 0 else Float32(0.0)
        rows = shared.rows + stage * (2 * CHUNK * K) + half * (HALF * 64)
        cols = shared.cols + stage * (CHUNK * K) + half * (HALF * 64)
        out = cute.make_rmem_tensor((2, 3), Float32)
        squares = cute.make_rmem_tensor(2 * HALF, Float32)
        for i in cutlass.range_constexpr(HALF):
            x, y = self.raw_pair(raw_q, half * HALF + i, channel), self.raw_pair(raw_k, half * HALF + i, channel)
            for e in cutlass.range_constexpr(2):
                log2 = G[e, i] - middle[e]
                grow = exp2_approx(log2)
                out[e, 0] = y[e] * grow
                out[e, 1] = x[e] * grow
                out[e, 2] = y[e] * exp2_approx(-log2)
            squares[i] = x[0] * x[0] + x[1] * x[1]
            squares[HALF + i] = y[0] * y[0] + y[1] * y[1]
            for j, target in enumerate((rows, rows + CHUNK * 64, cols)):
                n_rows = CHUNK if j == 2 else 2 * CHUNK
                pair = cute.make_rmem_tensor(2, Float32)
                pair[0] = out[0, j]
                pair[1] = out[1, j]
                vector(target, swizzled_row(i, channel, n_rows)).store(pair.load().to(BFloat16))
        # each step halves the values a lane has: lane n ends with the n-th of all lanes
        values = [squares[i] for i in range(2 * HALF)]
        for step in (16, 8, 4, 2, 1):
            upper = (lane & step) != 0
            n = len(values) // 2
            for m in cutlass.range_constexpr(n):
                keep = select(upper, values[m + n], values[m])
                send = select(upper, values[m], values[m + n])
                values[m] = keep + cute.arch.shuffle_sync_bfly(send, step)
            values = values[:n]
        vector(sums, (p // 32 % 2 * 2 + lane // HALF) * CHUNK + half * HALF + lane % HALF, 1)[0] = values[0]

    @cute.jit
    def norms(self, sums, token):
        """1 / |k| and 1 / |q| of a token; 1 where they come normalised."""
        norm_k, norm_q = Float32(1.0), Float32(1.0)
        if cutlass.const_expr(self.spec.qk_l2norm):
            qq, kk, qq2, kk2 = (vector(sums, i * CHUNK + token, 1)[0] for i in range(4))
            norm_k, norm_q = rsqrt(kk + kk2 + L2_EPS), rsqrt(qq + qq2 + L2_EPS)
        return norm_k, norm_q

    @cute.jit
    def spread(self, acc, L, mix, sums, warp: Int32, lane: Int32):
        """Of [kE; qE] kI^T, the upper half times b to L, the lower without what lies over its diagonal to `mix`."""
        col = 2 * (lane % 4)
        for h in cutlass.range_constexpr(2):
            row = 16 * warp + lane // 4 + 8 * h
            if row < CHUNK:
                norm_k, norm_q = self.norms(sums, row)
                factor = vector(sums, 4 * CHUNK + row, 1)[0] * norm_k * norm_k
                for j in cutlass.range_constexpr(CHUNK // 8):
                    for e in cutlass.range_constexpr(2):
                        vector(L, (8 * j + col + e) * INVERSE_PITCH + row, 1)[0] = acc[4 * j + 2 * h + e] * factor
            else:
                i = row - CHUNK
                for j in cutlass.range_constexpr(CHUNK // 8):
                    pair = cute.make_rmem_tensor(2, Float32)
                    for e in cutlass.range_constexpr(2):
                        pair[e] = acc[4 * j + 2 * h + e] if 8 * j + col + e <= i else Float32(0.0)
                    vector(mix, i * CHUNK + (j ^ (i // 2 % 4)) * 8 + col).store(pair.load().to(BFloat16))

    @cute.jit
    def invert(self, L, mix, lane: Int32):
        """(I + L)^-1 - I by substitution in fp32, lane n making column n. L is strictly lower."""
        x = [select(lane == i, Float32(1.0), Float32(0.0)) for i in range(CHUNK)]
        for m in cutlass.range_constexpr(CHUNK - 1):
            for quad in cutlass.range_constexpr((m + 1) // 4, CHUNK // 4):
                entries = vector(L, m * INVERSE_PITCH + 4 * quad, 4).load()
                for e in cutlass.range_constexpr(4):
                    if cutlass.const_expr(4 * quad + e > m):
                        x[4 * quad + e] = x[4 * quad + e] - entries[e] * x[m]
        for i in cutlass.range_constexpr(CHUNK):
            value = select(lane == i, Float32(0.0), x[i])
            vector(mix, i * CHUNK + ((lane // 8) ^ (i // 2 % 4)) * 8 + lane % 8, 1)[0] = value.to(BFloat16)
