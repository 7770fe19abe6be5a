"""The gated norm behind a decode step, on the device: each CTA of a head gets all of the head's outputs.

So every CTA sums their squares in one order, however many there are. Outputs go into the others' shared memory, which
counts their bytes; there are two buffers, one for every other token.
"""

import math

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.memory import SmemAllocator

from kda_kernels.cute.decode_config import LANES, DecodeSpec
from kda_kernels.cute.math import float_bits, lane_sum, load_now, rsqrt, sigmoid


class Norm:
    """o / sqrt(mean(o^2) + eps) * weight * sigmoid(gate).

    Arguments that its functions share: `room`, what `begin` makes; `out` and `rows` [passes], this thread's outputs and
    their rows of a state's V.
    """

    def __init__(self, spec: DecodeSpec):
        self.spec = spec
        self.remote = spec.slices > 1

    @cute.jit
    def begin(self, smem: SmemAllocator, tid: Int32):
        """Shared memory for outputs, and barriers that count their bytes; others write once this CTA has arrived."""
        outputs = smem.allocate_tensor(Float32, cute.make_layout((self.spec.V, 2)), byte_alignment=16)
        barriers = smem.allocate_array(Int64, 2)
        if cutlass.const_expr(self.remote):
            if tid == 0:
                for half in cutlass.range_constexpr(2):
                    cute.arch.mbarrier_init(barriers + half, 1)
                cute.arch.mbarrier_init_fence()
                for half in cutlass.range_constexpr(2):
                    self.expect(barriers + half)
            cute.arch.sync_warp()
        return outputs, barriers

    @cute.jit
    def expect(self, barrier: cute.Pointer):
        cute.arch.mbarrier_arrive_and_expect_tx(barrier, self.spec.V * 4)

    @cute.jit
    def fetch_weight(self, weight: cute.Tensor, rows):
        """Of this thread's rows, as it lies in memory."""
        raw = cute.make_rmem_tensor(len(rows), weight.element_type)
        for p in cutlass.range_constexpr(len(rows)):
            raw[p] = load_now(weight, (rows[p],))
        return raw

    @cute.jit
    def send(self, room, out: Float32, row: Int32, t: Int32, i_hv: Int32, lane: Int32):
        """An output of token t, which all lanes of a row have: each of them sends it to one CTA."""
        outputs, barriers = room
        target, half = lane % LANES, t % 2
        if target < self.spec.slices:
            place = outputs.iterator + (half * self.spec.V + row)
            if cutlass.const_expr(self.remote):
                rank = i_hv % self.spec.heads_of_cluster * self.spec.slices + target
                cute.arch.store_async_dsmem(place, float_bits(out), barriers + half, rank)
            else:
                cute.make_tensor(place, cute.make_layout(1))[0] = out

    @cute.jit
    def write(self, o: cute.Tensor, room, out, raw_gate, raw_weight, eps: Float32, t: Int32, at, rows, tid: Int32):
        """What comes out for token t, to o[at, rows], `at` being batch row, token and head."""
        outputs, barriers = room
        V, half, lane = self.spec.V, t % 2, tid % 32
        if cutlass.const_expr(self.remote):
            cute.arch.mbarrier_wait(barriers + half, t // 2 % 2)
            if cutlass.const_expr(not self.spec.one_token):
                if tid == 0:
                    self.expect(barriers + half)  # of the next token but one
        else:
            cute.arch.sync_threads()
        squares = Float32(0.0)
        for i in cutlass.range_constexpr(math.ceil(V / 32)):
            x = outputs[cutlass.min(lane + i * 32, V - 1), half]
            if cutlass.const_expr((i + 1) * 32 > V):
                x = Float32(cutlass.select_(lane + i * 32 < V, x, Float32(0.0)))
            squares += x * x
        norm = rsqrt(lane_sum(squares, 32) * (1.0 / V) + eps, self.spec.exact)
        if lane % LANES == 0:
            b, token, i_hv = at
            for p in cutlass.range_constexpr(len(rows)):
                gate = sigmoid(raw_gate[p].to(Float32), self.spec.exact)
                value = (out[p] * norm) * (raw_weight[p].to(Float32) * gate)
                o[b, token, i_hv, rows[p]] = value.to(o.element_type)
