"""How the prefill kernel turns the inputs of a chunk into the operands of its products; see `kernel.py`."""

import dataclasses

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32

from kda_kernels.cute.math import LOG2_E, rate, reciprocal, sum_in_pairs
from kda_kernels.cute.prefill.config import CHUNK, LEAST_LEFT, PARTS, SHIFT, STAGES, UNCUT, PrefillSpec
from kda_kernels.cute.prefill.shared import arrive, swizzled, vector
from kda_kernels.cute.prefill.work import Patch
from kda_kernels.cute.ptx import exp2_approx, float_pair, fresh, multiply_add, multiply_pairs
from kda_kernels.problem import Gate

HALF = CHUNK // 2  # tokens a thread has, of two channels
SMEM = cute.AddressSpace.smem
MOST_RATE = 2.0**24  # of exp(A_log) log2(e): what is open and what is closed differs by less than any gate's rounding


@dataclasses.dataclass(frozen=True)
class Column:
    """A pair of channels of 16 tokens in a tile in shared memory, rows of 128 bytes, 128-byte swizzle.

    Addresses are in bytes. The tile is aligned to 1024: a token's is `start` with three bits flipped.
    """

    start: Int32

    @staticmethod
    def of(tile, height: int, pair: Int32, half: Int32) -> "Column":
        """`height`: tokens of the tile."""
        return Column(tile.toint().to(Int32) + (pair >> 5) * (128 * height) + half * (128 * HALF) + (pair & 31) * 4)

    def word(self, token: int, behind: int = 0):
        """The pair of a token, as a word; of the tile so many bytes behind."""
        place = (self.start ^ (16 * (token & 7)) if token & 7 else self.start) + (128 * token + behind)
        return cute.make_tensor(cute.make_ptr(Int32, place, SMEM, assumed_align=4), cute.make_layout(1))


