"""How tokens of a chunk are related whose gates have no bound: by the borders of halves; see `unbounded.py`.

For tokens j < i, exp(G_i - G_j) is exp(G_i - G_m) exp(G_m - G_j), where m is the border between the halves, of 1, 2, 4,
8 or 16 tokens, that part them. So all factors are products of decays of tokens: nothing overflows or is divided by what
underflows, whatever the gate; and all that token i gets is made of decays up to its own, so no bit of it depends on
what follows.

A warp has 64 channels of half a chunk's tokens, a thread two channels. Halves of 1, 2, 4 and 8 tokens that part two
tokens are the warp's own. Of 2, 4 and 8 tokens operands go through shared memory that nobody else touches, and all 16
tokens of a warp make one product for each: 8 are right of their border, 8 left of theirs. Neighbours, halves of 1, are
multiplied in registers. What parts both halves of the chunk takes operands of two warps.
"""

import dataclasses
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32

from kda_kernels.cute.prefill.config import BLOCK, CHUNK, UNCUT, PrefillSpec
from kda_kernels.cute.prefill.prepare import HALF, Across, Column
from kda_kernels.cute.prefill.shared import vector
from kda_kernels.cute.ptx import (
    LOWER,
    UPPER,
    exp2_approx,
    float_pair,
    fresh_float,
    load_four_words,
    load_transposed,
    multiply_16x8x8,
    multiply_16x8x16,
    multiply_pairs,
    pick_bytes,
    select,
)

SMEM = cute.AddressSpace.smem
LOADER = 3  # the warp that is done first
WIDTH = 64  # channels of a warp
SIZES = (2, 4, 8)  # of halves inside a half of a chunk, in tokens, that take operands in shared memory
ONES = {BFloat16: 0x3F803F80, Float16: 0x3C003C00}  # a word of two
# Bytes: of an operand, a warp's channels of 8 tokens; of a warp's place for them; of its products of 8 x 8, k and q.
OPERAND, OPERANDS, PRODUCTS = WIDTH * 16, 4 * WIDTH * 16, 32 * 16


@dataclasses.dataclass(frozen=True)
class Mine:
    """Which warp this is, and which channels a thread has: the upper one of two first if `swapped`, in every other four
    lanes, so that what 8 lanes store at once lies in different banks."""

    group: Int32
    warp: Int32
    lane: Int32

    @property
    def columns(self) -> Int32:
        """Which 64 channels."""
        return self.warp & 1

    @property
    def half(self) -> Int32:
        """Which half of the chunk."""
        return self.warp >> 1

    @property
    def pair(self) -> Int32:
        return 32 * self.columns + self.lane

    @property
    def swapped(self) -> Int32:
        return self.lane >> 2 & 1

    def channel(self, e: int) -> Int32:
        return 2 * self.pair + (self.swapped ^ e)

    def selector(self, e: int, lower: int, upper: int) -> Int32:
        """What `pick_bytes` takes for channel e, from what it takes for the lower and the upper half of words."""
        return lower + (self.swapped ^ e) * (upper - lower)


def since(decays: list, first: int, last: int, before: Any = None) -> list:
    """Products of decays from `first` to each token until `last`; each times `before`, if that is given."""
    own = [fresh_float(x) for x in decays[first : last + 1]]
    return list(itertools.accumulate(own if before is None else [before * own[0], *own[1:]], operator.mul))


def until(decays: list, first: int, last: int, after: Any = None) -> list:
    """Products of decays behind each token from `first` on, until `last`; each times `after`, if that is given."""
    own = [fresh_float(x) for x in reversed(decays[first + 1 : last + 1])]
    start = [Float32(1.0), own[0]] if after is None else [after, after * own[0]]
    return list(itertools.accumulate([start[1], *own[1:]], operator.mul))[::-1] + start[:1]


@dataclasses.dataclass(frozen=True)
class Operands:
    """Where operands of a product of tokens lie: k and q of 8 tokens, and k of the 8 that both are multiplied with."""

    k: Int32
    q: Int32
    left: Int32

    @staticmethod
    def beside(place: Int32) -> "Operands":
        """One behind the other."""
        return Operands(*(place + i * OPERAND for i in range(3)))


