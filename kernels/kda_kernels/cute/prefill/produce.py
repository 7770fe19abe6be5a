"""The half of the prefill kernel that makes chunks ready for the chain; see `kernel.py`."""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32
from cutlass.cute.nvgpu import warpgroup

from kda_kernels.cute.math import sigmoid
from kda_kernels.cute.prefill.config import CHUNK, PARTS, STAGES, THREADS
from kda_kernels.cute.prefill.prepare import Preparer
from kda_kernels.cute.prefill.relate import Relater
from kda_kernels.cute.prefill.shared import TILE, arrive, by_chunk, piece, swizzled_rows, vector
from kda_kernels.cute.prefill.work import Barrier, Batch, Patch, Vacancy, Work
from kda_kernels.cute.ptx import finished, fresh, multiply_warpgroup, select

# The warps that may invert, ask for v, make beta and ask for other inputs: none has much more to do than another.
INVERTER, V_LOADER, BETA, LOADER = 0, 0, 2, 3


class Producer(Preparer, Relater):
    """A warpgroup that prepares every other chunk."""

    @cute.jit
    def produce(
        self, shared, atoms, sources, beta, batch: Batch, work: Work, turn, scale: Float32, lower_bound: Float32,
        group: Int32,
    ):  # fmt: skip
        """Every other chunk of an item, the `turn`-th of this CTA."""
        spec = self.spec
        n_chunks = work.n_chunks
        p = cute.arch.thread_idx()[0] & 127
        warp, lane, pair = cute.arch.make_warp_uniform(p >> 5), p & 31, p & 63
        half = warp >> 1

        raw_q = shared.raw + group * (2 * CHUNK * spec.K)
        raw_k = raw_q + CHUNK * spec.K
        raw_g = shared.raw_g + group * (CHUNK * spec.K)
        scratch = shared.solve + group * (3 * TILE)

        loaded = shared.loaded + group
        summary = cutlass.const_expr(not spec.part.reads)  # needs no q
        begin = self.first_chunk(group, work.before)
        if warp == LOADER:
            self.ask(self.inputs(shared, atoms, sources, work, group), loaded, begin, n_chunks)
        if warp == BETA:
            self.prefetch(self.inputs(shared, atoms, sources, work, group), begin + 2, n_chunks)

        # after the loads are on their way: these wait for memory too
        parameters = self.gate_parameters(batch.A_log, batch.dt_bias, lower_bound, work.i_hv, pair)
        raw_beta = self.fetch_beta(beta, work, begin * CHUNK + lane)
        if turn == 0:
            cute.arch.barrier_arrive(barrier_id=Barrier.ASKED, number_of_threads=THREADS)
        for chunk in cutlass.range(begin, n_chunks, 2, unroll=1):
            p = fresh(p)
            here = self.now(shared, work, turn)
            number, tokens = here.before + chunk, here.n_tokens - chunk * CHUNK
            stage = cute.arch.make_warp_uniform(number % STAGES)
            patch = Patch(number, stage, tokens, group, warp, lane, chunk, pair, half)
            sums = shared.sums + (2 * group + (number >> 1 & 1)) * (2 * CHUNK)
            cute.arch.mbarrier_wait(loaded, number >> 1 & 1)

            if tokens < CHUNK:
                if cutlass.const_expr(not summary):
                    self.clear(raw_q, tokens, p)
                self.clear(raw_k, tokens, p)
                self.barrier(group)
            G = self.gates(raw_g, parameters, patch)
            self.take(Vacancy(shared, atoms, sources, work, turn, stage, chunk), warp == V_LOADER)
            of_kI = self.decays(shared, G, patch)
            if cutlass.const_expr(spec.write_in_tf32):
                cute.arch.mbarrier_wait(shared.related + group, (number >> 1 & 1) ^ 1)
            self.operands(shared, raw_q, G, of_kI, patch)
            token = shared.token + stage * (3 * CHUNK)
            if cutlass.const_expr(spec.part.reads):
                self.factors_of_o(raw_q, token + 2 * CHUNK, sums + CHUNK, scale, warp, lane)
            if warp == BETA:
                self.write_beta(sums, raw_beta, lane, tokens)
                raw_beta = self.fetch_beta(beta, self.now(shared, work, turn), (chunk + 2) * CHUNK + lane)
            cute.arch.fence_proxy("async.shared", space="cta")
            self.barrier(group)

            products = self.product_of_rows(shared, stage, group)
            if warp == LOADER:
                item = self.now(shared, work, turn)
                self.ask(self.inputs(shared, atoms, sources, item, group), loaded, chunk + 2, n_chunks)
            elif warp == BETA:
                item = self.now(shared, work, turn)
                self.prefetch(self.inputs(shared, atoms, sources, item, group), chunk + 4, n_chunks)
            acc = finished(products)
            if cutlass.const_expr(spec.write_in_tf32):
                arrive(shared.related + group, lane, spec.each_arrives)
            if cutlass.const_expr(spec.chain_inverts):
                self.await_inverse(shared, number)
            mix = self.mix(shared, stage, spec.inverse_parts)
            self.spread(acc, scratch, mix, token, sums, warp, lane)
            cute.arch.fence_proxy("async.shared", space="cta")
            if cutlass.const_expr(spec.chain_inverts):
                arrive(shared.full + stage, lane, spec.each_arrives)
            else:
                self.invert_early(shared, scratch, patch)

    @cute.jit
    def take(self, vacancy: Vacancy, loads: Boolean):
        """Waits until the stage is free; the warp that `loads` has v loaded into it."""
        shared, stage = vacancy.shared, vacancy.stage
        item = self.now(shared, vacancy.work, vacancy.turn)
        number = item.before + vacancy.chunk
        cute.arch.mbarrier_wait(shared.empty + stage, (number // STAGES & 1) ^ 1)
        if loads:
            if item.kind == 0:
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(shared.full + stage, CHUNK * self.spec.V * 2)
                self.load_values(shared, vacancy.atoms, vacancy.sources, item, stage, vacancy.chunk)
            else:
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive(shared.full + stage)

    @cute.jit
    def product_of_rows(self, shared, stage: Int32, group: Int32):
        """Starts [kE; qE] kI^T."""
        K = self.spec.K
        left = swizzled_rows(shared.rows, stage * (2 * CHUNK * K * 2))
        if cutlass.const_expr(self.spec.write_in_tf32):
            right = swizzled_rows(shared.near, group * (CHUNK * K * 2))
        else:  # the first of its parts
            right = swizzled_rows(shared.cols, stage * (PARTS * CHUNK * K * 2))
        # 16 channels are 32 bytes, 64 a tile of 64 tokens and one of 32
        steps = [(2 * (i % 4) + 512 * (i // 4), 2 * (i % 4) + 256 * (i // 4)) for i in range(K // 16)]
        warpgroup.fence()
        products = multiply_warpgroup("m64n32k16.f32.bf16.bf16", left, right, steps)
        warpgroup.commit_group()
        return products

    @cute.jit
    def invert_early(self, shared, scratch, patch: Patch):
        """A warp makes the inverse of what it and another made; nobody else waits. Then the chunk is ready."""
        if patch.warp == INVERTER:
            cute.arch.barrier(barrier_id=Barrier.INVERT + patch.group, number_of_threads=64)
            self.invert(scratch, self.mix(shared, patch.stage, 0), patch.lane)
            cute.arch.fence_proxy("async.shared", space="cta")
        if patch.warp == 1:
            cute.arch.barrier_arrive(barrier_id=Barrier.INVERT + patch.group, number_of_threads=64)
        if patch.warp != 1 or self.spec.each_arrives:
            arrive(shared.full + patch.stage, patch.lane, self.spec.each_arrives)

    def mix(self, shared, stage, index: int):
        """A square of this stage."""
        return shared.mix + (stage * (1 + self.spec.inverse_parts) + index) * (CHUNK * CHUNK)

    @cute.jit
    def barrier(self, group: Int32):
        """Among the threads of this warpgroup."""
        cute.arch.barrier(barrier_id=Barrier.PREPARE + group, number_of_threads=128)

    def inputs(self, shared, atoms, sources, work: Work, group: Int32) -> list:
        """How TMA loads q, k and g for a warpgroup: what moves them, where to, and from where, by chunk."""
        i_h, b, K = work.i_hv // self.spec.group, work.b, self.spec.K
        raw_q = piece(shared.raw, group, 2 * CHUNK * K)
        targets = ((0, i_h, raw_q), (1, i_h, raw_q + CHUNK * K), (3, work.i_hv, piece(shared.raw_g, group, CHUNK * K)))
        return [
            (atoms[i], *by_chunk(atoms[i], sources[i][None, None, head, b], target, work.first, K))
            for i, head, target in targets
            if self.spec.part.reads or i != 0  # without q, nothing is made of it
        ]

    @cute.jit
    def ask(self, inputs: list, loaded, chunk: Int32, n_chunks: Int32):
        """Has the inputs of a chunk loaded, if there is one."""
        if chunk < n_chunks:
            size = sum(cute.size(target.shape) * target.element_type.width // 8 for _, target, _ in inputs)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(loaded, size)
            for atom, target, source in inputs:
                cute.copy(atom, source[None, chunk, 0], target, tma_bar_ptr=loaded)

    @cute.jit
    def prefetch(self, inputs: list, chunk: Int32, n_chunks: Int32):
        """Has the inputs of a chunk loaded into L2, if there is one: they are asked for late."""
        if chunk < n_chunks:
            with cute.arch.elect_one():
                for atom, _, source in inputs:
                    cute.prefetch(atom, source[None, chunk, 0])

    @cute.jit
    def fetch_beta(self, beta, work: Work, token: Int32):
        """beta of a token as it comes, and not converted, which would wait for it; 0 after the end."""
        raw = beta.element_type(0.0)
        if token < work.n_tokens:
            raw = beta[work.b, work.first + token, work.i_hv]
        return raw

    @cute.jit
    def write_beta(self, target, raw, lane: Int32, tokens: Int32):
        """beta of the token of this lane, from what `fetch_beta` returns; 0 after the end."""
        value = raw.to(Float32)
        if cutlass.const_expr(self.spec.beta_is_logit):
            value = select(lane < tokens, sigmoid(value, False), Float32(0.0))
            if cutlass.const_expr(self.spec.allow_neg_eigval):
                value = 2.0 * value
        vector(target, lane, 1)[0] = value

    @cute.jit
    def await_inverse(self, shared, number: Int32):
        """Waits until L of this warpgroup's last chunk has been inverted, before the next L takes its place."""
        if number > 1:
            cute.arch.mbarrier_wait(shared.inverted + (number - 2) % STAGES, (number - 2) // STAGES & 1)

    @cute.jit
    def load_values(self, shared, atoms, sources, work: Work, stage: Int32, chunk: Int32):
        """Has v of a chunk loaded into its stage."""
        place = shared.v + stage * (CHUNK * self.spec.V)
        here, there = by_chunk(atoms[2], sources[2][None, None, work.i_hv, work.b], place, work.first, self.spec.V)
        cute.copy(atoms[2], there[None, chunk, 0], here, tma_bar_ptr=shared.full + stage)