@dataclasses.dataclass(frozen=True)
class Across:
    """What a thread has of kI in fp32, [K, CHUNK]: rows of 128 bytes, 128-byte swizzle. Addresses are in bytes.

    What 8 lanes store at once lies in different banks if the rows that are first of theirs differ by all of 0 to 7.
    """

    rows: tuple  # where those of its two channels begin

    @staticmethod
    def of(tile, rows: list, half: Int32) -> "Across":
        start = tile.toint().to(Int32)
        return Across(tuple(start + 128 * row + ((row & 7) ^ (4 * half)) * 16 for row in rows))

    @staticmethod
    def crossed(pair: Int32) -> list:
        """Rows of channels 2 pair and 2 pair + 1: of 16 channels the even ones first, of these 0, 8, 2, 10, ..

        A lane of the chain has the same four channels of 16 as if they came in order: see `write_in_tf32`.
        """
        first = 16 * (pair >> 3) + 2 * (pair & 3) + (pair >> 2 & 1)
        return [first, first + 8]

    def four(self, e: int, token: int):
        """Of channel e the four even or odd of 8 tokens, one of which is `token`."""
        place = self.rows[e] ^ (16 * (2 * (token // 8) + token % 2))
        return cute.make_tensor(cute.make_ptr(Float32, place, SMEM, assumed_align=16), cute.make_layout(4))


@dataclasses.dataclass(frozen=True)
class GateParameters:
    """What makes gates of raw ones.

    Attributes:
        A: exp(A_log) log2(e). bias: that times the bias of two channels.
        rest_of_bias: 2^-x of what its rounding took off. As a factor: added to the exponent of each gate it would cost
            an instruction, and where exp(A_log) is 200 and a bias 16, the rounding would show.
    """

    A: Float32
    bias: cute.Tensor
    rest_of_bias: cute.Tensor
    lower_bound: Float32


class Preparer:
    """Makes kE, qE and kI of a chunk. Thread p has two channels, from 2 (p % 64), of 16 tokens, from 16 (p // 64)."""

    spec: PrefillSpec

    @cute.jit
    def clear(self, raw, tokens: Int32, p: Int32):
        """Zeros after the last token: what follows it in memory is another's, and may be no number."""
        zeros = cute.make_rmem_tensor(8, raw.dtype)
        zeros.fill(0.0)
        for row in cutlass.range(tokens + (p >> 4), CHUNK, 8, unroll=1):
            vector(raw, swizzled(row, p & 15, 8, raw.dtype), 8).store(zeros.load())

    def channel_pairs(self, source, pair: Int32, half: Int32) -> list:
        """Two channels of this thread's tokens, fp32."""
        if source.dtype.width == 16:
            column = Column.of(source, CHUNK, pair, half)
            return [float_pair(column.word(t)[0], source.dtype) for t in range(HALF)]
        start = source + half * (HALF * 1024 // source.dtype.width)
        loaded = [vector(start, swizzled(t, pair, 2, source.dtype)).load() for t in range(HALF)]
        return [(two[0], two[1]) for two in loaded]

    @cute.jit
    def gate_parameters(self, A_log, dt_bias, lower_bound: Float32, i_hv: Int32, pair: Int32) -> GateParameters:
        """Of a head, and of this thread's channels."""
        A = Float32(LOG2_E)
        bias, rest_of_bias = (cute.make_rmem_tensor(2, Float32) for _ in range(2))
        bias.fill(0.0)
        rest_of_bias.fill(1.0)
        if cutlass.const_expr(A_log is not None):
            A = cute.arch.fmin(rate(A_log[i_hv].to(Float32), False) * LOG2_E, Float32(MOST_RATE), nan=True)
        if cutlass.const_expr(dt_bias is not None):
            for e in cutlass.range_constexpr(2):
                given = dt_bias[i_hv * self.spec.K + 2 * pair + e].to(Float32)
                bias[e] = multiply_add(given, A, Float32(0.0))
                rounded_off = multiply_add(given, A, -bias[e])
                rounded_off = cute.arch.fmax(cute.arch.fmin(rounded_off, Float32(64.0)), Float32(-64.0))
                rest_of_bias[e] = exp2_approx(-rounded_off)
        return GateParameters(A, bias, rest_of_bias, lower_bound)

    @cute.jit
    def gates(self, raw_g, parameters: GateParameters, patch: Patch):
        """The sums of log2 decays from the middle of the chunk to each token, less or, in the second half, more SHIFT;
        and over this half: [2, HALF + 1]. Tokens after the end do not decay.
        """
        half, tokens = patch.half, patch.tokens
        A, bias, rest_of_bias = parameters.A, parameters.bias, parameters.rest_of_bias
        log2 = cute.make_rmem_tensor((2, HALF), Float32)
        for i, values in enumerate(self.channel_pairs(raw_g, patch.pair, half)):
            for e in cutlass.range_constexpr(2):
                if cutlass.const_expr(self.spec.gate is Gate.SAFE):
                    log2[e, i] = reciprocal(1.0 + exp2_approx(values[e] * -A - bias[e]) * rest_of_bias[e])
                else:
                    log2[e, i] = values[e]
        if tokens < CHUNK:
            last = fresh(tokens)  # a branch, where the compiler would select for every chunk
            for i in cutlass.range_constexpr(HALF):
                if half * HALF + i >= last:
                    for e in cutlass.range_constexpr(2):
                        log2[e, i] = Float32(0.0)
        factor = Float32(LOG2_E)
        if cutlass.const_expr(self.spec.gate is Gate.SAFE):
            factor = parameters.lower_bound * LOG2_E
        G = cute.make_rmem_tensor((2, HALF + 1), Float32)
        for e in cutlass.range_constexpr(2):  # beside the sums below, whose rounding is that of numbers over SHIFT
            G[e, HALF] = sum_in_pairs([log2[e, i] for i in range(HALF)]) * factor
        if half == 0:  # backwards from the middle
            for e in cutlass.range_constexpr(2):
                total = Float32(-SHIFT)
                for i in cutlass.range_constexpr(HALF - 1, -1, -1):
                    G[e, i] = total
                    total = total - log2[e, i] * factor
        else:
            for e in cutlass.range_constexpr(2):
                total = Float32(SHIFT)
                for i in cutlass.range_constexpr(HALF):
                    total = total + log2[e, i] * factor
                    G[e, i] = total
        return G

    @cute.jit
    def decays(self, shared, G, patch: Patch):
        """Those from the middle of the last chunk to that of this one, and those from there to its end.

        Returns: what kI is multiplied by where the state is written.

        Tokens of a second half may write 2^115 into a state of which the 32 tokens to the next middle then leave
        2^-230, which is no fp32 number. So a second half leaves 2^LEAST_LEFT at least. Where it should leave less, its
        kI are smaller by as much, so that what they write is right; what was there before, and should be gone, leaves
        2^LEAST_LEFT. The least factor is 2^-133, of which fp32 holds 16 bits.

        If the state decays to each chunk's end: those over each half.
        """
        K, half, number, stage = self.spec.K, patch.half, patch.number, patch.stage
        place = shared.decay + (stage * (2 * K) + 2 * patch.pair)
        over, of_kI = (cute.make_rmem_tensor(2, Float32) for _ in range(2))
        of_kI.fill(1.0 if self.spec.to_the_end else UNCUT)
        if cutlass.const_expr(self.spec.to_the_end):
            for e in cutlass.range_constexpr(2):
                over[e] = exp2_approx(G[e, HALF])
            vector(place, half * K).store(over.load())
        elif half == 0:
            over.fill(1.0)
            if patch.chunk > 0:
                last = cute.arch.make_warp_uniform((number - 1) % STAGES)
                cute.arch.mbarrier_wait(shared.ended + last, (number - 1) // STAGES & 1)
                over.store(vector(shared.decay, last * (2 * K) + K + 2 * patch.pair).load())
            for e in cutlass.range_constexpr(2):
                over[e] = over[e] * exp2_approx(G[e, HALF])
            vector(place, 0).store(over.load())
        else:
            for e in cutlass.range_constexpr(2):
                over[e] = exp2_approx(cute.arch.fmax(G[e, HALF], Float32(LEAST_LEFT), nan=True))
                less = cute.arch.fmin(G[e, HALF] - LEAST_LEFT, Float32(0.0), nan=True)
                of_kI[e] = UNCUT * exp2_approx(less)
            vector(place, K).store(over.load())
            arrive(shared.ended + stage, patch.lane, self.spec.each_arrives)
        return of_kI

    @cute.jit
    def operands(self, shared, raw_q, G, of_kI, patch: Patch):
        """kE, qE and kI into shared memory; k lies behind `raw_q`. `of_kI`: see `decays`.

        kE and qE are products of bf16 numbers: their rounding does little against that of kI, which has more bits where
        the state is written.
        """
        K, stage, pair, half = self.spec.K, patch.stage, patch.pair, patch.half
        summary = cutlass.const_expr(not self.spec.part.reads)
        batch = HALF // 2  # tokens read at once: before others are written, which the compiler does not move loads over
        raw = Column.of(raw_q, CHUNK, pair, half)
        rows = Column.of(shared.rows + stage * (2 * CHUNK * K), 2 * CHUNK, pair, half)
        if cutlass.const_expr(self.spec.write_in_tf32):
            cols = Column.of(shared.near + patch.group * (CHUNK * K), CHUNK, pair, half)
            across = Across.of(shared.cols + stage * (PARTS * CHUNK * K), Across.crossed(pair), half)
        else:
            cols = Column.of(shared.cols + stage * (PARTS * CHUNK * K), CHUNK, pair, half)
        waiting = []
        for i in cutlass.range_constexpr(HALF):
            if cutlass.const_expr(i % batch == 0):
                k = [raw.word(t, 2 * CHUNK * K)[0] for t in range(i, i + batch)]
                q = [None if summary else raw.word(t)[0] for t in range(i, i + batch)]
            k_i, q_i = k[i % batch], q[i % batch]
            grow = [exp2_approx(G[e, i]) for e in range(2)]
            factors = self.packed(grow)[0]
            rows.word(i)[0] = multiply_pairs(k_i, factors)
            if cutlass.const_expr(self.spec.part.splits):  # o is rounded twice then: exactly, for once
                x = float_pair(q_i, BFloat16)
                rows.word(i, 128 * CHUNK)[0] = self.packed([x[e] * grow[e] for e in range(2)])[0]
            elif cutlass.const_expr(not summary):
                rows.word(i, 128 * CHUNK)[0] = multiply_pairs(q_i, factors)

            y = float_pair(k_i, BFloat16)
            exact = [y[e] * exp2_approx(-G[e, i]) for e in range(2)]
            if cutlass.const_expr(self.spec.write_in_tf32):
                cols.word(i)[0] = self.packed(exact)[0]
                waiting.append(exact)
                if cutlass.const_expr(i % 8 >= 6):  # the even or the odd of 8 tokens are there
                    for e in cutlass.range_constexpr(2):
                        four = [waiting[t][e] * of_kI[e] for t in range(i - 6, i + 1, 2)]
                        across.four(e, i).store(self.four(four).load())
            else:
                for part in cutlass.range_constexpr(PARTS):
                    rounded = self.packed(exact)[0]
                    cols.word(i, part * (2 * CHUNK * K))[0] = rounded
                    if cutlass.const_expr(part + 1 < PARTS):
                        upper = float_pair(rounded, BFloat16)
                        exact = [exact[e] - upper[e] for e in range(2)]