@dataclasses.dataclass(frozen=True)
class Places:
    """What a warpgroup has of a chunk in shared memory.

    Attributes:
        raw_q, raw_k, raw_g: the inputs. In the place of its own gates a warp has `Stored`; in that of its own q
            products of neighbours and of halves of `SIZES`; in that of its k an operand, then products of both halves
            of the chunk.
        rows: kE and qE; columns: kI, fp32. Before that, operands of each warp.
        mix: where tril(qE kI^T) goes.
        decay: what the chunk leaves of the state, fp32 [K]. Before that log2 of what each half leaves, [2, K], of two
            channels the one first that a thread has first.
    """

    raw_q: cute.Pointer
    raw_k: cute.Pointer
    raw_g: cute.Pointer
    rows: cute.Pointer
    columns: cute.Pointer
    mix: cute.Pointer
    decay: cute.Pointer

    def operands(self, warp: Int32) -> Int32:
        """A warp's first place of operands."""
        return self.rows.toint().to(Int32) + warp * OPERANDS

    def within(self, i: int, mine: Mine) -> Operands:
        """Where a warp's operands of the i-th of `SIZES` lie: the third has what the others leave, and one more."""
        first = self.operands(mine.warp)
        second = self.columns.toint().to(Int32) + mine.warp * OPERANDS
        if i == 2:
            return Operands(first + 3 * OPERAND, second + 3 * OPERAND, self.own(self.raw_k, mine.columns, mine.half))
        return Operands.beside((first, second)[i])

    def products(self, columns, half: Int32) -> Int32:
        """A warp's products of neighbours and of halves of `SIZES`, one behind the other."""
        return self.own(self.raw_q, columns, half)

    def products_across(self, columns, block: Int32) -> Int32:
        """The products of the second half's first or second 8 tokens with both 8 of the first."""
        return self.own(self.raw_k, columns, block)

    def own(self, tile, columns, half: Int32) -> Int32:
        """Where a warp's rows of a tile begin; of fp32 those of its first 32 channels."""
        return tile.toint().to(Int32) + columns * (WIDTH * CHUNK * tile.dtype.width // 8) + half * (128 * HALF)


def four_words(place: Int32):
    """Shared memory at an address, as words."""
    return cute.make_tensor(cute.make_ptr(Int32, place, SMEM, assumed_align=16), cute.make_layout(4))


@dataclasses.dataclass(frozen=True)
class Stored:
    """q of a thread, words of two neighbours, in shared memory, so that it takes no registers: from `place` on."""

    place: Int32

    def keep(self, e: int, first: int, words: cute.Tensor) -> None:
        """Four words of a channel, from `first` on, a multiple of 4."""
        four_words(self.place + e * OPERAND + first // 4 * (OPERAND // 2)).store(words.load())

    def __getitem__(self, e: int) -> "Fetched":
        return Fetched(self.place + e * OPERAND)


class Fetched(dict):
    """The words of one channel of `Stored`, each four loaded where one of them is asked for first."""

    def __init__(self, place: Int32):
        super().__init__()
        self.place = place

    def __missing__(self, i: int) -> Int32:
        first = i // 4 * 4
        words = load_four_words(four_words(self.place + first // 4 * (OPERAND // 2)).iterator)
        self.update(zip(range(first, first + 4), words, strict=True))
        return self[i]


class Halves:
    """A warpgroup's tokens of a chunk, once their decays are known."""

    spec: PrefillSpec
    element: type

    @cute.jit
    def tokens(self, at: Places, decays: list, mine: Mine):
        """k and q, of each channel words of two neighbouring tokens; and what `keep_neighbours` takes."""
        cute.arch.sync_warp()  # its gates have been read: q takes their place
        raw = Column.of(at.raw_q, CHUNK, mine.pair, mine.half)
        picks = [mine.selector(e, LOWER, UPPER) for e in range(2)]
        q = None
        if cutlass.const_expr(self.spec.part.reads):
            q = Stored(at.own(at.raw_g, mine.columns, mine.half) + mine.lane * 16)
        k, sums = ([], []), []
        for first in cutlass.range_constexpr(0, HALF, 8):
            chosen, waiting = [None, None], ([], [])
            for n in cutlass.range_constexpr(4):
                t = first + 2 * n
                two_k = [raw.word(t + i, 2 * CHUNK * self.spec.K)[0] for i in range(2)]  # k lies behind q
                two_q = two_k if q is None else [raw.word(t + i)[0] for i in range(2)]
                for e in cutlass.range_constexpr(2):
                    k[e].append(pick_bytes(*two_k, picks[e]))
                    waiting[e].append(pick_bytes(*two_q, picks[e]))
                products = self.neighbours(two_k, two_q[1], [decays[e][t + 1] for e in range(2)], mine)
                here = (mine.lane & 3) == n
                chosen = [x if n == 0 else select(here, x, y) for x, y in zip(products, chosen, strict=True)]
            if cutlass.const_expr(q is not None):
                for e in cutlass.range_constexpr(2):
                    q.keep(e, first // 2, self.four(waiting[e], Int32))
            sums.append(self.exchange(*chosen, 16, mine.lane))
        total = self.exchange(*sums, 8, mine.lane)
        return k, q, total + cute.arch.shuffle_sync_bfly(total, 4)

    def neighbours(self, k: list, q: Int32, decays: list, mine: Mine) -> tuple:
        """Products of a token's k and q, decayed, with the k before it, summed over both channels of four lanes.

        Args:
            k: words of both channels of two tokens. q, decays: of the later one.
        """
        factors = self.packed(decays)[0]
        before = multiply_pairs(k[0], pick_bytes(factors, factors, mine.selector(0, 0x3210, 0x1032)), self.element)
        products = [multiply_pairs(x, before, self.element) for x in (k[1], q)]
        return multiply_16x8x8((Float32(0.0),) * 4, tuple(products), Int32(ONES[self.element]), self.element)[::2]

    def exchange(self, x: Float32, y: Float32, apart: int, lane: Int32) -> Float32:
        """x of this lane and of the one so far from it, summed; where this is the upper one, y."""
        upper = (lane & apart) != 0
        return select(upper, y, x) + cute.arch.shuffle_sync_bfly(select(upper, x, y), apart)

    def keep_neighbours(self, at: Places, total: Float32, mine: Mine) -> None:
        """Of each two neighbours the product of the later one's k, twice, and of its q, twice, as `sum_of` reads them.

        `total`: of neighbours lane % 4 + 4 (lane >> 3 & 1) of 8 that of k, or, from lane 16 on, that of q.
        """
        cute.arch.sync_warp()  # all have read the tokens that this takes the place of
        lane = mine.lane
        pair = (lane & 3) + (lane >> 1 & 4)
        place = at.products(mine.columns, mine.half) + pair * 16 + (lane >> 4) * 8 + (lane & 4)
        vector(cute.make_ptr(Float32, place, SMEM, assumed_align=4), 0, 1)[0] = total

    @cute.jit
    def within(self, at: Places, decays: list, k: list, q: Any, mine: Mine):
        """Products of tokens in a half of the chunk that are no neighbours, for `relate`."""
        for e in cutlass.range_constexpr(2):
            words = None if q is None else q[e]  # once for all sizes
            for i in cutlass.range_constexpr(len(SIZES)):
                self.write_operands(at.within(i, mine), SIZES[i], e, decays[e], k[e], words, mine.lane)
        cute.arch.sync_warp()
        place = at.products(mine.columns, mine.half)
        products = [self.product_of_tokens(at.within(i, mine), mine.lane) for i in range(len(SIZES))]
        cute.arch.sync_warp()  # all have read what the next take the place of
        for i, four in enumerate(products):
            self.keep_products(place, 1 + i, four, mine.lane)

    @cute.jit
    def operands_across(self, at: Places, decays: list, k: list, q: Any, mine: Mine):
        """Operands of products of tokens of both halves."""
        place = at.operands(mine.warp)
        if mine.half == 0:
            self.write_left(place, decays, k, mine.lane)
        else:
            self.write_right(place, decays, k, q, mine.lane)

    def keep_sums(self, at: Places, log2: list, mine: Mine) -> None:
        """What this half leaves of a state, to where the other half's warps look for it."""
        vector(at.decay, mine.half * self.spec.K + 2 * mine.pair).store(self.four(log2).load())

    @cute.jit
    def across(self, at: Places, decays: list, k: list, q: Any, mine: Mine):
        """Products of tokens of both halves, for `relate`; kI, kE, qE, and what the chunk leaves of a state.

        Args: what `decays_of_tokens` and `tokens` return.
        """
        K, lane, half = self.spec.K, mine.lane, mine.half
        own, other = (vector(at.decay, n * K + 2 * mine.pair).load() for n in (half, half ^ 1))
        others = [exp2_approx(other[e]) for e in range(2)]
        log2 = [own[e] + other[e] for e in range(2)]
        # the second half's first or second 8 tokens
        rows, left = at.operands(mine.columns + 2) + half * (2 * OPERAND), at.operands(mine.columns)
        products = [self.product_of_tokens(Operands(rows, rows + OPERAND, left + j * OPERAND), lane) for j in range(2)]
        self.write_columns(at, decays, k, [UNCUT * select(half == 0, x, Float32(1.0)) for x in others], mine)
        for j in cutlass.range_constexpr(2):
            self.keep_products(at.products_across(mine.columns, half), j, products[j], lane)
        self.barrier(mine.group)
        self.write_rows(at, decays, k, q, [select(half == 0, Float32(1.0), x) for x in others], mine)
        if half == 0:
            for e in cutlass.range_constexpr(2):
                vector(at.decay, mine.channel(e), 1)[0] = exp2_approx(log2[e])

    def words_of(self, pairs: Any, tokens: Sequence[int]) -> list:
        """Of a channel, of words of two neighbours, those of these tokens, which come in such pairs."""
        return [pairs[t // 2] for t in tokens[::2]]

    def write_operands(
        self, to: Operands, size: int, e: int, decays: list, k: list, q: Any, lane: Int32
    ) -> None:  # fmt: skip
        """Of channel e, for pairs of tokens that halves of this size part: k and q of the 8 tokens right of their
        border, decayed since then, and k of the 8 left of theirs, until then. Their order is `relate`'s."""
        right = [t for t in range(HALF) if t & size]
        left = [t for t in range(HALF) if not t & size]
        factors = self.packed([x for t in right[::size] for x in since(decays, t, t + size - 1)])
        self.write_operand(to.k, e, self.times(self.words_of(k, right), factors), lane)
        if q is not None:
            self.write_operand(to.q, e, self.times(self.words_of(q, right), factors), lane)
        factors = self.packed([x for t in left[::size] for x in until(decays, t, t + size - 1)])
        self.write_operand(to.left, e, self.times(self.words_of(k, left), factors), lane)

    def write_left(self, place: Int32, decays: list, k: list, lane: Int32) -> None:
        """k of the chunk's first half, decayed until it ends."""
        for e in range(2):
            words = self.times(k[e], self.packed(until(decays[e], 0, HALF - 1)))
            for i in range(2):
                self.write_operand(place + i * OPERAND, e, words[4 * i : 4 * i + 4], lane)

    def write_right(self, place: Int32, decays: list, k: list, q: list | None, lane: Int32) -> None:
        """k and q of the chunk's second half, decayed since it began."""
        for e in range(2):
            factors = self.packed(since(decays[e], 0, HALF - 1))
            for n, pairs in enumerate((k, q)):
                if pairs is not None:
                    words = self.times(self.words_of(pairs[e], range(HALF)), factors)
                    for i in range(2):
                        self.write_operand(place + (2 * i + n) * OPERAND, e, words[4 * i : 4 * i + 4], lane)

    def write_operand(self, place: Int32, e: int, words: list, lane: Int32) -> None:
        """8 tokens of channel e to an operand."""
        four_words(place + e * (OPERAND // 2) + lane * 16).store(self.four(words, Int32).load())

    def product_of_tokens(self, operands: Operands, lane: Int32):
        """Products of 8 tokens' k, and of their q, with the k of 8 others."""
        q = operands.q if self.spec.part.reads else operands.k  # without q, k takes its place
        rows = Int32(cutlass.select_((lane >> 3 & 1) == 0, operands.k, q)) + ((lane >> 4) * 8 + (lane & 7)) * 16
        left = operands.left + lane * 16
        acc = (Float32(0.0),) * 4
        for s in range(WIDTH // 16):
            if s % 2 == 0:
                b = load_transposed(cute.make_ptr(self.element, left + 256 * s, SMEM, assumed_align=16))
            a = load_transposed(cute.make_ptr(self.element, rows + 256 * s, SMEM, assumed_align=16))
            acc = multiply_16x8x16(acc, a, b[2 * (s % 2) : 2 * (s % 2) + 2], self.element)
        return acc

    def keep_products(self, place: Int32, index: int, values, lane: Int32) -> None:
        """A lane's four of a product of tokens, the `index`-th from `place` on."""
        target = cute.make_ptr(Float32, place + index * PRODUCTS + lane * 16, SMEM, assumed_align=16)
        vector(target, 0, 4).store(self.four(values).load())

    def write_columns(self, at: Places, decays: list, k: list, after: list, mine: Mine) -> None:
        """kI in fp32. `after`: of each channel, UNCUT times the decay over what follows these tokens in the chunk."""
        across = Across.of(at.columns, [mine.channel(e) for e in range(2)], mine.half)
        for e in range(2):
            factors = until(decays[e], 0, HALF - 1, after[e])
            keys = [x for word in k[e] for x in float_pair(word, self.element)]
            for first in (8, 9, 0, 1):
                four = [keys[t] * factors[t] for t in range(first, first + 8, 2)]
                across.four(e, first).store(self.four(four).load())

    def write_rows(self, at: Places, decays: list, k: list, q: list | None, before: list, mine: Mine) -> None:
        """kE and qE. `before`: of each channel, the decay over what precedes these tokens in the chunk."""
        for e in range(2):
            factors = since(decays[e], 0, HALF - 1, before[e])
            words = self.packed(factors)
            channel = mine.channel(e)
            for n, pairs in enumerate((k, q)):
                if pairs is None:
                    continue
                own = self.words_of(pairs[e], range(HALF))
                out = self.times(own, words)
                if n == 1 and self.spec.part.splits:  # o is rounded twice then: q once
                    exact = [x for word in own for x in float_pair(word, self.element)]
                    out = self.packed([x * y for x, y in zip(exact, factors, strict=True)])
                for i in range(2):
                    place = self.row_of(at, channel, 4 * n + 2 * mine.half + i)
                    four_words(place).store(self.four(out[4 * i : 4 * i + 4], Int32).load())

    def row_of(self, at: Places, channel: Int32, index: Int32) -> Int32:
        """8 tokens of a channel in [kE; qE], or in kE alone."""
        start = at.rows.toint().to(Int32)
        if self.spec.part.reads:
            return start + channel * 128 + (index ^ (channel & 7)) * 16
        return start + channel * 64 + (index ^ (channel >> 1 & 3)) * 16

    @cute.jit
    def relate(self, at: Places, scratch, sums, read: Int32, warp: Int32, lane: Int32):
        """The rows of a block a warp, summed over all channels: L to `scratch`, Aqk to `at.mix`.

        At the barrier `read` the warps say that they have read what the next inputs take the place of. Those of the
        second half, which had more operands across, have the shorter rows here.
        """
        for w in cutlass.range_constexpr(CHUNK // BLOCK):
            whose = CHUNK // BLOCK - 1 - w
            if warp == whose:
                rows_k, rows_q = [], []
                for j in cutlass.range_constexpr(w + 1):
                    total = self.sum_of(at, w, j, lane)
                    rows_k.extend(2 * total[:2])
                    rows_q.extend(2 * total[2:])
                if cutlass.const_expr(whose != LOADER):
                    if cutlass.const_expr(self.spec.each_arrives):
                        cute.arch.barrier(barrier_id=read, number_of_threads=128)
                    else:
                        cute.arch.barrier_arrive(barrier_id=read, number_of_threads=128)
                token = BLOCK * w + (lane >> 2)
                norm, _ = self.norms(sums, token)
                b = vector(sums, 3 * CHUNK + token, 1)[0] * norm * norm
                self.spread_k(rows_k, scratch, b, w // 2, w % 2, lane)
                if cutlass.const_expr(self.spec.part.reads):
                    self.spread_q(rows_q, at.mix, sums + 2 * CHUNK, w // 2, w % 2, lane)

    def sum_of(self, at: Places, i: int, j: int, lane: Int32) -> list:
        """A lane's four of the products of block i's k and q with block j's k: row lane // 4, columns
        2 (lane % 4) and the next. Over the diagonal garbage."""
        half, odd = Int32(i // 2), i % 2
        row, pair = lane >> 2, lane & 3
        apart = (row >> 1) ^ pair  # 0, 1, else: halves of 1, 2, 4 tokens part a row from its columns
        if j == i:  # in the order of `keep_neighbours` and of `write_operands`
            one = 4 * odd + pair
            two = 4 * (4 * odd + 2 * (row >> 2) + (row & 1)) + 2 * odd + (row >> 2)
            four = lane + (18 * odd - 16)
            source = cutlass.select_(apart == 0, one, cutlass.select_(apart == 1, two, four)) & 31
            size = cutlass.min(apart, 2)
            places = [at.products(c, half) + size * PRODUCTS + source * 16 for c in range(2)]
        elif j // 2 == i // 2:
            places = [at.products(c, half) + len(SIZES) * PRODUCTS + lane * 16 for c in range(2)]
        else:
            places = [at.products_across(c, Int32(odd)) + j * PRODUCTS + lane * 16 for c in range(2)]
        x, y = (vector(cute.make_ptr(Float32, p, SMEM, assumed_align=16), 0, 4).load() for p in places)
        return [x[n] + y[n] for n in range(4)]

    def times(self, a: list, b: list) -> list:
        """Products of words of two."""
        return [multiply_pairs(x, y, self.element) for x, y in zip(a, b, strict=True)]

    def packed(self, values: list) -> list:
        """Numbers as words of two each."""
        words = []
        for i in range(0, len(values), 2):
            out = cute.make_rmem_tensor(2, self.element)
            out.store(self.four(values[i : i + 2]).load().to(self.element))
            words.append(cute.recast_tensor(out, Int32)[0])
        return words

    def four(self, values, dtype: type = Float32):
        """Numbers in registers, beside each other."""
        out = cute.make_rmem_tensor(len(values), dtype)
        for i, x in enumerate(values):
            out[i] = x
        return out
