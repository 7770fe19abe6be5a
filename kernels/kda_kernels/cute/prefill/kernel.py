"""The fused prefill kernel: chunk-local work and the chain over chunks meet in one CTA, through shared memory.

A CTA has one value head of one sequence, or of one segment (`plan.py`), or one head after another (`items.py`). Two
warpgroups (`produce.py`, for gates without a bound `unbounded.py`) turn every other chunk of 32 tokens each into what
the chain needs; two (`consume.py`) hold the state, 64 value channels each, and run the chain; states come and go by
`states.py` and `checkpoints.py`.

With G the running sum of log2 decays in a chunk and m its middle (after token 15), for token i and channel c:

    kE = k exp2(G - m)     qE = q exp2(G - m)     kI = k exp2(m - G)

so that kE . kI of tokens i >= j is k_i . (exp2(G_i - G_j) k_j), and one reference does for the whole chunk: gates are
bounded by -5, hence all exponents by 16 * 5. L2 norms and beta are factors of whole tokens, a = |k|^-1 beta,
b = |k|^-2 beta, and are left out of the operands. With the state S~ (V x K) as it is decayed to m:

    L = b tril(kE kI^T, -1)                          w = (I + L)^-1 (a v - b S~ kE)
    o = scale |q|^-1 (S~ qE + tril(qE kI^T) w)       S~ <- S~ + w kI

and from one chunk's m to the next one's S~ decays once, by exp2(G_31 - m + m'), of which G_31 - m is -18 at least
(`Preparer.decays`); where bits must depend on a sequence alone, or kI is in two parts, first to the chunk's end and
then on. A state that leaves on the way is decayed to the chunk's end beside S~. w is u / |k|: the update that the delta
rule writes. The inverse of each diagonal block of 8 tokens is made in fp32 by substitution, what lies below them from
products of numbers of 16 bits (`relate.py`); the warps that run the chain make it, each in turn, but where states leave
in fp32. w kI is a product of tf32 numbers where shared memory has room for kI in fp32, L and tril(qE kI^T) are products
of bf16 numbers.

Keys may be long: in the first half of a chunk kE, qE and w are divided by 2^25 and kI is multiplied by it, in the
second half the other way. So nothing overflows unless q or k is longer than 2^37, and then o is made NaN.
"""

import dataclasses

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.utils.hopper_helpers import make_trivial_tiled_mma

from kda_kernels.cute.arguments import DTYPES
from kda_kernels.cute.prefill.config import (
    ALIGNMENT,
    CHUNK,
    CONSUMERS,
    SLOTS,
    STAGES,
    THREADS,
    Part,
    PrefillSpec,
)
from kda_kernels.cute.prefill.consume import Consumer
from kda_kernels.cute.prefill.items import Items
from kda_kernels.cute.prefill.produce import Producer
from kda_kernels.cute.prefill.shared import allocate, tile_layout, vector
from kda_kernels.cute.prefill.unbounded import Unbounded
from kda_kernels.cute.prefill.work import Batch, Deed, Products, States, Work
from kda_kernels.cute.ptx import fresh

K_MAJOR, MN_MAJOR = cute.nvgpu.OperandMajorMode.K, cute.nvgpu.OperandMajorMode.MN
# A thread of those that prepare and of those that consume; the sum over the warpgroups is the register file.
REGISTERS = 96, 160


