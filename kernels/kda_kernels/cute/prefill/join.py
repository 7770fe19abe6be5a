"""What a prefill that is split does once its segments have run: the states between them, and what these add to o.

A CTA has 64 value channels of a head of one unit, or of a sequence's end. It makes the state before its unit by itself,
from the one after the first segment and E and T of the units between them,

    S <- S T + E

and adds S r to the output of the unit's tokens; the last one stores the final state. What units have in common is
computed for each of them: products that cost less than telling other CTAs.

S and T are multiplied in fp16, 12 bits, each row of S and all of T in units of a power of two; S and what tokens read,
r, in bf16, which holds what any decay leaves of a query; sums are fp32. Inputs in fp16 are not taken.
"""

import dataclasses
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Float16, Float32, Int32, Int64
from cutlass.cute.nvgpu import cpasync, warpgroup

from kda_kernels.cute.dsl import SmemAllocator
from kda_kernels.cute.prefill.config import CHUNK, JOIN_WARPS
from kda_kernels.cute.prefill.kernel import MN_MAJOR, PrefillKernel
from kda_kernels.cute.prefill.shared import Kind, arrive, by_chunk, operand, swizzled, vector
from kda_kernels.cute.prefill.work import Barrier, States, Work
from kda_kernels.cute.ptx import float_pair, fresh, larger_size, load_transposed

WARPS = 4  # of a warpgroup
READERS = JOIN_WARPS[0] // WARPS  # warpgroups, which take chunks of tokens in turn; the first one makes the state
T_LOADER = JOIN_WARPS[0]  # the warp behind it loads outputs
T_STAGES, E_STAGES, O_STAGES = 3, 2, 4  # of transitions, states, chunks of tokens
CHANNELS = 64  # value channels of a CTA


@dataclasses.dataclass(frozen=True)
class JoinShared:
    """Pointers; sizes are in elements.

    T:   transitions: [K, K], fp16, 64 channels beside each other, rows of 128 bytes, 128-byte swizzle
    E:   the state after a first segment, then what each unit adds: [CHANNELS, K], fp32, as T with 32 channels
    r:   what a chunk's tokens read: [CHUNK, K], the same
    v:   o of these tokens as it is: [CHUNK, CHANNELS], the same
    out: o on its way out, one or two of them for each warpgroup
    """

    T: Any
    E: Any
    r: Any
    v: Any
    out: Any
    T_full: Any
    T_empty: Any
    E_full: Any
    E_empty: Any
    full: Any
    empty: Any


