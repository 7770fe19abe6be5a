"""How the prefill kernel prepares chunks whose gates have no bound; see `kernel.py` for the names.

With G the running sum of log decays in a chunk, and 31 its last token: kE = k exp(G), qE = q exp(G), kI =
k exp(G_31 - G). The state S is the one before the chunk, and decays once, by exp(G_31). For tokens j < i,
exp(G_i - G_j) is exp(G_i - G_m) exp(G_m - G_j), where m is the border between the halves, of 1, 2, 4, 8 or 16 tokens,
that part them. So all exponents are sums of log decays: nothing overflows or is divided by what underflows, whatever
the gate; and all that token i gets is made of decays up to its own, so no bit of it depends on what follows.

The inverse is made by the warps that run the chain: they wait for chunks.

A warp has 32 channels of all tokens, in blocks of 8 tokens. A lane has them as mma.m16n8k16 takes [k; q] of a block
from the left and k from the right: of token lane // 4 the channels 2 (lane % 4) and the next of each 8. The sums come
out in the same places: products of a matrix of ones and zeros with log decays, of 12 bits each. So what relates the
tokens of a chunk stays in registers, but for the sum over warps.
"""

import dataclasses
import math
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from kda_kernels.cute.math import LOG2_E, log2_softplus, rate, reciprocal, sigmoid
from kda_kernels.cute.prefill.config import BLOCK, CHUNK, PARTS, PRODUCERS, STAGES, THREADS, PrefillSpec
from kda_kernels.cute.prefill.shared import (
    TILE,
    Shared,
    arrive,
    piece,
    swizzled,
    vector,
)
from kda_kernels.cute.prefill.work import Barrier, Batch, Work
from kda_kernels.cute.ptx import (
    exp2_approx,
    float_pair,
    fresh,
    load_matrices,
    load_transposed,
    multiply_16x8x16,
    multiply_pairs,
    multiply_tf32,
    nearest_tf32,
    select,
    store_matrices,
)
from kda_kernels.problem import Gate

SMEM = cute.AddressSpace.smem
LOADER = 0  # the warp that has least to do
BLOCKS, TILES = CHUNK // BLOCK, 4  # of a chunk; of 8 channels, of a warp
CLOSED = -1e30  # what log2 decays are at least, so that sums of them are numbers


@dataclasses.dataclass(frozen=True)
class Slice:
    """A warp's 32 channels of a tile in shared memory, rows of 128 bytes, 128-byte swizzle. Addresses are in bytes."""

    start: Int32  # of the lane's 16 bytes of the first block
    dtype: type

    @staticmethod
    def of(pointer, warp: Int32, lane: Int32, height: int = CHUNK, dtype=None) -> "Slice":
        """Lane 8 n + r has row r, 8 channels from 8 n. `height`: tokens of the tile."""
        place = pointer.toint().to(Int32) + (warp >> 1) * (128 * height) + (lane & 7) * 128
        return Slice(place + (((4 * (warp & 1) + (lane >> 3)) ^ (lane & 7)) * 16), dtype or pointer.dtype)

    @staticmethod
    def paired(pointer, behind: int, warp: Int32, lane: Int32, height: int = CHUNK) -> "Slice":
        """Lane 16 n + r has row r, 8 channels from 8 n; lanes 8 more the same of what is so many elements behind."""
        place = pointer.toint().to(Int32) + (warp >> 1) * (128 * height) + (lane & 7) * 128
        place = place + (lane >> 3 & 1) * (2 * behind)
        return Slice(place + (((4 * (warp & 1) + (lane >> 4)) ^ (lane & 7)) * 16), pointer.dtype)

    def block(self, b: int, step: int = 0):
        """Of block b; for `paired`, 16 channels from 16 `step`."""
        place = ((self.start ^ (32 * step)) if step else self.start) + 1024 * b
        return cute.make_ptr(self.dtype, place, SMEM, assumed_align=16)