class PrefillKernel(Items, Producer, Unbounded, Consumer):
    """Called with tensors of the shapes of `Inputs`; see `build.py`."""

    def __init__(self, spec: PrefillSpec) -> None:
        self.spec = spec
        self.element = DTYPES[spec.dtype]

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
        h0: cute.Tensor | None,  # [N or P, HV, V, K]
        ht: cute.Tensor | None,  # [N, HV, V, K]
        state_indices: cute.Tensor | None,  # [N]
        cu_seqlens: cute.Tensor | None,  # [N + 1]
        started: cute.Tensor | None,  # has_initial_state [N]
        workspace: cute.Tensor | None,  # fp32, see below
        kept: cute.Tensor | None,  # [R, HV, V, K]: where checkpoints go
        rows: cute.Tensor | None,  # [N, C]: the row of each
        offsets: cute.Tensor | None,  # [N, C]: the tokens before each; None: `every` of them
        null_slot: Int32,  # a slot that is padding too; a negative number: none
        every: Int32,
        units: Int32,  # of all sequences in a round, at most
        scale: Float32,
        lower_bound: Float32,
        lead: Int32,  # tokens of a first segment, and of the others: multiples of CHUNK
        segment: Int32,
        begin: Int32,  # of each sequence, the tokens that this round is about: from `begin` on, `limit` at most
        limit: Int32,
        sms: Int32,  # multiprocessors: so many CTAs, if they stay
        stream,
    ):
        """In `workspace`, one behind the other: `starts` [N + units, HV, V, K], the states before this round and before
        each unit; `summaries` [2 units, HV, V, K], E and T of each unit, T as `send_half` or, of a cut, as
        `send_parts`; and in the dtype of q `reads` [units * segment, HV, K], what each token reads of the state before
        its unit. For summaries just those; for CTAs that stay a 0, from which they count items.
        """
        part = self.spec.part
        sequences = cu_seqlens.shape[0] - 1 if cutlass.const_expr(self.spec.packed) else q.shape[0]
        HV = v.shape[2]
        ctas = HV * sequences
        starts, summaries, reads, counter = None, None, None, None
        if cutlass.const_expr(part is Part.SUMMARY):
            ctas = 2 * ctas
            summaries = self.states(workspace.iterator, 2 * sequences, HV)
        elif cutlass.const_expr(not part.whole):
            starts, summaries, reads = self.carve(workspace, sequences, units, segment, HV, q.element_type)
            if cutlass.const_expr(part.splits):
                ctas = ctas + 2 * HV * units
            elif cutlass.const_expr(part is Part.KEPT):
                summaries, reads = None, None
                ctas = ctas * rows.shape[1]
        heads = cute.fast_divmod_create_divisor_v2(Int32(HV))
        items = Int32(ctas)
        if cutlass.const_expr(self.spec.stays):
            ctas = sms
            counter = cute.make_tensor(cute.recast_ptr(workspace.iterator, dtype=Int32), cute.make_layout(1))
        if cutlass.const_expr(part is Part.JOIN):
            self.launch_join(
                o, h0, ht, state_indices, cu_seqlens, starts, summaries, reads, sequences, null_slot, units, lead,
                segment, begin, limit, sms, heads, stream,
            )  # fmt: skip
        else:
            products = (
                self.product_of(CHUNK, MN_MAJOR),  # with the inverse
                self.product_of(CHUNK),  # with tril(qE kI^T)
                self.product_of(self.spec.K, MN_MAJOR),  # w kI
            )
            load, store, dense = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp(), (1, 3, 2, 0)
            tiles = [self.by_tile(x, load, self.spec.K, dense) for x in (q, k, v, g)]
            tiles.append(self.by_tile(o, store, 64, dense))
            if cutlass.const_expr(reads is not None):
                tiles.append(self.by_tile(reads, store, 64, (0, 2, 1)))
            if cutlass.const_expr(self.spec.keeps):
                tiles.append(self.by_tile(kept, store, 1024 // kept.element_type.width, (2, 3, 1, 0), 16))
            self.kernel(
                [atom for atom, _ in tiles], [x for _, x in tiles], g.element_type, beta, A_log, dt_bias, o, h0, ht,
                state_indices, cu_seqlens, started, summaries, starts, kept, rows, offsets, null_slot, every, units,
                scale, lower_bound, lead, segment, begin, limit, items, counter, heads, *products,
            ).launch(grid=(ctas, 1, 1), block=(THREADS, 1, 1), stream=stream, min_blocks_per_mp=1)  # fmt: skip

    def carve(self, workspace, sequences, units, segment, HV, dtype):
        """`starts`, `summaries` and `reads` of a split."""
        starts = self.states(workspace.iterator, sequences + units, HV)
        place = self.behind(workspace.iterator, sequences + units, starts)
        summaries = self.states(place, 2 * units, HV)
        place = cute.recast_ptr(self.behind(place, 2 * units, summaries), dtype=dtype)
        apart = cute.assume(HV * self.spec.K, divby=self.spec.K)
        inner = cute.make_layout((units * segment, HV, self.spec.K), stride=(apart, self.spec.K, 1))
        return starts, summaries, cute.make_tensor(place, inner)

    def product_of(self, n: int, b_major=K_MAJOR, source=warpgroup.OperandSource.RMEM, dtype=None):
        """64 rows by n columns in a warpgroup, fp32; of operands of `dtype`, else of the kernel's."""
        dtype = dtype or self.element
        return make_trivial_tiled_mma(dtype, dtype, K_MAJOR, b_major, Float32, (1, 1, 1), (64, n), source)

    def states(self, first, outer, heads):
        """[outer, heads, V, K], contiguous, from `first` on."""
        V, K = self.spec.V, self.spec.K
        strides = (cute.assume(heads * (V * K), divby=V * K), V * K, K, 1)
        return cute.make_tensor(first, cute.make_layout((outer, heads, V, K), stride=strides))

    def behind(self, first, outer, states):
        return first + cute.assume(Int64(outer) * Int64(states.stride[0]), divby=self.spec.V * self.spec.K)

    def by_tile(self, x: cute.Tensor, copy, channels: int, order: tuple[int, ...], rows: int = CHUNK):
        """TMA's view of an input or output, [T, K, heads, B], in tiles of a chunk and so many channels."""
        layout = cute.make_layout(tuple(x.shape[i] for i in order), stride=tuple(x.stride[i] for i in order))
        return cpasync.make_tiled_tma_atom(
            copy, cute.make_tensor(x.iterator, layout), tile_layout(x.element_type, channels, rows), (rows, channels)
        )

    @cute.kernel
    def kernel(
        self,
        atoms: list[cute.CopyAtom],  # of q, k, v, g, o, reads and checkpoints
        tiles: list[cute.Tensor],
        g_dtype: cutlass.Constexpr,
        beta: cute.Tensor,
        A_log: cute.Tensor | None,
        dt_bias: cute.Tensor | None,
        o: cute.Tensor,
        h0: cute.Tensor | None,
        ht: cute.Tensor | None,
        state_indices: cute.Tensor | None,
        cu_seqlens: cute.Tensor | None,
        started: cute.Tensor | None,
        summaries: cute.Tensor | None,
        starts: cute.Tensor | None,
        kept: cute.Tensor | None,
        rows: cute.Tensor | None,
        offsets: cute.Tensor | None,
        null_slot: Int32,
        every: Int32,
        units: Int32,
        scale: Float32,
        lower_bound: Float32,
        lead: Int32,
        segment: Int32,
        begin: Int32,
        limit: Int32,
        items: Int32,
        counter: cute.Tensor | None,
        heads: cute.FastDivmodDivisorV2,
        solve: cute.TiledMma,
        mix: cute.TiledMma,
        write: cute.TiledMma,
    ):
        spec = self.spec
        pid = cute.arch.block_idx()[0]
        if cutlass.const_expr(spec.part is Part.SPLIT):
            cute.arch.griddepcontrol_launch_dependents()  # the join's CTAs may wait on SMs that are idle
        states = States(h0, ht, started, summaries, starts, kept, rows, offsets, every, units)
        batch = Batch(
            o, A_log, dt_bias, state_indices, cu_seqlens, heads, null_slot, lead, segment, begin, limit, items, counter,
            states,
        )  # fmt: skip
        products = Products(solve, mix, write)
        if cutlass.const_expr(spec.stays):
            self.run(atoms, tiles, g_dtype, beta, batch, None, scale, lower_bound, products)
        else:
            work, found, live, wrong = self.locate(pid, batch)
            if work.slot < 0 or wrong:  # padding, or no slot: the pool is neither read nor written
                if cutlass.const_expr(spec.part.reads):
                    if found and work.kind == 0:
                        tid = cute.arch.thread_idx()[0]
                        self.write_nothing(o, wrong, work.b, work.first, work.n_tokens, 1, work.i_hv, tid)
            elif live:
                self.run(atoms, tiles, g_dtype, beta, batch, work, scale, lower_bound, products)
        if cutlass.const_expr(spec.packed and spec.part.reads):
            if begin == 0:
                self.clear_tail(o, cu_seqlens, heads, items)

    @cute.jit
    def locate(self, number: Int32, batch: Batch):
        """What an item is, whether there is one, whether it is to be run, whether its slot is none of the pool's.

        To be called by whole warps.
        """
        spec, o, cu_seqlens, states = self.spec, batch.o, batch.cu_seqlens, batch.states
        lead, segment, begin, limit = batch.lead, batch.segment, batch.begin, batch.limit
        i_n, i_hv = divmod(number, batch.heads)
        i_n, i_hv = cute.arch.make_warp_uniform(i_n), cute.arch.make_warp_uniform(i_hv)
        # a unit is a segment that is not the first of its sequence; `index` counts the segments of a sequence
        kind, index, unit, last = Int32(0), Int32(0), Int32(0), True
        if cutlass.const_expr(spec.part is Part.SUMMARY):
            kind, i_n = i_n & 1, i_n >> 1
            unit = i_n
        elif cutlass.const_expr(spec.part.splits):
            i_n, kind, index, unit, last = self.find(
                i_n, cu_seqlens, Int32(o.shape[0]), Int32(o.shape[1]), lead, segment, begin, limit
            )
        elif cutlass.const_expr(spec.part is Part.KEPT):
            column = i_n % Int32(states.rows.shape[1])
            i_n = i_n // Int32(states.rows.shape[1])
        elif cutlass.const_expr(spec.packed):
            i_n = self.longest_first(i_n, cu_seqlens)
        found = i_n >= 0
        i_n = i_n if found else Int32(0)
        slot, wrong = Int64(i_n), Boolean(False)
        if cutlass.const_expr(spec.pooled):
            slot = Int64(batch.state_indices[i_n])
            if slot == batch.null_slot:
                slot = Int64(-1)
            wrong = slot >= states.h0.shape[0]
        b, first, n_tokens = i_n, Int32(0), Int32(o.shape[1])
        if cutlass.const_expr(spec.packed):
            b, first = Int32(0), Int32(cu_seqlens[i_n])
            n_tokens = Int32(cu_seqlens[i_n + 1]) - first
        length = n_tokens
        if cutlass.const_expr(spec.part is Part.KEPT):
            position = self.position(states.offsets, states.every, i_n, column) - begin
            found = position > lead and position <= cutlass.min(n_tokens - begin, limit)
            found = found and (begin + position) % ALIGNMENT == 0
            index = (cutlass.max(position - lead, 1) + (segment - 1)) // segment
            unit = self.units_before(i_n, cu_seqlens, Int32(o.shape[1]), lead, segment, begin, limit) + index - 1
            offset = lead + (index - 1) * segment
            n_tokens = position - offset
            first = first + (begin + offset)
            index = column  # of the checkpoint
        if cutlass.const_expr(spec.part.splits):
            offset = Int32(0) if index == 0 else lead + (index - 1) * segment
            n_tokens = cutlass.min(cutlass.max(n_tokens - begin, 0), limit) - offset
            n_tokens = cutlass.min(n_tokens, lead if index == 0 else segment)
            first = first + (begin + offset)

        # an empty sequence leaves its slot of a pool alone, but a state that is not in place still has to be copied
        live = found
        if cutlass.const_expr(spec.part.reads and spec.pooled):
            live = found and n_tokens > 0
        elif cutlass.const_expr(spec.part.splits):
            live = found and (n_tokens > 0 or begin == 0)
        work = Work(i_n, i_hv, slot, kind, index, unit, last, b, first, length, n_tokens, segment, begin)
        return work, found, live, wrong

    @cute.jit
    def assign(self, number: Int32, batch: Batch) -> Work:
        """`locate`, and what is to be done."""
        work, found, live, wrong = self.locate(number, batch)
        deed = Int32(Deed.NOTHING)
        if work.slot < 0 or wrong:
            if found:
                deed = Int32(Deed.NAN) if wrong else Int32(Deed.ZEROS)
        elif live:
            deed = Int32(Deed.RUN)
        return dataclasses.replace(work, deed=deed)

    @cute.jit
    def find(
        self, rank: Int32, cu_seqlens, B: Int32, T: Int32, lead: Int32, segment: Int32, begin: Int32, limit: Int32
    ):
        """What a CTA works on: sequence (-1: nothing), kind, index of the segment, unit; whether it is the last one.

        First segments, the longest, come first: hardware starts CTAs in their order. Behind them E and T of all units,
        which are counted sequence by sequence. Of a first segment, `unit` is the one that follows.
        """
        N = B
        if cutlass.const_expr(self.spec.packed):
            N = Int32(cu_seqlens.shape[0] - 1)
        leads = rank < N
        unit, kind = (rank - N) >> 1, (rank - N) & 1
        if leads:
            unit, kind = Int32(0), Int32(0)
        if cutlass.const_expr(self.spec.packed):
            i_n, index, last, before = Int32(-1), Int32(0), True, Int32(0)
            for n in cutlass.range(N, unroll=1):
                count = self.units(Int32(cu_seqlens[n + 1]) - Int32(cu_seqlens[n]), lead, segment, begin, limit)
                if leads and n == rank:
                    i_n, unit, last = Int32(n), before, count == 0
                if not leads and unit >= before and unit < before + count:
                    i_n, index = Int32(n), unit - before + 1
                before = before + count
            return i_n, kind, index, unit, last
        else:
            count = self.units(T, lead, segment, begin, limit)
            if leads:
                unit = rank * count
            i_n = rank if leads else unit // cutlass.max(count, 1)
            index = Int32(0) if leads else unit - i_n * count + 1
            if i_n >= N:
                i_n = Int32(-1)
            return i_n, kind, index, unit, count == 0

    @cute.jit
    def units_before(
        self, i_n: Int32, cu_seqlens, T: Int32, lead: Int32, segment: Int32, begin: Int32, limit: Int32
    ):  # fmt: skip
        """Units of all sequences before one."""
        if cutlass.const_expr(self.spec.packed):
            before = Int32(0)
            for n in cutlass.range(i_n, unroll=1):
                length = Int32(cu_seqlens[n + 1]) - Int32(cu_seqlens[n])
                before = before + self.units(length, lead, segment, begin, limit)
            return before
        else:
            return i_n * self.units(T, lead, segment, begin, limit)

    @cute.jit
    def position(self, offsets, every: Int32, i_n: Int32, column: Int32):
        """Of a checkpoint: the tokens of its sequence before it."""
        if cutlass.const_expr(self.spec.every):
            return (column + 1) * every
        else:
            return Int32(offsets[i_n, column])

    @cute.jit
    def units(self, length: Int32, lead: Int32, segment: Int32, begin: Int32, limit: Int32):
        """How many segments a sequence has in this round behind its first."""
        length = cutlass.min(length - begin, limit)
        return cutlass.max(length - lead + (segment - 1), 0) // segment

    @cute.jit
    def longest_first(self, rank: Int32, cu_seqlens):
        """The sequence of this rank by length, so that short ones fill the gaps; more than 32 run as they come."""
        N = Int32(cu_seqlens.shape[0] - 1)
        i_n = rank
        if N > 1 and N <= 32:
            lane = cute.arch.lane_idx()
            mine = Int32(-1)
            if lane < N:
                mine = Int32(cu_seqlens[lane + 1]) - Int32(cu_seqlens[lane])
            place = Int32(0)
            for n in cutlass.range_constexpr(32):
                other = cute.arch.shuffle_sync(mine, n)
                if other > mine or (other == mine and n < lane):
                    place = place + 1
            i_n = cute.arch.popc(cute.arch.vote_ballot_sync(place == rank) - 1)
        return i_n

    @cute.jit
    def run(
        self, atoms, tiles, g_dtype: cutlass.Constexpr, beta, batch: Batch, work, scale: Float32, lower_bound: Float32,
        products: Products,
    ):  # fmt: skip
        """The item `work`, or, if CTAs stay, one after another."""
        tid = cute.arch.thread_idx()[0]
        shared = allocate(self.spec, self.element, g_dtype)
        if tid == 0:
            self.make_barriers(shared)
        if tid < 8:
            vector(shared.zeros, tid, 1)[0] = self.element(0.0)
        zeros = cute.make_rmem_tensor(8, self.element)
        zeros.fill(0.0)
        pieces = STAGES * (1 + self.spec.inverse_parts) * CHUNK * CHUNK // 8
        for i in cutlass.range(tid, pieces, THREADS, unroll=1):  # zero over the diagonals
            vector(shared.mix, 8 * i, 8).store(zeros.load())
        cute.arch.sync_threads()

        group = cute.arch.make_warp_uniform(tid >> 7)
        if group < CONSUMERS // 128:
            cute.arch.setmaxregister_increase(REGISTERS[1])
            self.each(
                shared, batch, work, False,
                lambda work, turn: self.consume(
                    shared, atoms, tiles, batch.o, batch.states, work, turn, products, group
                ),
            )  # fmt: skip
        else:
            cute.arch.setmaxregister_decrease(REGISTERS[0])
            group = group - CONSUMERS // 128
            produce = self.produce if self.spec.bounded else self.produce_unbounded
            self.each(
                shared, batch, work, True,
                lambda work, turn: produce(
                    shared, atoms, tiles, beta, batch, work, turn, scale, lower_bound, group
                ),
            )  # fmt: skip

    @cute.jit
    def make_barriers(self, shared):
        each = self.spec.each_arrives
        for s in cutlass.range_constexpr(STAGES):
            # v, and the warps' last pieces
            cute.arch.mbarrier_init(shared.full + s, 1 + (128 if each else 4 if self.spec.chain_inverts else 3))
            cute.arch.mbarrier_init(shared.empty + s, CONSUMERS // (1 if each else 32))
            cute.arch.mbarrier_init(shared.ended + s, 64 if each else 2)
            cute.arch.mbarrier_init(shared.inverted + s, 32 if each else 1)
        for s in cutlass.range_constexpr(2):
            cute.arch.mbarrier_init(shared.loaded + s, 1)
            cute.arch.mbarrier_init(shared.related + s, 128 if each else 4)
        if cutlass.const_expr(self.spec.stays):
            for s in cutlass.range_constexpr(SLOTS):
                cute.arch.mbarrier_init(shared.told + s, 32 if each else 1)
                cute.arch.mbarrier_init(shared.done + s, THREADS // (1 if each else 32))
        cute.arch.mbarrier_init_fence()

    @cute.jit
    def clear_tail(self, o, cu_seqlens, heads: cute.FastDivmodDivisorV2, items: Int32):
        """Zeros into the share of what lies behind the last sequence; the first items have one each.

        What it needs is made anew: kept from before the chunks it would cost registers there.
        """
        number = fresh(cute.arch.block_idx()[0])
        if cutlass.const_expr(self.spec.stays):
            for one in cutlass.range(number, items, cute.arch.grid_dim()[0], unroll=1):
                self.clear_share(o, cu_seqlens, heads, one)
        else:
            self.clear_share(o, cu_seqlens, heads, number)

    @cute.jit
    def clear_share(self, o, cu_seqlens, heads: cute.FastDivmodDivisorV2, number: Int32):
        share, i_hv = divmod(number, heads)
        N = Int32(cu_seqlens.shape[0] - 1)
        if share < N:
            first = Int32(cu_seqlens[N]) + share
            tid = fresh(cute.arch.thread_idx()[0])
            self.write_nothing(o, Boolean(False), Int32(0), first, Int32(o.shape[1]) - first, N, i_hv, tid)

    @cute.jit
    def do_nothing(self, work: Work, o):
        """Of an item that is not run."""
        if work.deed == Deed.ZEROS or work.deed == Deed.NAN:
            wrong, tid = work.deed == Deed.NAN, cute.arch.thread_idx()[0]
            self.write_nothing(o, wrong, work.b, work.first, work.n_tokens, 1, work.i_hv, tid)

    @cute.jit
    def write_nothing(
        self, o, wrong, b: Int32, first: Int32, n_tokens: Int32, step: Int32, i_hv: Int32, tid: Int32
    ):  # fmt: skip
        """Zeros into each `step`-th of the tokens; NaN where the slot is `wrong`, so that it is seen."""
        per_row = self.spec.V // 8
        value = cute.make_rmem_tensor(8, o.element_type)
        value.fill(Float32(cutlass.select_(wrong, Float32(float("nan")), Float32(0.0))).to(o.element_type))
        for t in cutlass.range(tid // per_row * step, n_tokens, THREADS // per_row * step, unroll=1):
            offset = Int64(b) * o.stride[0] + Int64(first + t) * o.stride[1] + Int64(i_hv) * o.stride[2]
            vector(o.iterator, offset + tid % per_row * 8, 8).store(value.load())
