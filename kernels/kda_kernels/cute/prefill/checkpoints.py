"""States that leave the prefill kernel's chain on the way."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from kda_kernels.cute.prefill.config import CHUNK, CONSUMERS, STAGES
from kda_kernels.cute.prefill.shared import arrive, by_chunk, piece, swizzled, vector
from kda_kernels.cute.prefill.states import StateTransfer
from kda_kernels.cute.prefill.work import Barrier, Exit, Link, Registers, States, Work
from kda_kernels.cute.ptx import store_matrices


class CheckpointTransfer(StateTransfer):
    """At the end of every second chunk, by TMA from where the chunk's operands were. They change no bit of anything."""

    def first_column(self, states: States, work: Work):
        """Of checkpoints at regular distances the first one in this round, and the tokens at which it is due."""
        column = Int32(0)
        if self.spec.keeps and self.spec.every:
            column = work.begin // states.every
        return column, (column + 1) * states.every

    @cute.jit
    def next_row(self, states: States, work: Work, position: Int32, column: Int32, due: Int32):
        """Of a checkpoint at regular distances its row, -1 if none is due; and what `first_column` says of the next."""
        row = states.rows.element_type(-1)
        if position == due:
            if column < states.rows.shape[1]:
                row = states.rows[work.i_n, column]
            column, due = column + 1, due + states.every
        return row, column, due

    @cute.jit
    def keep(self, own: Registers, states: States, work: Work, position: Int32, row, way: Exit):
        """The state after `position` tokens of a sequence into the rows of the checkpoints that are there.

        At regular distances there is one of them at most, in `row`. Both warpgroups come here, though there be none.
        """
        self.await_vacant(way.link)
        if way.link.tokens >= CHUNK and work.kind == 0 and work.index == 0:
            if cutlass.const_expr(self.spec.every):
                self.send_tiles(own, Int32(row), way)
            else:
                for column in cutlass.range(states.rows.shape[1], unroll=1):
                    if Int32(states.offsets[work.i_n, column]) == position:
                        self.send_tiles(own, Int32(states.rows[work.i_n, column]), way)

    @cute.jit
    def vacate(self, half: cutlass.Constexpr[int], link: Link):
        """Says that this warpgroup is done with what the other's half of a checkpoint takes the place of.

        The first warpgroup's takes that of [kE; qE], which is read early in a chunk, the other's that of kI: so the
        first may be ahead of the other, and they do not multiply at the same time. A warpgroup may be two chunks ahead,
        but not three: every other checkpoint has barriers of its own. What compute-sanitizer can follow: both meet.
        """
        if cutlass.const_expr(not self.spec.each_arrives):
            if link.group == 1 - half:
                cute.arch.barrier_arrive(barrier_id=self.vacancy(link) + half, number_of_threads=CONSUMERS)

    @cute.jit
    def await_vacant(self, link: Link):
        """Waits until this warpgroup's half of a checkpoint may take its place."""
        barrier = Int32(Barrier.LEAVE) if self.spec.each_arrives else self.vacancy(link) + link.group
        cute.arch.barrier(barrier_id=barrier, number_of_threads=CONSUMERS)

    def vacancy(self, link: Link) -> Int32:
        return Barrier.VACANT + (link.number & 2)

    @cute.jit
    def send_tiles(self, own: Registers, row: Int32, way: Exit):
        """The state to a checkpoint's row, if there is such a row.

        It leaves in tiles of a warp's 16 value channels and 128 bytes of key channels, two of which have room.
        """
        link, dtype = way.link, way.kept.element_type
        channels = 1024 // dtype.width
        if row >= 0 and row < way.kept.shape[0]:
            half = cute.arch.make_warp_uniform(link.group * STAGES + link.stage)
            place = piece(way.shared.rows, half, 2 * CHUNK * self.spec.K)
            place = cute.recast_ptr(place + cute.assume(link.warp * (2 * 16 * 64), divby=2 * 16 * 64), dtype=dtype)
            for part in cutlass.range_constexpr(self.spec.K // channels):
                if cutlass.const_expr(part >= 2):
                    cute.arch.cp_async_bulk_wait_group(1, read=True)
                    cute.arch.sync_warp()
                elif cutlass.const_expr(part == 0 and not self.spec.every):  # then it may go to two rows
                    cute.arch.cp_async_bulk_wait_group(0, read=True)
                    cute.arch.sync_warp()
                tile = place + part % 2 * (16 * channels)
                values = cute.make_rmem_tensor(channels // 2, Float32)
                for i in cutlass.range_constexpr(channels // 2):
                    values[i] = own.S[channels // 2 * part + i]
                if cutlass.const_expr(self.spec.bounded and not self.spec.to_the_end):
                    self.decay(values, link.decay + (self.spec.K + channels * part), link.col)
                if cutlass.const_expr(self.spec.scaled):
                    self.scale_rows(values, self.powers(own.exponents, -1))
                self.put(values, tile, dtype, link.lane)
                cute.arch.fence_proxy("async.shared", space="cta")
                cute.arch.sync_warp()
                here, there = by_chunk(way.atom, way.tiles[None, None, way.i_hv, row], tile, 0, channels, 16)
                cute.copy(way.atom, here, there[None, 4 * link.group + link.warp, part])
                cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def put(self, values, tile, dtype: cutlass.Constexpr, lane: Int32):
        """16 rows of accumulators into a tile of as many columns."""
        if cutlass.const_expr(dtype.width == 16):
            # 4 matrices of 8 rows at once, below each other and then beside: lanes give the addresses of rows
            rounded = cute.make_rmem_tensor(cute.size(values), dtype)
            rounded.store(values.load().to(dtype))
            words = cute.recast_tensor(rounded, Int32)
            for j in cutlass.range_constexpr(0, 8, 2):
                target = tile + swizzled(lane & 15, j + (lane >> 4), 8, dtype, 16)
                store_matrices(target, tuple(words[2 * j + i] for i in range(4)))
        else:
            for j, h, pair in self.pairs(values):
                place = swizzled((lane >> 2) + 8 * h, 4 * j + (lane & 3), 2, dtype, 16)
                vector(tile, place).store(pair.load())

    @cute.jit
    def hand_back(self, shared, owed: Int32, lane: Int32):
        """Says of the stage from which a state leaves, or of none (-1), that what this warp had there has left."""
        if owed >= 0:
            cute.arch.cp_async_bulk_wait_group(0, read=True)
            arrive(shared.empty + owed, lane, self.spec.each_arrives)
