"""What a prefill that is split does once its segments have run: the states between them, and what these add to o.

A CTA has 64 value channels of a head of one unit. It makes the state before its unit by itself, from the one after the
first segment and E and T of the units between them,

    S <- S T + E

and adds S r to the output of the unit's tokens. What units have in common is computed for each of them: products that
cost less than telling other CTAs. One of two warpgroups makes S; then both read, in turns. The state at the end is made
by CTAs of its own while there are SMs for them, else by those of a sequence's last unit.

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
from kda_kernels.cute.prefill.config import JOIN_WARPS
from kda_kernels.cute.prefill.kernel import MN_MAJOR, PrefillKernel
from kda_kernels.cute.prefill.shared import Kind, arrive, by_chunk, operand, swizzled, vector
from kda_kernels.cute.prefill.work import Barrier, States, Work
from kda_kernels.cute.ptx import float_pair, fresh, larger_size, load_transposed, store_matrices

WARPS = 4  # of a warpgroup
GROUPS = JOIN_WARPS[0] // WARPS  # warpgroups
T_LOADER = JOIN_WARPS[0]  # the warp behind it loads outputs
T_STAGES, E_STAGES = 3, 2  # of transitions, states
EARLY_STAGES, O_STAGES = 2, 6  # of tokens: while the state is made, and then, in the place of transitions, too
TOKENS = 64  # that are read at once
CHANNELS = 64  # value channels of a CTA


@dataclasses.dataclass(frozen=True)
class JoinShared:
    """Pointers; sizes are in elements.

    T:   transitions: [K, K], fp16, 64 channels beside each other, rows of 128 bytes, 128-byte swizzle
    E:   the state after a first segment, then what each unit adds: [CHANNELS, K], fp32, as T with 32 channels. In the
         end there are in one of them the state as tokens read it, [CHANNELS, K], bf16, as T, in the other and behind
         them o on its way out, two for each warpgroup: [TOKENS, CHANNELS], the same
    r:   what tokens read: [TOKENS, K], bf16, as T. The first EARLY_STAGES of them lie before T, others in it
    v:   o of these tokens as it is: [TOKENS, CHANNELS], the same. The last EARLY_STAGES of them lie behind T
    """

    T: Any
    E: Any
    r: Any
    v: Any
    T_full: Any
    T_empty: Any
    E_full: Any
    E_empty: Any
    full: Any
    empty: Any
    made: Any  # the state: T is free


class JoinKernel(PrefillKernel):
    """What `PrefillKernel.__call__` launches after a split, with the workspace that this has filled."""

    def launch_join(
        self, o, h0, ht, state_indices, cu_seqlens, starts, summaries, reads, sequences, null_slot, units, lead,
        segment, begin, limit, sms, heads, stream,
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
        wanted = 2 * HV * (sequences + units)
        apart = cutlass.min(cutlass.max(sms + 1 - wanted, 0), 1)  # whether ends have CTAs of their own
        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        to_both, dense = cpasync.CopyBulkTensorTileG2SMulticastOp(), (1, 3, 2, 0)
        tiles = [
            self.by_tile(halves, to_both, K // 2, (2, 3, 1, 0), K),
            self.by_tile(both, load, K, (2, 3, 1, 0), CHANNELS),
            self.by_tile(reads, to_both, K // 2, (0, 2, 1), TOKENS),
            self.by_tile(o, load, CHANNELS, dense, TOKENS),
            self.by_tile(o, store, CHANNELS, dense, TOKENS),
        ]
        self.join(
            [atom for atom, _ in tiles], [x for _, x in tiles], o, h0, ht, state_indices, cu_seqlens, summaries, starts,
            null_slot, units, apart, lead, segment, begin, limit, heads,
            self.product_of(K, MN_MAJOR, dtype=Float16),
            self.product_of(TOKENS, source=warpgroup.OperandSource.SMEM),
        ).launch(
            grid=(2 * HV * (units + apart * sequences), 1, 1), block=(32 * sum(JOIN_WARPS), 1, 1), stream=stream,
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
        apart: Int32,
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
        ends = rank < apart * N
        # ends and late units, which have most to do, come first
        place = rank if ends else N + 2 * (units - 1 - (rank - apart * N))
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
        count = self.units(length, lead, segment, begin, limit)
        steps, before, n_tokens = count, unit, Int32(0)  # `before`: the first unit of the sequence
        if ends:
            index, found = count + 1, found and count > 0
        else:
            found = found and index <= count  # of dense sequences a round may have fewer units than there is room for
            offset = lead + (index - 1) * segment
            before, n_tokens = unit - (index - 1), cutlass.min(here - offset, segment)
            first = first + (begin + offset)
            if apart == 1 or index < count:
                steps = index - 1
        if found and slot >= 0 and not wrong:
            work = Work(
                i_n,
                i_hv,
                slot,
                Int32(0),
                index,
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
            self.join_one(atoms, tiles, o, states, work, before, steps, half, move, read)
        else:
            cute.arch.griddepcontrol_wait()  # what comes after the join comes after the segments

    def join_shared(self) -> JoinShared:
        smem, K = SmemAllocator(), self.spec.K

        def array(dtype, size, align=1024):
            return smem.allocate_tensor(dtype, cute.make_layout(size), byte_alignment=align).iterator

        r = array(BFloat16, T_STAGES * K * K + EARLY_STAGES * TOKENS * (K + CHANNELS))
        return JoinShared(
            T=cute.recast_ptr(r + EARLY_STAGES * TOKENS * K, dtype=Float16),
            E=array(Float32, E_STAGES * CHANNELS * K + TOKENS * CHANNELS),
            r=r,
            v=r + O_STAGES * TOKENS * K,
            T_full=array(Int64, T_STAGES, 8),
            T_empty=array(Int64, T_STAGES, 8),
            E_full=array(Int64, E_STAGES, 8),
            E_empty=array(Int64, E_STAGES, 8),
            full=array(Int64, O_STAGES, 8),
            empty=array(Int64, O_STAGES, 8),
            made=array(Int64, 1, 8),
        )

    @cute.jit
    def join_one(
        self, atoms, tiles, o, states: States, work: Work, before: Int32, steps: Int32, half: Int32,
        move: cute.TiledMma, read: cute.TiledMma,
    ):  # fmt: skip
        """64 value channels of a head: the state before a unit, which is there after `work.index - 1` of `steps`, what
        it adds to the unit's o, and, if there is one step more, or no token, the state at the end."""
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
                cute.arch.mbarrier_init(shared.empty + s, 2 * arrivals)
            cute.arch.mbarrier_init(shared.made, 2 * arrivals)
            cute.arch.mbarrier_init_fence()
        if tid < 32:
            for atom in atoms:
                cpasync.prefetch_descriptor(atom)
        cute.arch.cluster_arrive_relaxed()  # nothing reaches a CTA that has not begun
        cute.arch.cluster_wait()
        cute.arch.griddepcontrol_wait()  # until the segments have run and what they wrote can be seen
        n_turns = (work.n_tokens + TOKENS - 1) // TOKENS
        warp = cute.arch.make_warp_uniform(tid >> 5)
        if warp < T_LOADER:
            if warp < WARPS:
                self.join_state(shared, states, work, before, steps, n_turns, half, move)
            elif n_turns > 0:
                self.both_groups_are_here()
            self.add_reads(shared, atoms[4:], tiles[4:], o, work, n_turns, half, warp >> 2, read)
        elif warp == T_LOADER:
            self.load_transitions(shared, atoms, tiles, states, work, before, steps, half)
        else:
            self.load_outputs(shared, atoms[2:], tiles[2:], work, n_turns, half)

    @cute.jit
    def load_transitions(
        self, shared, atoms, tiles, states: States, work: Work, before: Int32, steps: Int32, half: Int32
    ):  # fmt: skip
        K, N = self.spec.K, self.sequences(states)
        self.load_channels(shared, atoms[1], tiles[1], work.i_hv, N + before, half, 0)
        for step in cutlass.range(steps, unroll=1):
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
    def load_outputs(self, shared, atoms, tiles, work: Work, n_turns: Int32, half: Int32):
        """What tokens read, and their o as it is."""
        K = self.spec.K
        for turn in cutlass.range(n_turns, unroll=1):
            stage = turn % O_STAGES
            full = shared.full + stage
            if turn == EARLY_STAGES:
                cute.arch.mbarrier_wait(shared.made, 0)
            cute.arch.mbarrier_wait(shared.empty + stage, (turn // O_STAGES & 1) ^ 1)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full, TOKENS * (K + CHANNELS) * 2)
            place = shared.r + (2 * stage + half) * (TOKENS * K // 2)
            rows = work.unit * work.segment
            here, there = by_chunk(atoms[0], tiles[0][None, None, work.i_hv], place, rows, K // 2, TOKENS)
            cute.copy(atoms[0], there[None, turn, half], here, tma_bar_ptr=full, mcast_mask=cutlass.Int16(3))
            target = self.place_of_v(shared, stage)
            here, there = by_chunk(
                atoms[1], tiles[1][None, None, work.i_hv, work.b], target, work.first, CHANNELS, TOKENS
            )
            cute.copy(atoms[1], there[None, turn, half], here, tma_bar_ptr=full)

    @cute.jit
    def join_state(
        self, shared, states: States, work: Work, before: Int32, steps: Int32, n_turns: Int32, half: Int32,
        move: cute.TiledMma,
    ):  # fmt: skip
        """The state before a unit to where it is read, and the one at the end to where it goes."""
        spec, K = self.spec, self.spec.K
        p = cute.arch.thread_idx()[0]
        lane = p & 31
        inside = self.inside(half, p) + work.i_hv * (spec.V * K)
        S = cute.make_rmem_tensor(move.partition_shape_C((CHANNELS, K)), Float32)
        half_of_E = cute.make_rmem_tensor(cute.size(S) // 2, Float32)  # registers have no room for more
        rounded = cute.make_rmem_tensor(cute.make_layout(((2, 2, 2), 1, K // 16)), Float16)
        factors = cute.make_rmem_tensor(2, Float32)
        T = operand(shared.T, Kind.MN_SW128, (K, K, T_STAGES), (1, 0, 2))
        T = move.make_fragment_B(move.get_slice(p).partition_B(T))
        unit_next = self.unit_of(states, work, before, steps, 0)
        self.take_channels(S, shared, p, 0, 0)
        arrive(shared.E_empty, lane, spec.each_arrives)
        for step in cutlass.range(steps, unroll=1):
            if step == work.index - 1:
                self.hand_on(S, shared, states, work, p, inside)
            stage, unit_here = step % T_STAGES, unit_next
            unit_next = self.unit_of(states, work, before, steps, step + 1)
            self.round_rows(S, rounded, factors)
            cute.arch.mbarrier_wait(shared.T_full + stage, step // T_STAGES & 1)
            self.product(move, S, rounded, T, stage, K // 16, False)
            self.take_channels(half_of_E, shared, p, step + 1, 0)
            warpgroup.wait_group(0)
            if step + T_STAGES < steps:  # somebody waits for it: nothing reaches a CTA that has gone
                self.arrive_at_both(shared.T_empty + stage, lane, half)
            for h in cutlass.range_constexpr(2):
                factors[h] = factors[h] * unit_here
            for i in cutlass.range_constexpr(cute.size(half_of_E)):
                S[i] = S[i] * factors[i // 2 % 2] + half_of_E[i]
            self.take_channels(half_of_E, shared, p, step + 1, K // 16)
            arrive(shared.E_empty + (step + 1) % E_STAGES, lane, spec.each_arrives)
            for i in cutlass.range_constexpr(cute.size(half_of_E)):
                S[i + cute.size(half_of_E)] = S[i + cute.size(half_of_E)] * factors[i // 2 % 2] + half_of_E[i]
        if n_turns > EARLY_STAGES:
            self.arrive_at_both(shared.made, lane, half)
        if steps < work.index and n_turns > 0:
            self.hand_on(S, shared, states, work, p, inside)
        else:
            if work.last:
                if cutlass.const_expr(spec.pooled or spec.ht is not None):
                    self.store_state(S, states.h0 if spec.pooled else states.ht, work.slot, inside)
            else:
                self.store_state(S, states.starts, Int64(work.i_n), inside)
            cute.arch.barrier(barrier_id=Barrier.SEND, number_of_threads=32 * WARPS)  # all have taken the last E

    def place_of_v(self, shared, stage: Int32):
        """As the first stages of `r` are before `T`, those of `v` are behind it."""
        return shared.v + cute.assume((stage + (O_STAGES - EARLY_STAGES)) % O_STAGES * (TOKENS * CHANNELS), divby=1024)

    @cute.jit
    def arrive_at_both(self, barrier, lane: Int32, half: Int32):
        """A warp says so to the CTAs of both halves of the value channels."""
        arrive(barrier, lane, self.spec.each_arrives)
        if self.spec.each_arrives or lane == 0:
            cute.arch.mbarrier_arrive(barrier, 1 - half)

    def both_groups_are_here(self):
        cute.arch.barrier(barrier_id=Barrier.LEAVE, number_of_threads=32 * JOIN_WARPS[0])

    @cute.jit
    def hand_on(self, S, shared, states: States, work: Work, p: Int32, inside: Int32):
        """The state before the unit to where it is read, and to where checkpoints inside of the unit begin."""
        if cutlass.const_expr(self.spec.kept is not None):
            if work.index > 1:
                self.store_state(S, states.starts, Int64(self.sequences(states) + work.unit), inside)
        rounded = cute.make_rmem_tensor(cute.size(S), BFloat16)
        self.round(S, rounded)
        words, target = cute.recast_tensor(rounded, Int32), self.as_read(shared, work)
        row, unit = 16 * (p >> 5) + (p & 15), p >> 4 & 1
        cute.arch.barrier(barrier_id=Barrier.SEND, number_of_threads=32 * WARPS)  # all have taken E
        for j in cutlass.range_constexpr(0, cute.size(words) // 2, 2):
            place = swizzled(row, j + unit, 8, BFloat16, CHANNELS)
            store_matrices(target + place, tuple(words[2 * j + i] for i in range(4)))
        cute.arch.fence_proxy("async.shared", space="cta")
        self.both_groups_are_here()

    def as_read(self, shared, work: Work):
        """Where the state lies as tokens read it: where the last `E` before the unit was."""
        place = (work.index - 1) % E_STAGES * (CHANNELS * self.spec.K)
        return cute.recast_ptr(shared.E + cute.assume(place, divby=CHANNELS * self.spec.K), dtype=BFloat16)

    @cute.jit
    def place_of_out(self, shared, work: Work, group: Int32, index: Int32):
        """For the first warpgroup, which is done with all `E`, where the other one was, for the second behind them."""
        stage = work.index % E_STAGES if group == 0 else Int32(E_STAGES)
        place = stage * (2 * CHANNELS * self.spec.K) + index * (TOKENS * CHANNELS)
        return cute.recast_ptr(shared.E, dtype=BFloat16) + cute.assume(place, divby=TOKENS * CHANNELS)

    @cute.jit
    def unit_of(self, states: States, work: Work, before: Int32, steps: Int32, step: Int32) -> Float32:
        """In which units T is that this step multiplies by; see `send_half`. Of the step behind the last: any."""
        slot = Int64(2 * (before + cutlass.max(cutlass.min(step, steps - 1), 0)) + 1)
        square = self.spec.V * self.spec.K
        place = slot * states.summaries.stride[0] + (work.i_hv * square + square // 2)
        return vector(states.summaries.iterator, place, 1)[0]

    @cute.jit
    def round_rows(self, S, rounded, factors):
        """S in fp16, each row in units of a power of two, which goes into `factors`."""
        most = cute.make_rmem_tensor(4, Float32)  # of each row of this lane two: shorter chains
        most.fill(0.0)
        for i in cutlass.range_constexpr(cute.size(S)):
            place = i // 2 % 4
            most[place] = larger_size(most[place], S[i])
        for h in cutlass.range_constexpr(2):
            x = larger_size(most[h], most[2 + h])
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

    @cute.jit
    def add_reads(
        self, shared, atoms, tiles, o, work: Work, n_turns: Int32, half: Int32, group: Int32, read: cute.TiledMma
    ):  # fmt: skip
        """o + S r of the unit's tokens."""
        p = cute.arch.thread_idx()[0] & 127
        S = operand(self.as_read(shared, work), Kind.K_SW128, (CHANNELS, self.spec.K), (0, 1))
        S = read.make_fragment_A(read.get_slice(p).partition_A(S))
        r = operand(shared.r, Kind.K_SW128, (TOKENS, self.spec.K, O_STAGES), (0, 1, 2))
        r = read.make_fragment_B(read.get_slice(p).partition_B(r))
        out = cute.make_rmem_tensor(read.partition_shape_C((CHANNELS, TOKENS)), Float32)
        rounded = cute.make_rmem_tensor(cute.size(out), BFloat16)
        for turn in cutlass.range(group, n_turns, GROUPS, unroll=1):
            p = fresh(p)
            warp, lane = p >> 5, p & 31
            stage, tokens = turn % O_STAGES, work.n_tokens - turn * TOKENS
            cute.arch.mbarrier_wait(shared.full + stage, turn // O_STAGES & 1)
            self.product(read, out, S, r, stage, self.spec.K // 16, False)
            place = swizzled((lane >> 4) * 8 + (lane & 7), 2 * warp + (lane >> 3 & 1), 8, BFloat16)
            v, so_far = self.place_of_v(shared, stage), []
            for j in cutlass.range_constexpr(0, TOKENS // 8, 2):
                so_far.extend(load_transposed(v + (place + j * 8 * 64)))
            warpgroup.wait_group(0)
            for i in cutlass.range_constexpr(len(so_far)):
                pair = float_pair(so_far[i])
                for e in cutlass.range_constexpr(2):
                    rounded[2 * i + e] = (out[2 * i + e] + pair[e]).to(BFloat16)
            source = self.place_of_out(shared, work, group, turn // GROUPS & 1)
            self.stage(rounded, source, warp, lane)
            self.write_out(source, atoms, tiles, o, work, group, half, turn, tokens, p, TOKENS)
            if turn + O_STAGES < n_turns:  # here: the proxy fence of a turn would wait for the other CTA to see it
                self.arrive_at_both(shared.empty + stage, lane, half)
        cute.arch.cp_async_bulk_wait_group(0, read=True)
