"""Device half of the CuTe DSL decode: a CTA takes some rows of one head's state through every token of its sequence.

A state tile is read once and written once. Over all tokens it is held in fp32 registers, or in shared memory, where
bulk copies put it and from where it is taken a few rows at a time. Eight lanes share a row of the state and each access
moves 16 bytes per lane, 128 bytes per row: whole lines for the memory, and sums over K of 3 shuffles. What a block of
tokens needs once for the whole tile (gate, norms, k.q) is made by one thread a channel and shared through shared
memory, so that q, k and g may lie at any address.

With a convolution or a norm (`kda_step`) the CTAs of a head are a thread block cluster. Each of them convolves q and k
for itself, and one shifts their windows after all have read them. Each gets all outputs of the head, so that the sum
under the norm runs in one order, however many CTAs there are.
"""

import functools
import math
import operator

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint32

from kda_kernels.cute.decode.config import LANES, MOST_BLOCKS, SUMS, DecodeSpec
from kda_kernels.cute.decode.conv import Windows
from kda_kernels.cute.decode.norm import Norm
from kda_kernels.cute.decode.states import States
from kda_kernels.cute.dsl import SmemAllocator
from kda_kernels.cute.math import L2_EPS, exp2, lane_sum, load_now, log2_decay, rate, rsqrt, sigmoid
from kda_kernels.cute.ptx import bulk_store_lasting


