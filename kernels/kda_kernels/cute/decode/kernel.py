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
from kda_kernels.cute.decode.work import (
    Asked,
    Gate,
    Memory,
    Outputs,
    Past,
    Rounding,
    Run,
    Shared,
    Tile,
    Tokens,
    Work,
)
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
        past_states: cute.Tensor | None,  # its states [P, 2 H K + HV V, L], or [P, L, ..] with tokens first
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
            started, taps, taps_bias, past_states, past_indices, norm_weight, norm_gate, state_scales, seed,
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
        past_states: cute.Tensor | None,
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
        work = self.work(q, state_indices, cu_seqlens, accepted, first_n)
        memory = Memory(h0, ht, state_indices, state_scales, token_states, token_rows, started, null_slot)

        # Loads are issued in the order in which they are waited for, and nothing is made of a value before all are on
        # their way: the channels of the first tokens do not wait for the slot, and the state only for the slot. A
        # branch among them, or a plain load, and the compiler puts most of the state's behind the gates.
        tokens = Tokens(q, k, v, g, beta)
        raw = self.room_for(tokens)
        self.fetch(raw, tokens, work, work.first, work.n_tokens)
        gate = self.gate(A_log, dt_bias, lower_bound, work)
        past, weights, factors, keys = None, None, None, None
        if cutlass.const_expr(spec.norm is not None):
            factors = self.norm.room_for(norm_weight, norm_gate, eps)
            self.norm.fetch_gates(factors, norm_gate, work, work.first, work.n_tokens)
        if cutlass.const_expr(spec.taps):
            lines = self.windows.lines(Int32(q.shape[2]), work)
            weights = self.windows.fetch_weights(taps, taps_bias, lines)
            past_slot = work.slot
            if cutlass.const_expr(spec.past_index is not None):
                past_slot = self.unsigned(past_indices[work.i_n])
            elif cutlass.const_expr(spec.accepted is not None):
                past_slot = self.unsigned(state_indices[work.i_n, 0])
            past = Past(past_states, past_slot, lines)
        if cutlass.const_expr(spec.norm is not None):
            self.norm.fetch_weight(factors, norm_weight, work)
        if cutlass.const_expr(spec.stochastic):
            words = cute.recast_tensor(seed, Int32)
            keys = tuple(Uint32(load_now(words, (i,))) for i in range(2))
        asked = Asked(tokens, raw, gate, norm_gate, factors, weights, keys)

        # what does not wait for the slot, while it is on its way
        smem, tile, outputs = SmemAllocator(), None, None
        if cutlass.const_expr(self.bulk):
            tile = self.begin_tile(smem, h0.element_type, work)
        if cutlass.const_expr(spec.norm is not None):
            outputs = self.norm.begin(smem, work)
        if cutlass.const_expr(spec.cluster is not None):
            cute.arch.cluster_arrive_relaxed()  # this CTA is there: others may write to its shared memory

        # an empty sequence leaves its slot of a pool alone, but a state that is not in place still has to be copied
        live = work.n_tokens > 0 if cutlass.const_expr(spec.pooled) else True
        if self.lost(work, memory, past):
            self.write_nothing(o, self.wrong(work, memory, past), work, work.first, work.n_tokens, 1)
        elif live:
            self.update(work, memory, past, asked, smem, tile, outputs, o, scale)
        if cutlass.const_expr(spec.packed):  # zeros into this sequence's share of what lies behind the last one
            N = Int32(cu_seqlens.shape[0]) - 1
            end = Int32(cu_seqlens[N]) + work.i_n
            self.write_nothing(o, Boolean(False), work, end, Int32(q.shape[1]) - end, N)

    @cute.jit
    def work(self, q: cute.Tensor, state_indices, cu_seqlens, accepted, first_n: Int32 | None) -> Work:
        spec, tid = self.spec, cute.arch.thread_idx()[0]
        i_slice, i_hv, i_n = cute.arch.block_idx()  # in this order, so that a state's CTAs start together
        if cutlass.const_expr(spec.many):
            i_n = i_n + first_n
        i_h, lane = i_hv // spec.group, tid % 32
        row = i_slice * self.rows + tid // 32 * self.states.of_warp + lane // LANES
        col = (lane % LANES) * spec.vector
        slot, column = Int64(i_n), Int32(0)
        if cutlass.const_expr(spec.accepted is not None):
            column = cutlass.min(cutlass.max(Int32(accepted[i_n]) - 1, 0), Int32(state_indices.shape[1]) - 1)
            slot = self.unsigned(state_indices[i_n, column])
        elif cutlass.const_expr(spec.pooled):
            slot = self.unsigned(state_indices[i_n])
        b, first, n_tokens = i_n, Int32(0), Int32(1 if spec.one_token else q.shape[1])
        if cutlass.const_expr(spec.packed):
            b, first = Int32(0), Int32(cu_seqlens[i_n])
            n_tokens = Int32(cu_seqlens[i_n + 1]) - first
        return Work(i_n, i_h, i_hv, i_slice, slot, column, b, first, n_tokens, tid, lane, row, col)

    @cute.jit
    def lost(self, work: Work, memory: Memory, past: Past | None):
        """Whether the sequence is padding, or has no slot of the pool: that is neither read nor written."""
        lost = False
        if cutlass.const_expr(self.spec.pooled):
            lost = not self.inside(work.slot, memory.h0) or work.slot == memory.null_slot
        if cutlass.const_expr(past is not None):
            lost = lost or not self.inside(past.slot, past.states)
            if cutlass.const_expr(self.spec.apart):
                lost = lost or past.slot == memory.null_slot
        return lost

    @cute.jit
    def wrong(self, work: Work, memory: Memory, past: Past | None):
        """Whether a lost sequence is no padding."""
        slot = work.slot
        wrong = (Int32 if slot.width == 32 else Int64)(slot) >= 0 and slot != memory.null_slot
        if cutlass.const_expr(self.spec.apart):
            other = (Int32 if past.slot.width == 32 else Int64)(past.slot)
            wrong = wrong and other >= 0 and past.slot != memory.null_slot
        return wrong

    @cute.jit
    def update(
        self, work: Work, memory: Memory, past: Past | None, asked: Asked, smem, tile: Tile | None,
        outputs: Outputs | None, o: cute.Tensor, scale: Float32,
    ):  # fmt: skip
        """A sequence's tokens through this CTA's rows of its state."""
        spec, states = self.spec, memory.h0 if self.spec.pooled else memory.ht
        inside = work.i_hv * (spec.V * spec.K) + work.row * spec.K + work.col
        begun, raw_past, scales, S, target = True, None, None, None, None
        if cutlass.const_expr(not self.bulk):
            S = self.states.registers(self.states.passes)
        if cutlass.const_expr(spec.fresh):
            begun = memory.started[work.i_n]
        if cutlass.const_expr(spec.taps and spec.config.huge):
            raw_past = self.windows.fetch_past(past, work.column, begun)
        if cutlass.const_expr(self.states.scaled):
            scales = self.states.fetch_scales(memory.state_scales, work.slot, work)
        if cutlass.const_expr(self.bulk):
            first_row = work.i_hv * (spec.V * spec.K) + work.i_slice * (self.rows * spec.K)
            self.fetch_tile(tile, self.start(memory.h0, work.slot, None, first_row), begun, work)
            if cutlass.const_expr(spec.ht is not None or self.in_place):
                target = self.start(states, work.slot, None, first_row)
        # Bulk copies stand in a branch. Where these loads are ahead of it, the compiler puts the convolution there,
        # too, and the state waits for its windows.
        if cutlass.const_expr(spec.taps and not spec.config.huge):
            raw_past = self.windows.fetch_past(past, work.column, begun)
        if cutlass.const_expr(not self.bulk):
            if cutlass.const_expr(spec.h0 is None or spec.fresh):
                S.fill(0.0)
            if cutlass.const_expr(spec.h0 is not None):
                if begun:
                    self.states.load(S, self.start(memory.h0, work.slot, None, inside), scales, 0, work.lane)

        shared = self.shared(smem)
        window, before = None, None
        if cutlass.const_expr(spec.taps):
            window = self.windows.fp32(raw_past), *(self.windows.fp32(x) for x in asked.taps)
            if cutlass.const_expr(spec.accepted is not None):
                before = self.windows.fp32(raw_past)
        odd = cute.make_rmem_tensor(self.states.together, Float32)
        odd.fill(0.0)
        rounding = Rounding(scales, odd, asked.keys, Uint32(work.slot), work.i_hv * spec.V + work.row)
        if cutlass.const_expr(not self.bulk and (spec.ht is not None or self.in_place)):
            target = self.start(states, work.slot, None, inside)
        run = Run(work, memory, o, scale, shared, outputs, rounding, S, tile, begun, target, inside)
        if cutlass.const_expr(spec.one_token):
            self.one_token(run, asked, past, window)
        else:
            self.many_tokens(run, asked, window)
        if cutlass.const_expr(self.states.scaled and self.in_place):
            self.states.store_scales(memory.state_scales, work.slot, scales, work)
        if cutlass.const_expr(spec.taps and spec.update and not self.shifts_early):
            self.shift(past, window[0], before, asked.tokens, work)
        if cutlass.const_expr(self.bulk):
            cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def one_token(self, run: Run, asked: Asked, past: Past | None, window):
        work, none = run.work, Int32(0)
        self.prepare(run, asked, window, work.n_tokens)
        if cutlass.const_expr(self.shifts_early):
            self.windows.keep(past, window[0], 0, self.leads(work), work.tid)
        if cutlass.const_expr(self.spec.cluster is not None):
            self.meet()
        self.recur(run, none, work.n_tokens)
        self.store_last(run)
        if cutlass.const_expr(self.spec.norm is not None):
            self.norm.write(run.o, run.outputs, asked.factors, work, none, work.n_tokens)

    @cute.jit
    def many_tokens(self, run: Run, asked: Asked, window):
        """A block of tokens after the other."""
        spec, work = self.spec, run.work
        if cutlass.const_expr(spec.cluster is not None):
            self.meet()
        for done in cutlass.range(0, work.n_tokens, spec.block, unroll=1):
            left = work.n_tokens - done
            self.prepare(run, asked, window, left)
            self.recur(run, done, left)
            if cutlass.const_expr(spec.norm is not None):
                self.norm.write(run.o, run.outputs, asked.factors, work, done, left)
            behind, left = work.first + done + spec.block, left - spec.block
            self.fetch(asked.raw, asked.tokens, work, behind, left)
            if cutlass.const_expr(spec.norm is not None):
                self.norm.fetch_gates(asked.factors, asked.norm_gate, work, behind, left)
            if cutlass.const_expr(spec.norm is None or self.norm.remote):
                cute.arch.sync_threads()  # all have used the channels
        self.store_last(run)

    @cute.jit
    def store_last(self, run: Run):
        """The state after the last token to its slot, out of registers."""
        if cutlass.const_expr(not self.bulk and run.target is not None):
            self.states.store(run.S, run.target, run.rounding, run.work.n_tokens - 1, 0, run.work.lane)

    @cute.jit
    def shift(self, past: Past, window, before, tokens: Tokens, work: Work):
        """Writes the convolution's state: the last inputs, or those of the drafts behind what was accepted before."""
        if cutlass.const_expr(self.waits):
            cute.arch.cluster_wait()  # all have read the windows
        leads = work.i_slice == 0 and self.leads(work)
        if cutlass.const_expr(self.spec.accepted is None):
            if work.n_tokens > 0:
                self.windows.keep(past, window, 0, leads, work.tid)
        else:
            self.windows.keep(past, before, 1, leads, work.tid)
            self.keep_drafts(past, tokens, leads, work)

    def leads(self, work: Work):
        """Whether it is the first of the value heads that share q and k."""
        return work.i_hv % self.spec.group == 0

    @cute.jit
    def meet(self):
        """All CTAs of the cluster are there."""
        cute.arch.cluster_wait()
        if cutlass.const_expr(self.waits):
            cute.arch.cluster_arrive()  # this one has read the windows

    @cute.jit
    def shared(self, smem: SmemAllocator) -> Shared:
        block = self.spec.block

        def room(size: int):
            return smem.allocate_tensor(Float32, cute.make_layout((size, block)), byte_alignment=16)

        q, k, decay = (room(self.spec.width) for _ in range(3))
        return Shared((q, k, decay), room(SUMS * self.warps), room(self.threads), room(4))

    @cute.jit
    def keep_token(self, run: Run, S, t: Int32, first_pass):
        """The state after token t of a sequence, to where it is wanted beside the slot of its last one."""
        memory, work = run.memory, run.work
        if cutlass.const_expr(memory.token_rows is not None):
            place = self.unsigned(memory.token_rows[work.i_n])
            if self.inside(place, memory.token_states) and t < memory.token_states.shape[1]:
                self.store(run, S, memory.token_states, place, t, t, first_pass)
        elif cutlass.const_expr(memory.token_states is not None):
            self.store(run, S, memory.token_states, work.b, work.first + t, t, first_pass)
        if cutlass.const_expr(self.spec.accepted is not None and self.spec.update):
            if t < memory.state_indices.shape[1]:
                slot = self.unsigned(memory.state_indices[work.i_n, t])
                if self.inside(slot, memory.h0) and slot != memory.null_slot:
                    self.store(run, S, memory.h0, slot, None, t, first_pass)
                    if cutlass.const_expr(self.states.scaled):
                        self.states.store_scales(memory.state_scales, slot, run.rounding.scales, work)

    @cute.jit
    def store(self, run: Run, S, states: cute.Tensor, i, entry, t: Int32, first_pass):
        """S, the rows from `first_pass` on of the state after token t, to states[i], or to states[i, entry]."""
        first = self.start(states, i, entry, run.inside + self.states.row(first_pass) * self.spec.K)
        self.states.store(S, first, run.rounding, t, first_pass, run.work.lane)

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
    def room_for(self, tokens: Tokens) -> Tokens:
        """Registers for a block of them."""
        block = self.spec.block
        of_channels = (self.channels, block)
        sizes = of_channels, of_channels, block, of_channels, 1
        given = tokens.q, tokens.k, tokens.v, tokens.g, tokens.beta
        raw = [cute.make_rmem_tensor(size, x.element_type) for x, size in zip(given, sizes, strict=True)]
        for x in raw:
            x.fill(0.0)
        return Tokens(*raw)

    @cute.jit
    def fetch(self, raw: Tokens, tokens: Tokens, work: Work, first: Int32, count: Int32):
        """Fills `raw` from token `first` on; the last of `count` tokens repeats, and of none nothing is read."""
        b, i_h, i_hv, tid = work.b, work.i_h, work.i_hv, work.tid
        if count > 0:
            for j in cutlass.range_constexpr(self.spec.block):
                t = first + cutlass.min(count - 1, j) if cutlass.const_expr(j) else first
                for m in cutlass.range_constexpr(self.channels):
                    channel = self.channel(tid, m)
                    raw.q[m, j] = load_now(tokens.q, (b, t, i_h, channel))
                    raw.k[m, j] = load_now(tokens.k, (b, t, i_h, channel))
                    raw.g[m, j] = load_now(tokens.g, (b, t, i_hv, channel))
                raw.v[j] = load_now(tokens.v, (b, t, i_hv, work.i_slice * self.rows + self.windows.row(tid)))
            t = first + cutlass.min(count - 1, tid) if cutlass.const_expr(self.spec.block > 1) else first
            raw.beta[0] = load_now(tokens.beta, (b, t, i_hv))

    @cute.jit
    def gate(self, A_log, dt_bias, lower_bound: Float32, work: Work) -> Gate:
        A, bias = Float32(0.0), cute.make_rmem_tensor(self.channels, Float32)
        bias.fill(0.0)
        if cutlass.const_expr(A_log is not None):
            A = load_now(A_log, (work.i_hv,)).to(Float32)
        if cutlass.const_expr(dt_bias is not None):
            for m in cutlass.range_constexpr(self.channels):
                channel = work.i_hv * self.spec.K + self.channel(work.tid, m)
                bias[m] = load_now(dt_bias, (channel,)).to(Float32)
        return Gate(A, bias, lower_bound)

    @cute.jit
    def prepare(self, run: Run, asked: Asked, window, count: Int32):
        """What the rows of a state need of a block's tokens, `count` of which are left, into shared memory."""
        spec, shared, tid = self.spec, run.shared, run.work.tid
        A = rate(asked.gate.A_log, spec.exact)
        for j in cutlass.range_constexpr(spec.block):
            if cutlass.const_expr(j == 0):
                self.prepare_token(shared, asked, A, window, j, tid)
            else:
                if j < count:
                    self.prepare_token(shared, asked, A, window, j, tid)
        if tid < spec.block:
            beta = asked.raw.beta[0].to(Float32)
            if cutlass.const_expr(spec.beta_is_logit):
                beta = sigmoid(beta, spec.exact)
                if cutlass.const_expr(spec.allow_neg_eigval):
                    beta = 2.0 * beta
            shared.scalars[3, tid] = beta
        cute.arch.sync_threads()
        if cutlass.const_expr(spec.block > 1):
            if tid < cutlass.min(count, spec.block):
                for i, x in enumerate(self.scalars(shared, run.scale, tid)):
                    shared.scalars[i, tid] = x
            cute.arch.sync_threads()

    @cute.jit
    def prepare_token(
        self, shared: Shared, asked: Asked, A: Float32, window, j: cutlass.Constexpr[int], tid: Int32
    ):  # fmt: skip
        """One thread a channel: q, k and the decay, and its warp's part of the sums over K; one thread a row: v.

        With a convolution q, k and v go through it first. `A`: exp(A_log).
        """
        raw, gate, exact = asked.raw, asked.gate, self.spec.exact
        qq, kk, qk = Float32(0.0), Float32(0.0), Float32(0.0)
        for m in cutlass.range_constexpr(self.channels):
            x, y = raw.q[m, j].to(Float32), raw.k[m, j].to(Float32)
            if cutlass.const_expr(self.spec.taps):
                x = self.windows.apply(x, *window, m)
                y = self.windows.apply(y, *window, self.channels + m)
            x, y = self.once(x, tid, m), self.once(y, tid, m)
            qq, kk, qk = qq + x * x, kk + y * y, qk + x * y
            log2 = log2_decay(raw.g[m, j].to(Float32), A, gate.bias[m], gate.lower_bound, self.spec.gate, exact)
            for target, value in zip(shared.channels, (x, y, exp2(log2, exact)), strict=True):
                target[tid + m * self.threads, j] = value
        value = raw.v[j].to(Float32)
        if cutlass.const_expr(self.spec.taps):
            value = self.windows.apply(value, *window, 2 * self.channels)
        shared.values[self.threads - 1 - tid, j] = value
        parts = tuple(lane_sum(x, 32) for x in (qq, kk, qk))
        if tid % 32 == 0:
            for i in cutlass.range_constexpr(SUMS):
                shared.sums[i * self.warps + tid // 32, j] = parts[i]

    @cute.jit
    def scalars(self, shared: Shared, scale: Float32, j):
        """Of token j: the factors of q and k, being their norms and the scale; their product times k.q; beta."""
        words = shared.sums[None, j].load()
        qq, kk, qk = (
            functools.reduce(operator.add, [words[i * self.warps + w] for w in range(self.warps)]) for i in range(SUMS)
        )
        norm_q, norm_k = scale, Float32(1.0)
        if cutlass.const_expr(self.spec.qk_l2norm):
            norm_q, norm_k = scale * rsqrt(qq + L2_EPS, self.spec.exact), rsqrt(kk + L2_EPS, self.spec.exact)
        return norm_q, norm_k, qk * norm_k * norm_q, shared.scalars[3, j]

    @cute.jit
    def recur(self, run: Run, done: Int32, count: Int32):
        """A block's tokens through this CTA's rows of the state. `done`: tokens before them, and `count` are left.

        With bulk copies the rows are taken from shared memory a piece at a time, and each goes out, to its target,
        after the last token, while the next is on its way. A warp's rows of a pass lie in one piece.
        """
        spec, shared = self.spec, run.shared
        if cutlass.const_expr(not self.bulk):
            self.tokens(run, run.S, None, done, count, 0)
        else:
            held = None
            if cutlass.const_expr(spec.one_token and spec.K <= 128):
                held = self.scalars(shared, run.scale, 0), self.all_columns(shared, run.work.lane, 0)
            for i in cutlass.range(spec.pieces, unroll=1):  # a loop: less code than the instruction cache holds
                self.piece(run, i, held, done, count)

    @cute.jit
    def piece(self, run: Run, i: Int32, held, done: Int32, count: Int32):
        """A block's tokens through the i-th piece of this CTA's rows. `held`: see `step`."""
        spec, K, work, tile = self.spec, self.spec.K, run.work, run.tile
        lane, p = work.lane, i * self.states.together
        row = work.row - work.i_slice * self.rows + self.states.row(p)
        own = tile.words.iterator + cute.assume(row * K + lane % LANES * spec.vector, divby=spec.vector)
        S = self.states.registers(self.states.together)
        cute.arch.mbarrier_wait(tile.arrived + i, 0)
        if cutlass.const_expr(spec.fresh):
            S.fill(0.0)
            if run.begun or done > 0:
                self.states.load(S, own, run.rounding.scales, p, lane)
        else:
            self.states.load(S, own, run.rounding.scales, p, lane)
        self.tokens(run, S, held, done, count, p)
        if cutlass.const_expr(run.target is not None or not spec.one_token):
            self.states.store(S, own, run.rounding, done + count - 1, p, lane)
        if cutlass.const_expr(run.target is not None):
            if count <= spec.block:
                self.send(run, p)

    @cute.jit
    def send(self, run: Run, p: Int32):
        """This warp's part of the piece from pass p on to where the state goes."""
        spec, K, work, words = self.spec, self.spec.K, run.work, run.tile.words
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_warp()
        if work.lane == 0:
            part = cute.make_layout(self.states.of_warp * K)
            first = cute.assume((work.tid // 32 * self.states.of_warp + self.states.row(p)) * K, divby=spec.vector)
            there, here = (cute.make_tensor(x + first, part) for x in (run.target, words.iterator))
            if cutlass.const_expr(spec.config.huge):
                size = cute.size(part) * words.element_type.width // 8
                bulk_store_lasting(there.iterator, here.iterator, size)
            else:
                cute.copy(cute.make_copy_atom(cute.nvgpu.cpasync.CopyBulkS2GOp(), words.element_type), here, there)
            cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def tokens(self, run: Run, S, held, done: Int32, count: Int32, first_pass):
        """A block's tokens through the rows in S, which are as many passes as it has, from `first_pass` on."""
        if cutlass.const_expr(self.spec.one_token):
            self.step(run, S, held, Int32(0), 0, first_pass)
            self.keep_token(run, S, Int32(0), first_pass)
        else:
            for j in cutlass.range(cutlass.min(count, self.spec.block), unroll=1):
                self.step(run, S, held, done, j, first_pass)
                self.keep_token(run, S, done + j, first_pass)

    @cute.jit
    def step(self, run: Run, S, held, done: Int32, j, first_pass):
        """Token j of a block: S <- diag(decay) S; u = beta (v - S k); o = S q + (k.q) u; S <- S + u k.

        o is made of the decayed state, so that both sums run together. q and k are raw here: their norms are factors.
        With a norm o goes to the head's CTAs, and `Norm.write` ends it. `held`: scalars and channels, where registers
        have them for all rows.
        """
        spec, work, shared, lane = self.spec, run.work, run.shared, run.work.lane
        passes = cute.size(S, mode=[2])
        row = work.row - work.i_slice * self.rows + self.states.row(first_pass)
        if cutlass.const_expr(held is not None):
            norm_q, norm_k, qk, beta = held[0]
        elif cutlass.const_expr(spec.one_token):
            norm_q, norm_k, qk, beta = self.scalars(shared, run.scale, 0)
        else:
            words = shared.scalars[None, j].load()
            norm_q, norm_k, qk, beta = (words[i] for i in range(4))

        columns = held[1] if cutlass.const_expr(held is not None) else None
        if cutlass.const_expr(self.bulk and held is None and spec.K <= 128):
            columns = self.all_columns(shared, lane, j)
        hk = cute.make_rmem_tensor(passes, Float32)
        hq = cute.make_rmem_tensor(passes, Float32)
        hk.fill(0.0)
        hq.fill(0.0)
        for s in cutlass.range_constexpr(spec.steps):
            if cutlass.const_expr(columns is not None):
                x, y, d = columns[s]
            else:
                x, y, d = (self.columns(source, s, lane, j) for source in shared.channels)
            for p in cutlass.range_constexpr(passes):
                for i in cutlass.range_constexpr(spec.vector):
                    decayed = S[i, s, p] * d[i]
                    hk[p] += decayed * y[i]
                    hq[p] += decayed * x[i]
                    S[i, s, p] = decayed
        for p in cutlass.range_constexpr(passes):
            u = beta * (shared.values[row + self.states.row(p), j] - lane_sum(hk[p], LANES) * norm_k)
            hq[p] = lane_sum(hq[p], LANES) * norm_q + qk * u
            hk[p] = u * norm_k
            run.rounding.odd[p] = hk[p]
        self.put_out(run, hq, row, done, j)
        for s in cutlass.range_constexpr(spec.steps):
            if cutlass.const_expr(columns is not None):
                _, y, _ = columns[s]
            else:
                y = self.columns(shared.channels[1], s, lane, j)
            for p in cutlass.range_constexpr(passes):
                for i in cutlass.range_constexpr(spec.vector):
                    S[i, s, p] += hk[p] * y[i]

    @cute.jit
    def put_out(self, run: Run, outs: cute.Tensor, row: Int32, done: Int32, j):
        """Outputs of token j of a block, of this CTA's rows from `row` on: to the norm, or to o."""
        work = run.work
        if cutlass.const_expr(self.spec.norm is not None):
            for p in cutlass.range_constexpr(cute.size(outs)):
                at = work.i_slice * self.rows + row + self.states.row(p)
                self.norm.send(run.outputs, outs[p], at, done, j, work)
        elif work.lane % LANES == 0:
            # once, after all sums: a branch keeps the next pass's arithmetic out of this one's waits
            for p in cutlass.range_constexpr(cute.size(outs)):
                at = work.i_slice * self.rows + row + self.states.row(p)
                run.o[work.b, work.first + done + j, work.i_hv, at] = outs[p].to(run.o.element_type)

    @cute.jit
    def keep_drafts(self, past: Past, tokens: Tokens, leads, work: Work):
        """The inputs of this call's tokens behind the first `taps` - 2 entries of the convolution's state."""
        length = Int32(past.states.shape[1 if self.spec.tokens_first else 2])
        for t in cutlass.range(cutlass.min(work.n_tokens, length - (self.windows.kept - 1)), unroll=1):
            for i in cutlass.range_constexpr(self.windows.count):
                if self.windows.owns(i, leads, work.tid):
                    if cutlass.const_expr(i == self.windows.count - 1):
                        row = work.i_slice * self.rows + self.windows.row(work.tid)
                        x = tokens.v[work.b, work.first + t, work.i_hv, row]
                    else:
                        source = tokens.q if cutlass.const_expr(i < self.channels) else tokens.k
                        x = source[work.b, work.first + t, work.i_h, work.tid + i % self.channels * self.threads]
                    place = self.windows.at(past.slot, past.lines[i], self.windows.kept - 1 + t)
                    past.states[place] = x.to(past.states.element_type)

    @cute.jit
    def all_columns(self, shared: Shared, lane: Int32, j):
        """q, k and decays of token j in this thread's columns, by access."""
        return tuple(
            tuple(self.columns(source, s, lane, j) for source in shared.channels) for s in range(self.spec.steps)
        )  # fmt: skip

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
    def begin_tile(self, smem: SmemAllocator, dtype: cutlass.Constexpr, work: Work) -> Tile:
        """Barriers that count the bytes of pieces; others than the first warp may wait at them after a barrier."""
        words = smem.allocate_tensor(dtype, cute.make_layout(self.rows * self.spec.K), byte_alignment=128)
        arrived = smem.allocate_array(Int64, self.spec.pieces)
        if work.tid == 0:
            for i in cutlass.range_constexpr(self.spec.pieces):
                cute.arch.mbarrier_init(arrived + i, 1)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_warp()
        return Tile(words, arrived)

    @cute.jit
    def fetch_tile(self, tile: Tile, source, begun, work: Work):
        """Asks for the CTA's part of a state, which begins at `source`, if there is one that has `begun`."""
        words = tile.words
        if work.tid == 0:
            size = cute.size(words) // self.spec.pieces
            piece = cute.make_layout(size)
            atom = cute.make_copy_atom(cute.nvgpu.cpasync.CopyBulkG2SOp(), words.element_type)
            for i in cutlass.range_constexpr(self.spec.pieces):
                if begun:
                    cute.arch.mbarrier_arrive_and_expect_tx(tile.arrived + i, size * words.element_type.width // 8)
                    there, here = (cute.make_tensor(x + i * size, piece) for x in (source, words.iterator))
                    cute.copy(atom, there, here, mbar_ptr=tile.arrived + i)
                else:
                    cute.arch.mbarrier_arrive(tile.arrived + i)

    def unsigned(self, index):
        """An index, negative ones being larger than any that there is: see `inside`."""
        return (cutlass.Uint32 if index.width == 32 else cutlass.Uint64)(index)

    def inside(self, index, states):
        """Whether it is the index of a state."""
        # by way of 64 bits: a size of the DSL's own type would make the comparison one of signed numbers
        return index < type(index)(Int64(states.shape[0]))

    @cute.jit
    def write_nothing(self, o: cute.Tensor, wrong, work: Work, first: Int32, n_tokens: Int32, step):
        """Zeros into each `step`-th of the tokens; NaN where the slot is `wrong`, so that it is seen."""
        if work.lane % LANES == 0:
            value = Float32(cutlass.select_(wrong, Float32(float("nan")), Float32(0.0))).to(o.element_type)
            for t in cutlass.range(0, n_tokens, step, unroll=1):
                for p in cutlass.range_constexpr(self.states.passes):
                    o[work.b, first + t, work.i_hv, work.row + self.states.row(p)] = value
