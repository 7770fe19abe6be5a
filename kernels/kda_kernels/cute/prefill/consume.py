"""The half of the prefill kernel that holds the state and runs the chain over chunks; see `kernel.py`."""

import dataclasses

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32, Int64
from cutlass.cute.nvgpu import warpgroup

from kda_kernels.cute.math import float_bits, float_of
from kda_kernels.cute.prefill.config import (
    ALIGNMENT,
    CHUNK,
    CONSUMERS,
    JOINED,
    LARGEST,
    LEAST_EXPONENT,
    MOST_EXPONENT,
    PARTS,
    STAGES,
    THREADS,
    UNCUT,
    Part,
    PrefillSpec,
)
from kda_kernels.cute.prefill.shared import Kind, arrive, by_chunk, operand, piece, swizzled, swizzled_rows, vector
from kda_kernels.cute.prefill.work import Barrier, Exit, Products, States, Work
from kda_kernels.cute.ptx import (
    PTX,
    finished,
    float_pair,
    fresh,
    larger_size,
    load_transposed,
    multiply_warpgroup,
    rest,
    select,
    send_bytes,
    store_matrices,
    store_transposed,
)


@dataclasses.dataclass(frozen=True)
class Rights:
    """Right operands of products, by the names of `Products`; the last axis is the stage."""

    solve: cute.Tensor  # the inverse, transposed
    mix: cute.Tensor  # tril(qE kI^T)
    write: cute.Tensor  # kI


@dataclasses.dataclass(frozen=True)
class Registers:
    """What a thread of the chain holds.

    Attributes:
        S: the state. w, out: what is written to the state, and o.
        S_operand, w_operand: S and w as left operands.
        exponents: S and what is added to it is times 2 to these, row by row.
    """

    S: cute.Tensor
    w: cute.Tensor
    out: cute.Tensor
    S_operand: cute.Tensor
    w_operand: cute.Tensor
    exponents: cute.Tensor


@dataclasses.dataclass(frozen=True)
class Link:
    """A chunk and a thread of the chain.

    Attributes:
        number: of the chunk on this CTA. tokens: from it on.
        col: a lane's first column of 8.
        decay: those of the chunk's stage.
    """

    number: Int32
    stage: Int32
    tokens: Int32
    group: Int32
    warp: Int32
    lane: Int32
    col: Int32
    decay: cute.Pointer


