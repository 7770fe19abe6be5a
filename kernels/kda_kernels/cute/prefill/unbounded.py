"""How the prefill kernel prepares chunks whose gates have no bound; see `kernel.py` for the names.

With G the running sum of log decays in a chunk, and 31 its last token: kE = k exp(G), qE = q exp(G), kI =
k exp(G_31 - G). The state S is the one before the chunk, and decays once, by exp(G_31). Tokens are related by the
borders of halves (`halves.py`). The inverse is made by the warps that run the chain: they wait for chunks.
"""

import dataclasses
import math

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32

from kda_kernels.cute.math import LOG2_E, float_of, log2_softplus, rate, reciprocal, sum_in_pairs
from kda_kernels.cute.prefill.config import CHUNK, PARTS, STAGES, THREADS, PrefillSpec
from kda_kernels.cute.prefill.halves import LOADER, Halves, Mine, Places
from kda_kernels.cute.prefill.prepare import HALF, Column
from kda_kernels.cute.prefill.shared import TILE, arrive, piece, swizzled, vector
from kda_kernels.cute.prefill.work import Barrier, Batch, Vacancy, Work
from kda_kernels.cute.ptx import exp2_approx, float_pair, fresh, pick_bytes, select
from kda_kernels.problem import Gate


@dataclasses.dataclass(frozen=True)
class Rates:
    """What makes log decays of raw gates: `bias` of each channel, in log2 for softplus gates, fp32 [K], of two channels
    the one first that a thread has first; behind it exp(A_log)."""

    bias: cute.Pointer
    lower_bound: Float32


