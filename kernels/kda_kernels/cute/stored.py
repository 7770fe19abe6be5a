"""States in two bytes on the device: rounded stochastically, or int16 with a scale a row.

The definition, which these follow to the bit, is `kda_kernels.reference.stored`. Floor: `docs/notes/states.md`.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float16, Float32, Int32, Uint32, Uint64

from kda_kernels.cute.math import float_bits, float_of, reciprocal
from kda_kernels.cute.ptx import (
    UPPER,
    add_down,
    multiply,
    multiply_add,
    multiply_add_down,
    pick_bytes,
    select,
)
from kda_kernels.reference.stored import LARGEST, LEAST_ROW, ROUNDS

MAGIC = 12582912.0  # 1.5 * 2**23: a sum with it is rounded to an integer, which is in its low bits


@cute.jit
def random_words(keys, slot: Uint32, token: Uint32, group: Uint32):
    """Four words of 2 x 16 random bits: of the 8 elements from 8 `group` on of a state. `keys`: halves of the seed."""
    c0, c1, c2, c3 = group, slot, token, Uint32(0)
    k0, k1 = keys
    for _ in cutlass.range_constexpr(ROUNDS):
        p0, p2 = Uint64(c0) * Uint64(0xD2511F53), Uint64(c2) * Uint64(0xCD9E8D57)
        c0, c1, c2, c3 = Uint32(p2 >> 32) ^ c1 ^ k0, Uint32(p2), Uint32(p0 >> 32) ^ c3 ^ k1, Uint32(p0)
        k0, k1 = k0 + Uint32(0x9E3779B9), k1 + Uint32(0xBB67AE85)
    return c0, c1, c2, c3


@cute.jit
def bf16_stochastic(a: Float32, b: Float32, word: Uint32) -> Int32:
    """Two numbers, neither of which is NaN, in a word, by the random ones in another."""
    return pick_bytes(float_bits(a) + Int32(word & Uint32(0xFFFF)), float_bits(b) + Int32(word >> 16), UPPER)


@cute.jit
def fp16_stochastic(a: Float32, b: Float32, word: Uint32) -> Int32:
    """As `bf16_stochastic`; each number is as fp16 can have it, or infinite from 65536 on.

    Times 2^-112 what is subnormal in fp16 is so in fp32, so that the last bit of fp16 is bit 13 in all; what the
    definition rounds off by adding 2^-14 is rounded off so.
    """
    numbers, pair = word & Uint32(0x1FFF1FFF), cute.make_rmem_tensor(2, Float32)
    pair[0] = _rounded_to_fp16(a, Int32(numbers & Uint32(0xFFFF)))
    pair[1] = _rounded_to_fp16(b, Int32(numbers >> 16))
    narrow = cute.make_rmem_tensor(2, Float16)
    narrow.store(pair.load().to(Float16))
    return cute.recast_tensor(narrow, Int32)[0]


@cute.jit
def _rounded_to_fp16(x: Float32, number: Int32) -> Float32:
    bits = float_bits(multiply(x, Float32(2.0**-112))) + number
    return multiply(float_of(bits & -0x2000), Float32(2.0**112))


@cute.jit
def row_scales(most: Float32, zero: Float32):
    """Of a row whose largest |x| is `most`: what x is multiplied by, and the scale. `zero`: NaN if the row has NaN."""
    least = most < LEAST_ROW
    quarter = most * 0.25  # whose reciprocal is a normal number
    inverse = reciprocal(quarter)
    inverse = multiply_add(multiply_add(-quarter, inverse, Float32(1.0)), inverse, inverse)
    w = quotient(Float32(LARGEST / 4), quarter, inverse)
    scale = quotient(most, Float32(LARGEST), Float32(1 / LARGEST))  # an infinity makes it NaN
    return select(least, Float32(0.0), w), select(least, Float32(0.0), scale) + zero


@cute.jit
def quotient(a: Float32, b: Float32, inverse: Float32) -> Float32:
    """a / b, rounded to nearest, from 1 / b rounded so: Markstein's way, of numbers that are far from the least."""
    q = a * inverse
    return multiply_add(multiply_add(-q, b, a), inverse, q)


@cute.jit
def upper_integer(word: Int32) -> Float32:
    """The int16 in its upper half, out of 2**23 + 2**15 + x: conversions are slow, and the lower halves have some."""
    return float_of((word >> 16) + 0x4B008000) - Float32(2.0**23 + 2.0**15)


@cute.jit
def int16_nearest(x: Float32, w: Float32) -> Int32:
    """Its lower half is the integer next to x w."""
    return float_bits(multiply_add(x, w, Float32(MAGIC)))


@cute.jit
def int16_stochastic(x: Float32, w: Float32, number: Float32) -> Int32:
    """Its lower half is the integer. `number`: see `random_fractions`. Sums rounded down have the same floor."""
    return float_bits(add_down(multiply_add_down(x, w, number), Float32(MAGIC - 128.0)))


@cute.jit
def random_fractions(word: Uint32):
    """128 + r / 65536 of the two random numbers in a word."""
    return tuple(float_of(pick_bytes(word, Int32(0x4300 << 16), pick)) for pick in (0x7610, 0x7632))
