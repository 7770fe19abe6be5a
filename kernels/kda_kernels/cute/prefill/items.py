"""How a CTA that stays comes by its items: heads of sequences, of which there are more than multiprocessors.

One warp takes them by a counter in global memory, so that lengths may differ and a CTA that starts late takes fewer;
it tells all others through shared memory. It takes one ahead of what is prepared, but none while that is a long one:
others are free sooner. Chunks of all items go through the stages in one row: the next item's are prepared while the
chain ends the last one. An item may have any number of chunks, also none.
"""

import dataclasses
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32

from kda_kernels.cute.prefill.config import CHUNK, SHORT, SLOTS, THREADS, PrefillSpec
from kda_kernels.cute.prefill.shared import arrive
from kda_kernels.cute.prefill.work import TOLD, Batch, Deed, Work

ANNOUNCER = THREADS // 32 - 3  # the warp: of the second warpgroup that prepares, whose first chunk is needed later


class Items:
    """What the halves of the kernel run, one item or many. In the place of `work` is None where CTAs stay."""

    spec: PrefillSpec
    assign: Any
    do_nothing: Any

    @cute.jit
    def each(self, shared, batch: Batch, work, prepares: cutlass.Constexpr[bool], run: cutlass.Constexpr):
        """Calls `run` with `work` and 0, or, if CTAs stay, with one item after another and its number on this CTA.

        Args: prepares: whether this is one of the warps that prepare, since one of these takes items.
        """
        if cutlass.const_expr(not self.spec.stays):
            run(work, 0)
        else:
            turn, announced, goes_on = Int32(0), Int32(0), Boolean(True)
            while goes_on:
                if cutlass.const_expr(prepares):
                    if self.announces():
                        while self.is_due(shared, announced, turn):
                            self.announce(shared, batch, announced)
                            announced = announced + 1
                item = self.known(shared, turn)
                goes_on = item.deed != Deed.END
                if item.deed == Deed.RUN:
                    run(item, turn)
                else:
                    self.do_nothing(item, batch.o)
                arrive(shared.done + (turn & (SLOTS - 1)), cute.arch.lane_idx(), self.spec.each_arrives)
                turn = turn + 1

    @cute.jit
    def is_due(self, shared, number: Int32, turn: Int32):
        """Whether this item of the CTA is to be known while the `turn`-th is prepared."""
        return number <= turn or (number == turn + 1 and self.item(shared, turn).n_chunks <= SHORT)

    def announces(self):
        """Whether this is the warp that tells the others. A vote, since it is the same for all lanes."""
        return cute.arch.vote_any_sync(cute.arch.thread_idx()[0] >> 5 == ANNOUNCER)

    @cute.jit
    def announce(self, shared, batch: Batch, turn: Int32):
        """A warp takes an item, if there is one left, and tells the others what it is."""
        assert batch.counter is not None
        slot, lane = turn & (SLOTS - 1), cute.arch.lane_idx()
        number, before = cute.arch.block_idx()[0], Int32(0)
        if turn > 0:
            if lane == 0:
                number = cute.arch.grid_dim()[0] + cute.arch.atomic_add(batch.counter.iterator, Int32(1))
            number = cute.arch.make_warp_uniform(cute.arch.shuffle_sync(number, 0))
            last = self.item(shared, turn - 1)
            before = last.before
            if last.deed == Deed.RUN:
                before = before + last.n_chunks
        cute.arch.mbarrier_wait(shared.done + slot, self.phase_of(turn) ^ 1)
        place = shared.items + slot * len(TOLD)
        if number < batch.items:
            work = dataclasses.replace(self.assign(number, batch), before=before)
            words = work.words()
            if lane == 0:
                for i in cutlass.range_constexpr(len(TOLD)):
                    place[i] = words[i]
        elif lane == 0:
            place[TOLD.index("deed")] = Int32(Deed.END)
            place[TOLD.index("n_tokens")] = Int32(CHUNK * SHORT + 1)  # so that nothing is due after it
        cute.arch.sync_warp()
        arrive(shared.told + slot, lane, self.spec.each_arrives)

    @cute.jit
    def known(self, shared, turn: Int32) -> Work:
        """The `turn`-th item of this CTA, once it is known."""
        cute.arch.mbarrier_wait(shared.told + (turn & (SLOTS - 1)), self.phase_of(turn))
        cute.arch.sync_warp()
        item = self.item(shared, turn)
        steering = {name: cute.arch.make_warp_uniform(getattr(item, name)) for name in ("deed", "before", "n_tokens")}
        return dataclasses.replace(item, **steering)

    def item(self, shared, turn: Int32) -> Work:
        """The same again: read from shared memory where it is needed, it takes no registers in between."""
        place = shared.items + (turn & (SLOTS - 1)) * len(TOLD)
        return Work.of([place[i] for i in range(len(TOLD))])

    def phase_of(self, turn: Int32) -> Int32:
        """The phase in which a slot's barriers are for this item."""
        return turn >> (SLOTS.bit_length() - 1) & 1

    def now(self, shared, work: Work, turn) -> Work:
        """`work`, the `turn`-th item, by `item` if CTAs stay."""
        return self.item(shared, turn) if self.spec.stays else work

    def first_chunk(self, group: Int32, before: Int32):
        """The first chunk that a warpgroup prepares of an item which comes after so many chunks."""
        return (group - before) & 1 if self.spec.stays else group
