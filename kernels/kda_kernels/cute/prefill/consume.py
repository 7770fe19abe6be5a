"""The half of the prefill kernel that holds the state and runs the chain over chunks; see `kernel.py`."""

import dataclasses

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import warpgroup

from kda_kernels.cute.prefill.checkpoints import CheckpointTransfer
from kda_kernels.cute.prefill.config import (
    ALIGNMENT,
    CHUNK,
    PARTS,
    STAGES,
    THREADS,
    UNCUT,
    Part,
    PrefillSpec,
)
from kda_kernels.cute.prefill.shared import Kind, arrive, by_chunk, operand, swizzled, swizzled_rows, vector
from kda_kernels.cute.prefill.work import Barrier, Exit, Link, Products, Registers, States, Work
from kda_kernels.cute.ptx import (
    PTX,
    finished,
    float_pair,
    fresh,
    load_transposed,
    multiply_warpgroup,
    store_transposed,
)


@dataclasses.dataclass(frozen=True)
class Rights:
    """Right operands of products, by the names of `Products`; the last axis is the stage."""

    solve: cute.Tensor  # the inverse, transposed
    mix: cute.Tensor  # tril(qE kI^T)
    write: cute.Tensor  # kI


class Consumer(CheckpointTransfer):
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
            if cutlass.const_expr(spec.keeps and spec.every):  # asked for here, since memory takes its time
                row, column, due = self.next_row(states, work, position, column, due)
            if cutlass.const_expr(spec.chain_inverts):
                self.invert_in_turn(shared, number, stage, group, warp, lane)
            if cutlass.const_expr(spec.bounded):
                self.decay(S, decay, link.col)
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
                self.decay(S, decay + spec.K, link.col)
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
                    way = Exit(atoms[-1], tiles[-1], states.kept, shared, link, work.i_hv)
                    self.keep(own, states, work, position, row, way)
            if cutlass.const_expr(spec.scaled and spec.invariant):
                if chunk & 1 == 1:
                    self.scale_state(S, own.exponents)
        if cutlass.const_expr(not summary):
            cute.arch.cp_async_bulk_wait_group(0, read=True)
        if cutlass.const_expr(spec.scaled):
            self.scale_rows(S, self.powers(own.exponents, -1))
        if cutlass.const_expr(spec.bounded and not spec.to_the_end):
            if n_chunks > 0:
                stage = (work.before + n_chunks - 1) % STAGES
                self.decay(S, shared.decay + (stage * (2 * spec.K) + spec.K), 2 * (p & 3))
                if cutlass.const_expr(spec.stays):
                    if owed < 0:
                        arrive(shared.empty + stage, p & 31, spec.each_arrives)
        if cutlass.const_expr(spec.keeps):
            self.hand_back(shared, owed, p & 31)
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
            self.decay(own.S, link.decay, link.col, ratios)
        warpgroup.wait_group(0)

    @cute.jit
    def write(self, shared, own: Registers, rights: Rights, products: Products, link: Link):
        """o <- o + tril(qE kI^T) w, to shared memory, and S <- S + w kI."""
        spec, w, stage = self.spec, own.w, link.stage
        self.round(w, own.w_operand)
        left = []
        if cutlass.const_expr(spec.write_in_tf32):
            uncut = UNCUT**2 if spec.to_the_end else UNCUT  # where kI is not multiplied by it
            left = [w[4 * j + i] * uncut for j in range(CHUNK // 8) for i in (0, 2, 1, 3)]
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
    def decay(self, S, factors, col: Int32, ratios=None):
        """S diag(factors), of all of a lane's columns or of some that lie beside each other; rows times `ratios`."""
        for j in cutlass.range_constexpr(cute.size(S) // 4):
            pair = vector(factors, 8 * j + col).load()
            for i in cutlass.range_constexpr(4):
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
