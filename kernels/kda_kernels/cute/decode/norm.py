"""The gated norm behind a decode step, on the device: each CTA of a head gets all of the head's outputs.

So every CTA sums their squares in one order, however many there are. Outputs go into the others' shared memory, which
counts their bytes; there are two buffers, one for every other block of tokens.
"""

import math

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from kda_kernels.cute.decode.config import LANES, DecodeSpec
from kda_kernels.cute.dsl import SmemAllocator
from kda_kernels.cute.math import float_bits, lane_sum, load_now, rsqrt, sigmoid


class Norm:
    """o / sqrt(mean(o^2) + eps) * weight * sigmoid(gate).

    Arguments that its functions share: `room`, what `begin` makes; `ending`, this thread's gates, one for each token of
    a block, and weight, of its row: thread r has the CTA's r-th row.
    """

    def __init__(self, spec: DecodeSpec):
        self.spec = spec
        self.rows = spec.config.rows
        self.remote = spec.slices > 1
        self.halves = 2 if self.remote and not spec.one_token else 1

    @cute.jit
    def begin(self, smem: SmemAllocator, tid: Int32):
        """Shared memory for outputs, and barriers that count their bytes; others write once this CTA has arrived."""
        layout = cute.make_layout((self.spec.V, self.spec.block * self.halves))
        outputs = smem.allocate_tensor(Float32, layout, byte_alignment=16)
        barriers = smem.allocate_array(Int64, 2)
        if cutlass.const_expr(self.remote):
            if tid == 0:
                for half in cutlass.range_constexpr(self.halves):
                    cute.arch.mbarrier_init(barriers + half, 1)
                cute.arch.mbarrier_init_fence()
            cute.arch.sync_warp()
        return outputs, barriers

    @cute.jit
    def room_for(self, weight: cute.Tensor, gate: cute.Tensor):
        gates = cute.make_rmem_tensor(self.spec.block, gate.element_type)
        gates.fill(0.0)
        return gates, cute.make_rmem_tensor(1, weight.element_type)

    @cute.jit
    def row(self, heads, tid: Int32):
        return heads[2] * self.rows + cutlass.min(tid, self.rows - 1)

    @cute.jit
    def fetch_weight(self, ending, weight: cute.Tensor, heads, tid: Int32):
        ending[1][0] = load_now(weight, (self.row(heads, tid),))

    @cute.jit
    def fetch_gate(self, ending, gate: cute.Tensor, b: Int32, first: Int32, count: Int32, heads, tid: Int32):
        """As the tokens' channels are: the last of `count` tokens repeats, and of none nothing is read."""
        if count > 0:
            for j in cutlass.range_constexpr(self.spec.block):
                t = first + cutlass.min(count - 1, j) if cutlass.const_expr(j) else first
                ending[0][j] = load_now(gate, (b, t, heads[1], self.row(heads, tid)))

    @cute.jit
    def place(self, done: Int32, j):
        """Where outputs of token j lie of the block after `done` tokens."""
        if cutlass.const_expr(self.halves == 1):
            return j
        else:
            return j + done // self.spec.block % 2 * self.spec.block

    @cute.jit
    def send(self, room, out: Float32, row: Int32, done: Int32, j, i_hv: Int32, lane: Int32):
        """An output of token j of a block, which all lanes of a row have: each of them sends it to one CTA."""
        outputs, barriers = room
        target = lane % LANES
        if target < self.spec.slices:
            place = outputs.iterator + (self.place(done, j) * self.spec.V + row)
            if cutlass.const_expr(self.remote):
                rank = i_hv % self.spec.heads_of_cluster * self.spec.slices + target
                half = done // self.spec.block % 2 if cutlass.const_expr(self.halves == 2) else 0
                cute.arch.store_async_dsmem(place, float_bits(out), barriers + half, rank)
            else:
                cute.make_tensor(place, cute.make_layout(1))[0] = out

    @cute.jit
    def write(
        self, o: cute.Tensor, room, ending, eps: Float32, b: Int32, first: Int32, done: Int32, count: Int32, heads,
        tid: Int32,
    ):  # fmt: skip
        """What comes out for a block of tokens: `done` are before them, and `count` are left."""
        outputs, barriers = room
        block = self.spec.block
        if cutlass.const_expr(self.remote):
            number = done // block
            half = number % 2 if cutlass.const_expr(self.halves == 2) else 0
            if tid == 0:
                cute.arch.mbarrier_arrive_and_expect_tx(barriers + half, cutlass.min(count, block) * (self.spec.V * 4))
            cute.arch.mbarrier_wait(barriers + half, number // 2 % 2)
        else:
            cute.arch.sync_threads()
        for j in cutlass.range_constexpr(block):
            if cutlass.const_expr(j == 0):
                self.write_token(o, outputs, ending, eps, b, first + done, j, self.place(done, j), heads, tid)
            else:
                if j < count:
                    self.write_token(o, outputs, ending, eps, b, first + done + j, j, self.place(done, j), heads, tid)

    @cute.jit
    def write_token(
        self, o: cute.Tensor, outputs, ending, eps: Float32, b: Int32, t: Int32, j: cutlass.Constexpr[int], place,
        heads, tid: Int32,
    ):  # fmt: skip
        V, lane, exact = self.spec.V, tid % 32, self.spec.exact
        squares = Float32(0.0)
        for i in cutlass.range_constexpr(math.ceil(V / 32)):
            x = outputs[cutlass.min(lane + i * 32, V - 1), place]
            if cutlass.const_expr((i + 1) * 32 > V):
                x = Float32(cutlass.select_(lane + i * 32 < V, x, Float32(0.0)))
            squares += x * x
        norm = rsqrt(lane_sum(squares, 32) * (1.0 / V) + eps, exact)
        if tid < self.rows:
            row = self.row(heads, tid)
            gate = sigmoid(ending[0][j].to(Float32), exact)
            value = (outputs[row, place] * norm) * (ending[1][0].to(Float32) * gate)
            o[b, t, heads[1], row] = value.to(o.element_type)