class Unbounded(Halves):
    """A warpgroup that prepares every other chunk. What is the same for any gate is `Producer`'s and `Relater`'s."""

    spec: PrefillSpec
    element: type

    @cute.jit
    def produce_unbounded(
        self, shared, atoms, sources, beta, batch: Batch, work: Work, turn, scale: Float32, lower_bound: Float32,
        group: Int32,
    ):  # fmt: skip
        """As `Producer.produce`."""
        spec = self.spec
        n_chunks = work.n_chunks
        p = cute.arch.thread_idx()[0] & 127
        # roles of warps: those of the two warpgroups that have most to do are on different schedulers
        warp = cute.arch.make_warp_uniform((p >> 5) ^ (2 * group))
        # by a shuffle: else ptxas makes it anew of the thread's number wherever it is needed
        lane = cute.arch.shuffle_sync(p & 31, p & 31)

        raw_q = piece(shared.raw, group, 2 * CHUNK * spec.K)
        raw_k = raw_q + CHUNK * spec.K
        raw_g = piece(shared.raw_g, group, CHUNK * spec.K)
        scratch = piece(shared.solve, group, 3 * TILE)
        loaded, squared = shared.loaded + group, shared.related + group
        begin = self.first_chunk(group, work.before)
        if warp == LOADER:
            inputs = self.inputs(shared, atoms, sources, work, group)
            self.ask(inputs, loaded, begin, n_chunks)
            self.prefetch(inputs, begin + 2, n_chunks)

        # after the loads are on their way: these wait for memory too
        rates = Rates(piece(shared.bias, group, spec.K + 4), lower_bound)
        self.keep_rates(rates, batch, work.i_hv, p)
        self.barrier(group)
        raw_beta = self.fetch_beta(beta, work, begin * CHUNK + lane)
        if turn == 0:
            cute.arch.barrier_arrive(barrier_id=Barrier.ASKED, number_of_threads=THREADS)
        for chunk in cutlass.range(begin, n_chunks, 2, unroll=1):
            p = fresh(p)
            here = self.now(shared, work, turn)
            number, tokens = here.before + chunk, here.n_tokens - chunk * CHUNK
            stage = cute.arch.make_warp_uniform(number % STAGES)
            sums = shared.sums + (2 * group + (number >> 1 & 1)) * (4 * CHUNK)
            at, mine = self.places(shared, raw_q, raw_k, raw_g, stage), Mine(group, warp, lane)
            phase = number >> 1 & 1
            cute.arch.mbarrier_wait(loaded, phase)
            if tokens < CHUNK:
                self.fill_tail(at, tokens, p)
                self.barrier(group)
            squares = self.squares(raw_q, warp, lane)
            decays, log2 = self.decays_of_tokens(at, rates, mine)
            self.keep_squares(squares, sums, warp, lane)
            if cutlass.const_expr(spec.scaled):
                self.scale_tokens(raw_q, sums, warp, lane)
                self.barrier(group)
            arrive(squared, lane, spec.each_arrives)
            if warp == 1:
                self.write_beta(sums + 3 * CHUNK, raw_beta, lane, tokens)
            self.take(Vacancy(shared, atoms, sources, work, turn, stage, chunk), warp == LOADER)
            k, q, neighbours = self.tokens(at, decays, mine)
            cute.arch.mbarrier_wait(squared, phase)
            self.keep_neighbours(at, neighbours, mine)
            self.keep_sums(at, log2, mine)  # elsewhere ptxas spills more
            self.within(at, decays, k, q, mine)
            self.operands_across(at, decays, k, q, mine)
            self.barrier(group)
            self.across(at, decays, k, q, mine)
            here = self.now(shared, work, turn)
            self.await_inverse(shared, here.before + chunk)
            read = Barrier.READ + group
            self.relate(at, scratch, sums, read, warp, lane)
            if warp == 2:
                self.factors(shared.token + stage * (3 * CHUNK), sums, scale, lane)
            cute.arch.fence_proxy("async.shared", space="cta")
            arrive(shared.full + stage, lane, spec.each_arrives)
            if warp == LOADER:
                cute.arch.barrier(barrier_id=read, number_of_threads=128)
                cute.arch.fence_proxy("async.shared", space="cta")
                inputs = self.inputs(shared, atoms, sources, self.now(shared, work, turn), group)
                self.ask(inputs, loaded, chunk + 2, n_chunks)
                self.prefetch(inputs, chunk + 4, n_chunks)
            if warp == 1:  # here: over the products above it would be spilled, and so waited for
                raw_beta = self.fetch_beta(beta, self.now(shared, work, turn), (chunk + 2) * CHUNK + lane)

    @cute.jit
    def keep_rates(self, rates: Rates, batch: Batch, i_hv: Int32, p: Int32):
        """The bias of a channel a thread, and exp(A_log), to where `rates` says."""
        spec, A_log, dt_bias = self.spec, batch.A_log, batch.dt_bias
        A, bias = Float32(1.0), Float32(0.0)
        if cutlass.const_expr(A_log is not None):
            A = rate(A_log[i_hv].to(Float32))
        if cutlass.const_expr(spec.gate is Gate.SAFE):
            A = A * LOG2_E
        if cutlass.const_expr(dt_bias is not None):
            bias = dt_bias[i_hv * spec.K + p].to(Float32)
            if cutlass.const_expr(spec.gate is Gate.SOFTPLUS):
                bias = bias * LOG2_E
        vector(rates.bias, p ^ (p >> 3 & 1), 1)[0] = bias  # as `Mine.swapped`
        vector(rates.bias, spec.K, 1)[0] = A

    def places(self, shared, raw_q, raw_k, raw_g, stage: Int32) -> Places:
        K, squares = self.spec.K, 1 + self.spec.inverse_parts
        return Places(
            raw_q=raw_q,
            raw_k=raw_k,
            raw_g=raw_g,
            rows=shared.rows + stage * (2 * CHUNK * K),
            columns=shared.cols + stage * (PARTS * CHUNK * K),
            mix=piece(shared.mix, stage * squares + squares - 1, CHUNK * CHUNK),
            decay=piece(shared.decay, stage, 2 * K),
        )

    def raw_gates(self, at: Places, mine: Mine) -> list:
        """Of each token both channels, fp32."""
        dtype, swapped = at.raw_g.dtype, mine.swapped == 1
        if dtype.width == 32:
            pairs = self.channel_pairs(at.raw_g, mine.pair, mine.half)
            return [(select(swapped, y, x), select(swapped, x, y)) for x, y in pairs]
        column = Column.of(at.raw_g, CHUNK, mine.pair, mine.half)
        words = [column.word(t)[0] for t in range(HALF)]
        if dtype is BFloat16:
            picks = [mine.selector(e, 0x1044, 0x3244) for e in range(2)]
            return [[float_of(pick_bytes(word, Int32(0), pick)) for pick in picks] for word in words]
        turn = mine.selector(0, 0x3210, 0x1032)
        return [float_pair(pick_bytes(word, word, turn), dtype) for word in words]

    @cute.jit
    def decays_of_tokens(self, at: Places, rates: Rates, mine: Mine):
        """Of each channel the decay over each token; and log2 of that over all of them, a sum in fp32.

        The sum for what a chunk leaves of a state: errors of a product of 32 add up from chunk to chunk.
        """
        spec = self.spec
        A, factor = vector(rates.bias, spec.K, 1)[0], Float32(LOG2_E)
        if cutlass.const_expr(spec.gate is Gate.SAFE):
            factor = rates.lower_bound * LOG2_E
        elif cutlass.const_expr(spec.gate is Gate.SOFTPLUS):
            factor = -A
        bias = vector(rates.bias, 2 * mine.pair).load()
        raw = self.raw_gates(at, mine)
        decays, sums = ([], []), [Float32(0.0), Float32(0.0)]
        for first in cutlass.range_constexpr(0, HALF, 4):
            for e in cutlass.range_constexpr(2):
                log2 = []
                for t in cutlass.range_constexpr(first, first + 4):
                    y = raw[t][e]
                    if cutlass.const_expr(spec.gate is Gate.SAFE):
                        y = reciprocal(1.0 + exp2_approx((y + bias[e]) * -A))
                    elif cutlass.const_expr(spec.gate is Gate.SOFTPLUS):
                        y = log2_softplus(y * LOG2_E + bias[e])
                    log2.append(y * factor)
                sums[e] = sums[e] + sum_in_pairs(log2)
                decays[e].extend([exp2_approx(x) for x in log2])
        return decays, sums

    @cute.jit
    def fill_tail(self, at: Places, tokens: Int32, p: Int32):
        """q and k of 0, and gates that leave all, after the last token."""
        if cutlass.const_expr(self.spec.part.reads):
            self.fill(at.raw_q, 0.0, tokens, p)
        self.fill(at.raw_k, 0.0, tokens, p)
        self.fill(at.raw_g, 0.0 if self.spec.gate is Gate.NONE else -math.inf, tokens, p)

    @cute.jit
    def fill(self, raw, value: cutlass.Constexpr[float], tokens: Int32, p: Int32):
        """`value` after the last token: what follows it in memory is another's, and may be no number."""
        pieces, unit = raw.dtype.width, 128 // raw.dtype.width  # of 16 bytes in a row; elements of each
        values = cute.make_rmem_tensor(unit, raw.dtype)
        values.fill(value)
        for row in cutlass.range(tokens + p // pieces, CHUNK, 128 // pieces, unroll=1):
            vector(raw, swizzled(row, p % pieces, unit, raw.dtype), unit).store(values.load())
