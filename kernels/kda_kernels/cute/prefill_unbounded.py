"""How the prefill kernel prepares chunks whose gates have no bound; see `prefill_kernel.py` for the names.

With G the running sum of log decays in a chunk, and 31 its last token: kE = k exp(G), qE = q exp(G), kI =
k exp(G_31 - G). The state S is the one before the chunk, and decays once, by exp(G_31). For tokens j < i,
exp(G_i - G_j) is exp(G_i - G_m) exp(G_m - G_j), where m is the border between the halves, of 1, 2, 4, 8 or 16 tokens,
that part them. So all factors are products of decays: nothing overflows or is divided by what underflows, whatever the
gate; and all that token i gets is made of decays up to its own, so no bit of it depends on what follows.

A warp has a block of 8 tokens, a lane four of its channels, from 4 lane.
"""

import dataclasses
import math

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32

from kda_kernels.cute.math import LOG2_E, log2_softplus, rate, reciprocal, sigmoid
from kda_kernels.cute.prefill_config import BLOCK, CHUNK, PARTS, STAGES, Part, PrefillSpec
from kda_kernels.cute.prefill_shared import (
    L_HALF,
    L_PITCH,
    TILE,
    TILE_PITCH,
    arrive,
    by_chunk,
    piece,
    room_for_g,
    swizzled,
    vector,
)
from kda_kernels.cute.ptx import (
    bfloat16_pair,
    exp2_approx,
    fresh,
    load_matrices,
    load_transposed,
    multiply_16x8x16,
    multiply_pairs,
    rest,
    select,
)
from kda_kernels.problem import Gate

SMEM = cute.AddressSpace.smem
INVERTER, LOADER = 0, 3  # warps


@dataclasses.dataclass(frozen=True)
class Rows:
    """A block's tokens of k in shared memory, and those of q or of k's second part behind them.

    As in a tile of more tokens, 128-byte swizzle; addresses are in bytes. `start` is a multiple of 1024, so that the
    swizzle's exclusive or falls on what a lane adds to it, and a token or a step costs one instruction.
    """

    start: Int32
    apart: int  # from k to what is behind it
    height: int  # from 64 channels to the other 64: 128 times the tile's tokens

    @staticmethod
    def of(pointer, block, apart: int, tokens: int) -> "Rows":
        """Block number `block` of a tile of so many tokens; `apart` in elements."""
        return Rows(pointer.toint().to(Int32) + block * (128 * BLOCK), 2 * apart, 128 * tokens)

    def quad(self, lane: Int32) -> Int32:
        """Where the first token's four channels of this lane are."""
        return self.start + ((lane >> 4) * self.height + (lane & 15) * 8)

    def token(self, quad: Int32, i: int, part: int = 0):
        """Token i, from `quad`."""
        return cute.make_ptr(BFloat16, (quad ^ (16 * i)) + (128 * i + part * self.apart), SMEM, assumed_align=8)

    def matrices(self, lane: Int32, apart: int) -> Int32:
        """Where this lane's row of four 8 x 8 matrices is: k's and q's first 8 channels, then their next 8."""
        row = lane & 7
        return self.start + ((lane >> 3 & 1) * apart + row * 128 + ((lane >> 4) ^ row) * 16)

    def right(self, lane: Int32, part: int = 0) -> Int32:
        """The same for the first 32 channels of k, or of what is behind it."""
        row = lane & 7
        return self.start + (part * self.apart + row * 128 + ((lane >> 3) ^ row) * 16)

    def step(self, matrices: Int32, step: int):
        """The same for the next 16 channels, and so on."""
        return cute.make_ptr(
            BFloat16, (matrices ^ (32 * (step & 3))) + (step >> 2) * self.height, SMEM, assumed_align=16
        )


