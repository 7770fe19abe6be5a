"""Where the states of the prefill kernel's chain come from, and where they go to."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32, Int64

from kda_kernels.cute.math import float_bits
from kda_kernels.cute.prefill.config import (
    ALIGNMENT,
    CONSUMERS,
    JOINED,
    LEAST_EXPONENT,
    MOST_EXPONENT,
    Part,
    PrefillSpec,
)
from kda_kernels.cute.prefill.scale import RowScaler
from kda_kernels.cute.prefill.shared import vector
from kda_kernels.cute.prefill.work import Barrier, Products, States, Work
from kda_kernels.cute.ptx import larger_size, rest, select, send_bytes


class StateTransfer(RowScaler):
    """Before the first chunk and after the last; a lane's numbers as accumulators lie, see `Consumer`."""

    spec: PrefillSpec

    def inside(self, group: Int32, p: Int32) -> Int32:
        """Where in a head's state this lane's first number is."""
        lane = p & 31
        return (64 * group + 16 * (p >> 5) + (lane >> 2)) * self.spec.K + 2 * (lane & 3)

    @cute.jit
    def first_state(self, states: States, work: Work, products: Products, group: Int32, p: Int32, inside: Int32):
        """The state before the first chunk; of checkpoints that no chunk ends at, NaN into their rows."""
        spec = self.spec
        lane = p & 31
        S = cute.make_rmem_tensor(products.write.partition_shape_C((64, spec.K)), Float32)
        if cutlass.const_expr(spec.part.splits or spec.part is Part.SUMMARY):
            for j in cutlass.range_constexpr(spec.K // 8):  # nothing, or the identity
                for i in cutlass.range_constexpr(4):
                    row, channel = 64 * group + 16 * (p >> 5) + (lane >> 2) + i // 2 * 8, 8 * j + 2 * (lane & 3) + i % 2
                    S[4 * j + i] = select(work.kind == 1 and row == channel, Float32(1.0), Float32(0.0))
        else:
            S.fill(0.0)
        comes_in = work.index == 0 and work.begin == 0
        if cutlass.const_expr(spec.fresh):
            comes_in = comes_in and states.started[work.i_n] != 0
        if cutlass.const_expr(spec.part is Part.KEPT):
            self.load_state(S, states.starts, Int64(self.sequences(states) + work.unit), inside)
        elif cutlass.const_expr(spec.part.whole and spec.h0 is not None and not spec.fresh):
            self.load_state(S, states.h0, work.slot, inside)
        elif cutlass.const_expr(spec.part.reads and spec.h0 is not None):
            if comes_in:
                self.load_state(S, states.h0, work.slot, inside)
        if cutlass.const_expr(spec.part.splits):
            if work.index == 0 and work.begin > 0:
                self.load_state(S, states.starts, Int64(work.i_n), inside)
        if cutlass.const_expr(spec.keeps):
            if work.index == 0 and work.kind == 0 and work.begin == 0:
                self.mark_unaligned(states, work, inside)
        return S

    def sequences(self, states: States) -> Int32:
        """Of the batch: behind their states, `starts` has those before units."""
        return Int32(states.starts.shape[0]) - states.units

    @cute.jit
    def last_state(self, S, shared, states: States, work: Work, inside: Int32, group: Int32, p: Int32):
        """The state after the last chunk to where it goes."""
        spec = self.spec
        final = cutlass.const_expr(spec.pooled or spec.ht is not None)
        target = states.h0 if spec.pooled else states.ht
        if cutlass.const_expr(spec.part is Part.SUMMARY):
            self.send_state(S, shared, states.summaries, Int64(2 * work.unit + work.kind), inside, group, p)
        elif cutlass.const_expr(spec.part is Part.KEPT):
            self.store_row(S, states, work.i_n, work.index, inside)
        elif cutlass.const_expr(spec.part.splits):
            if work.kind == 1:
                send = self.send_half if spec.part is Part.SPLIT else self.send_parts
                send(S, shared, states.summaries, Int64(2 * work.unit + 1), work.i_hv, inside, group, p)
            elif work.index > 0:
                self.send_state(S, shared, states.summaries, Int64(2 * work.unit), inside, group, p)
            elif not work.last:
                self.send_state(S, shared, states.starts, Int64(self.sequences(states) + work.unit), inside, group, p)
            elif cutlass.const_expr(final):
                self.final_state(S, shared, target, work, inside, group, p)
        elif cutlass.const_expr(final):
            self.final_state(S, shared, target, work, inside, group, p)

    @cute.jit
    def final_state(self, S, shared, target, work: Work, inside: Int32, group: Int32, p: Int32):
        if cutlass.const_expr(target.element_type is Float32 and not self.spec.stays):
            self.send_state(S, shared, target, work.slot, inside, group, p)
        else:
            self.store_state(S, target, work.slot, inside)

    @cute.jit
    def load_state(self, S, states, slot: Int64, inside: Int32):
        for j in cutlass.range_constexpr(self.spec.K // 8):
            for h in cutlass.range_constexpr(2):
                pair = vector(states.iterator, slot * states.stride[0] + (inside + 8 * h * self.spec.K + 8 * j)).load()
                for e in cutlass.range_constexpr(2):
                    S[4 * j + 2 * h + e] = pair[e].to(Float32)

    def pairs(self, acc):
        """Of accumulators the numbers that lie beside each other: of columns 8j on, of row lane // 4 + 8h."""
        for j in range(cute.size(acc) // 4):
            for h in range(2):
                pair = cute.make_rmem_tensor(2, Float32)
                for e in range(2):
                    pair[e] = acc[4 * j + 2 * h + e]
                yield j, h, pair

    @cute.jit
    def store_state(self, S, states, slot: Int64, inside: Int32):
        """S rounded to the dtype of the states."""
        start, K = slot * states.stride[0], self.spec.K
        narrow = cutlass.const_expr(states.element_type.width == 16)
        col = 2 * (cute.arch.lane_idx() & 3)
        for block in cutlass.range_constexpr(K // 32):
            words = [[], []]
            for j in cutlass.range_constexpr(4 * block, 4 * block + 4):
                for h in cutlass.range_constexpr(2):
                    pair = cute.make_rmem_tensor(2, Float32)
                    for e in cutlass.range_constexpr(2):
                        pair[e] = S[4 * j + 2 * h + e]
                    rounded = pair.load().to(states.element_type)
                    if cutlass.const_expr(narrow):
                        word = cute.make_rmem_tensor(2, states.element_type)
                        word.store(rounded)
                        words[h].append(cute.recast_tensor(word, Int32)[0])
                    else:
                        vector(states.iterator, start + (inside + 8 * h * K + 8 * j)).store(rounded)
            if cutlass.const_expr(narrow):  # 16 bytes a lane: whole sectors, in a quarter of the stores
                for h in cutlass.range_constexpr(2):
                    place = start + (inside - col + 8 * h * K + 32 * block + 4 * col)
                    target = vector(cute.recast_ptr(states.iterator, dtype=Int32), place >> 1, 4)
                    target.store(self.across_quad(words[h], col >> 1).load())

    @cute.jit
    def across_quad(self, words: list, c: Int32):
        """Of four lanes the c-th gets word c of each."""
        odd, high = c & 1 == 1, c >= 2
        for i in (0, 2):
            got = cute.arch.shuffle_sync_bfly(Int32(cutlass.select_(odd, words[i], words[i + 1])), 1)
            words[i], words[i + 1] = (
                Int32(cutlass.select_(odd, got, words[i])), Int32(cutlass.select_(odd, words[i + 1], got))
            )  # fmt: skip
        out = cute.make_rmem_tensor(4, Int32)
        for i in (0, 1):
            got = cute.arch.shuffle_sync_bfly(Int32(cutlass.select_(high, words[i], words[i + 2])), 2)
            out[i] = Int32(cutlass.select_(high, got, words[i]))
            out[i + 2] = Int32(cutlass.select_(high, words[i + 2], got))
        return out

    @cute.jit
    def send_state(self, S, shared, states, slot: Int64, inside: Int32, group: Int32, p: Int32):
        """S in fp32, by way of shared memory where operands were: from registers a row leaves 32 bytes at a time."""
        K, lane = self.spec.K, p & 31
        pitch = K + 8  # in words; rows that are stored at once begin in different banks
        place = cute.recast_ptr(self.row_buffer(shared, group, p), dtype=Float32)
        row, col = lane >> 2, 2 * (lane & 3)
        for j, h, pair in self.pairs(S):
            vector(place, (row + 8 * h) * pitch + 8 * j + col).store(pair.load())
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_warp()
        if lane < 16:
            target = states.iterator + (slot * states.stride[0] + (inside - row * K - col + lane * K))
            send_bytes(target, place + lane * pitch, 4 * K)
        cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def send_parts(self, S, shared, states, slot: Int64, i_hv: Int32, inside: Int32, group: Int32, p: Int32):
        """S in two parts of bf16, [2, K, K], in the place of K * K numbers; as `send_state`."""
        K, lane = self.spec.K, p & 31
        square = self.spec.V * K
        pitch = K + 8  # in elements
        place = self.row_buffer(shared, group, p)
        row, col = lane >> 2, 2 * (lane & 3)
        for j, h, pair in self.pairs(S):
            rounded = cute.make_rmem_tensor(2, BFloat16)
            for part in cutlass.range_constexpr(2):
                rounded.store(pair.load().to(BFloat16))
                vector(place, (row + 8 * h + 16 * part) * pitch + 8 * j + col).store(rounded.load())
                rest(pair, rounded)
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_warp()
        words = cute.recast_ptr(states.iterator, dtype=BFloat16)
        # `inside` has one i_hv already
        first = inside - row * K - col + i_hv * square + (lane & 15) * K + (lane >> 4) * square
        send_bytes(words + (2 * slot * states.stride[0] + first), place + lane * pitch, 2 * K)
        cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def send_half(self, S, shared, states, slot: Int64, i_hv: Int32, inside: Int32, group: Int32, p: Int32):
        """S in fp16, [K, K], in units of a power of two in which its largest number is 2^JOINED to twice that, in the
        first half of the place of K * K numbers; behind it that power, fp32. As `send_state`."""
        K, lane, warp = self.spec.K, p & 31, 4 * group + (p >> 5)
        square = self.spec.V * K
        pitch = K + 8  # in elements
        most = cute.make_rmem_tensor(2, Float32)
        most.fill(0.0)
        self.largest(S, most)
        x = larger_size(most[0], most[1])
        for bit in (1, 2, 4, 8, 16):
            x = larger_size(x, cute.arch.shuffle_sync_bfly(x, bit))
        place = cute.recast_ptr(self.row_buffer(shared, group, p), dtype=Float16)
        if lane == 0:
            vector(shared.token, warp, 1)[0] = x
        cute.arch.barrier(barrier_id=Barrier.LEAVE, number_of_threads=CONSUMERS)
        for other in cutlass.range_constexpr(CONSUMERS // 32):
            x = larger_size(x, vector(shared.token, other, 1)[0])
        exponent = self.joined_exponent(x)
        factor = self.power(exponent)
        row, col = lane >> 2, 2 * (lane & 3)
        for j, h, pair in self.pairs(S):
            vector(place, (row + 8 * h) * pitch + 8 * j + col).store((pair.load() * factor).to(Float16))
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_warp()
        start = slot * states.stride[0]
        if lane < 16:
            # `inside` has one i_hv already
            first = inside - row * K - col + i_hv * square + lane * K
            send_bytes(
                cute.recast_ptr(states.iterator, dtype=Float16) + (2 * start + first), place + lane * pitch, 2 * K
            )
        if warp == 0 and lane == 0:
            vector(states.iterator, start + (i_hv * square + square // 2), 1)[0] = self.power(-exponent)
        cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0, read=True)

    def joined_exponent(self, largest: Float32) -> Int32:
        """Of the power of two that makes such a number 2^JOINED to twice that."""
        wanted = JOINED + 127 - (float_bits(largest) >> 23)
        return cutlass.min(cutlass.max(wanted, LEAST_EXPONENT), MOST_EXPONENT)

    @cute.jit
    def row_buffer(self, shared, group: Int32, p: Int32):
        """Of this warp, for 16 rows of a state on their way out, once both warpgroups are done with the last chunk."""
        cute.arch.barrier(barrier_id=Barrier.LEAVE, number_of_threads=CONSUMERS)
        rows = 2 * 16 * (self.spec.K + 8)
        return cute.recast_ptr(shared.rows, dtype=BFloat16) + cute.assume((4 * group + (p >> 5)) * rows, divby=rows)

    @cute.jit
    def store_row(self, S, states: States, i_n: Int32, column: Int32, inside: Int32):
        row = Int64(states.rows[i_n, column])
        if row >= 0 and row < states.kept.shape[0]:
            self.store_state(S, states.kept, row, inside)

    @cute.jit
    def mark_unaligned(self, states: States, work: Work, inside: Int32):
        """NaN into the rows of checkpoints where no chunk ends, so that it is seen."""
        if cutlass.const_expr(not self.spec.every):
            for column in cutlass.range(states.rows.shape[1], unroll=1):
                position = Int32(states.offsets[work.i_n, column])
                if position > 0 and position <= work.length and position % ALIGNMENT != 0:
                    nothing = cute.make_rmem_tensor(self.spec.K // 2, Float32)
                    nothing.fill(float("nan"))
                    self.store_row(nothing, states, work.i_n, column, inside)