class DecodeKernel:
    """`__call__` is the host half that `cute.compile` builds, `kernel` the device half."""

    def __init__(self, spec: DecodeSpec):
        self.spec = spec
        self.rows, self.threads, self.ctas = spec.config.rows, spec.config.threads, spec.config.ctas
        self.bulk = spec.bulk
        self.warps = self.threads // 32
        self.channels = math.ceil(spec.K / self.threads)  # a thread
        self.windows, self.norm, self.states = Windows(spec), Norm(spec), States(spec)

    @property
    def in_place(self) -> bool:
        """Whether the state of the last token goes to its slot."""
        return self.spec.pooled and self.spec.update and self.spec.accepted is None

    @property
    def waits(self) -> bool:
        """Whether windows of q and k are shifted that have readers no norm waits for."""
        spec = self.spec
        shifted = spec.taps > 0 and spec.update and spec.cluster is not None
        return shifted and (spec.norm is None or spec.heads_of_cluster > 1)

    @property
    def shifts_early(self) -> bool:
        """Whether windows are shifted as soon as this CTA, their only reader, has them: no register keeps them then."""
        spec = self.spec
        return spec.taps > 0 and spec.update and spec.cluster is None and spec.one_token and spec.accepted is None

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
        state_indices: cute.Tensor | None,  # [N], or [N, C] with `accepted`
        cu_seqlens: cute.Tensor | None,  # [N + 1]
        token_states: cute.Tensor | None,  # [B, T, HV, V, K], or [R, S, HV, V, K] with `token_rows`
        accepted: cute.Tensor | None,  # num_accepted_tokens [N]
        token_rows: cute.Tensor | None,  # token_state_indices [N]
        started: cute.Tensor | None,  # has_initial_state [N]
        taps: cute.Tensor | None,  # the convolution's weight [2 H K + HV V, taps]
        taps_bias: cute.Tensor | None,  # [2 H K + HV V]
        past: cute.Tensor | None,  # its states [P, 2 H K + HV V, L], or [P, L, ..] with tokens first
        past_indices: cute.Tensor | None,  # [N]
        norm_weight: cute.Tensor | None,  # [V]
        norm_gate: cute.Tensor | None,  # [B, T, HV, V]
        state_scales: cute.Tensor | None,  # of the pool [P, HV, V]
        seed: cute.Tensor | None,  # rounding_seed [1]
        null_slot: Int32,  # a slot that is padding too; a negative number: none
        scale: Float32,
        lower_bound: Float32,
        eps: Float32 | None,  # of the norm
        stream,
    ):
        N = cu_seqlens.shape[0] - 1 if cutlass.const_expr(self.spec.packed) else q.shape[0]
        tensors = (
            q, k, v, g, beta, A_log, dt_bias, o, h0, ht, state_indices, cu_seqlens, token_states, accepted, token_rows,
            started, taps, taps_bias, past, past_indices, norm_weight, norm_gate, state_scales, seed,
        )  # fmt: skip
        numbers = null_slot, scale, lower_bound, eps
        if cutlass.const_expr(self.spec.many):
            for first_n in cutlass.range(0, N, MOST_BLOCKS, unroll=1):
                some = cutlass.min(N - first_n, MOST_BLOCKS)
                self.launch(tensors, Int32(first_n), numbers, v.shape[2], some, stream)
        else:
            self.launch(tensors, None, numbers, v.shape[2], N, stream)

    @cute.jit
    def launch(self, tensors, first_n: Int32 | None, numbers, heads, N, stream):
        cluster = self.spec.cluster
        self.kernel(*tensors, first_n, *numbers).launch(
            grid=(self.spec.slices, heads, N),
            block=(self.threads, 1, 1),
            cluster=None if cluster is None else (*cluster, 1),
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
        accepted: cute.Tensor | None,
        token_rows: cute.Tensor | None,
        started: cute.Tensor | None,
        taps: cute.Tensor | None,
        taps_bias: cute.Tensor | None,
        past: cute.Tensor | None,
        past_indices: cute.Tensor | None,
        norm_weight: cute.Tensor | None,
        norm_gate: cute.Tensor | None,
        state_scales: cute.Tensor | None,
        seed: cute.Tensor | None,
        first_n: Int32 | None,
        null_slot: Int32,
        scale: Float32,
        lower_bound: Float32,
        eps: Float32 | None,
    ):
        spec = self.spec
        tid = cute.arch.thread_idx()[0]
        i_slice, i_hv, i_n = cute.arch.block_idx()  # in this order, so that a state's CTAs start together
        if cutlass.const_expr(spec.many):
            i_n = i_n + first_n
        i_h = i_hv // spec.group
        lane = tid % 32
        row = self.first_row((None, i_hv, i_slice), tid)
        col = (lane % LANES) * spec.vector

        slot, column = Int64(i_n), Int32(0)
        if cutlass.const_expr(spec.accepted is not None):  # of the last token that was accepted
            column = cutlass.min(cutlass.max(Int32(accepted[i_n]) - 1, 0), Int32(state_indices.shape[1]) - 1)
            slot = self.unsigned(state_indices[i_n, column])
        elif cutlass.const_expr(spec.pooled):
            slot = self.unsigned(state_indices[i_n])
        b, first, n_tokens = i_n, Int32(0), Int32(1 if spec.one_token else q.shape[1])
        if cutlass.const_expr(spec.packed):
            b, first = Int32(0), Int32(cu_seqlens[i_n])
            n_tokens = Int32(cu_seqlens[i_n + 1]) - first

        # Loads are issued in the order in which they are waited for, and nothing is made of a value before all are on
        # their way: the channels of the first tokens do not wait for the slot, and the state only for the slot. A
        # branch among them, or a plain load, and the compiler puts most of the state's behind the gates.
        tokens, heads = (q, k, v, g, beta), (i_h, i_hv, i_slice)
        raw = self.room_for(tokens)
        self.fetch(raw, tokens, b, first, n_tokens, heads, tid)
        A, bias = self.gate_parameters(A_log, dt_bias, i_hv, tid)
        lines, raw_taps, ending, past_slot = None, None, None, slot
        if cutlass.const_expr(spec.norm is not None):
            ending = self.norm.room_for(norm_weight, norm_gate)
            self.norm.fetch_gate(ending, norm_gate, b, first, n_tokens, heads, tid)
        if cutlass.const_expr(spec.taps):
            lines = self.windows.lines(Int32(q.shape[2]), i_h, i_hv * spec.V + i_slice * self.rows, tid)
            raw_taps = self.windows.fetch_taps(taps, taps_bias, lines)
            if cutlass.const_expr(spec.past_index is not None):
                past_slot = self.unsigned(past_indices[i_n])
            elif cutlass.const_expr(spec.accepted is not None):
                past_slot = self.unsigned(state_indices[i_n, 0])
        if cutlass.const_expr(spec.norm is not None):
            self.norm.fetch_weight(ending, norm_weight, heads, tid)
        keys = None
        if cutlass.const_expr(spec.stochastic):
            words = cute.recast_tensor(seed, Int32)
            keys = tuple(Uint32(load_now(words, (i,))) for i in range(2))

        # what does not wait for the slot, while it is on its way
        smem, tile, arrived, room = SmemAllocator(), None, None, None
        if cutlass.const_expr(self.bulk):
            tile = smem.allocate_tensor(h0.element_type, cute.make_layout(self.rows * spec.K), byte_alignment=128)
            arrived = smem.allocate_array(Int64, spec.pieces)
            self.begin_tile(arrived, tid)
        if cutlass.const_expr(spec.norm is not None):
            room = self.norm.begin(smem, tid)
        if cutlass.const_expr(spec.cluster is not None):
            cute.arch.cluster_arrive_relaxed()  # this CTA is there: others may write to its shared memory

        # an empty sequence leaves its slot of a pool alone, but a state that is not in place still has to be copied
        live = n_tokens > 0 if cutlass.const_expr(spec.pooled) else True
        lost = False
        if cutlass.const_expr(spec.pooled):
            lost = not self.inside(slot, h0) or slot == null_slot
        if cutlass.const_expr(spec.taps):
            lost = lost or not self.inside(past_slot, past)
            if cutlass.const_expr(spec.apart):
                lost = lost or past_slot == null_slot
        if lost:  # padding, or no slot of the pool: that is neither read nor written
            wrong = (Int32 if slot.width == 32 else Int64)(slot) >= 0 and slot != null_slot
            if cutlass.const_expr(spec.apart):
                other = (Int32 if past_slot.width == 32 else Int64)(past_slot)
                wrong = wrong and other >= 0 and past_slot != null_slot
            self.write_nothing(o, wrong, b, first, n_tokens, 1, i_hv, row, lane)
        elif live:
            inside = i_hv * (spec.V * spec.K) + row * spec.K + col
            target, begun = None, True
            S = None if cutlass.const_expr(self.bulk) else self.states.registers(self.states.passes)
            if cutlass.const_expr(spec.fresh):
                begun = started[i_n]
            if cutlass.const_expr(spec.taps and spec.config.huge):
                raw_past = self.windows.fetch_past(past, past_slot, column, begun, lines)
            scales = None
            if cutlass.const_expr(self.states.scaled):
                scales = self.states.fetch_scales(state_scales, slot, i_hv, row, lane)
            if cutlass.const_expr(self.bulk):
                first_row = i_hv * (spec.V * spec.K) + i_slice * (self.rows * spec.K)
                self.fetch_tile(tile, arrived, self.start(h0, slot, None, first_row), begun, tid)
                if cutlass.const_expr(spec.ht is not None or self.in_place):
                    target = self.start(h0 if spec.pooled else ht, slot, None, first_row)
            # Bulk copies stand in a branch. Where these loads are ahead of it, the compiler puts the convolution there,
            # too, and the state waits for its windows.
            if cutlass.const_expr(spec.taps and not spec.config.huge):
                raw_past = self.windows.fetch_past(past, past_slot, column, begun, lines)
            if cutlass.const_expr(not self.bulk):
                if cutlass.const_expr(spec.h0 is None or spec.fresh):
                    S.fill(0.0)
                if cutlass.const_expr(spec.h0 is not None):
                    if begun:
                        self.states.load(S, self.start(h0, slot, None, inside), scales, 0, lane)

            shared = self.shared(smem)
            window, before = None, None
            if cutlass.const_expr(spec.taps):
                window = self.windows.fp32(raw_past), *(self.windows.fp32(x) for x in raw_taps)
                if cutlass.const_expr(spec.accepted is not None):
                    before = self.windows.fp32(raw_past)
            numbers = A, bias, scale, lower_bound, eps
            kept = token_states, token_rows, h0, state_indices, null_slot, i_n, first, inside, state_scales
            odd = cute.make_rmem_tensor(self.states.together, Float32)
            odd.fill(0.0)
            stored = scales, odd, (keys, Uint32(slot), i_hv * spec.V + row)
            fixed = S, (tile, arrived, target, begun), stored, o, shared, room, kept, scale, b
            final = None
            if cutlass.const_expr(not self.bulk and (spec.ht is not None or self.in_place)):
                final = self.start(h0 if spec.pooled else ht, slot, None, inside)
            if cutlass.const_expr(spec.one_token):
                self.prepare(raw, numbers, shared, window, n_tokens, tid)
                if cutlass.const_expr(self.shifts_early):
                    self.windows.keep(past, past_slot, window[0], 0, lines, i_hv % spec.group == 0, tid)
                if cutlass.const_expr(spec.cluster is not None):
                    self.meet()
                self.recur(*fixed, Int32(0), n_tokens, heads, tid)
                if cutlass.const_expr(final is not None):
                    self.store(S, final, stored, n_tokens - 1, 0, lane)
                if cutlass.const_expr(spec.norm is not None):
                    self.norm.write(o, room, ending, eps, b, first, Int32(0), n_tokens, heads, tid)
            else:
                if cutlass.const_expr(spec.cluster is not None):
                    self.meet()
                for done in cutlass.range(0, n_tokens, spec.block, unroll=1):
                    left = n_tokens - done
                    self.prepare(raw, numbers, shared, window, left, tid)
                    self.recur(*fixed, done, left, heads, tid)
                    if cutlass.const_expr(spec.norm is not None):
                        self.norm.write(o, room, ending, eps, b, first, done, left, heads, tid)
                    behind, left = first + done + spec.block, left - spec.block
                    self.fetch(raw, tokens, b, behind, left, heads, tid)
                    if cutlass.const_expr(spec.norm is not None):
                        self.norm.fetch_gate(ending, norm_gate, b, behind, left, heads, tid)
                    if cutlass.const_expr(spec.norm is None or self.norm.remote):
                        cute.arch.sync_threads()  # all have used the channels
                if cutlass.const_expr(final is not None):
                    self.store(S, final, stored, n_tokens - 1, 0, lane)
            if cutlass.const_expr(self.states.scaled and self.in_place):
                self.states.store_scales(state_scales, slot, scales, i_hv, row, lane)
            if cutlass.const_expr(spec.taps and spec.update and not self.shifts_early):
                if cutlass.const_expr(self.waits):
                    cute.arch.cluster_wait()  # all have read the windows
                leads = i_slice == 0 and i_hv % spec.group == 0
                if cutlass.const_expr(spec.accepted is None):
                    if n_tokens > 0:
                        self.windows.keep(past, past_slot, window[0], 0, lines, leads, tid)
                else:
                    self.windows.keep(past, past_slot, before, 1, lines, leads, tid)
                    self.keep_drafts(
                        past, past_slot, q, k, v, b, first, n_tokens, i_h, i_hv, i_slice, lines, leads, tid
                    )
            if cutlass.const_expr(self.bulk):
                cute.arch.cp_async_bulk_wait_group(0, read=True)
        if cutlass.const_expr(spec.packed):  # zeros into this sequence's share of what lies behind the last one
            N = Int32(cu_seqlens.shape[0]) - 1
            end = Int32(cu_seqlens[N]) + i_n
            self.write_nothing(o, Boolean(False), b, end, Int32(q.shape[1]) - end, N, i_hv, row, lane)

    @cute.jit
    def meet(self):
        """All CTAs of the cluster are there."""
        cute.arch.cluster_wait()
        if cutlass.const_expr(self.waits):
            cute.arch.cluster_arrive()  # this one has read the windows

    @cute.jit
    def first_row(self, heads, tid: Int32):
        """This thread's first row of a state; the others are `States.row` behind it."""
        return heads[2] * self.rows + tid // 32 * self.states.of_warp + tid % 32 // LANES

    @cute.jit
    def shared(self, smem: SmemAllocator):
        """Shared memory for what a block of tokens has for all rows: q, k and decays, of all channels; of each warp the
        sums over them; v; and the scalars that `scalars` returns, of which a lone token's are made by each thread."""
        block = self.spec.block

        def room(size: int):
            return smem.allocate_tensor(Float32, cute.make_layout((size, block)), byte_alignment=16)

        channels = tuple(room(self.spec.width) for _ in range(3))
        return channels, room(SUMS * self.warps), room(self.threads), room(4)

    @cute.jit
    def store(self, S, first: cute.Pointer, stored, t: Int32, first_pass, lane: Int32):
        """S, the rows from `first_pass` on of the state after token t, to where this thread's part of one begins."""
        scales, odd, (keys, slot, row) = stored
        stamp = keys, slot, Uint32(t), row
        self.states.store(S, first, odd, scales, first_pass, stamp, lane)

    @cute.jit
    def keep_token(self, S, stored, kept, b: Int32, t: Int32, first_pass, heads, tid: Int32):
        """The state after token t of a sequence, to where it is wanted beside the slot of its last one."""
        token_states, token_rows, h0, state_indices, null_slot, i_n, first, inside, state_scales = kept
        lane = tid % 32
        inside += self.states.row(first_pass) * self.spec.K
        if cutlass.const_expr(self.spec.token_rows is not None):
            place = self.unsigned(token_rows[i_n])
            if self.inside(place, token_states) and t < token_states.shape[1]:
                self.store(S, self.start(token_states, place, t, inside), stored, t, first_pass, lane)
        elif cutlass.const_expr(self.spec.token_states is not None):
            self.store(S, self.start(token_states, b, first + t, inside), stored, t, first_pass, lane)
        if cutlass.const_expr(self.spec.accepted is not None and self.spec.update):
            if t < state_indices.shape[1]:
                slot = self.unsigned(state_indices[i_n, t])
                if self.inside(slot, h0) and slot != null_slot:
                    self.store(S, self.start(h0, slot, None, inside), stored, t, first_pass, lane)
                    if cutlass.const_expr(self.states.scaled):
                        row = self.first_row(heads, tid)
                        self.states.store_scales(state_scales, slot, stored[0], heads[1], row, lane)

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
    def room_for(self, tokens):
        """Registers for a block of tokens as they lie in memory: this thread's channels, its row of v, and one beta."""
        q, k, v, g, beta = tokens
        block = self.spec.block
        sizes = ((q, (self.channels, block)), (k, (self.channels, block)), (v, block), (g, (self.channels, block)))
        raw = tuple(cute.make_rmem_tensor(size, x.element_type) for x, size in (*sizes, (beta, 1)))
        for x in raw:
            x.fill(0.0)
        return raw

    @cute.jit
    def fetch(self, raw, tokens, b: Int32, first: Int32, count: Int32, heads, tid: Int32):
        """Fills `raw` from token `first` on; the last of `count` tokens repeats, and of none nothing is read."""
        q, k, v, g, beta = tokens
        i_h, i_hv, i_slice = heads
        if count > 0:
            for j in cutlass.range_constexpr(self.spec.block):
                t = first + cutlass.min(count - 1, j) if cutlass.const_expr(j) else first
                for m in cutlass.range_constexpr(self.channels):
                    channel = self.channel(tid, m)
                    raw[0][m, j] = load_now(q, (b, t, i_h, channel))
                    raw[1][m, j] = load_now(k, (b, t, i_h, channel))
                    raw[3][m, j] = load_now(g, (b, t, i_hv, channel))
                raw[2][j] = load_now(v, (b, t, i_hv, i_slice * self.rows + self.windows.row(tid)))
            t = first + cutlass.min(count - 1, tid) if cutlass.const_expr(self.spec.block > 1) else first
            raw[4][0] = load_now(beta, (b, t, i_hv))

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
    def prepare(self, raw, numbers, shared, window, count: Int32, tid: Int32):
        """What the rows of a state need of a block's tokens, into shared memory: see `shared`."""
        spec = self.spec
        A, bias, scale, lower_bound, _ = numbers
        A = rate(A, spec.exact)
        _, sums, _, made = shared
        for j in cutlass.range_constexpr(spec.block):
            if cutlass.const_expr(j == 0):
                self.prepare_token(raw, A, bias, lower_bound, shared, window, j, tid)
            else:
                if j < count:
                    self.prepare_token(raw, A, bias, lower_bound, shared, window, j, tid)
        if tid < spec.block:
            beta = raw[4][0].to(Float32)
            if cutlass.const_expr(spec.beta_is_logit):
                beta = sigmoid(beta, spec.exact)
                if cutlass.const_expr(spec.allow_neg_eigval):
                    beta = 2.0 * beta
            made[3, tid] = beta
        cute.arch.sync_threads()
        if cutlass.const_expr(spec.block > 1):
            if tid < cutlass.min(count, spec.block):
                for i, x in enumerate(self.scalars(sums, made, scale, tid)):
                    made[i, tid] = x
            cute.arch.sync_threads()

    @cute.jit
    def prepare_token(
        self, raw, A: Float32, bias, lower_bound: Float32, shared, window, j: cutlass.Constexpr[int], tid
    ):
        """One thread a channel: q, k and the decay, and its warp's part of the sums over K; one thread a row: v.

        With a convolution q, k and v go through it first.
        """
        channels, sums, values, _ = shared
        exact = self.spec.exact
        qq, kk, qk = Float32(0.0), Float32(0.0), Float32(0.0)
        for m in cutlass.range_constexpr(self.channels):
            x, y = raw[0][m, j].to(Float32), raw[1][m, j].to(Float32)
            if cutlass.const_expr(self.spec.taps):
                x = self.windows.apply(x, *window, m)
                y = self.windows.apply(y, *window, self.channels + m)
            x, y = self.once(x, tid, m), self.once(y, tid, m)
            qq, kk, qk = qq + x * x, kk + y * y, qk + x * y
            log2 = log2_decay(raw[3][m, j].to(Float32), A, bias[m], lower_bound, self.spec.gate, exact)
            for target, value in zip(channels, (x, y, exp2(log2, exact)), strict=True):
                target[tid + m * self.threads, j] = value
        value = raw[2][j].to(Float32)
        if cutlass.const_expr(self.spec.taps):
            value = self.windows.apply(value, *window, 2 * self.channels)
        values[self.threads - 1 - tid, j] = value
        parts = tuple(lane_sum(x, 32) for x in (qq, kk, qk))
        if tid % 32 == 0:
            for i in cutlass.range_constexpr(SUMS):
                sums[i * self.warps + tid // 32, j] = parts[i]

    @cute.jit
    def scalars(self, sums, made, scale: Float32, j):
        """Of token j: the factors of q and k, being their norms and the scale; their product times k.q; beta."""
        words = sums[None, j].load()
        qq, kk, qk = (
            functools.reduce(operator.add, [words[i * self.warps + w] for w in range(self.warps)]) for i in range(SUMS)
        )
        norm_q, norm_k = scale, Float32(1.0)
        if cutlass.const_expr(self.spec.qk_l2norm):
            norm_q, norm_k = scale * rsqrt(qq + L2_EPS, self.spec.exact), rsqrt(kk + L2_EPS, self.spec.exact)
        return norm_q, norm_k, qk * norm_k * norm_q, made[3, j]

    @cute.jit
    def recur(
        self, S, bulk, stored, o, shared, room, kept, scale: Float32, b: Int32, done: Int32, count: Int32, heads, tid
    ):  # fmt: skip
        """A block's tokens through this CTA's rows of the state. `done`: tokens before them, and `count` are left.

        With bulk copies the rows are taken from shared memory a piece at a time, and each goes out, to `target`, after
        the last token, while the next is on its way. A warp's rows of a pass lie in one piece.
        """
        spec, K = self.spec, self.spec.K
        if cutlass.const_expr(not self.bulk):
            self.tokens(S, None, stored, o, shared, room, kept, scale, b, done, count, 0, heads, tid)
        else:
            held = None
            if cutlass.const_expr(spec.one_token and K <= 128):
                held = self.scalars(shared[1], shared[3], scale, 0), self.all_columns(shared[0], tid % 32, 0)
            for i in cutlass.range(spec.pieces, unroll=1):  # a loop: less code than the instruction cache holds
                self.piece(i, held, bulk, stored, o, shared, room, kept, scale, b, done, count, heads, tid)

    @cute.jit
    def piece(self, i: Int32, held, bulk, stored, o, shared, room, kept, scale: Float32, b, done, count, heads, tid):
        """A block's tokens through the i-th piece of this CTA's rows."""
        spec, K = self.spec, self.spec.K
        tile, arrived, target, begun = bulk
        lane, p = tid % 32, i * self.states.together
        row = self.first_row(heads, tid) - heads[2] * self.rows + self.states.row(p)
        own = tile.iterator + cute.assume(row * K + lane % LANES * spec.vector, divby=spec.vector)
        part = cute.make_layout(self.states.of_warp * K)  # a warp's
        atom = cute.make_copy_atom(cute.nvgpu.cpasync.CopyBulkS2GOp(), tile.element_type)
        S = self.states.registers(self.states.together)
        cute.arch.mbarrier_wait(arrived + i, 0)
        if cutlass.const_expr(spec.fresh):
            S.fill(0.0)
            if begun or done > 0:
                self.states.load(S, own, stored[0], p, lane)
        else:
            self.states.load(S, own, stored[0], p, lane)
        self.tokens(S, held, stored, o, shared, room, kept, scale, b, done, count, p, heads, tid)
        if cutlass.const_expr(target is not None or not spec.one_token):
            self.store(S, own, stored, done + count - 1, p, lane)
        if cutlass.const_expr(target is not None):
            if count <= spec.block:
                cute.arch.fence_proxy("async.shared", space="cta")
                cute.arch.sync_warp()
                if lane == 0:
                    first = cute.assume((tid // 32 * self.states.of_warp + self.states.row(p)) * K, divby=spec.vector)
                    there, here = (cute.make_tensor(x + first, part) for x in (target, tile.iterator))
                    if cutlass.const_expr(spec.config.huge):
                        size = cute.size(part) * tile.element_type.width // 8
                        bulk_store_lasting(there.iterator, here.iterator, size)
                    else:
                        cute.copy(atom, here, there)
                    cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def tokens(self, S, held, stored, o, shared, room, kept, scale: Float32, b, done, count, first_pass, heads, tid):
        """A block's tokens through the rows in S, which are as many passes as it has, from `first_pass` on."""
        spec = self.spec
        if cutlass.const_expr(spec.one_token):
            self.step(S, held, stored[1], o, shared, room, scale, b, kept[6], Int32(0), 0, first_pass, heads, tid)
            self.keep_token(S, stored, kept, b, Int32(0), first_pass, heads, tid)
        else:
            for j in cutlass.range(cutlass.min(count, spec.block), unroll=1):
                self.step(S, held, stored[1], o, shared, room, scale, b, kept[6], done, j, first_pass, heads, tid)
                self.keep_token(S, stored, kept, b, done + j, first_pass, heads, tid)

    @cute.jit
    def step(
        self, S, held, odd, o, shared, room, scale: Float32, b: Int32, first: Int32, done: Int32, j,
        first_pass, heads, tid: Int32,
    ):  # fmt: skip
        """Token j of a block: S <- diag(decay) S; u = beta (v - S k); o = S q + (k.q) u; S <- S + u k.

        o is made of the decayed state, so that both sums run together. q and k are raw here: their norms are factors.
        With a norm o goes to the head's CTAs, and `Norm.write` ends it. `held`: scalars and channels, where registers
        have them for all rows. `odd`: not finite afterwards for a row that may hold NaN.
        """
        spec = self.spec
        channels, sums, values, made = shared
        passes, lane = cute.size(S, mode=[2]), tid % 32
        _, i_hv, i_slice = heads
        row = self.first_row(heads, tid) - i_slice * self.rows + self.states.row(first_pass)
        if cutlass.const_expr(held is not None):
            norm_q, norm_k, qk, beta = held[0]
        elif cutlass.const_expr(spec.one_token):
            norm_q, norm_k, qk, beta = self.scalars(sums, made, scale, 0)
        else:
            words = made[None, j].load()
            norm_q, norm_k, qk, beta = (words[i] for i in range(4))

        columns = held[1] if cutlass.const_expr(held is not None) else None
        if cutlass.const_expr(self.bulk and held is None and spec.K <= 128):
            columns = self.all_columns(channels, lane, j)
        hk = cute.make_rmem_tensor(passes, Float32)
        hq = cute.make_rmem_tensor(passes, Float32)
        hk.fill(0.0)
        hq.fill(0.0)
        for s in cutlass.range_constexpr(spec.steps):
            if cutlass.const_expr(columns is not None):
                x, y, d = columns[s]
            else:
                x, y, d = (self.columns(source, s, lane, j) for source in channels)
            for p in cutlass.range_constexpr(passes):
                for i in cutlass.range_constexpr(spec.vector):
                    decayed = S[i, s, p] * d[i]
                    hk[p] += decayed * y[i]
                    hq[p] += decayed * x[i]
                    S[i, s, p] = decayed
        for p in cutlass.range_constexpr(passes):
            u = beta * (values[row + self.states.row(p), j] - lane_sum(hk[p], LANES) * norm_k)
            hq[p] = lane_sum(hq[p], LANES) * norm_q + qk * u
            hk[p] = u * norm_k
            odd[p] = hk[p]
        if cutlass.const_expr(spec.norm is not None):
            for p in cutlass.range_constexpr(passes):
                self.norm.send(room, hq[p], i_slice * self.rows + row + self.states.row(p), done, j, i_hv, lane)
        elif (
            lane % LANES == 0
        ):  # once, after all sums: a branch keeps the next pass's arithmetic out of this one's waits
            for p in cutlass.range_constexpr(passes):
                at = i_slice * self.rows + row + self.states.row(p)
                o[b, first + done + j, i_hv, at] = hq[p].to(o.element_type)
        for s in cutlass.range_constexpr(spec.steps):
            if cutlass.const_expr(columns is not None):
                _, y, _ = columns[s]
            else:
                y = self.columns(channels[1], s, lane, j)
            for p in cutlass.range_constexpr(passes):
                for i in cutlass.range_constexpr(spec.vector):
                    S[i, s, p] += hk[p] * y[i]

    @cute.jit
    def keep_drafts(
        self, past, slot, q, k, v, b: Int32, first: Int32, n_tokens: Int32, i_h: Int32, i_hv: Int32, i_slice: Int32,
        lines, leads, tid: Int32,
    ):  # fmt: skip
        """The inputs of this call's tokens behind the first `taps` - 2 entries of the convolution's state."""
        for t in cutlass.range(
            cutlass.min(n_tokens, Int32(past.shape[1 if self.spec.tokens_first else 2]) - (self.windows.kept - 1)),
            unroll=1,
        ):
            for i in cutlass.range_constexpr(self.windows.count):
                if self.windows.owns(i, leads, tid):
                    if cutlass.const_expr(i == self.windows.count - 1):
                        x = v[b, first + t, i_hv, i_slice * self.rows + self.windows.row(tid)]
                    else:
                        source = q if cutlass.const_expr(i < self.channels) else k
                        x = source[b, first + t, i_h, tid + i % self.channels * self.threads]
                    past[self.windows.at(slot, lines[i], self.windows.kept - 1 + t)] = x.to(past.element_type)

    @cute.jit
    def all_columns(self, channels, lane: Int32, j):
        """q, k and decays of token j in this thread's columns, by access."""
        return tuple(tuple(self.columns(source, s, lane, j) for source in channels) for s in range(self.spec.steps))

    @cute.jit
    def columns(self, source, s: cutlass.Constexpr[int], lane: Int32, j):
        """What shared memory holds of token j for this thread's columns of access s."""
        offset = lane % LANES * self.spec.vector + (s * LANES * self.spec.vector + j * self.spec.width)
        words = source.iterator + cute.assume(offset, divby=4)
        return cute.make_tensor(words, cute.make_layout(self.spec.vector)).load()

    @cute.jit
    def start(self, state, i, t, inside: Int32):
        """Where this thread's part of a state starts. Offsets are 64-bit: slots lie anywhere in large pools."""
        offset = Int64(i) * state.stride[0] + inside
        if cutlass.const_expr(t is not None):
            offset += Int64(t) * state.stride[1]
        return state.iterator + cute.assume(offset, divby=self.spec.vector)

    @cute.jit
    def begin_tile(self, arrived, tid: Int32):
        """Barriers that count the bytes of pieces; others than the first warp may wait at them after a barrier."""
        if tid == 0:
            for i in cutlass.range_constexpr(self.spec.pieces):
                cute.arch.mbarrier_init(arrived + i, 1)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_warp()

    @cute.jit
    def fetch_tile(self, tile, arrived, source, begun, tid: Int32):
        """Asks for the CTA's part of a state, which begins at `source`, if there is one that has `begun`."""
        if tid == 0:
            size = cute.size(tile) // self.spec.pieces
            piece = cute.make_layout(size)
            atom = cute.make_copy_atom(cute.nvgpu.cpasync.CopyBulkG2SOp(), tile.element_type)
            for i in cutlass.range_constexpr(self.spec.pieces):
                if begun:
                    cute.arch.mbarrier_arrive_and_expect_tx(arrived + i, size * tile.element_type.width // 8)
                    there, here = (cute.make_tensor(x + i * size, piece) for x in (source, tile.iterator))
                    cute.copy(atom, there, here, mbar_ptr=arrived + i)
                else:
                    cute.arch.mbarrier_arrive(arrived + i)

    def unsigned(self, index):
        """An index, negative ones being larger than any that there is: see `inside`."""
        return (cutlass.Uint32 if index.width == 32 else cutlass.Uint64)(index)

    def inside(self, index, states):
        """Whether it is the index of a state."""
        # by way of 64 bits: a size of the DSL's own type would make the comparison one of signed numbers
        return index < type(index)(Int64(states.shape[0]))

    @cute.jit
    def write_nothing(
        self, o, wrong, b: Int32, first: Int32, n_tokens: Int32, step: Int32, i_hv: Int32, row: Int32, lane: Int32
    ):  # fmt: skip
        """Zeros into each `step`-th of the tokens; NaN where the slot is `wrong`, so that it is seen."""
        if lane % LANES == 0:
            value = Float32(cutlass.select_(wrong, Float32(float("nan")), Float32(0.0))).to(o.element_type)
            for t in cutlass.range(0, n_tokens, step, unroll=1):
                for p in cutlass.range_constexpr(self.states.passes):
                    o[b, first + t, i_hv, row + self.states.row(p)] = value