@dataclasses.dataclass(frozen=True)
class Places:
    """What a warpgroup has of a chunk in shared memory.

    Attributes:
        raw_q, raw_k, raw_g: the inputs. In their place, products of blocks with each other, each warp's for itself.
        rows: kE and qE; columns: kI in parts, and before that, fp32, how each token decays until its block ends.
        left: what each block leaves of the state, fp32 [BLOCKS, K]; until Aqk takes its place, `mix`.
        decay: what the chunk leaves of it, fp32 [K].
        ones: what `write_ones` writes.
    """

    raw_q: cute.Pointer
    raw_k: cute.Pointer
    raw_g: cute.Pointer
    rows: cute.Pointer
    columns: cute.Pointer
    left: cute.Pointer
    mix: cute.Pointer
    decay: cute.Pointer
    ones: cute.Pointer

    def gates(self, warp: Int32, lane: Int32) -> Slice:
        if self.raw_g.dtype.width == 32:  # 32 channels beside each other
            return Slice.of(self.raw_g, 2 * warp, lane, dtype=Float32)
        return Slice.of(self.raw_g, warp, lane)

    def products(self, i: int, j: int, warp: Int32, lane: Int32):
        """A lane's four of a warp's products of block i with block j."""
        if i == j:
            place = self.gates(warp, lane).block(i)
        else:
            tile, b = {(1, 0): (self.raw_q, 1), (2, 0): (self.raw_q, 0), (2, 1): (self.raw_q, 2),
                       (3, 0): (self.raw_k, 2), (3, 1): (self.raw_k, 3), (3, 2): (self.raw_q, 3)}[i, j]  # fmt: skip
            place = Slice.of(tile, warp, lane).block(b)
        return cute.recast_ptr(place, dtype=Float32)

    def stash(self, b: int, warp: Int32, lane: Int32) -> list:
        """Where a lane has its eight numbers of block b."""
        parts = (self.columns, self.columns + CHUNK * 128)
        return [Slice.of(part, warp, lane, dtype=Float32).block(b) for part in parts]


@dataclasses.dataclass(frozen=True)
class Rates:
    """What makes log decays of raw gates: exp(A_log), `bias` of each channel, in log2 for softplus gates, fp32 [K]."""

    A: Float32
    bias: cute.Pointer
    lower_bound: Float32


@dataclasses.dataclass(frozen=True)
class Vacancy:
    """The stage that a chunk of an item, the `turn`-th of the CTA, will take; once it is free v is loaded into it."""

    shared: Shared
    atoms: list[cute.CopyAtom]
    sources: list[cute.Tensor]
    work: Work
    turn: Any
    stage: Int32
    chunk: Int32


