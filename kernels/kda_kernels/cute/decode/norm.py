"""The gated norm behind a decode step, on the device: each CTA of a head gets all of the head's outputs.

So every CTA sums their squares in one order, however many there are. Outputs go into the others' shared memory, which
counts their bytes; there are two buffers, one for every other block of tokens.
"""

import math

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from kda_kernels.cute.decode.config import LANES, DecodeSpec
from kda_kernels.cute.decode.work import Factors, Outputs, Work
from kda_kernels.cute.dsl import SmemAllocator
from kda_kernels.cute.math import float_bits, lane_sum, load_now, rsqrt, sigmoid


class Norm:
    """o / sqrt(mean(o^2) + eps) * weight * sigmoid(gate). Thread r of a CTA has its r-th row."""

    def __init__(self, spec: DecodeSpec):
        self.spec = spec
        self.rows = spec.config.rows
        self.remote = spec.slices > 1
        self.halves = 2 if self.remote and not spec.one_token else 1

    @cute.jit
    def begin(self, smem: SmemAllocator, work: Work) -> Outputs:
        """Shared memory for outputs, and barriers that count their bytes; others write once this CTA has arrived."""
        layout = cute.make_layout((self.spec.V, self.spec.block * self.halves))
        words = smem.allocate_tensor(Float32, layout, byte_alignment=16)
        barriers = smem.allocate_array(Int64, 2)
        if cutlass.const_expr(self.remote):
            if work.tid == 0:
                for half in cutlass.range_constexpr(self.halves):
                    cute.arch.mbarrier_init(barriers + half, 1)
                cute.arch.mbarrier_init_fence()
            cute.arch.sync_warp()
        return Outputs(words, barriers)

    @cute.jit
    def room_for(self, weight: cute.Tensor, gate: cute.Tensor, eps: Float32) -> Factors:
        gates = cute.make_rmem_tensor(self.spec.block, gate.element_type)
        gates.fill(0.0)
        return Factors(gates, cute.make_rmem_tensor(1, weight.element_type), eps)

    @cute.jit
    def row(self, work: Work):
        return work.i_slice * self.rows + cutlass.min(work.tid, self.rows - 1)

    @cute.jit
    def fetch_weight(self, factors: Factors, weight: cute.Tensor, work: Work):
        factors.weight[0] = load_now(weight, (self.row(work),))

    @cute.jit
    def fetch_gates(self, factors: Factors, gate: cute.Tensor, work: Work, first: Int32, count: Int32):
        """As the tokens' channels are: the last of `count` tokens repeats, and of none nothing is read."""
        if count > 0:
            for j in cutlass.range_constexpr(self.spec.block):
                t = first + cutlass.min(count - 1, j) if cutlass.const_expr(j) else first
                factors.gates[j] = load_now(gate, (work.b, t, work.i_hv, self.row(work)))

    @cute.jit
    def place(self, done: Int32, j):
        """Where outputs of token j lie of the block after `done` tokens."""
        if cutlass.const_expr(self.halves == 1):
            return j
        else:
            return j + done // self.spec.block % 2 * self.spec.block

    @cute.jit
    def send(self, outputs: Outputs, out: Float32, row: Int32, done: Int32, j, work: Work):
        """An output of token j of a block, which all lanes of a row have: each of them sends it to one CTA."""
        target = work.lane % LANES
        if target < self.spec.slices:
            place = outputs.words.iterator + (self.place(done, j) * self.spec.V + row)
            if cutlass.const_expr(self.remote):
                rank = work.i_hv % self.spec.heads_of_cluster * self.spec.slices + target
                half = done // self.spec.block % 2 if cutlass.const_expr(self.halves == 2) else 0
                cute.arch.store_async_dsmem(place, float_bits(out), outputs.barriers + half, rank)
            else:
                cute.make_tensor(place, cute.make_layout(1))[0] = out

    @cute.jit
    def write(self, o: cute.Tensor, outputs: Outputs, factors: Factors, work: Work, done: Int32, count: Int32):
        """What comes out for a block of tokens: `done` are before them, and `count` are left."""
        block = self.spec.block
        if cutlass.const_expr(self.remote):
            number = done // block
            half = number % 2 if cutlass.const_expr(self.halves == 2) else 0
            arrived = outputs.barriers + half
            if work.tid == 0:
                cute.arch.mbarrier_arrive_and_expect_tx(arrived, cutlass.min(count, block) * (self.spec.V * 4))
            cute.arch.mbarrier_wait(arrived, number // 2 % 2)
        else:
            cute.arch.sync_threads()
        for j in cutlass.range_constexpr(block):
            if cutlass.const_expr(j == 0):
                self.write_token(o, outputs, factors, work, done, j)
            else:
                if j < count:
                    self.write_token(o, outputs, factors, work, done, j)

    @cute.jit
    def write_token(
        self, o: cute.Tensor, outputs: Outputs, factors: Factors, work: Work, done: Int32, j: cutlass.Constexpr[int]
    ):  # fmt: skip
        V, tid, lane, exact, place = self.spec.V, work.tid, work.lane, self.spec.exact, self.place(done, j)
        squares = Float32(0.0)
        for i in cutlass.range_constexpr(math.ceil(V / 32)):
            x = outputs.words[cutlass.min(lane + i * 32, V - 1), place]
            if cutlass.const_expr((i + 1) * 32 > V):
                x = Float32(cutlass.select_(lane + i * 32 < V, x, Float32(0.0)))
            squares += x * x
        norm = rsqrt(lane_sum(squares, 32) * (1.0 / V) + factors.eps, exact)
        if tid < self.rows:
            row = self.row(work)
            gate = sigmoid(factors.gates[j].to(Float32), exact)
            value = (outputs.words[row, place] * norm) * (factors.weight[0].to(Float32) * gate)
            o[work.b, work.first + done + j, work.i_hv, row] = value.to(o.element_type)