class JoinKernel(PrefillKernel):
    """What `PrefillKernel.__call__` launches after a split, with the workspace that this has filled."""

    def launch_join(
        self, o, h0, ht, state_indices, cu_seqlens, starts, summaries, reads, sequences, null_slot, units, lead,
        segment, begin, limit, heads, stream,
    ):  # fmt: skip
        HV, K = o.shape[2], self.spec.K
        both = self.states(starts.iterator, sequences + 3 * units, HV)  # one behind the other
        square = K * K
        halves = cute.make_tensor(
            cute.recast_ptr(summaries.iterator, dtype=Float16),
            cute.make_layout(
                (2 * units, HV, K, K), stride=(cute.assume(2 * HV * square, divby=2 * square), 2 * square, K, 1)
            ),
        )
        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        dense = (1, 3, 2, 0)
        tiles = [
            self.by_tile(halves, cpasync.CopyBulkTensorTileG2SMulticastOp(), K // 2, (2, 3, 1, 0), K),
            self.by_tile(both, load, K, (2, 3, 1, 0), CHANNELS),
            self.by_tile(reads, load, K, (0, 2, 1)),
            self.by_tile(o, load, CHANNELS, dense),
            self.by_tile(o, store, CHANNELS, dense),
        ]
        self.join(
            [atom for atom, _ in tiles], [x for _, x in tiles], o, h0, ht, state_indices, cu_seqlens, summaries, starts,
            null_slot, units, lead, segment, begin, limit, heads, self.product_of(K, MN_MAJOR, dtype=Float16),
            self.product_of(CHUNK),
        ).launch(
            grid=(2 * HV * (sequences + units), 1, 1), block=(32 * sum(JOIN_WARPS), 1, 1), stream=stream,
            cluster=(2, 1, 1), min_blocks_per_mp=1, use_pdl=True,
        )  # fmt: skip

    @cute.kernel
    def join(
        self,
        atoms: list[cute.CopyAtom],  # of transitions, states, reads, o as it comes and as it goes
        tiles: list[cute.Tensor],
        o: cute.Tensor,
        h0: cute.Tensor | None,
        ht: cute.Tensor | None,
        state_indices: cute.Tensor | None,
        cu_seqlens: cute.Tensor | None,
        summaries: cute.Tensor,
        starts: cute.Tensor,
        null_slot: Int32,
        units: Int32,
        lead: Int32,
        segment: Int32,
        begin: Int32,
        limit: Int32,
        heads: cute.FastDivmodDivisorV2,
        move: cute.TiledMma,
        read: cute.TiledMma,
    ):
        spec = self.spec
        pid = cute.arch.block_idx()[0]
        half = pid & 1
        rank, i_hv = divmod(pid >> 1, heads)
        rank, i_hv = cute.arch.make_warp_uniform(rank), cute.arch.make_warp_uniform(i_hv)
        N = Int32(o.shape[0])
        if cutlass.const_expr(spec.packed):
            N = Int32(cu_seqlens.shape[0] - 1)
        ends = rank < N
        # ends and late units, which have most to do, come first
        place = rank if ends else N + 2 * (units - 1 - (rank - N))
        i_n, _, index, unit, _ = self.find(
            place, cu_seqlens, Int32(o.shape[0]), Int32(o.shape[1]), lead, segment, begin, limit
        )
        found = i_n >= 0
        i_n = i_n if found else Int32(0)
        slot, wrong = Int64(i_n), Boolean(False)
        if cutlass.const_expr(spec.pooled):
            slot = Int64(state_indices[i_n])
            wrong = slot == null_slot or slot >= h0.shape[0]
        b, first, length = i_n, Int32(0), Int32(o.shape[1])
        if cutlass.const_expr(spec.packed):
            b, first = Int32(0), Int32(cu_seqlens[i_n])
            length = Int32(cu_seqlens[i_n + 1]) - first
        here = cutlass.min(cutlass.max(length - begin, 0), limit)
        steps, n_tokens = index - 1, Int32(0)
        if ends:
            steps = self.units(length, lead, segment, begin, limit)
            found = found and steps > 0
        else:
            offset = lead + steps * segment
            n_tokens = cutlass.min(here - offset, segment)
            first = first + (begin + offset)
        if found and slot >= 0 and not wrong:
            before = unit if ends else unit - steps  # the first unit of the sequence
            work = Work(
                i_n,
                i_hv,
                slot,
                Int32(0),
                steps,
                unit,
                length <= begin + limit,
                b,
                first,
                length,
                n_tokens,
                segment,
                begin,
            )
            states = States(h0, ht, None, summaries, starts, None, None, None, Int32(0), units)
            self.join_one(atoms, tiles, o, states, work, before, ends, half, move, read)
        else:
            cute.arch.griddepcontrol_wait()  # what comes after the join comes after the segments

    def join_shared(self) -> JoinShared:
        smem, K = SmemAllocator(), self.spec.K

        def array(dtype, size, align=1024):
            return smem.allocate_tensor(dtype, cute.make_layout(size), byte_alignment=align).iterator

        return JoinShared(
            T=array(Float16, T_STAGES * K * K),
            E=array(Float32, E_STAGES * CHANNELS * K),
            r=array(BFloat16, O_STAGES * CHUNK * K),
            v=array(BFloat16, O_STAGES * CHUNK * CHANNELS),
            out=array(BFloat16, 2 * self.spec.out_buffers * CHUNK * CHANNELS),
            T_full=array(Int64, T_STAGES, 8),
            T_empty=array(Int64, T_STAGES, 8),
            E_full=array(Int64, E_STAGES, 8),
            E_empty=array(Int64, E_STAGES, 8),
            full=array(Int64, O_STAGES, 8),
            empty=array(Int64, O_STAGES, 8),
        )

    @cute.jit
    def join_one(
        self, atoms, tiles, o, states: States, work: Work, before: Int32, ends, half: Int32, move: cute.TiledMma,
        read: cute.TiledMma,
    ):  # fmt: skip
        """64 value channels of a head: the state before a unit, or at the end, and what that adds to the unit's o."""
        tid = cute.arch.thread_idx()[0]
        shared = self.join_shared()
        if tid == 0:
            arrivals = 32 * WARPS if self.spec.each_arrives else WARPS
            for s in cutlass.range_constexpr(T_STAGES):
                cute.arch.mbarrier_init(shared.T_full + s, 1)
                cute.arch.mbarrier_init(shared.T_empty + s, 2 * arrivals)
            for s in cutlass.range_constexpr(E_STAGES):
                cute.arch.mbarrier_init(shared.E_full + s, 1)
                cute.arch.mbarrier_init(shared.E_empty + s, arrivals)
            for s in cutlass.range_constexpr(O_STAGES):
                cute.arch.mbarrier_init(shared.full + s, 1)
                cute.arch.mbarrier_init(shared.empty + s, arrivals)
            cute.arch.mbarrier_init_fence()
        self.both_are_here()
        cute.arch.griddepcontrol_wait()  # until the segments have run and what they wrote can be seen
        n_chunks = (work.n_tokens + CHUNK - 1) // CHUNK
        warp = cute.arch.make_warp_uniform(tid >> 5)
        if warp < T_LOADER:
            self.join_states(
                shared, atoms[4:], tiles[4:], o, states, work, before, ends, n_chunks, half, warp >> 2, move, read
            )
        elif warp == T_LOADER:
            self.load_transitions(shared, atoms, tiles, states, work, before, half)
        else:
            self.load_outputs(shared, atoms[2:], tiles[2:], work, n_chunks, half)
        self.both_are_here()  # nothing reaches a CTA that has gone

    def both_are_here(self):
        """The CTAs of both halves of the value channels wait for each other."""
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()

    @cute.jit
    def load_transitions(self, shared, atoms, tiles, states: States, work: Work, before: Int32, half: Int32):
        K, N = self.spec.K, self.sequences(states)
        self.load_channels(shared, atoms[1], tiles[1], work.i_hv, N + before, half, 0)
        for step in cutlass.range(work.index, unroll=1):
            stage = step % T_STAGES
            cute.arch.mbarrier_wait(shared.T_empty + stage, (step // T_STAGES & 1) ^ 1)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(shared.T_full + stage, K * K * 2)
            there = tiles[0][None, None, work.i_hv, 2 * (before + step) + 1]
            place = shared.T + (2 * stage + half) * (K * K // 2)
            target, source = by_chunk(atoms[0], there, place, 0, K // 2, K)
            full, both = shared.T_full + stage, cutlass.Int16(3)
            cute.copy(atoms[0], source[None, 0, half], target, tma_bar_ptr=full, mcast_mask=both)
            slot = N + states.units + 2 * (before + step)
            self.load_channels(shared, atoms[1], tiles[1], work.i_hv, slot, half, step + 1)

    @cute.jit
    def load_channels(self, shared, atom, tile, i_hv: Int32, slot: Int32, half: Int32, turn: Int32):
        """This CTA's channels of a state in the workspace, the `turn`-th that it asks for."""
        K, stage = self.spec.K, turn % E_STAGES
        cute.arch.mbarrier_wait(shared.E_empty + stage, (turn // E_STAGES & 1) ^ 1)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(shared.E_full + stage, CHANNELS * K * 4)
        place = shared.E + stage * (CHANNELS * K)
        target, source = by_chunk(atom, tile[None, None, i_hv, slot], place, 0, K, CHANNELS)
        cute.copy(atom, source[None, half, 0], target, tma_bar_ptr=shared.E_full + stage)

    @cute.jit
    def load_outputs(self, shared, atoms, tiles, work: Work, n_chunks: Int32, half: Int32):
        """What tokens read, and their o as it is."""
        K = self.spec.K
        for chunk in cutlass.range(n_chunks, unroll=1):
            stage = chunk % O_STAGES
            full = shared.full + stage
            cute.arch.mbarrier_wait(shared.empty + stage, (chunk // O_STAGES & 1) ^ 1)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full, CHUNK * (K + CHANNELS) * 2)
            here, there = by_chunk(
                atoms[0], tiles[0][None, None, work.i_hv], shared.r + stage * (CHUNK * K), work.unit * work.segment, K
            )
            cute.copy(atoms[0], there[None, chunk, 0], here, tma_bar_ptr=full)
            target = shared.v + stage * (CHUNK * CHANNELS)
            here, there = by_chunk(atoms[1], tiles[1][None, None, work.i_hv, work.b], target, work.first, CHANNELS)
            cute.copy(atoms[1], there[None, chunk, half], here, tma_bar_ptr=full)

    @cute.jit
    def join_states(
        self, shared, atoms, tiles, o, states: States, work: Work, before: Int32, ends, n_chunks: Int32, half: Int32,
        group: Int32, move: cute.TiledMma, read: cute.TiledMma,
    ):  # fmt: skip
        if group == 0:
            self.join_state(shared, states, work, before, ends, half, move)
        if not ends:
            self.add_reads(shared, atoms, tiles, o, work, n_chunks, half, group, read)

    @cute.jit
    def join_state(
        self, shared, states: States, work: Work, before: Int32, ends, half: Int32, move: cute.TiledMma
    ):  # fmt: skip
        """The state before a unit to those that read it, or the one at the end to where it goes."""
        spec = self.spec
        K = spec.K
        p = cute.arch.thread_idx()[0]
        lane = p & 31
        inside = self.inside(half, p) + work.i_hv * (spec.V * K)
        S = cute.make_rmem_tensor(move.partition_shape_C((CHANNELS, K)), Float32)
        half_of_E = cute.make_rmem_tensor(cute.size(S) // 2, Float32)  # registers have no room for more
        rounded = cute.make_rmem_tensor(cute.make_layout(((2, 2, 2), 1, K // 16)), Float16)
        factors = cute.make_rmem_tensor(2, Float32)
        T = operand(shared.T, Kind.MN_SW128, (K, K, T_STAGES), (1, 0, 2))
        T = move.make_fragment_B(move.get_slice(p).partition_B(T))
        N = self.sequences(states)
        unit_next = self.unit_of(states, work, before, 0)
        self.take_channels(S, shared, p, 0, 0)
        arrive(shared.E_empty, lane, spec.each_arrives)
        for step in cutlass.range(work.index, unroll=1):
            stage, unit_here = step % T_STAGES, unit_next
            unit_next = self.unit_of(states, work, before, step + 1)
            self.round_rows(S, rounded, factors)
            cute.arch.mbarrier_wait(shared.T_full + stage, step // T_STAGES & 1)
            self.product(move, S, rounded, T, stage, K // 16, False)
            self.take_channels(half_of_E, shared, p, step + 1, 0)
            warpgroup.wait_group(0)
            arrive(shared.T_empty + stage, lane, spec.each_arrives)
            if spec.each_arrives or lane == 0:
                cute.arch.mbarrier_arrive(shared.T_empty + stage, 1 - half)
            for h in cutlass.range_constexpr(2):
                factors[h] = factors[h] * unit_here
            for i in cutlass.range_constexpr(cute.size(half_of_E)):
                S[i] = S[i] * factors[i // 2 % 2] + half_of_E[i]
            self.take_channels(half_of_E, shared, p, step + 1, K // 16)
            arrive(shared.E_empty + (step + 1) % E_STAGES, lane, spec.each_arrives)
            for i in cutlass.range_constexpr(cute.size(half_of_E)):
                S[i + cute.size(half_of_E)] = S[i + cute.size(half_of_E)] * factors[i // 2 % 2] + half_of_E[i]
        if ends:
            if work.last:
                if cutlass.const_expr(spec.pooled or spec.ht is not None):
                    self.store_state(S, states.h0 if spec.pooled else states.ht, work.slot, inside)
            else:
                self.store_state(S, states.starts, Int64(work.i_n), inside)
        else:
            if cutlass.const_expr(spec.kept is not None):
                if work.index > 0:
                    self.store_state(S, states.starts, Int64(N + work.unit), inside)
            read = cute.make_rmem_tensor(rounded.layout, BFloat16)
            self.round(S, read)
            words = cute.recast_tensor(read, Int32)
            cute.arch.sync_warp()  # all have taken what was there
            for i in cutlass.range_constexpr(cute.size(words) // 4):
                piece = cute.make_rmem_tensor(4, Int32)
                for e in cutlass.range_constexpr(4):
                    piece[e] = words[4 * i + e]
                self.handed(shared, p, i).store(piece.load())

    @cute.jit
    def unit_of(self, states: States, work: Work, before: Int32, step: Int32) -> Float32:
        """In which units T is that this step multiplies by; see `send_half`. Of the step behind the last: any."""
        slot = Int64(2 * (before + cutlass.max(cutlass.min(step, work.index - 1), 0)) + 1)
        square = self.spec.V * self.spec.K
        place = slot * states.summaries.stride[0] + (work.i_hv * square + square // 2)
        return vector(states.summaries.iterator, place, 1)[0]

    @cute.jit
    def round_rows(self, S, rounded, factors):
        """S in fp16, each row in units of a power of two, which goes into `factors`."""
        most = cute.make_rmem_tensor(2, Float32)
        most.fill(0.0)
        self.largest(S, most)
        for h in cutlass.range_constexpr(2):
            x = most[h]
            for bit in (1, 2):  # the lanes of a row
                x = larger_size(x, cute.arch.shuffle_sync_bfly(x, bit))
            exponent = self.joined_exponent(x)
            most[h], factors[h] = self.power(exponent), self.power(-exponent)
        self.scale_rows(S, most)
        self.round(S, rounded)

    @cute.jit
    def take_channels(self, target, shared, p: Int32, turn: Int32, first: cutlass.Constexpr[int]):
        """Of what `load_channels` brings in that turn, from the `first`-th 8 channels on, as accumulators lie."""
        warp, lane = p >> 5, p & 31
        row, stage = 16 * warp + (lane >> 2), turn % E_STAGES
        cute.arch.mbarrier_wait(shared.E_full + stage, turn // E_STAGES & 1)
        tile = shared.E + stage * (CHANNELS * self.spec.K)
        for j in cutlass.range_constexpr(cute.size(target) // 4):
            place = swizzled(row, 4 * (first + j) + (lane & 3), 2, Float32, CHANNELS)
            for h in cutlass.range_constexpr(2):
                pair = vector(tile, place + 8 * h * 32).load()
                for e in cutlass.range_constexpr(2):
                    target[4 * j + 2 * h + e] = pair[e]

    def handed(self, shared, p: Int32, i: int):
        """Where the state as it is read lies, of one thread of each warpgroup, in four words: where its warp's rows of
        `E` were, which no other warp looks at."""
        place = i // 4 * (CHANNELS * 32) + (p >> 5) * (16 * 32) + (i % 4 * 32 + (p & 31)) * 4
        return vector(cute.recast_ptr(shared.E, dtype=Int32), place, 4)

    @cute.jit
    def add_reads(
        self, shared, atoms, tiles, o, work: Work, n_chunks: Int32, half: Int32, group: Int32, read: cute.TiledMma
    ):  # fmt: skip
        """o + S r of the unit's tokens."""
        p = cute.arch.thread_idx()[0] & 127
        S_operand = cute.make_rmem_tensor(cute.make_layout(((2, 2, 2), 1, self.spec.K // 16)), BFloat16)
        words = cute.recast_tensor(S_operand, Int32)
        cute.arch.barrier(barrier_id=Barrier.LEAVE, number_of_threads=32 * JOIN_WARPS[0])
        for i in cutlass.range_constexpr(cute.size(words) // 4):
            piece = self.handed(shared, p, i).load()
            for e in cutlass.range_constexpr(4):
                words[4 * i + e] = piece[e]
        r = operand(shared.r, Kind.K_SW128, (CHUNK, self.spec.K, O_STAGES), (0, 1, 2))
        r = read.make_fragment_B(read.get_slice(p).partition_B(r))
        out = cute.make_rmem_tensor(read.partition_shape_C((CHANNELS, CHUNK)), Float32)
        rounded = cute.make_rmem_tensor(cute.size(out), BFloat16)
        for chunk in cutlass.range(group, n_chunks, READERS, unroll=1):
            p = fresh(p)
            warp, lane = p >> 5, p & 31
            stage, tokens = chunk % O_STAGES, work.n_tokens - chunk * CHUNK
            cute.arch.mbarrier_wait(shared.full + stage, chunk // O_STAGES & 1)
            self.product(read, out, S_operand, r, stage, self.spec.K // 16, False)
            place = swizzled((lane >> 4) * 8 + (lane & 7), 2 * warp + (lane >> 3 & 1), 8, BFloat16)
            so_far = []
            for j in cutlass.range_constexpr(0, CHUNK // 8, 2):
                so_far.extend(load_transposed(shared.v + (stage * (CHUNK * CHANNELS) + place + j * 8 * 64)))
            warpgroup.wait_group(0)
            arrive(shared.empty + stage, lane, self.spec.each_arrives)
            for i in cutlass.range_constexpr(len(so_far)):
                pair = float_pair(so_far[i])
                for e in cutlass.range_constexpr(2):
                    rounded[2 * i + e] = (out[2 * i + e] + pair[e]).to(BFloat16)
            if cutlass.const_expr(self.spec.out_buffers == 1):
                self.own_buffer(group, warp)
            source = self.buffer(shared, group, chunk // READERS & 1)
            self.stage(rounded, source, warp, lane)
            self.write_out(source, atoms, tiles, o, work, group, half, chunk, tokens, p)
        cute.arch.cp_async_bulk_wait_group(0, read=True)
