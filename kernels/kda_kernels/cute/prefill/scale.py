"""Powers of two by which rows of the state stay in fp16's range; see `PrefillSpec.scaled`."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from kda_kernels.cute.math import float_bits, float_of
from kda_kernels.cute.prefill.config import LARGEST, MOST_EXPONENT
from kda_kernels.cute.ptx import larger_size


class RowScaler:
    """Of accumulators, two rows a lane."""

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

    def power(self, exponent: Int32) -> Float32:
        """2^exponent."""
        return float_of((exponent + 127) << 23)

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