class Unbounded:
    """A warpgroup that prepares every other chunk. What is the same for any gate is `Producer`'s and `Relater`'s."""

    spec: PrefillSpec
    element: type

    @cute.jit
    def produce_unbounded(
        self, shared, atoms, sources, beta, batch: Batch, work: Work, turn, scale: Float32, lower_bound: Float32,
        group: Int32, gram: cute.TiledMma,
    ):  # fmt: skip
        """As `Producer.produce`."""
        spec = self.spec
        n_chunks = work.n_chunks
        p = cute.arch.thread_idx()[0] & 127
        # roles of warps: those of the two warpgroups that have most to do are on different schedulers
        warp, lane = (p >> 5) ^ (2 * group), p & 31

        raw_q = piece(shared.raw, group, 2 * CHUNK * spec.K)
        raw_k = raw_q + CHUNK * spec.K
        raw_g = piece(shared.raw_g, group, CHUNK * spec.K)
        scratch = piece(shared.solve, group, 3 * TILE)
        loaded = shared.loaded + group
        begin = self.first_chunk(group, work.before)
        if warp == LOADER:
            self.ask(self.inputs(shared, atoms, sources, work, group), loaded, begin, n_chunks)

        # after the loads are on their way: these wait for memory too
        A_log, dt_bias, i_hv = batch.A_log, batch.dt_bias, work.i_hv
        A = Float32(1.0)
        if cutlass.const_expr(A_log is not None):
            A = rate(A_log[i_hv].to(Float32))
        if cutlass.const_expr(spec.gate is Gate.SAFE):
            A = A * LOG2_E
        bias = Float32(0.0)
        if cutlass.const_expr(dt_bias is not None):
            bias = dt_bias[i_hv * spec.K + p].to(Float32)
            if cutlass.const_expr(spec.gate is Gate.SOFTPLUS):
                bias = bias * LOG2_E
        biases = shared.bias
        if cutlass.const_expr(spec.stays):
            biases = piece(shared.bias, group, spec.K + 4)
            vector(biases, p, 1)[0] = bias
            vector(biases, spec.K, 1)[0] = A
            self.barrier(group)
        else:  # both warpgroups the same; neither reads before the other has written
            vector(biases, p, 1)[0] = bias
            self.write_ones(shared.decay + spec.K, lane)
            cute.arch.barrier(barrier_id=Barrier.PREPARE, number_of_threads=PRODUCERS)
        rates = Rates(A, biases, lower_bound)
        raw_beta = self.fetch_beta(beta, work, begin * CHUNK + lane)
        if turn == 0:
            cute.arch.barrier_arrive(barrier_id=Barrier.ASKED, number_of_threads=THREADS)
        for chunk in cutlass.range(begin, n_chunks, 2, unroll=1):
            p = fresh(p)
            warp, lane = (p >> 5) ^ (2 * group), p & 31
            here = self.now(shared, work, turn)
            number, tokens = here.before + chunk, here.n_tokens - chunk * CHUNK
            stage = cute.arch.make_warp_uniform(number % STAGES)
            sums = shared.sums + (2 * group + (number >> 1 & 1)) * (4 * CHUNK)
            cute.arch.mbarrier_wait(loaded, number >> 1 & 1)

            if tokens < CHUNK:
                if cutlass.const_expr(spec.part.reads):
                    self.fill(raw_q, 0.0, tokens, p)
                self.fill(raw_k, 0.0, tokens, p)
                self.fill(raw_g, 0.0 if spec.gate is Gate.NONE else -math.inf, tokens, p)  # no decay
                self.barrier(group)
            self.squares(raw_q, sums, warp, lane)
            if cutlass.const_expr(spec.scaled):
                self.scale_tokens(raw_q, sums, warp, lane)
                self.barrier(group)
            if warp == 1:
                value = raw_beta.to(Float32)
                if cutlass.const_expr(spec.beta_is_logit):
                    value = sigmoid(value)
                    if cutlass.const_expr(spec.allow_neg_eigval):
                        value = 2.0 * value
                vector(sums, 3 * CHUNK + lane, 1)[0] = value
            at = self.places(shared, raw_q, raw_k, raw_g, stage)
            vacancy = Vacancy(shared, atoms, sources, work, turn, stage, chunk)
            left, late = self.forwards(at, rates, vacancy, group, warp, lane)
            self.backwards(at, left, late, warp, lane)
            self.barrier(group)
            here = self.now(shared, work, turn)
            number, tokens = here.before + chunk, here.n_tokens - chunk * CHUNK
            if number > 1:  # the inverse of the last L is there
                cute.arch.mbarrier_wait(shared.inverted + (number - 2) % STAGES, (number - 2) // STAGES & 1)
            read = Barrier.READ + group
            self.relate(at, scratch, sums, read, warp, lane, tokens)
            if warp == 2:
                self.factors(shared.token + stage * (3 * CHUNK), sums, scale, lane, tokens)
            cute.arch.fence_proxy("async.shared", space="cta")
            arrive(shared.full + stage, lane, spec.each_arrives)
            if warp == LOADER:
                cute.arch.barrier(barrier_id=read, number_of_threads=128)
                cute.arch.fence_proxy("async.shared", space="cta")
                item = self.now(shared, work, turn)
                self.ask(self.inputs(shared, atoms, sources, item, group), loaded, chunk + 2, n_chunks)
            if warp == 1:  # here: over the products above it would be spilled, and so waited for
                raw_beta = self.fetch_beta(beta, self.now(shared, work, turn), (chunk + 2) * CHUNK + lane)

    @cute.jit
    def take(self, vacancy: Vacancy, warp: Int32):
        """Waits until the stage is free, and has v loaded into it."""
        shared, stage = vacancy.shared, vacancy.stage
        item = self.now(shared, vacancy.work, vacancy.turn)
        number = item.before + vacancy.chunk
        cute.arch.mbarrier_wait(shared.empty + stage, (number // STAGES & 1) ^ 1)
        if warp == LOADER:
            if item.kind == 0:
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(shared.full + stage, CHUNK * self.spec.V * 2)
                self.load_values(shared, vacancy.atoms, vacancy.sources, item, stage, vacancy.chunk)
            else:
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive(shared.full + stage)

    def places(self, shared, raw_q, raw_k, raw_g, stage: Int32) -> Places:
        K, squares = self.spec.K, 1 + self.spec.inverse_parts
        mix = piece(shared.mix, stage * squares + squares - 1, CHUNK * CHUNK)
        return Places(
            raw_q=raw_q,
            raw_k=raw_k,
            raw_g=raw_g,
            rows=shared.rows + stage * (2 * CHUNK * K),
            columns=shared.cols + stage * (PARTS * CHUNK * K),
            left=cute.recast_ptr(mix, dtype=Float32),
            mix=mix,
            decay=piece(shared.decay, stage, 2 * K),
            ones=shared.decay + K,
        )

    @cute.jit
    def write_ones(self, table, lane: Int32):
        """What adds log decays up, three left operands of 8 tokens, each where a stage's second K decays would be.

        The upper and the lower rows of each: for halves of 1 and of 2 tokens; of 4, and from a token to its block's
        end; from the block's begin to the token, twice. A first half's token decays to the half's end, a second half's
        has decayed since its half began.
        """
        i, token = lane >> 2, 2 * (lane & 3)
        words = []
        for e in cutlass.range_constexpr(2):
            t = token + e
            for size in (1, 2, 4, 0, 8):
                middle = Int32(size)
                if cutlass.const_expr(0 < size < 8):
                    middle = (i & -2 * size) + size
                among = (t > i and t < middle) or (t <= i and t >= middle)
                words.append(cutlass.select_(among, Float32(1.0), Float32(0.0)))
        one, two, four, since, until = ((words[n], words[5 + n]) for n in range(5))
        for n, (x, y) in enumerate(((one, two), (four, until), (since, since))):
            vector(table, n * (2 * self.spec.K) + 4 * lane, 4).store(self.four((x[0], y[0], x[1], y[1])).load())

    @cute.jit
    def log2_decays(self, at: Places, b: cutlass.Constexpr[int], rates: Rates, warp: Int32, lane: Int32):
        """Of block b, for `multiply_tf32`: of channel lane // 4 of each 8, tokens 2 (lane % 4) and the next.

        And unrounded, the sums of both.
        """
        spec, dtype = self.spec, at.raw_g.dtype
        raw = cute.make_rmem_tensor(2 * TILES, dtype)
        if cutlass.const_expr(dtype.width == 16):
            words = cute.recast_tensor(raw, Int32)
            for i, word in enumerate(load_transposed(at.gates(warp, lane).block(b))):
                words[i] = word
        else:
            for i in cutlass.range_constexpr(2 * TILES):
                token, channel = BLOCK * b + 2 * (lane & 3) + i % 2, 32 * warp + 8 * (i // 2) + (lane >> 2)
                raw[i] = vector(at.raw_g, swizzled(token, channel, 1, dtype), 1)[0]
        factor, A = Float32(LOG2_E), rates.A
        if cutlass.const_expr(spec.stays):
            A = vector(rates.bias, spec.K, 1)[0]
        if cutlass.const_expr(spec.gate is Gate.SAFE):
            factor = rates.lower_bound * LOG2_E
        elif cutlass.const_expr(spec.gate is Gate.SOFTPLUS):
            factor = -A
        out, sums = [], []
        for t in cutlass.range_constexpr(TILES):
            own = vector(rates.bias, 32 * warp + 8 * t + (lane >> 2), 1)[0]
            if cutlass.const_expr(dtype.width == 16):
                pair = float_pair(cute.recast_tensor(raw, Int32)[t], dtype)
            else:
                pair = (raw[2 * t].to(Float32), raw[2 * t + 1].to(Float32))
            exact = []
            for x in pair:
                y = x
                if cutlass.const_expr(spec.gate is Gate.SAFE):
                    y = reciprocal(1.0 + exp2_approx((x + own) * -A))
                elif cutlass.const_expr(spec.gate is Gate.SOFTPLUS):
                    y = log2_softplus(x * LOG2_E + own)
                exact.append(y * factor)
                out.append(nearest_tf32(exact[-1], CLOSED))
            sums.append(exact[0] + exact[1])
        return out, sums

    @cute.jit
    def summed(self, table, n: cutlass.Constexpr[int], log2: list, lane: Int32):
        """Decays over what rows of an operand say, of tiles of 8 channels: by the upper rows, and by the lower."""
        upper, lower = [], []
        ones = vector(cute.recast_ptr(table, dtype=Int32), n * (2 * self.spec.K) + 4 * lane, 4).load()
        ones = tuple(ones[i] for i in range(4))
        for pair in log2:
            x = [exp2_approx(x) for x in multiply_tf32((Float32(0.0),) * 4, ones, pair)]
            upper, lower = upper + x[:2], lower + x[2:]
        return upper, lower

    @cute.jit
    def forwards(self, at: Places, rates: Rates, vacancy: Vacancy, group: Int32, warp: Int32, lane: Int32):
        """From the first block to the last: its products with itself and with earlier ones, kE and qE.

        kI of the last block too; of others what it is made of, and what they leave. What the chunk leaves of a state is
        made of unrounded log decays: with 11 bits, as products take them, what an almost closed gate leaves is 1% off.
        """
        K, reads = self.spec.K, self.spec.part.reads
        raw = Slice.paired(at.raw_k, -CHUNK * K if reads else 0, warp, lane)  # without q, k takes its place
        rows = Slice.paired(at.rows, CHUNK * 64 if reads else 0, warp, lane, 2 * CHUNK)
        before, left, columns, late = [], [], [], []
        following, total = self.log2_decays(at, 0, rates, warp, lane)
        for b in cutlass.range_constexpr(BLOCKS):
            log2 = following
            kq = [load_matrices(raw.block(b, s)) for s in range(2)]
            if cutlass.const_expr(
                b + 1 < BLOCKS
            ):  # here, so that they are made while this block's products are waited for
                following, added = self.log2_decays(at, b + 1, rates, warp, lane)
                total = [x + y for x, y in zip(total, added, strict=True)]
            if cutlass.const_expr(b == 1 and not self.spec.scaled):
                self.barrier(group)  # norms have been made of what products take the place of
            pairs = [(log2[2 * t], log2[2 * t + 1]) for t in range(TILES)]
            by_one, by_two = self.summed(at.ones, 0, pairs, lane)
            by_one, by_two = self.with_itself(kq, by_one), self.with_itself(kq, by_two)
            by_four, until = self.summed(at.ones, 1, pairs, lane)
            by_four = self.with_itself(kq, by_four)
            self.keep_products(at, b, b, self.parted(by_one, by_two, by_four, lane), warp, lane)
            since, _ = self.summed(at.ones, 2, pairs, lane)
            if cutlass.const_expr(b == 0):
                self.take(vacancy, warp)
            self.write_rows(rows, b, kq, since if b == 0 else self.times(since, before))
            if cutlass.const_expr(b == 1):
                self.keep_products(at, 1, 0, self.with_columns(kq, since, columns)[0], warp, lane)
            elif cutlass.const_expr(b == 2):
                x = self.with_columns(kq, since, columns)
                for j in cutlass.range_constexpr(2):
                    self.keep_products(at, 2, j, x[j], warp, lane)
            elif cutlass.const_expr(b == 3):
                self.keep_products(at, 3, 2, self.with_columns(kq, since, columns[2:])[0], warp, lane)
                x = self.with_columns(kq, self.times(since, self.left_by(at, 2, warp, lane)), columns[:2])
                self.keep_products(at, 3, 1, x[1], warp, lane)
                late = x[0]

            left = self.times(since, until)
            if cutlass.const_expr(b == BLOCKS - 1):
                self.write_columns(at, b, self.keys(kq), until, warp, lane)
                self.keep_decays(at.decay, total, warp, lane)
            else:
                before = left if b == 0 else self.times(before, left)
                self.keep_channels(at.left + b * K, left, warp, lane)
                for i, place in enumerate(at.stash(b, warp, lane)):
                    vector(place, 0, 4).store(self.four(until[4 * i : 4 * i + 4]).load())
                if cutlass.const_expr(b == 1):  # block 0's now decays to the end of this one
                    k0 = load_matrices(Slice.of(at.raw_k, warp, lane).block(0))
                    columns = [self.column(k0, self.times(self.stashed(at, 0, warp, lane), left))]
                columns.append(self.column(self.keys(kq), until))
        return left, late

    @cute.jit
    def backwards(self, at: Places, left: list, late, warp: Int32, lane: Int32):
        """kI of all blocks but the last. `left`, `late`: what `forwards` returns."""
        for b in cutlass.range_constexpr(BLOCKS - 2, -1, -1):
            if cutlass.const_expr(b < BLOCKS - 2):
                left = self.times(left, self.left_by(at, b + 1, warp, lane))
            factors = self.times(self.stashed(at, b, warp, lane), left)
            k = load_matrices(Slice.of(at.raw_k, warp, lane).block(b))
            cute.arch.sync_warp()  # all have read what kI takes the place of
            self.write_columns(at, b, k, factors, warp, lane)
            if cutlass.const_expr(b == BLOCKS - 2):
                self.keep_products(at, 3, 0, late, warp, lane)

    @cute.jit
    def keep_products(
        self, at: Places, i: cutlass.Constexpr[int], j: cutlass.Constexpr[int], values, warp: Int32, lane: Int32
    ):
        """This warp's products of block i with block j, for `relate`; an mma has been waited for since their place was
        read."""
        if cutlass.const_expr(self.spec.each_arrives):
            cute.arch.sync_warp()
        vector(at.products(i, j, warp, lane), 0, 4).store(self.four(values).load())

    @cute.jit
    def relate(self, at: Places, scratch, sums, read: Int32, warp: Int32, lane: Int32, tokens: Int32):
        """The rows of a block a warp, summed over all warps: L to `scratch`, Aqk to `at.mix`.

        At the barrier `read` the warps say that they have read what the next inputs take the place of.
        """
        for w in cutlass.range_constexpr(BLOCKS):
            if warp == w:
                rows_k, rows_q = [], []
                for j in cutlass.range_constexpr(w + 1):
                    x = [vector(at.products(w, j, Int32(i), lane), 0, 4).load() for i in range(4)]
                    total = [(x[0][e] + x[1][e]) + (x[2][e] + x[3][e]) for e in range(4)]
                    rows_k.extend(2 * total[:2])
                    rows_q.extend(2 * total[2:])
                if cutlass.const_expr(w != LOADER):
                    if cutlass.const_expr(self.spec.each_arrives):
                        cute.arch.barrier(barrier_id=read, number_of_threads=128)
                    else:
                        cute.arch.barrier_arrive(barrier_id=read, number_of_threads=128)
                token = BLOCK * w + (lane >> 2)
                norm, _ = self.norms(sums, token)
                b = vector(sums, 3 * CHUNK + token, 1)[0] * norm * norm
                b = select(token < tokens, b, Float32(0.0))
                self.spread_k(rows_k, scratch, b, w // 2, w % 2, lane)
                if cutlass.const_expr(self.spec.part.reads):
                    self.spread_q(rows_q, at.mix, sums + 2 * CHUNK, w // 2, w % 2, lane)
                    nothing = cute.make_rmem_tensor(2, self.element)
                    nothing.fill(0.0)
                    row = BLOCK * w + (lane >> 2)
                    for j in cutlass.range_constexpr(w + 1, BLOCKS):
                        vector(at.mix, row * CHUNK + (j ^ (row >> 1 & 3)) * 8 + 2 * (lane & 3)).store(nothing.load())

    @cute.jit
    def times(self, a: list, b: list):
        return [x * y for x, y in zip(a, b, strict=True)]

    @cute.jit
    def packed(self, values):
        """Numbers as words of two each."""
        exact = cute.make_rmem_tensor(len(values), Float32)
        for i in cutlass.range_constexpr(len(values)):
            exact[i] = values[i]
        out = cute.make_rmem_tensor(len(values), self.element)
        out.store(exact.load().to(self.element))
        words = cute.recast_tensor(out, Int32)
        return [words[i] for i in range(len(values) // 2)]

    @cute.jit
    def scaled(self, kq: tuple, factors):
        """[k; q] of 16 channels times what `factors`, two words, say of k and q alike."""
        return tuple(multiply_pairs(kq[i], factors[i // 2], self.element) for i in range(4))

    @cute.jit
    def with_itself(self, kq: list, factors: list):
        """Products of a block's [k; q] with its k, both times `factors`."""
        words, acc = self.packed(factors), (Float32(0.0),) * 4
        for s in cutlass.range_constexpr(2):
            a = self.scaled(kq[s], words[2 * s : 2 * s + 2])
            acc = multiply_16x8x16(acc, a, (a[0], a[2]), self.element)
        return acc

    @cute.jit
    def parted(self, by_one, by_two, by_four, lane: Int32):
        """Products of a block's tokens, each pair's from the halves that part it; over the diagonal garbage."""
        out = []
        for i in cutlass.range_constexpr(4):
            differ = (lane >> 2) ^ (2 * (lane & 3) + i % 2)
            out.append(select(differ == 1, by_one[i], select(differ < 4, by_two[i], by_four[i])))
        return out

    @cute.jit
    def with_columns(self, kq: list, factors: list, columns: list):
        """Products of [k; q] of a block, times `factors`, with each of `columns`."""
        words = self.packed(factors)
        out = [(Float32(0.0),) * 4 for _ in columns]
        for s in cutlass.range_constexpr(2):
            a = self.scaled(kq[s], words[2 * s : 2 * s + 2])
            for n in cutlass.range_constexpr(len(columns)):
                out[n] = multiply_16x8x16(out[n], a, (columns[n][2 * s], columns[n][2 * s + 1]), self.element)
        return out

    @cute.jit
    def write_rows(self, target: Slice, b: cutlass.Constexpr[int], kq: list, factors: list):
        """kE and qE of a block."""
        words = self.packed(factors)
        for s in cutlass.range_constexpr(2):
            out = list(self.scaled(kq[s], words[2 * s : 2 * s + 2]))
            if cutlass.const_expr(self.spec.part.splits):  # o is rounded twice then: q once
                for n in cutlass.range_constexpr(2):
                    pair = float_pair(kq[s][2 * n + 1], self.element)
                    out[2 * n + 1] = self.packed([pair[e] * factors[4 * s + 2 * n + e] for e in range(2)])[0]
            store_matrices(target.block(b, s), tuple(out))

    @cute.jit
    def write_columns(self, at: Places, b: cutlass.Constexpr[int], k, factors: list, warp: Int32, lane: Int32):
        """kI of a block in PARTS parts: its rounding is what a state is off by."""
        exact = []
        for word in k:
            exact.extend(float_pair(word, self.element))
        upper, lower = (cute.recast_tensor(part, Int32) for part in self.parts(self.times(exact, factors)))
        columns = Slice.paired(at.columns, CHUNK * self.spec.K, warp, lane)
        for s in cutlass.range_constexpr(2):
            words = (upper[2 * s], lower[2 * s], upper[2 * s + 1], lower[2 * s + 1])
            store_matrices(columns.block(b, s), words)

    def keys(self, kq: list) -> list:
        """k alone, a word a tile."""
        return [kq[t // 2][t % 2 * 2] for t in range(TILES)]

    @cute.jit
    def column(self, k, factors: list):
        """k of a block as a right operand, times `factors`."""
        words = self.packed(factors)
        return [multiply_pairs(k[t], words[t], self.element) for t in range(TILES)]

    @cute.jit
    def stashed(self, at: Places, b: cutlass.Constexpr[int], warp: Int32, lane: Int32):
        """How this lane's token of block b decays until the block ends."""
        out = []
        for place in at.stash(b, warp, lane):
            x = vector(place, 0, 4).load()
            out.extend(x[e] for e in range(4))
        return out

    @cute.jit
    def left_by(self, at: Places, b: cutlass.Constexpr[int], warp: Int32, lane: Int32):
        """What block b leaves of this lane's channels."""
        out = []
        for t in cutlass.range_constexpr(TILES):
            x = vector(at.left, b * self.spec.K + 32 * warp + 8 * t + 2 * (lane & 3)).load()
            out.extend(x[e] for e in range(2))
        return out

    @cute.jit
    def keep_channels(self, target, values: list, warp: Int32, lane: Int32):
        """What all tokens' lanes have of the warp's channels."""
        if lane < 4:
            for t in cutlass.range_constexpr(TILES):
                place = 32 * warp + 8 * t + 2 * lane
                vector(target, place).store(self.four(values[2 * t : 2 * t + 2]).load())
        cute.arch.sync_warp()

    @cute.jit
    def keep_decays(self, target, log2: list, warp: Int32, lane: Int32):
        """Decays of the warp's channels over a chunk, from log2 of those over this lane's tokens."""
        for t in cutlass.range_constexpr(TILES):
            x = log2[t]
            for step in (1, 2):
                x = x + cute.arch.shuffle_sync_bfly(x, step)
            if lane & 3 == 0:
                vector(target, 32 * warp + 8 * t + (lane >> 2), 1)[0] = exp2_approx(x)
        cute.arch.sync_warp()

    @cute.jit
    def four(self, values):
        out = cute.make_rmem_tensor(len(values), Float32)
        for i in cutlass.range_constexpr(len(values)):
            out[i] = values[i]
        return out

    @cute.jit
    def fill(self, raw, value: cutlass.Constexpr[float], tokens: Int32, p: Int32):
        """`value` after the last token: what follows it in memory is another's, and may be no number."""
        pieces, unit = raw.dtype.width, 128 // raw.dtype.width  # of 16 bytes in a row; elements of each
        values = cute.make_rmem_tensor(unit, raw.dtype)
        values.fill(value)
        for row in cutlass.range(tokens + p // pieces, CHUNK, 128 // pieces, unroll=1):
            vector(raw, swizzled(row, p % pieces, unit, raw.dtype), unit).store(values.load())
