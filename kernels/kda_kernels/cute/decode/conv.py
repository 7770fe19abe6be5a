"""The causal convolution ahead of a decode step, on the device: each thread keeps the windows of a few channels.

Such a channel is a line here. A thread's lines are its channels of q, those of k and, one at most, of v.
"""

import math

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from kda_kernels.cute.decode.config import DecodeSpec
from kda_kernels.cute.decode.work import Past, Work
from kda_kernels.cute.math import load_now, sigmoid
from kda_kernels.cute.ptx import load_words


class Windows:
    """Loads, applies and shifts the windows of a CTA's channels.

    Arguments that its functions share: `lines`, the channel of each line among the 2 H K + HV V; `window` [taps - 1,
    lines], the inputs before this token, oldest first; `taps` [taps, lines], `bias` [lines].
    """

    def __init__(self, spec: DecodeSpec):
        self.spec = spec
        self.threads = spec.config.threads
        self.channels = math.ceil(spec.K / self.threads)  # of q, and of k, a thread
        self.count = 2 * self.channels + 1
        self.kept = spec.taps - 1  # inputs of the past that a token needs

    @cute.jit
    def row(self, tid: Int32):
        """The CTA's value row whose channel this thread has; the last one for threads that have none.

        Counted from the last thread down, as the first ones have the channels of q and k where there are more threads
        than those.
        """
        return cutlass.min(self.threads - 1 - tid, self.spec.config.rows - 1)

    @cute.jit
    def lines(self, H: Int32, work: Work):
        spec, lines = self.spec, []
        for half in cutlass.range_constexpr(2):
            for m in cutlass.range_constexpr(self.channels):
                channel = cutlass.min(work.tid + m * self.threads, spec.K - 1)
                lines.append((half * H + work.i_h) * spec.K + channel)
        first_v = work.i_hv * spec.V + work.i_slice * spec.config.rows
        lines.append(2 * H * spec.K + first_v + self.row(work.tid))
        return tuple(lines)

    @cute.jit
    def fetch_weights(self, weight: cute.Tensor, bias: cute.Tensor | None, lines):
        """Weight and bias of the lines as they lie in memory; no bias is 0."""
        taps = cute.make_rmem_tensor((self.spec.taps, self.count), weight.element_type)
        offsets = cute.make_rmem_tensor(self.count, Float32 if bias is None else bias.element_type)
        offsets.fill(0.0)
        for i in cutlass.range_constexpr(self.count):
            if cutlass.const_expr(self.spec.wide):
                words = cute.recast_tensor(taps, Int32)
                found = load_words(weight.iterator + Int64(lines[i]) * self.spec.taps, cute.size(words, mode=[0]))
                for j in cutlass.range_constexpr(len(found)):
                    words[j, i] = found[j]
            else:
                for j in cutlass.range_constexpr(self.spec.taps):
                    taps[j, i] = load_now(weight, (lines[i], j))
            if cutlass.const_expr(bias is not None):
                offsets[i] = load_now(bias, (lines[i],))
        return taps, offsets

    def at(self, slot, channel, entry):
        """Where an input lies in the states."""
        return (slot, entry, channel) if self.spec.tokens_first else (slot, channel, entry)

    @cute.jit
    def fetch_past(self, past: Past, first: Int32, begun):
        """The inputs before the first token as they lie in memory, from entry `first` of the state on; 0 unless it has
        `begun`, and nothing is read then."""
        states = past.states
        window = cute.make_rmem_tensor((self.kept, self.count), states.element_type)
        window.fill(0.0)
        if cutlass.const_expr(self.spec.accepted is not None):  # never past the end of a slot
            first = cutlass.min(first, Int32(cute.size(states, mode=[1 if self.spec.tokens_first else 2])) - self.kept)
        if begun:
            for i in cutlass.range_constexpr(self.count):
                for j in cutlass.range_constexpr(self.kept):
                    window[j, i] = load_now(states, self.at(past.slot, past.lines[i], first + j))
        return window

    @cute.jit
    def fp32(self, raw):
        """The same in fp32."""
        out = cute.make_rmem_tensor(raw.shape, Float32)
        out.store(raw.load().to(Float32))
        return out

    @cute.jit
    def apply(self, x: Float32, window, taps, bias, line: cutlass.Constexpr[int]):
        """SiLU of the convolution at input x of a line, whose window moves on to it."""
        y = bias[line]
        for j in cutlass.range_constexpr(self.kept):
            y += window[j, line] * taps[j, line]
            window[j, line] = window[j + 1, line] if cutlass.const_expr(j + 1 < self.kept) else x
        y += x * taps[self.kept, line]
        return y * sigmoid(y, self.spec.exact)

    @cute.jit
    def keep(self, past: Past, window, first: cutlass.Constexpr[int], leads, tid: Int32):
        """Writes `window` from entry `first` on to the front of the state; of q and k only where the CTA `leads`."""
        for i in cutlass.range_constexpr(self.count):
            if self.owns(i, leads, tid):
                for j in cutlass.range_constexpr(self.kept - first):
                    place = self.at(past.slot, past.lines[i], j)
                    past.states[place] = window[first + j, i].to(past.states.element_type)

    @cute.jit
    def owns(self, line: cutlass.Constexpr[int], leads, tid: Int32):
        """Whether it is this thread that writes a line."""
        if cutlass.const_expr(line == self.count - 1):
            return self.threads - 1 - tid < self.spec.config.rows
        else:
            return leads and tid + line % self.channels * self.threads < self.spec.K