class Consumer:
    """A warpgroup with 64 value channels. Everything is transposed: value channels are the rows of all products.

    A lane's accumulators 4j + 2h + e are row 16 warp + lane // 4 + 8h, column 8j + 2 (lane % 4) + e.
    """

    spec: PrefillSpec
    element: type

    @cute.jit
    def consume(
        self, shared, atoms, tiles, o, states: States, work: Work, turn, products: Products, group: Int32
    ):  # fmt: skip
        """The chain of an item, the `turn`-th of this CTA."""
        spec = self.spec
        p = cute.arch.thread_idx()[0] & 127
        warp = cute.arch.make_warp_uniform(p >> 5)
        n_chunks = work.n_chunks
        inside = self.inside(group, p) + work.i_hv * (spec.V * spec.K)
        # a state is 64 KB: what those that prepare ask for would wait behind it
        if turn == 0:
            cute.arch.barrier(barrier_id=Barrier.ASKED, number_of_threads=THREADS)
        S = self.first_state(states, work, products, group, p, inside)
        rights = self.right_operands(shared, products, p)
        summary = cutlass.const_expr(not spec.part.reads)
        own = self.registers(S, products)
        if cutlass.const_expr(spec.scaled):
            self.scale_state(S, own.exponents)
        owed = Int32(-1)  # the stage from which a state leaves
        column, due = self.first_column(states, work)

        for chunk in cutlass.range(n_chunks, unroll=1):
            p = fresh(p)
            lane = p & 31
            col = 2 * (lane & 3)
            number = work.before + chunk
            stage, tokens = number % STAGES, work.n_tokens - chunk * CHUNK
            if cutlass.const_expr(spec.keeps and spec.kept == "float32"):
                self.hand_back(shared, owed, lane)
                owed = Int32(-1)
            cute.arch.mbarrier_wait(shared.full + stage, number // STAGES & 1)
            decay = shared.decay + stage * (2 * spec.K)
            link = Link(number, stage, tokens, group, warp, lane, col, decay)
            position, row = work.begin + (chunk + 1) * CHUNK, Int32(-1)
            if cutlass.const_expr(spec.keeps and spec.every):
                row = states.rows.element_type(-1)
                if position == due:  # asked for here, since memory takes its time
                    if column < states.rows.shape[1]:
                        row = states.rows[work.i_n, column]
                    column, due = column + 1, due + states.every
            if cutlass.const_expr(spec.chain_inverts):
                self.invert_in_turn(shared, number, stage, group, warp, lane)
            if cutlass.const_expr(spec.bounded):
                self.decay(S, decay, link.col, not spec.to_the_end)
            if cutlass.const_expr(spec.keeps and spec.kept != "float32"):  # half the bytes have left by now
                self.hand_back(shared, owed, lane)
                owed = Int32(-1)
            leaves = False  # a state may leave, from where the chunk's operands are
            if cutlass.const_expr(spec.keeps):
                leaves = position % ALIGNMENT == 0
            ratios = self.miss(shared, own, work.kind, link)
            if leaves:
                self.vacate(0, link)
            self.correct(shared, own, rights, products, ratios, link)
            self.write(shared, own, rights, products, link)
            if leaves:
                self.vacate(1, link)
            if cutlass.const_expr(spec.to_the_end):
                self.decay(S, decay + spec.K, link.col, False)
            last = False  # the stage is not empty where its decays are read once more, or a state leaves from it
            if cutlass.const_expr(spec.stays and spec.bounded and not spec.to_the_end):
                last = tokens <= CHUNK
            if leaves:
                owed = stage
            elif not last:
                arrive(shared.empty + stage, lane, spec.each_arrives)
            if cutlass.const_expr(not summary):
                source = self.buffer(shared, group, number & 1)
                self.write_out(source, atoms[4:], tiles[4:], o, work, group, group, chunk, tokens, p)
            if cutlass.const_expr(spec.keeps):
                if leaves:
                    self.await_vacant(link)
                    if tokens >= CHUNK and work.kind == 0 and work.index == 0:
                        way = Exit(atoms[-1], tiles[-1], states.kept, shared, link, work.i_hv)
                        self.keep(own, states, work, position, row, way)
            if cutlass.const_expr(spec.scaled and spec.invariant):
                if chunk & 1 == 1:
                    self.scale_state(S, own.exponents)
        if cutlass.const_expr(not summary):
            cute.arch.cp_async_bulk_wait_group(0, read=True)
        if cutlass.const_expr(spec.scaled):
            self.scale_rows(S, self.powers(own.exponents, -1))
        if cutlass.const_expr(spec.keeps):
            self.hand_back(shared, owed, p & 31)
        if cutlass.const_expr(spec.bounded and not spec.to_the_end):
            if n_chunks > 0:
                stage = (work.before + n_chunks - 1) % STAGES
                self.decay(S, shared.decay + (stage * (2 * spec.K) + spec.K), 2 * (p & 3), False)
                if cutlass.const_expr(spec.stays):
                    arrive(shared.empty + stage, p & 31, spec.each_arrives)
        self.last_state(S, shared, states, work, inside, group, p)

    def registers(self, S, products: Products) -> Registers:
        """Beside the state, nothing yet."""
        K = self.spec.K
        w = cute.make_rmem_tensor(products.mix.partition_shape_C((64, CHUNK)), Float32)
        out = cute.make_rmem_tensor(w.shape, Float32)
        S_operand = cute.make_rmem_tensor(cute.make_layout(((2, 2, 2), 1, K // 16)), self.element)
        w_operand = cute.make_rmem_tensor(cute.make_layout(((2, 2, 2), 1, CHUNK // 16)), self.element)
        exponents = cute.make_rmem_tensor(2, Int32)
        exponents.fill(0)
        return Registers(S, w, out, S_operand, w_operand, exponents)

    @cute.jit
    def miss(self, shared, own: Registers, kind: Int32, link: Link):
        """w = a v - b S~ kE, what the state misses of v, and o = S~ qE. Returns powers of two for rows, in fp16."""
        spec, S, w = self.spec, own.S, own.w
        self.round(S, own.S_operand)
        products = self.read(shared, own.S_operand, link.stage)
        words = self.values(shared, link.stage, link.tokens, kind, link.group, link.warp, link.lane)
        most = cute.make_rmem_tensor(2, Float32)
        if cutlass.const_expr(spec.scaled):
            most.fill(0.0)
            self.largest(S, most)
        read = finished(products)
        self.residual(shared, link.stage, words, read, w, own.out, link.col, own.exponents)
        ratios = None
        if cutlass.const_expr(spec.scaled):
            self.largest(w, most)
            ratios = self.into_range(most, own.exponents)
            self.scale_rows(w, ratios)
            if cutlass.const_expr(spec.part.reads):
                self.scale_rows(own.out, ratios)
        return ratios

    @cute.jit
    def correct(self, shared, own: Registers, rights: Rights, products: Products, ratios, link: Link):
        """w <- (I + L)^-1 w; meanwhile, if gates have no bound, S decays."""
        spec, w = self.spec, own.w
        self.round(w, own.w_operand)
        if cutlass.const_expr(spec.chain_inverts):
            cute.arch.mbarrier_wait(shared.inverted + link.stage, link.number // STAGES & 1)
        first = (1 + spec.inverse_parts) * link.stage
        for part in cutlass.range_constexpr(spec.inverse_parts):
            self.product(products.solve, w, own.w_operand, rights.solve, first + part, CHUNK // 16, True)
        if cutlass.const_expr(not spec.bounded):  # S was the one before the chunk
            self.decay(own.S, link.decay, link.col, False, ratios)
        warpgroup.wait_group(0)

    @cute.jit
    def write(self, shared, own: Registers, rights: Rights, products: Products, link: Link):
        """o <- o + tril(qE kI^T) w, to shared memory, and S <- S + w kI."""
        spec, w, stage = self.spec, own.w, link.stage
        self.round(w, own.w_operand)
        left = []
        if cutlass.const_expr(spec.write_in_tf32):
            left = [w[4 * j + i] * UNCUT for j in range(CHUNK // 8) for i in (0, 2, 1, 3)]
        if cutlass.const_expr(spec.part.reads):
            place = (1 + spec.inverse_parts) * stage + spec.inverse_parts
            self.product(products.mix, own.out, own.w_operand, rights.mix, place, CHUNK // 16, True)
        if cutlass.const_expr(spec.write_in_tf32):
            self.write_in_tf32(shared, own.S, left, stage)
        else:
            for part in cutlass.range_constexpr(PARTS):
                self.product(
                    products.write, own.S, own.w_operand, rights.write, PARTS * stage + part, CHUNK // 16, True
                )
        if cutlass.const_expr(spec.part.reads):
            warpgroup.wait_group(1 if spec.write_in_tf32 else PARTS)
            if cutlass.const_expr(spec.out_buffers == 1):
                self.own_buffer(link.group, link.warp)
            self.stage_out(own.out, shared, link.group, link.number, stage, link.warp, link.lane, own.exponents)
        warpgroup.wait_group(0)

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

    def right_operands(self, shared, products: Products, p: Int32) -> "Rights":
        """What products take from shared memory, of all stages."""
        spec = self.spec
        cols = operand(shared.cols, Kind.MN_SW128, (spec.K, CHUNK, PARTS * STAGES), (1, 0, 2))
        squares = (CHUNK, CHUNK, (1 + spec.inverse_parts) * STAGES)
        square = operand(shared.mix, Kind.K_SW64, squares, (0, 1, 2))
        inverse = operand(shared.mix, Kind.MN_SW64, squares, (1, 0, 2))
        pairs = ((products.solve, inverse), (products.mix, square), (products.write, cols))
        return Rights(*(mma.make_fragment_B(mma.get_slice(p).partition_B(x)) for mma, x in pairs))

    @cute.jit
    def values(self, shared, stage: Int32, tokens: Int32, kind: Int32, group: Int32, warp: Int32, lane: Int32):
        """v of a chunk, this warp's 16 value channels, as accumulators lie: words of two tokens."""
        spec = self.spec
        # 8 tokens a matrix: lanes give the addresses of tokens
        token = (lane >> 4) * 8 + (lane & 7)
        zeros = (shared.zeros.toint() - shared.v.toint()).to(Int32) >> 1
        place = stage * (CHUNK * spec.V)
        place = place + swizzled(token, ((64 * group + 16 * warp) >> 3) + (lane >> 3 & 1), 8, self.element)
        words = []
        for j in cutlass.range_constexpr(0, CHUNK // 8, 2):
            # what follows the last token in memory is another's, and may be no number
            ours = 8 * j + token < tokens
            if cutlass.const_expr(spec.part.splits or spec.part is Part.SUMMARY):
                ours = ours and kind == 0
            words.extend(load_transposed(shared.v + (place + j * 8 * 64 if ours else zeros)))
        return words

    @cute.jit
    def largest(self, acc, most):
        """The largest number of each row of accumulators, of this lane and at least `most`, into it."""
        for j in cutlass.range_constexpr(cute.size(acc) // 4):
            for i in cutlass.range_constexpr(4):
                most[i // 2] = larger_size(most[i // 2], acc[4 * j + i])

    @cute.jit
    def into_range(self, most, exponents):
        """Powers of two for rows whose largest number is `most`, so that it is 2^LARGEST to twice that; `exponents`
        count them."""
        ratios = cute.make_rmem_tensor(2, Float32)
        for h in cutlass.range_constexpr(2):
            x = most[h]
            for step in (1, 2):  # the lanes of a row
                x = larger_size(x, cute.arch.shuffle_sync_bfly(x, step))
            wanted = exponents[h] + (LARGEST + 127 - (float_bits(x) >> 23))
            wanted = cutlass.min(cutlass.max(wanted, -MOST_EXPONENT), MOST_EXPONENT)
            ratios[h] = float_of((wanted - exponents[h] + 127) << 23)
            exponents[h] = wanted
        return ratios

    @cute.jit
    def powers(self, exponents, sign: cutlass.Constexpr[int] = 1):
        """2^exponents, or its inverse."""
        out = cute.make_rmem_tensor(2, Float32)
        for h in cutlass.range_constexpr(2):
            out[h] = self.power(sign * exponents[h])
        return out

    @cute.jit
    def scale_rows(self, acc, factors):
        for j in cutlass.range_constexpr(cute.size(acc) // 4):
            for i in cutlass.range_constexpr(4):
                acc[4 * j + i] = acc[4 * j + i] * factors[i // 2]

    @cute.jit
    def scale_state(self, S, exponents):
        """S into range, as it would be if it came from memory."""
        most = cute.make_rmem_tensor(2, Float32)
        most.fill(0.0)
        self.largest(S, most)
        self.scale_rows(S, self.into_range(most, exponents))

    @cute.jit
    def residual(self, shared, stage: Int32, words, read, w, out, col: Int32, exponents):
        """w = a v - b S~ kE, and what the state gives to o, S~ qE, from S~ [kE; qE]."""
        factors = shared.token + stage * (3 * CHUNK)
        powers = self.powers(exponents)
        for j in cutlass.range_constexpr(CHUNK // 8):
            a, b = (vector(factors, i * CHUNK + 8 * j + col).load() for i in range(2))
            for h in cutlass.range_constexpr(2):
                v = float_pair(words[2 * j + h], self.element)
                for e in cutlass.range_constexpr(2):
                    i = 4 * j + 2 * h + e
                    if cutlass.const_expr(self.spec.scaled):
                        w[i] = a[e] * v[e] * powers[h] - b[e] * read[i]
                    else:
                        w[i] = a[e] * v[e] - b[e] * read[i]
                    if cutlass.const_expr(self.spec.part.reads):
                        out[i] = read[cute.size(w) + i]

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
        for j in cutlass.range_constexpr(K // 8):
            for h in cutlass.range_constexpr(2):
                pair = cute.make_rmem_tensor(2, Float32)
                for e in cutlass.range_constexpr(2):
                    pair[e] = S[4 * j + 2 * h + e]
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
        for j in cutlass.range_constexpr(K // 8):
            for h in cutlass.range_constexpr(2):
                pair = cute.make_rmem_tensor(2, Float32)
                for e in cutlass.range_constexpr(2):
                    pair[e] = S[4 * j + 2 * h + e]
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
        for j in cutlass.range_constexpr(K // 8):
            for h in cutlass.range_constexpr(2):
                pair = cute.make_rmem_tensor(2, Float32)
                for e in cutlass.range_constexpr(2):
                    pair[e] = S[4 * j + 2 * h + e] * factor
                vector(place, (row + 8 * h) * pitch + 8 * j + col).store(pair.load().to(Float16))
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

    def power(self, exponent: Int32) -> Float32:
        """2^exponent."""
        return float_of((exponent + 127) << 23)

    @cute.jit
    def row_buffer(self, shared, group: Int32, p: Int32):
        """Of this warp, for 16 rows of a state on their way out, once both warpgroups are done with the last chunk."""
        cute.arch.barrier(barrier_id=Barrier.LEAVE, number_of_threads=CONSUMERS)
        rows = 2 * 16 * (self.spec.K + 8)
        return cute.recast_ptr(shared.rows, dtype=BFloat16) + cute.assume((4 * group + (p >> 5)) * rows, divby=rows)

    @cute.jit
    def decay(self, S, factors, col: Int32, roots: cutlass.Constexpr[bool], ratios=None):
        """S diag(factors), or of their squares if they are roots; rows times `ratios`."""
        for j in cutlass.range_constexpr(self.spec.K // 8):
            pair = vector(factors, 8 * j + col).load()
            for i in cutlass.range_constexpr(4):
                S[4 * j + i] = S[4 * j + i] * pair[i % 2]
                if cutlass.const_expr(roots):
                    S[4 * j + i] = S[4 * j + i] * pair[i % 2]
                if cutlass.const_expr(ratios is not None):
                    S[4 * j + i] = S[4 * j + i] * ratios[i // 2]

    @cute.jit
    def round(self, acc, target):
        """Accumulators as the left operand of the next product: the same places."""
        cute.make_tensor(target.iterator, acc.layout).store(acc.load().to(target.element_type))

    @cute.jit
    def product(
        self, mma: cute.TiledMma, acc, left, right, stage: Int32, steps: cutlass.Constexpr[int],
        add: cutlass.Constexpr[bool],
    ):  # fmt: skip
        """Starts acc (+)= left right."""
        warpgroup.fence()
        for i in cutlass.range_constexpr(steps):
            mma.set(warpgroup.Field.ACCUMULATE, add or i != 0)
            cute.gemm(mma, acc, left[None, None, i], right[None, None, i, stage], acc)
        warpgroup.commit_group()

    def read(self, shared, S_operand, stage: Int32) -> list:
        """Starts S~ [kE; qE]^T, or S~ kE^T: 16 channels at a time, so that words of the next are made meanwhile."""
        spec, words = self.spec, cute.recast_tensor(S_operand, Int32)
        tokens = 2 * CHUNK if spec.part.reads else CHUNK
        line = 128 if spec.bounded else 2 * tokens  # bytes: of 64 channels of a token, or of a channel's tokens
        right = swizzled_rows(shared.rows, stage * (2 * CHUNK * spec.K * 2), line)
        shape = f"m64n{tokens}k16.f32.{PTX[self.element]}.{PTX[self.element]}"
        products = None
        warpgroup.fence()
        for i in range(spec.K // 16):
            left = [words[4 * i + n] for n in range(4)]
            step = 2 * (i % 4) + 512 * (i // 4) if spec.bounded else line * i
            products = multiply_warpgroup(shape, left, right, [step], products, transposed=not spec.bounded)
        warpgroup.commit_group()
        return products

    @cute.jit
    def write_in_tf32(self, shared, S, left: list, stage: Int32):
        """Starts S += w kI. Of 8 tokens a lane has two that lie beside each other: kI has the even ones first.

        If gates have a bound kI's channels are `Across.crossed`, and a lane's numbers of 16 channels are in that order.
        """
        columns = swizzled_rows(shared.cols, stage * (PARTS * CHUNK * self.spec.K * 2))
        order = list(range(cute.size(S)))
        if self.spec.bounded:  # 4 (2 block + a) + 2 row + b
            order = [8 * (i // 8) + 4 * (i % 2) + i % 4 // 2 * 2 + i % 8 // 4 for i in order]
        warpgroup.fence()
        total = multiply_warpgroup(
            "m64n128k8.f32.tf32.tf32", left, columns, [2 * i for i in range(CHUNK // 8)], [S[i] for i in order]
        )
        for n, i in enumerate(order):
            S[i] = total[n]
        warpgroup.commit_group()

    @cute.jit
    def own_buffer(self, group: Int32, warp: Int32):
        """All of this warpgroup are here, and what they wrote last has left shared memory."""
        if warp == 0:
            cute.arch.cp_async_bulk_wait_group(0, read=True)
        cute.arch.barrier(barrier_id=Barrier.SEND + group, number_of_threads=128)

    def buffer(self, shared, group, index):
        buffers = self.spec.out_buffers
        return shared.out + (buffers * group + (index if buffers == 2 else 0)) * (CHUNK * 64)

    @cute.jit
    def stage_out(self, out, shared, group: Int32, chunk: Int32, stage: Int32, warp: Int32, lane: Int32, exponents):
        """o of this chunk into shared memory."""
        if cutlass.const_expr(self.spec.scaled):
            self.scale_rows(out, self.powers(exponents, -1))
        factors = shared.token + stage * (3 * CHUNK) + 2 * CHUNK + 2 * (lane & 3)
        rounded = cute.make_rmem_tensor(cute.size(out), self.element)
        for j in cutlass.range_constexpr(CHUNK // 8):
            scale = vector(factors, 8 * j).load()
            for h in cutlass.range_constexpr(2):
                for e in cutlass.range_constexpr(2):
                    rounded[4 * j + 2 * h + e] = (out[4 * j + 2 * h + e] * scale[e]).to(self.element)
        self.stage(rounded, self.buffer(shared, group, chunk & 1), warp, lane)

    @cute.jit
    def stage(self, rounded, buffer, warp: Int32, lane: Int32):
        """Columns of accumulators, rounded, as rows of a tile of 64 value channels."""
        words = cute.recast_tensor(rounded, Int32)
        target = buffer + swizzled((lane >> 4) * 8 + (lane & 7), 2 * warp + (lane >> 3 & 1), 8, self.element)
        for j in cutlass.range_constexpr(0, cute.size(rounded) // 4, 2):
            store_transposed(target + j * 8 * 64, tuple(words[2 * j + i] for i in range(4)))

    def first_column(self, states: States, work: Work):
        """Of checkpoints at regular distances the first one in this round, and the tokens before it."""
        column = Int32(0)
        if self.spec.keeps and self.spec.every:
            column = work.begin // states.every
        return column, (column + 1) * states.every

    @cute.jit
    def keep(self, own: Registers, states: States, work: Work, position: Int32, row, way: Exit):
        """The state after `position` tokens of a sequence into the rows of the checkpoints that are there.

        At regular distances there is one of them at most, in `row`.
        """
        if cutlass.const_expr(self.spec.every):
            self.send_tiles(own, Int32(row), way)
        else:
            for column in cutlass.range(states.rows.shape[1], unroll=1):
                if Int32(states.offsets[work.i_n, column]) == position:
                    self.send_tiles(own, Int32(states.rows[work.i_n, column]), way)

    @cute.jit
    def hand_back(self, shared, owed: Int32, lane: Int32):
        """Says of the stage from which a state leaves, or of none (-1), that what this warp had there has left."""
        if owed >= 0:
            cute.arch.cp_async_bulk_wait_group(0, read=True)
            arrive(shared.empty + owed, lane, self.spec.each_arrives)

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
            for j in cutlass.range_constexpr(4):
                for h in cutlass.range_constexpr(2):
                    pair = cute.make_rmem_tensor(2, Float32)
                    for e in cutlass.range_constexpr(2):
                        pair[e] = values[4 * j + 2 * h + e]
                    place = swizzled((lane >> 2) + 8 * h, 4 * j + (lane & 3), 2, dtype, 16)
                    vector(tile, place).store(pair.load())

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

    @cute.jit
    def write_out(
        self, source, atoms, tiles, o, work: Work, group: Int32, half: Int32, chunk: Int32, tokens: Int32, p: Int32,
        rows: cutlass.Constexpr[int] = CHUNK,
    ):  # fmt: skip
        """From `source` to where it belongs: by TMA, but for a last chunk of fewer tokens than `rows`.

        Args: atoms, tiles: of o, and of reads if there are any. group: the warpgroup. half: of the value channels.
        """
        warp = p >> 5
        cute.arch.fence_proxy("async.shared", space="cta")  # here: before the wait for products it crashes the compiler
        self.own_buffer(group, warp)  # the other one, if there are two: what is in it has gone
        if tokens >= rows or work.kind == 1:
            if warp == 0:
                if work.kind == 0:
                    there = tiles[0][None, None, work.i_hv, work.b]
                    here, there = by_chunk(atoms[0], there, source, work.first, 64, rows)
                    cute.copy(atoms[0], here, there[None, chunk, half])
                if cutlass.const_expr(self.spec.part.splits):
                    if work.kind == 1:
                        first = work.unit * work.segment
                        here, there = by_chunk(atoms[1], tiles[1][None, None, work.i_hv], source, first, 64)
                        cute.copy(atoms[1], here, there[None, chunk, half])
                cute.arch.cp_async_bulk_commit_group()
        else:
            offset = (
                Int64(work.b) * o.stride[0]
                + Int64(work.first + chunk * rows) * o.stride[1]
                + Int64(work.i_hv) * o.stride[2]
            )
            for row in cutlass.range(p >> 3, tokens, 16, unroll=1):
                target = vector(o.iterator, offset + row * o.stride[1] + (64 * half + 8 * (p & 7)), 8)
                target.store(vector(source, swizzled(row, p & 7, 8, self.element), 8).load())
