"""Device half of the CuTe DSL decode: a CTA takes some rows of one head's state through every token of its sequence.

A state tile is read once, held in fp32 registers over all tokens and written once. Eight lanes share a row of the state
and each access moves 16 bytes a lane, 128 bytes a row: whole lines for the memory, and sums over K that are 3 shuffles.
What a token's channels need once for the whole tile (gate, norms, k.q) is made by one thread a channel and shared
through shared memory, so that q, k and g may lie at any address.
"""

import functools
import math
import operator

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.memory import SmemAllocator

from kda_kernels.cute.decode_config import LANES, SUMS, DecodeSpec
from kda_kernels.cute.math import L2_EPS, LOG2_E, exp2, lane_sum, load_now, log2_decay, rsqrt, sigmoid


class DecodeKernel:
    """`__call__` is the host half that `cute.compile` builds, `kernel` the device half."""

    def __init__(self, spec: DecodeSpec):
        self.spec = spec
        self.rows, self.threads, self.ctas = spec.config.rows, spec.config.threads, spec.config.ctas
        self.bulk = spec.bulk
        self.warps = self.threads // 32
        self.channels = math.ceil(spec.K / self.threads)  # a thread
        self.apart = 32 // LANES  # rows that a warp touches with one access
        self.passes = self.rows // (self.warps * self.apart)

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # [B, T, H, K]
        k: cute.Tensor,  # [B, T, H, K]
        v: cute.Tensor,  # [B, T, HV, V]
        g: cute.Tensor,  # [B, T, HV, K]
        beta: cute.Tensor,  # [B, T, HV]
        A_log: cute.Tensor | None,  # [HV]
        dt_bias: cute.Tensor | None,  # [HV * K]
        o: cute.Tensor,  # [B, T, HV, V]
        h0: cute.Tensor | None,  # [N, HV, V, K] or the pool [P, HV, V, K]
        ht: cute.Tensor | None,  # [N, HV, V, K]; None with a pool
        state_indices: cute.Tensor | None,  # [N]
        cu_seqlens: cute.Tensor | None,  # [N + 1]
        token_states: cute.Tensor | None,  # [B, T, HV, V, K]
        scale: Float32,
        lower_bound: Float32,
        stream,
    ):
        N = cu_seqlens.shape[0] - 1 if cutlass.const_expr(self.spec.packed) else q.shape[0]
        self.kernel(
            q, k, v, g, beta, A_log, dt_bias, o, h0, ht, state_indices, cu_seqlens, token_states, scale, lower_bound
        ).launch(
            grid=(self.spec.slices * self.spec.HV * N, 1, 1),
            block=(self.threads, 1, 1),
            stream=stream,
            min_blocks_per_mp=self.ctas,
            preferred_smem_carveout=100 if self.bulk else 25,
        )

    @cute.kernel
    def kernel(
        self,
        q: cute.Tensor,
        k: cute.Tensor,
        v: cute.Tensor,
        g: cute.Tensor,
        beta: cute.Tensor,
        A_log: cute.Tensor | None,
        dt_bias: cute.Tensor | None,
        o: cute.Tensor,
        h0: cute.Tensor | None,
        ht: cute.Tensor | None,
        state_indices: cute.Tensor | None,
        cu_seqlens: cute.Tensor | None,
        token_states: cute.Tensor | None,
        scale: Float32,
        lower_bound: Float32,
    ):
        spec = self.spec
        tid = cute.arch.thread_idx()[0]
        pid = cute.arch.block_idx()[0]
        i_n = pid // (spec.slices * spec.HV)
        i_hv = (pid // spec.slices) % spec.HV
        i_h = i_hv // (spec.HV // spec.H)
        lane = tid % 32
        # a warp's rows lie together: 4 of them a pass
        row = (pid % spec.slices) * self.rows + (tid // 32) * (self.rows // self.warps) + lane // LANES
        col = (lane % LANES) * spec.vector

        slot = Int64(i_n)
        if cutlass.const_expr(spec.pooled):
            slot = Int64(state_indices[i_n])
        b, first, n_tokens = i_n, Int32(0), Int32(1 if spec.one_token else q.shape[1])
        if cutlass.const_expr(spec.packed):
            b, first = Int32(0), Int32(cu_seqlens[i_n])
            n_tokens = Int32(cu_seqlens[i_n + 1]) - first

        # Loads are issued in the order in which they are waited for, and nothing is made of a value before all are on
        # their way: the channels of the first token do not wait for the slot, and the state only for the slot. A branch
        # among them, or a plain load, and the compiler puts most of the state's behind the gates.
        raw = self.fetch(q, k, g, b, first, i_h, i_hv, tid, n_tokens > 0)
        A, bias = self.gate_parameters(A_log, dt_bias, i_hv, tid)
        raw_v, raw_beta = self.fetch_rows(v, beta, b, first, i_hv, row, n_tokens > 0)

        # an empty sequence leaves its slot of a pool alone, but a state that is not in place still has to be copied
        live = n_tokens > 0 if cutlass.const_expr(spec.pooled) else True
        if slot < 0:  # padding: the pool is neither read nor written
            self.write_zeros(o, b, first, n_tokens, i_hv, row, lane)
        elif live:
            inside = i_hv * (spec.V * spec.K) + row * spec.K + col
            S = cute.make_rmem_tensor((spec.vector, spec.steps, self.passes), Float32)
            smem = SmemAllocator()
            if cutlass.const_expr(self.bulk):
                tile = smem.allocate_tensor(h0.element_type, cute.make_layout(self.rows * spec.K), byte_alignment=128)
                arrived = smem.allocate_array(Int64, 1)
                first_row = i_hv * (spec.V * spec.K) + (pid % spec.slices) * (self.rows * spec.K)
                self.fetch_tile(tile, arrived, h0, slot, first_row, tid)
                mine = tile.iterator + cute.assume(row % self.rows * spec.K + col, divby=spec.vector)
            elif cutlass.const_expr(spec.h0 is not None):
                self.load_state(S, self.start(h0, slot, None, inside))
            else:
                S.fill(0.0)

            layout = cute.make_layout((spec.width, 2))  # two tokens: one is read while the next is written
            shared = tuple(smem.allocate_tensor(Float32, layout, byte_alignment=16) for _ in range(3))
            sums = smem.allocate_tensor(Float32, cute.make_layout((SUMS * self.warps, 2)), byte_alignment=16)
            if cutlass.const_expr(spec.one_token):
                parts = self.share(raw, A, bias, lower_bound, shared, sums, 0, tid)
                if cutlass.const_expr(self.bulk):
                    cute.arch.mbarrier_wait(arrived, 0)
                    self.load_state(S, mine)
                self.step(S, o, raw_v, raw_beta, scale, shared, parts, 0, b, first, i_hv, row, col)
                if cutlass.const_expr(spec.token_states is not None):
                    self.store_state(S, self.start(token_states, Int64(b), first, inside))
            else:
                if cutlass.const_expr(self.bulk):
                    cute.arch.sync_threads()  # the barrier is made
                    cute.arch.mbarrier_wait(arrived, 0)
                    self.load_state(S, mine)
                for t in cutlass.range(n_tokens, unroll=1):
                    more = t + 1 < n_tokens
                    next_raw = self.fetch(q, k, g, b, first + t + 1, i_h, i_hv, tid, more)
                    next_v, next_beta = self.fetch_rows(v, beta, b, first + t + 1, i_hv, row, more)
                    parts = self.share(raw, A, bias, lower_bound, shared, sums, t % 2, tid)
                    self.step(S, o, raw_v, raw_beta, scale, shared, parts, t % 2, b, first + t, i_hv, row, col)
                    if cutlass.const_expr(spec.token_states is not None):
                        self.store_state(S, self.start(token_states, Int64(b), first + t, inside))
                    for now, then in zip((*raw, raw_v, raw_beta), (*next_raw, next_v, next_beta), strict=True):
                        now.store(then.load())

            if cutlass.const_expr(self.bulk and spec.pooled):
                self.store_state(S, mine)
                self.send_tile(tile, h0, slot, first_row, tid)
            elif cutlass.const_expr(spec.pooled or spec.ht is not None):
                self.store_state(S, self.start(h0 if spec.pooled else ht, slot, None, inside))

    @cute.jit
    def channel(self, tid: Int32, m: cutlass.Constexpr[int]):
        """The m-th channel of this thread; the last one for threads that have no m-th, so that none has to branch."""
        channel = tid + m * self.threads
        if cutlass.const_expr((m + 1) * self.threads > self.spec.K):
            channel = cutlass.min(channel, self.spec.K - 1)
        return channel

    @cute.jit
    def once(self, x: Float32, tid: Int32, m: cutlass.Constexpr[int]):
        """x of this thread's m-th channel; 0 for threads that have no m-th."""
        if cutlass.const_expr((m + 1) * self.threads > self.spec.K):
            x = Float32(cutlass.select_(tid + m * self.threads < self.spec.K, x, Float32(0.0)))
        return x

    @cute.jit
    def fetch(self, q, k, g, b: Int32, t: Int32, i_h: Int32, i_hv: Int32, tid: Int32, live):
        """This thread's channels of q, k and g as they lie in memory; 0 where there is no token."""
        raw = tuple(cute.make_rmem_tensor(self.channels, x.element_type) for x in (q, k, g))
        for x in raw:
            x.fill(0.0)
        if live:
            for m in cutlass.range_constexpr(self.channels):
                channel = self.channel(tid, m)
                raw[0][m] = load_now(q, (b, t, i_h, channel))
                raw[1][m] = load_now(k, (b, t, i_h, channel))
                raw[2][m] = load_now(g, (b, t, i_hv, channel))
        return raw

    @cute.jit
    def gate_parameters(self, A_log, dt_bias, i_hv: Int32, tid: Int32):
        """A_log of the head and dt_bias of this thread's channels, fp32; 0 where there are none."""
        A, bias = Float32(0.0), cute.make_rmem_tensor(self.channels, Float32)
        bias.fill(0.0)
        if cutlass.const_expr(A_log is not None):
            A = load_now(A_log, (i_hv,)).to(Float32)
        if cutlass.const_expr(dt_bias is not None):
            for m in cutlass.range_constexpr(self.channels):
                bias[m] = load_now(dt_bias, (i_hv * self.spec.K + self.channel(tid, m),)).to(Float32)
        return A, bias

    @cute.jit
    def fetch_rows(self, v, beta, b: Int32, t: Int32, i_hv: Int32, row: Int32, live):
        """v of this thread's rows and beta, as they lie in memory."""
        raw_v = cute.make_rmem_tensor(self.passes, v.element_type)
        raw_beta = cute.make_rmem_tensor(1, beta.element_type)
        raw_v.fill(0.0)
        raw_beta.fill(0.0)
        if live:
            raw_beta[0] = load_now(beta, (b, t, i_hv))
            for p in cutlass.range_constexpr(self.passes):
                raw_v[p] = load_now(v, (b, t, i_hv, row + p * self.apart))
        return raw_v, raw_beta

    @cute.jit
    def share(self, raw, A: Float32, bias, lower_bound: Float32, shared, sums, half, tid: Int32):
        """One thread a channel: q, k and the decay into shared memory, and the sums over K: q.q, k.k and q.k."""
        exact = self.spec.exact
        A = exp2(A * LOG2_E, exact)
        qq, kk, qk = Float32(0.0), Float32(0.0), Float32(0.0)
        for m in cutlass.range_constexpr(self.channels):
            x, y = (self.once(raw[i][m].to(Float32), tid, m) for i in range(2))
            qq, kk, qk = qq + x * x, kk + y * y, qk + x * y
            log2 = log2_decay(raw[2][m].to(Float32), A, bias[m], lower_bound, self.spec.gate, exact)
            for target, value in zip(shared, (x, y, exp2(log2, exact)), strict=True):
                target[tid + m * self.threads, half] = value
        parts = tuple(lane_sum(x, 32) for x in (qq, kk, qk))
        if tid % 32 == 0:
            for i in cutlass.range_constexpr(SUMS):
                sums[i * self.warps + tid // 32, half] = parts[i]
        cute.arch.sync_threads()
        words = sums[None, half].load()
        return tuple(
            functools.reduce(operator.add, [words[i * self.warps + w] for w in range(self.warps)]) for i in range(SUMS)
        )

    @cute.jit
    def step(
        self, S, o, raw_v, raw_beta, scale: Float32, shared, parts, half,
        b: Int32, t: Int32, i_hv: Int32, row: Int32, col: Int32,
    ):  # fmt: skip
        """One token: S <- diag(decay) S; u = beta (v - S k); o = S q + (k.q) u; S <- S + u k.

        o is made of the decayed state, so that both sums run together. q and k are raw here: their norms are factors.
        """
        spec = self.spec
        beta = raw_beta[0].to(Float32)
        if cutlass.const_expr(spec.beta_is_logit):
            beta = sigmoid(beta, spec.exact)
            if cutlass.const_expr(spec.allow_neg_eigval):
                beta = 2.0 * beta
        qq, kk, qk = parts
        norm_q, norm_k = scale, Float32(1.0)
        if cutlass.const_expr(spec.qk_l2norm):
            norm_q, norm_k = scale * rsqrt(qq + L2_EPS, spec.exact), rsqrt(kk + L2_EPS, spec.exact)

        hk = cute.make_rmem_tensor(self.passes, Float32)
        hq = cute.make_rmem_tensor(self.passes, Float32)
        hk.fill(0.0)
        hq.fill(0.0)
        for s in cutlass.range_constexpr(self.spec.steps):
            x, y, d = (self.columns(source, s, col, half) for source in shared)
            for p in cutlass.range_constexpr(self.passes):
                for i in cutlass.range_constexpr(spec.vector):
                    decayed = S[i, s, p] * d[i]
                    hk[p] += decayed * y[i]
                    hq[p] += decayed * x[i]
                    S[i, s, p] = decayed
        for p in cutlass.range_constexpr(self.passes):
            u = beta * (raw_v[p].to(Float32) - lane_sum(hk[p], LANES) * norm_k)
            hq[p] = lane_sum(hq[p], LANES) * norm_q + (qk * norm_k * norm_q) * u
            hk[p] = u * norm_k
        if col == 0:  # once, after all sums: a branch keeps the next pass's arithmetic out of this one's waits
            for p in cutlass.range_constexpr(self.passes):
                o[b, t, i_hv, row + p * self.apart] = hq[p].to(o.element_type)
        for s in cutlass.range_constexpr(self.spec.steps):
            y = self.columns(shared[1], s, col, half)
            for p in cutlass.range_constexpr(self.passes):
                for i in cutlass.range_constexpr(spec.vector):
                    S[i, s, p] += hk[p] * y[i]

    @cute.jit
    def columns(self, source, s: cutlass.Constexpr[int], col: Int32, half):
        """What shared memory holds for this thread's columns of access s."""
        offset = col + (s * LANES * self.spec.vector + half * self.spec.width)
        words = source.iterator + cute.assume(offset, divby=4)
        return cute.make_tensor(words, cute.make_layout(self.spec.vector)).load()

    @cute.jit
    def start(self, state, i: Int64, t, inside: Int32):
        """Where this thread's part of a state starts. Offsets are 64-bit: slots lie anywhere in large pools."""
        offset = i * state.stride[0] + inside
        if cutlass.const_expr(t is not None):
            offset += Int64(t) * state.stride[1]
        return state.iterator + cute.assume(offset, divby=self.spec.vector)

    @cute.jit
    def fetch_tile(self, tile, arrived, state, slot: Int64, first_row: Int32, tid: Int32):
        """Asks for the CTA's part of a state, which lies in one piece. Others may wait for it after a barrier."""
        if tid == 0:
            cute.arch.mbarrier_init(arrived, 1)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_warp()
        if tid == 0:
            cute.arch.mbarrier_arrive_and_expect_tx(arrived, cute.size(tile) * tile.element_type.width // 8)
            source = cute.make_tensor(self.start(state, slot, None, first_row), tile.layout)
            atom = cute.make_copy_atom(cute.nvgpu.cpasync.CopyBulkG2SOp(), tile.element_type)
            cute.copy(atom, source, tile, mbar_ptr=arrived)

    @cute.jit
    def send_tile(self, tile, state, slot: Int64, first_row: Int32, tid: Int32):
        """Writes the CTA's part of a state back from shared memory."""
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_threads()
        if tid == 0:
            target = cute.make_tensor(self.start(state, slot, None, first_row), tile.layout)
            atom = cute.make_copy_atom(cute.nvgpu.cpasync.CopyBulkS2GOp(), tile.element_type)
            cute.copy(atom, tile, target)
            cute.arch.cp_async_bulk_commit_group()
            cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def vectors(self, first: cute.Pointer, s: cutlass.Constexpr[int], p: cutlass.Constexpr[int]):
        """This thread's columns of access s in its row of pass p, `first` being its first element of a state."""
        offset = p * self.apart * self.spec.K + s * LANES * self.spec.vector
        return cute.make_tensor(first + offset, cute.make_layout(self.spec.vector))

    @cute.jit
    def load_state(self, S, first: cute.Pointer):
        raw = cute.make_rmem_tensor(S.shape, first.dtype)
        for p in cutlass.range_constexpr(self.passes):
            for s in cutlass.range_constexpr(self.spec.steps):
                raw[None, s, p].store(self.vectors(first, s, p).load())
        S.store(raw.load().to(Float32))

    @cute.jit
    def store_state(self, S, first: cute.Pointer):
        """Rounded to the dtype of the state."""
        for p in cutlass.range_constexpr(self.passes):
            for s in cutlass.range_constexpr(self.spec.steps):
                self.vectors(first, s, p).store(S[None, s, p].load().to(first.dtype))

    @cute.jit
    def write_zeros(self, o, b: Int32, first: Int32, n_tokens: Int32, i_hv: Int32, row: Int32, lane: Int32):
        if lane % LANES == 0:
            for t in cutlass.range(n_tokens, unroll=1):
                for p in cutlass.range_constexpr(self.passes):
                    o[b, first + t, i_hv, row + p * self.apart] = Float32(0.0).to(o.element_type)