@dataclasses.dataclass(frozen=True)
class Places:
    """Of a warp's block in a chunk, and for `cross` of all of them.

    Attributes:
        raw: k and q, then in place as they have decayed since the block began. read: kE and qE. write: kI in parts.
        left: what each block leaves of the state, fp32 [CHUNK / BLOCK, K]; until Aqk takes its place, `mix`.
        columns: k as it decays to where later blocks' decays begin: block 0's to its end and to its half's, 1's, 2's.
        late: block 3's k and q as they have decayed since their half began.
        decay: what the chunk leaves of the state, fp32 [K].
    """

    raw: Rows
    read: Rows
    write: Rows
    left: cute.Pointer
    mix: cute.Pointer
    columns: list
    late: Rows
    decay: cute.Pointer


class Unbounded:
    """A warpgroup that prepares every other chunk. What is the same for any gate is `Producer`'s and `Relater`'s."""

    spec: PrefillSpec

    @cute.jit
    def produce_unbounded(
        self, shared, atoms, sources, beta, A_log, dt_bias, b: Int32, first: Int32, n_tokens: Int32, n_chunks: Int32,
        i_h: Int32, i_hv: Int32, kind: Int32, scale: Float32, lower_bound: Float32, group: Int32,
    ):  # fmt: skip
        spec = self.spec
        p = cute.arch.thread_idx()[0] & 127
        warp, lane = p >> 5, p & 31

        raw_q = piece(shared.raw, group, 2 * CHUNK * spec.K)
        raw_k = raw_q + CHUNK * spec.K
        raw_g = piece(shared.raw_g, group, room_for_g(shared.raw_g.dtype.width))
        scratch = piece(shared.solve, group, 3 * TILE)
        loaded = shared.loaded + group
        inputs = [
            (atoms[i], *by_chunk(atoms[i], sources[i][None, None, head, b], target, first, spec.K))
            for i, head, target in ((0, i_h, raw_q), (1, i_h, raw_k), (3, i_hv, raw_g))
            if spec.part.reads or i != 0  # without q, nothing is made of it
        ]
        size = CHUNK * spec.K * (16 * (len(inputs) - 1) + raw_g.dtype.width) // 8
        if warp == LOADER:
            self.ask(inputs, loaded, size, group, n_chunks)

        # after the loads are on their way: these wait for memory too
        A = Float32(1.0)
        if cutlass.const_expr(A_log is not None):
            A = rate(A_log[i_hv].to(Float32), False)
        if cutlass.const_expr(spec.gate is Gate.SAFE):
            A = A * LOG2_E
        bias = Float32(0.0)
        if cutlass.const_expr(dt_bias is not None):
            bias = dt_bias[i_hv * spec.K + p].to(Float32)
            if cutlass.const_expr(spec.gate is Gate.SOFTPLUS):
                bias = bias * LOG2_E
        vector(shared.bias, p, 1)[0] = bias  # both warpgroups the same
        self.barrier(group)
        raw_beta = self.fetch_beta(beta, b, first, group * CHUNK + lane, n_tokens, i_hv)
        for chunk in cutlass.range(group, n_chunks, 2, unroll=1):
            p = fresh(p)
            warp, lane = p >> 5, p & 31
            stage = cute.arch.make_warp_uniform(chunk % STAGES)
            tokens = n_tokens - chunk * CHUNK
            sums = shared.sums + (2 * group + (chunk >> 1 & 1)) * (4 * CHUNK)
            cute.arch.mbarrier_wait(loaded, chunk >> 1 & 1)

            if tokens < CHUNK:
                if cutlass.const_expr(spec.part.reads):
                    self.fill(raw_q, 0.0, tokens, p)
                self.fill(raw_k, 0.0, tokens, p)
                self.fill(raw_g, 0.0 if spec.gate is Gate.NONE else -math.inf, tokens, p)  # no decay
                self.barrier(group)
            at = self.places(shared, raw_k, raw_g, stage, warp)
            self.own_squares(at.raw, sums, warp, lane)
            d = self.each_decay(raw_g, A, shared.bias, lower_bound, warp, lane)
            cute.arch.mbarrier_wait(shared.empty + stage, (chunk // STAGES & 1) ^ 1)
            if warp == LOADER:
                full = shared.full + stage
                if kind == 0:
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive_and_expect_tx(full, CHUNK * spec.V * 2)
                    place = shared.v + stage * (CHUNK * spec.V)
                    v_tiles, v = by_chunk(atoms[2], sources[2][None, None, i_hv, b], place, first, spec.V)
                    cute.copy(atoms[2], v[None, chunk, 0], v_tiles, tma_bar_ptr=full)
                else:
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive(full)

            self.leave(at.left, d, warp, lane)
            own = self.relate_own(at, d, lane)
            if warp == 1:
                value = raw_beta
                if cutlass.const_expr(spec.beta_is_logit):
                    value = sigmoid(raw_beta)
                    if cutlass.const_expr(spec.allow_neg_eigval):
                        value = 2.0 * value
                vector(sums, 3 * CHUNK + lane, 1)[0] = value
                raw_beta = self.fetch_beta(beta, b, first, (chunk + 2) * CHUNK + lane, n_tokens, i_hv)
            self.barrier(group)
            # 1, and the compiler does not know: it would keep, and spill, products that are made again in a moment
            one = select(tokens > 0, Float32(1.0), Float32(0.0))
            self.write_operands(at, d, raw_g, one, warp, lane)
            cute.arch.fence_proxy("async.shared", space="cta")
            self.barrier(group)

            self.relate_others(at, own, scratch, sums, warp, lane, tokens)
            if warp == 2:
                self.factors(shared.token + stage * (3 * CHUNK), sums, scale, lane, tokens)
            cute.arch.fence_proxy("async.shared", space="cta")
            # L goes to the warp that inverts, and what the next inputs take the place of is read; nobody else waits
            if warp == INVERTER or warp == LOADER:  # noqa: SIM109 (values of the GPU)
                cute.arch.barrier(barrier_id=5 + group, number_of_threads=128)
            else:
                cute.arch.barrier_arrive(barrier_id=5 + group, number_of_threads=128)
            if warp == LOADER:
                self.ask(inputs, loaded, size, chunk + 2, n_chunks)
            if warp == INVERTER:
                self.invert_blocks(scratch, self.mix(shared, stage, 0), lane)
                cute.arch.fence_proxy("async.shared", space="cta")
                arrive(shared.full + stage, lane, spec.each_arrives)

    @cute.jit
    def ask(self, inputs: list, loaded, size: cutlass.Constexpr[int], chunk: Int32, n_chunks: Int32):
        """Has the inputs of a chunk loaded, if there is one; and the next into L2, as they can be asked for late."""
        if chunk < n_chunks:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(loaded, size)
            for atom, target, source in inputs:
                cute.copy(atom, source[None, chunk, 0], target, tma_bar_ptr=loaded)
            if chunk + 2 < n_chunks:
                with cute.arch.elect_one():
                    for atom, _, source in inputs:
                        cute.prefetch(atom, source[None, chunk + 2, 0])

    def places(self, shared, raw_k, raw_g, stage: Int32, warp: Int32) -> Places:
        K, squares = self.spec.K, 1 + self.spec.inverse_parts
        mix = piece(shared.mix, stage * squares + squares - 1, CHUNK * CHUNK)
        cross = cute.recast_ptr(raw_g, dtype=BFloat16)
        return Places(
            raw=Rows.of(raw_k, warp, -CHUNK * K, CHUNK),
            read=Rows.of(shared.rows + stage * (2 * CHUNK * K), warp, CHUNK * 64, 2 * CHUNK),
            write=Rows.of(shared.cols + stage * (PARTS * CHUNK * K), warp, CHUNK * K, CHUNK),
            left=cute.recast_ptr(mix, dtype=Float32),
            mix=mix,
            columns=[Rows.of(cross, 2 * i, 0, BLOCK) for i in range(4)],
            late=Rows.of(cross, 8, BLOCK * K, BLOCK),
            decay=piece(shared.decay, stage, 2 * K),
        )

    @cute.jit
    def relate_own(self, at: Places, d, lane: Int32):
        """Products of this block's tokens with each other. Their factors go where kE, qE and kI go after them."""
        self.halves(at.raw, at.read, d, 1, lane)
        self.halves(at.raw, at.write, d, 2, lane)
        cute.arch.sync_warp()
        by_one = self.products(at.read, [(at.raw, 0)], lane)[0]
        by_two = self.products(at.write, [(at.write, 0)], lane)[0]
        cute.arch.sync_warp()
        self.halves(at.raw, at.read, d, 4, lane)
        cute.arch.sync_warp()
        return self.parted(by_one, by_two, self.products(at.read, [(at.read, 0)], lane)[0], lane)

    @cute.jit
    def write_operands(self, at: Places, d, raw_g, one: Float32, warp: Int32, lane: Int32):
        """kE, qE and kI, and what relates this block to the others: with what those leave."""
        ones = (one,) * 4
        before = self.left_by(at.left, lane, [(warp > i, i) for i in range(3)])
        after = self.left_by(at.left, lane, [(warp < i, i) for i in range(1, 4)])
        if warp == 0:
            near = self.left_by(at.left, lane, [(True, 1)])
            self.until(at.raw, at.write, [(at.columns[0], ones), (at.columns[1], near)], d, after, lane)
            self.since(at.raw, [(at.read, before)], d, lane)
        elif warp < 3:
            column = Rows.of(cute.recast_ptr(raw_g, dtype=BFloat16), 2 * (warp + 1), 0, BLOCK)
            self.until(at.raw, at.write, [(column, ones)], d, after, lane)
            self.since(at.raw, [(at.read, before), (at.raw, ones)], d, lane)
        else:
            near = self.left_by(at.left, lane, [(True, 2)])
            self.until(at.raw, at.write, [], d, after, lane)
            left = self.since(at.raw, [(at.read, before), (at.late, near), (at.raw, ones)], d, lane)
            for e in cutlass.range_constexpr(4):
                before[e] = left[e]
            vector(at.decay, 4 * lane, 4).store(before.load())

    @cute.jit
    def relate_others(self, at: Places, own, scratch, sums, warp: Int32, lane: Int32, tokens: Int32):
        """Products of this block's tokens with those of earlier blocks; and where all that relates them goes."""
        columns = [(column, 0) for column in at.columns]
        for w in cutlass.range_constexpr(CHUNK // BLOCK):
            if warp == w:
                blocks = []
                if cutlass.const_expr(w == 1):
                    blocks = self.products(at.raw, columns[:1], lane)
                elif cutlass.const_expr(w == 2):
                    blocks = self.products(at.raw, columns[1:3], lane)
                elif cutlass.const_expr(w == 3):
                    blocks = self.products(at.late, columns[1:3], lane) + self.products(at.raw, columns[3:], lane)
                self.spread_block([*blocks, own], w, scratch, at.mix, sums, lane, tokens)

    @cute.jit
    def leave(self, target, d, warp: Int32, lane: Int32):
        """What this warp's block leaves of the state, to the rest of its warpgroup."""
        total = cute.make_rmem_tensor(4, Float32)
        for e in cutlass.range_constexpr(4):
            total[e] = d[e, 0]
            for i in cutlass.range_constexpr(1, BLOCK):
                total[e] = total[e] * d[e, i]
        vector(target, warp * self.spec.K + 4 * lane, 4).store(total.load())

    @cute.jit
    def left_by(self, source, lane: Int32, blocks: list):
        """What blocks leave together of four channels: of those whose condition is met."""
        out = cute.make_rmem_tensor(4, Float32)
        out.fill(1.0)
        for condition, i in blocks:
            left = vector(source, i * self.spec.K + 4 * lane, 4).load()
            for e in cutlass.range_constexpr(4):
                out[e] = out[e] * (left[e] if condition is True else select(condition, left[e], Float32(1.0)))
        return out

    @cute.jit
    def fill(self, raw, value: cutlass.Constexpr[float], tokens: Int32, p: Int32):
        """`value` after the last token: what follows it in memory is another's, and may be no number."""
        pieces, unit = raw.dtype.width, 128 // raw.dtype.width  # of 16 bytes in a row; elements of each
        values = cute.make_rmem_tensor(unit, raw.dtype)
        values.fill(value)
        for row in cutlass.range(tokens + p // pieces, CHUNK, 128 // pieces, unroll=1):
            vector(raw, swizzled(row, p % pieces, unit, raw.dtype), unit).store(values.load())

    @cute.jit
    def each_decay(self, raw_g, A: Float32, bias, lower_bound: Float32, warp: Int32, lane: Int32):
        """What each token leaves of the state: [4, BLOCK]. `bias`: of each channel; for softplus gates in log2."""
        spec, dtype = self.spec, raw_g.dtype
        start = piece(raw_g, warp, BLOCK * 1024 // dtype.width)
        raw = cute.make_rmem_tensor((4, BLOCK), dtype)
        for i in cutlass.range_constexpr(BLOCK):
            raw[None, i].store(vector(start, swizzled(i, lane, 4, dtype), 4).load())
        log2 = cute.make_rmem_tensor((4, BLOCK), Float32)
        bias = vector(bias, 4 * lane, 4).load()
        factor = Float32(LOG2_E)
        if cutlass.const_expr(spec.gate is Gate.SAFE):
            factor = lower_bound * LOG2_E
        elif cutlass.const_expr(spec.gate is Gate.SOFTPLUS):
            factor = -A
        for i in cutlass.range_constexpr(BLOCK):
            x = self.quad(raw, i)
            for e in cutlass.range_constexpr(4):
                if cutlass.const_expr(spec.gate is Gate.SAFE):
                    log2[e, i] = reciprocal(1.0 + exp2_approx((x[e] + bias[e]) * -A))
                elif cutlass.const_expr(spec.gate is Gate.SOFTPLUS):
                    log2[e, i] = log2_softplus(x[e] * LOG2_E + bias[e])
                else:
                    log2[e, i] = x[e]
        d = cute.make_rmem_tensor((4, BLOCK), Float32)
        for i in cutlass.range_constexpr(4 * BLOCK):
            d[i] = exp2_approx(log2[i] * factor)
        return d

    @cute.jit
    def quad(self, raw, i: cutlass.Constexpr[int]):
        """Column i of [4, n], fp32."""
        if cutlass.const_expr(raw.element_type is BFloat16):
            words = cute.recast_tensor(raw, Int32)
            return (*bfloat16_pair(words[2 * i]), *bfloat16_pair(words[2 * i + 1]))
        else:
            return tuple(raw[e, i].to(Float32) for e in range(4))

    @cute.jit
    def load(self, rows: Rows, quad: Int32, i: cutlass.Constexpr[int]):
        """Token i of this lane: k and q."""
        k = cute.make_rmem_tensor(4, BFloat16)
        q = cute.make_rmem_tensor(4, BFloat16)
        k.store(vector(rows.token(quad, i), 0, 4).load())
        if cutlass.const_expr(self.spec.part.reads):
            q.store(vector(rows.token(quad, i, 1), 0, 4).load())
        return k, q

    @cute.jit
    def scale(self, x, factor):
        """Four numbers of 16 bits times so many rounded to them: their products, rounded again."""
        rounded = self.rounded(factor)
        words, by = cute.recast_tensor(x, Int32), cute.recast_tensor(rounded, Int32)
        out = cute.make_rmem_tensor(4, BFloat16)
        target = cute.recast_tensor(out, Int32)
        for i in cutlass.range_constexpr(2):
            target[i] = multiply_pairs(words[i], by[i])
        return out

    @cute.jit
    def rounded(self, values):
        exact = cute.make_rmem_tensor(4, Float32)
        for e in cutlass.range_constexpr(4):
            exact[e] = values[e]
        out = cute.make_rmem_tensor(4, BFloat16)
        out.store(exact.load().to(BFloat16))
        return out

    @cute.jit
    def put(self, rows: Rows, quad: Int32, i: cutlass.Constexpr[int], k, q=None):
        """Token i of k, and of q if it is given."""
        vector(rows.token(quad, i), 0, 4).store(k.load())
        if cutlass.const_expr(q is not None and self.spec.part.reads):
            vector(rows.token(quad, i, 1), 0, 4).store(q.load())

    @cute.jit
    def halves(self, raw: Rows, target: Rows, d, size: cutlass.Constexpr[int], lane: Int32):
        """q and k for pairs of tokens that lie in neighbouring halves of `size`, decayed to or from what parts them.

        A first half's k decays to its end; a second half's k and q have decayed since their half began. Where that is
        nothing, k is as it was; with halves of one token k of the first is not written.
        """
        source, here = raw.quad(lane), target.quad(lane)
        for middle in cutlass.range_constexpr(size, BLOCK, 2 * size):
            factor = [Float32(1.0)] * 4
            for i in cutlass.range_constexpr(middle - 1, middle - 1 - size, -1):
                if cutlass.const_expr(size > 1):
                    k, _ = self.load(raw, source, i)
                    self.put(target, here, i, k if i == middle - 1 else self.scale(k, factor))
                factor = [factor[e] * d[e, i] for e in range(4)]
            factor = [Float32(1.0)] * 4
            for i in cutlass.range_constexpr(middle, middle + size):
                k, q = self.load(raw, source, i)
                factor = [factor[e] * d[e, i] for e in range(4)]
                self.put(target, here, i, self.scale(k, factor), self.scale(q, factor))

    @cute.jit
    def since(self, raw: Rows, targets: list, d, lane: Int32):
        """k and q as they have decayed since the block began, to each of `targets` with what was left before that.

        Returns:
            What is left at the block's end of what was left before it, of the first target.
        """
        source, here = raw.quad(lane), [target.quad(lane) for target, _ in targets]
        factors = [[before[e] for e in range(4)] for _, before in targets]
        for i in cutlass.range_constexpr(BLOCK):
            k, q = self.load(raw, source, i)
            for n in cutlass.range_constexpr(len(targets)):
                factors[n] = [factors[n][e] * d[e, i] for e in range(4)]
                if cutlass.const_expr(n == 0 and self.spec.part is Part.SPLIT):  # o is rounded twice then: q once
                    x = self.quad(q, 0)
                    scaled_q = self.rounded([x[e] * factors[n][e] for e in range(4)])
                else:
                    scaled_q = self.scale(q, factors[n])
                self.put(targets[n][0], here[n], i, self.scale(k, factors[n]), scaled_q)
        return factors[0]

    @cute.jit
    def until(self, raw: Rows, write: Rows, targets: list, d, after, lane: Int32):
        """k as it decays until the block ends, to each of `targets` with what is left after that.

        To `write`, with `after`, in PARTS parts, one behind the other: its rounding is what a state is off by.
        """
        source, there, here = raw.quad(lane), write.quad(lane), [target.quad(lane) for target, _ in targets]
        factor = [after[e] for e in range(4)]
        factors = [[left[e] for e in range(4)] for _, left in targets]
        for i in cutlass.range_constexpr(BLOCK - 1, -1, -1):
            k, _ = self.load(raw, source, i)
            for n in cutlass.range_constexpr(len(targets)):
                self.put(targets[n][0], here[n], i, self.scale(k, factors[n]))
                factors[n] = [factors[n][e] * d[e, i] for e in range(4)]
            x = self.quad(k, 0)
            exact = cute.make_rmem_tensor(4, Float32)
            for e in cutlass.range_constexpr(4):
                exact[e] = x[e] * factor[e]
            for part in cutlass.range_constexpr(PARTS):
                rounded = self.rounded(exact)
                vector(write.token(there, i, part), 0, 4).store(rounded.load())
                if cutlass.const_expr(part + 1 < PARTS):
                    rest(exact, rounded)
            factor = [factor[e] * d[e, i] for e in range(4)]

    @cute.jit
    def products(self, rows: Rows, columns: list, lane: Int32):
        """A block's k and, under it, its q, times what stands in `columns`: pairs of rows and of 0 for k, 1 for q."""
        apart = 0 if not self.spec.part.reads else rows.apart  # without q, k in its place
        left = rows.matrices(lane, apart)
        right = [other.right(lane, part) for other, part in columns]
        out = [(Float32(0.0),) * 4 for _ in columns]
        for pair in cutlass.range_constexpr(self.spec.K // 32):
            a = [load_matrices(rows.step(left, 2 * pair + i)) for i in range(2)]
            for n in cutlass.range_constexpr(len(columns)):
                b = load_matrices(columns[n][0].step(right[n], 2 * pair))
                for i in cutlass.range_constexpr(2):
                    out[n] = multiply_16x8x16(out[n], a[i], (b[2 * i], b[2 * i + 1]))
        return out

    @cute.jit
    def own_squares(self, raw: Rows, sums, warp: Int32, lane: Int32):
        """q.q, k.k and q.k of this block's tokens to `sums`."""
        summary = cutlass.const_expr(not self.spec.part.reads)
        out = self.products(raw, [(raw, 0)] if summary else [(raw, 0), (raw, 1)], lane)
        if lane & 3 == lane >> 3:  # the diagonal
            odd, token = lane >> 2 & 1 == 1, BLOCK * warp + (lane >> 2)
            vector(sums, CHUNK + token, 1)[0] = select(odd, out[0][1], out[0][0])
            if cutlass.const_expr(not summary):
                vector(sums, token, 1)[0] = select(odd, out[1][3], out[1][2])
                vector(sums, 2 * CHUNK + token, 1)[0] = select(odd, out[0][3], out[0][2])

    @cute.jit
    def parted(self, by_one, by_two, by_four, lane: Int32):
        """Products of this block's tokens, each pair's from the halves that part it; over the diagonal garbage."""
        out = cute.make_rmem_tensor(4, Float32)
        for i in cutlass.range_constexpr(4):
            differ = (lane >> 2) ^ (2 * (lane & 3) + i % 2)
            out[i] = select(differ == 1, by_one[i], select(differ < 4, by_two[i], by_four[i]))
        return out

    @cute.jit
    def spread_block(self, blocks: list, w: cutlass.Constexpr[int], scratch, mix, sums, lane: Int32, tokens: Int32):
        """The rows of block `w`, from its products with all blocks up to itself: L to `scratch`, Aqk to `mix`."""
        half, late = w // 2, w % 2
        acc = [blocks[j][2 * (h % 2) + e] if j <= w else None for j in range(4) for h in range(2) for e in range(2)]
        rows_k = [acc[4 * j + i % 2] for j in range(4) for i in range(4)]
        rows_q = [acc[4 * j + 2 + i % 2] for j in range(4) for i in range(4)]
        self.spread_k(rows_k, scratch, sums, half, late, lane, tokens)
        if cutlass.const_expr(self.spec.part.reads):
            self.spread_q(rows_q, mix, sums, half, late, lane)
            nothing = cute.make_rmem_tensor(2, BFloat16)
            nothing.fill(0.0)
            row = BLOCK * w + (lane >> 2)
            for j in cutlass.range_constexpr(w + 1, CHUNK // BLOCK):
                vector(mix, row * CHUNK + (j ^ (row >> 1 & 3)) * 8 + 2 * (lane & 3)).store(nothing.load())

    @cute.jit
    def invert_blocks(self, scratch, mix, lane: Int32):
        """As `Relater.invert`, but diagonal squares are joined from blocks of 8, whose inverses substitution makes."""
        block, n, g, col = lane >> 3, lane & 7, lane >> 2, 2 * (lane & 3)
        half, late = block >> 1, block & 1
        tiles = cute.recast_ptr(scratch, dtype=BFloat16)
        L = piece(piece(scratch, half, L_HALF), late, BLOCK * (L_PITCH + 1))
        x = [select(n == i, Float32(1.0), Float32(0.0)) for i in range(BLOCK)]
        for m in cutlass.range_constexpr(BLOCK - 1):
            for quad in cutlass.range_constexpr((m + 1) // 4, BLOCK // 4):
                entries = vector(L, m * L_PITCH + 4 * quad, 4).load()
                for e in cutlass.range_constexpr(4):
                    if cutlass.const_expr(4 * quad + e > m):
                        x[4 * quad + e] = x[4 * quad + e] - entries[e] * x[m]
        under = [
            vector(scratch, i * L_HALF + (col + e) * L_PITCH + (BLOCK + g), 1)[0] for i in range(2) for e in range(2)
        ]
        cute.arch.sync_warp()  # all have read L: X takes its place
        zeros = cute.make_rmem_tensor(8, BFloat16)
        zeros.fill(0.0)
        column = piece(piece(tiles, half, 2 * TILE), BLOCK * late + n, TILE_PITCH)
        for part, values in enumerate(self.parts(x)):
            vector(column, part * TILE + BLOCK * late, 8).store(values[None, 0].load())
            vector(column, part * TILE + BLOCK * (1 - late), 8).store(zeros.load())
            if cutlass.const_expr(part < self.spec.inverse_parts):
                place = part * (CHUNK * CHUNK) + lane * CHUNK + (block ^ (lane >> 1 & 3)) * 8
                vector(mix, place, 8).store(values[None, 0].load())
        vector(mix, lane * CHUNK + (block ^ (lane >> 1 & 3)) * 8 + n, 1)[0] = BFloat16(0.0)  # the diagonal
        cute.arch.sync_warp()

        # of both squares at once, one in the upper left of a left operand, one in its lower right
        place = tiles + ((block & 1) * (2 * TILE) + (block >> 1) * TILE + n * TILE_PITCH)
        inner = self.both(load_matrices(place), self.words(under))  # X0^T L10^T
        last = load_transposed(place + (BLOCK * TILE_PITCH + BLOCK))
        outer = self.both(self.words(inner), last)  # that times X1^T
        for i in cutlass.range_constexpr(2):
            pair = cute.make_rmem_tensor(2, Float32)
            for e in cutlass.range_constexpr(2):
                pair[e] = -outer[2 * i + e]
            rounded = cute.make_rmem_tensor(2, BFloat16)
            row = 2 * BLOCK * i + g
            for part in cutlass.range_constexpr(2):
                rounded.store(pair.load().to(BFloat16))
                vector(tiles, (2 * i + part) * TILE + g * TILE_PITCH + BLOCK + col).store(rounded.load())
                if cutlass.const_expr(part < self.spec.inverse_parts):
                    target = part * (CHUNK * CHUNK) + row * CHUNK + ((2 * i + 1) ^ (row >> 1 & 3)) * 8 + col
                    vector(mix, target).store(rounded.load())
                rest(pair, rounded)
        cute.arch.sync_warp()
        self.join(tiles, mix, lane)

    @cute.jit
    def words(self, values):
        """Four numbers in two bf16 parts: the words of the upper ones, then those of the lower."""
        upper, lower = self.parts([*values, *(Float32(0.0),) * 4])
        return tuple(cute.recast_tensor(part, Int32)[i] for part in (upper, lower) for i in range(2))

    @cute.jit
    def both(self, a: tuple, b: tuple):
        """Products of two pairs of 8 x 8, words of two parts as in `words`, but for those of the lower parts."""
        acc, zero = (Float32(0.0),) * 4, Int32(0)
        for i, j in ((2, 0), (0, 2), (0, 0)):
            acc = multiply_16x8x16(acc, (a[i], zero, zero, a[i + 1]), (b[j], b[j + 1]))
        return acc
