"""The half of the prefill kernel that makes chunks ready for the chain; see `kernel.py`."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import warpgroup

from kda_kernels.cute.math import sigmoid
from kda_kernels.cute.prefill.config import CHUNK, PARTS, STAGES, THREADS
from kda_kernels.cute.prefill.prepare import Preparer
from kda_kernels.cute.prefill.relate import Relater
from kda_kernels.cute.prefill.shared import TILE, Kind, arrive, by_chunk, operand, vector
from kda_kernels.cute.prefill.work import Barrier, Work
from kda_kernels.cute.ptx import fresh

INVERTER, LOADER = 0, 3  # warps


class Producer(Preparer, Relater):
    """A warpgroup that prepares every other chunk."""

    @cute.jit
    def produce(
        self, shared, atoms, sources, beta, A_log, dt_bias, work: Work, n_chunks: Int32, scale: Float32,
        lower_bound: Float32, group: Int32, gram: cute.TiledMma,
    ):  # fmt: skip
        spec = self.spec
        b, first, n_tokens, i_hv = work.b, work.first, work.n_tokens, work.i_hv
        i_h = i_hv // spec.group
        p = cute.arch.thread_idx()[0] & 127
        warp, lane, pair, half = p >> 5, p & 31, p & 63, p >> 6

        raw_q = shared.raw + group * (2 * CHUNK * spec.K)
        raw_k = raw_q + CHUNK * spec.K
        raw_g = shared.raw_g + group * (CHUNK * spec.K)
        scratch = shared.solve + group * (3 * TILE)

        rows = operand(shared.rows, Kind.K_SW128, (2 * CHUNK, spec.K, STAGES), (0, 1, 2))
        cols = operand(shared.cols, Kind.K_SW128, (CHUNK, spec.K, PARTS * STAGES), (0, 1, 2))
        thread = gram.get_slice(p)
        gram_a = gram.make_fragment_A(thread.partition_A(rows))
        gram_b = gram.make_fragment_B(thread.partition_B(cols))
        acc = cute.make_rmem_tensor(gram.partition_shape_C((2 * CHUNK, CHUNK)), Float32)

        atom_q, atom_k, atom_v, atom_g = atoms[:4]
        q_tiles, q = by_chunk(atom_q, sources[0][None, None, i_h, b], raw_q, first, spec.K)
        k_tiles, k = by_chunk(atom_k, sources[1][None, None, i_h, b], raw_k, first, spec.K)
        g_tiles, g = by_chunk(atom_g, sources[3][None, None, i_hv, b], raw_g, first, spec.K)
        loaded = shared.loaded + group
        summary = cutlass.const_expr(not spec.part.reads)  # needs no q
        size = CHUNK * spec.K * ((16 if summary else 32) + raw_g.dtype.width) // 8
        if warp == LOADER:
            if group < n_chunks:
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(loaded, size)
                if cutlass.const_expr(not summary):
                    cute.copy(atom_q, q[None, group, 0], q_tiles, tma_bar_ptr=loaded)
                cute.copy(atom_k, k[None, group, 0], k_tiles, tma_bar_ptr=loaded)
                cute.copy(atom_g, g[None, group, 0], g_tiles, tma_bar_ptr=loaded)
                if group + 2 < n_chunks:
                    self.prefetch(atoms, q, k, g, group + 2)

        # after the loads are on their way: these wait for memory too
        A, bias, rest_of_bias = self.gate_parameters(A_log, dt_bias, i_hv, pair)
        raw_beta = self.fetch_beta(beta, b, first, group * CHUNK + lane, n_tokens, i_hv)
        cute.arch.barrier_arrive(barrier_id=Barrier.ASKED, number_of_threads=THREADS)
        for chunk in cutlass.range(group, n_chunks, 2, unroll=1):
            p = fresh(p)
            warp, lane, pair, half = p >> 5, p & 31, p & 63, p >> 6
            stage = cute.arch.make_warp_uniform(chunk % STAGES)
            tokens = n_tokens - chunk * CHUNK
            sums = shared.sums + (2 * group + (chunk >> 1 & 1)) * (4 * CHUNK)
            cute.arch.mbarrier_wait(loaded, chunk >> 1 & 1)

            if tokens < CHUNK:
                if cutlass.const_expr(not summary):
                    self.clear(raw_q, tokens, p)
                self.clear(raw_k, tokens, p)
                self.barrier(group)
            G = self.gates(raw_g, A, bias, rest_of_bias, lower_bound, pair, half, tokens)
            cute.arch.mbarrier_wait(shared.empty + stage, (chunk // STAGES & 1) ^ 1)
            if warp == LOADER:
                full = shared.full + stage
                if work.kind == 0:
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive_and_expect_tx(full, CHUNK * spec.V * 2)
                    place = shared.v + stage * (CHUNK * spec.V)
                    v_tiles, v = by_chunk(atom_v, sources[2][None, None, i_hv, b], place, first, spec.V)
                    cute.copy(atom_v, v[None, chunk, 0], v_tiles, tma_bar_ptr=full)
                else:
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive(full)
            self.decays(shared, G, chunk, stage, pair, half, warp, lane)
            self.operands(shared, raw_q, raw_k, G, stage, pair, half)
            # what the warp that inverts, for which the others wait in the end, need not do
            if warp != INVERTER:
                self.squares(raw_q, sums, warp, lane)
            if warp == 2:
                self.squares(raw_q, sums, INVERTER, lane)
            if warp == 1:
                value = raw_beta.to(Float32)
                if cutlass.const_expr(spec.beta_is_logit):
                    value = sigmoid(value)
                    if cutlass.const_expr(spec.allow_neg_eigval):
                        value = 2.0 * value
                vector(sums, 3 * CHUNK + lane, 1)[0] = value
                raw_beta = self.fetch_beta(beta, b, first, (chunk + 2) * CHUNK + lane, n_tokens, i_hv)
            cute.arch.fence_proxy("async.shared", space="cta")
            self.barrier(group)

            warpgroup.fence()
            for i in cutlass.range_constexpr(spec.K // 16):
                gram.set(warpgroup.Field.ACCUMULATE, i != 0)
                cute.gemm(gram, acc, gram_a[None, None, i, stage], gram_b[None, None, i, PARTS * stage], acc)
            warpgroup.commit_group()

            if warp == LOADER:
                if chunk + 2 < n_chunks:
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive_and_expect_tx(loaded, size)
                    if cutlass.const_expr(not summary):
                        cute.copy(atom_q, q[None, chunk + 2, 0], q_tiles, tma_bar_ptr=loaded)
                    cute.copy(atom_k, k[None, chunk + 2, 0], k_tiles, tma_bar_ptr=loaded)
                    cute.copy(atom_g, g[None, chunk + 2, 0], g_tiles, tma_bar_ptr=loaded)
                    if chunk + 4 < n_chunks:
                        self.prefetch(atoms, q, k, g, chunk + 4)
                self.factors(shared.token + stage * (3 * CHUNK), sums, scale, lane, tokens)
            warpgroup.wait_group(0)
            self.spread(acc, scratch, self.mix(shared, stage, spec.inverse_parts), sums, warp, lane, tokens)
            cute.arch.fence_proxy("async.shared", space="cta")
            # L goes from two warps to one of them; nobody else waits
            if warp == INVERTER:
                cute.arch.barrier(barrier_id=Barrier.INVERT + group, number_of_threads=64)
                self.invert(scratch, self.mix(shared, stage, 0), lane)
                cute.arch.fence_proxy("async.shared", space="cta")
            if warp == 1:
                cute.arch.barrier_arrive(barrier_id=Barrier.INVERT + group, number_of_threads=64)
            if warp != 1 or spec.each_arrives:
                arrive(shared.full + stage, lane, spec.each_arrives)

    def mix(self, shared, stage, index: int):
        """A square of this stage."""
        return shared.mix + (stage * (1 + self.spec.inverse_parts) + index) * (CHUNK * CHUNK)

    @cute.jit
    def barrier(self, group: Int32):
        """Among the threads of this warpgroup."""
        cute.arch.barrier(barrier_id=Barrier.PREPARE + group, number_of_threads=128)

    @cute.jit
    def prefetch(self, atoms, q, k, g, chunk: Int32):
        """Into L2: what is loaded next waits for that only, since it can be loaded late only."""
        with cute.arch.elect_one():
            if cutlass.const_expr(self.spec.part.reads):
                cute.prefetch(atoms[0], q[None, chunk, 0])
            cute.prefetch(atoms[1], k[None, chunk, 0])
            cute.prefetch(atoms[3], g[None, chunk, 0])

    @cute.jit
    def fetch_beta(self, beta, b: Int32, first: Int32, token: Int32, n_tokens: Int32, i_hv: Int32):
        """beta of a token as it comes, not converted, since that would wait for it; 0 after the end."""
        raw = beta.element_type(0.0)
        if token < n_tokens:
            raw = beta[b, first + token, i_hv]
        return raw
