"""Device functions that load and store states, in all that a pool may hold: see `kda_kernels.reference.stored`.

Floor of stochastic rounding, an element: a seventh part of Philox' 7 rounds is 1.75 products of 32 x 32 to 64 bits and
1.75 three-way XORs, and there are 2 (bf16) to 6 instructions more.
"""

import triton
import triton.language as tl

from kda_kernels.reference import stored as definition
from kda_kernels.triton.common import INTERPRETED, cast, hash_now, is_cuda, reciprocal

ROUNDS = tl.constexpr(definition.ROUNDS)
LARGEST = tl.constexpr(definition.LARGEST)
INVERSE = tl.constexpr(1 / definition.LARGEST)
LEAST_ROW = tl.constexpr(definition.LEAST_ROW)


@triton.jit
def _round(c0, c1, c2, c3, k0, k1):
    """One of Philox' rounds; all of uint32."""
    p0 = c0.to(tl.uint64) * 0xD2511F53
    p2 = c2.to(tl.uint64) * 0xCD9E8D57
    return (p2 >> 32).to(tl.uint32) ^ c1 ^ k0, p2.to(tl.uint32), (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)


@triton.jit
def _with_half(word, upper: tl.constexpr, HIGH: tl.constexpr):
    """uint32: `upper`, whose lower half is 0, and there a half of `word`."""
    if not HIGH:
        return (word & 0xFFFF) | upper
    if INTERPRETED or not is_cuda():
        return (word >> 16) | upper
    text: tl.constexpr = f"prmt.b32 $0, $1, {upper}, 0x7632;"
    return tl.inline_asm_elementwise(text, "=r,r", [word], dtype=tl.uint32, is_pure=True, pack=1)


@triton.jit
def _widened(x):
    """int16 x in fp32: of 2**23 + 2**15 + x, as a conversion of its own would take four times as long."""
    if INTERPRETED or not is_cuda():
        bits = (x.to(tl.uint16, bitcast=True).to(tl.uint32) ^ 0x8000) | 0x4B000000
        bits = bits.to(tl.uint32)
    else:
        text: tl.constexpr = """{ .reg .b32 t; xor.b32 t, $2, 0x80008000;
            prmt.b32 $0, t, 0x4B000000, 0x7610; prmt.b32 $1, t, 0x4B000000, 0x7632; }"""
        bits = tl.inline_asm_elementwise(text, "=r,=r,r", [x], dtype=tl.uint32, is_pure=True, pack=2)
    return bits.to(tl.float32, bitcast=True) - 8421376.0


@triton.jit
def random_numbers(seed, slot, token, row, odd, DTYPE: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """[rows, BK] int32: of the elements of these rows, hv V + v, of a state, what rounding to DTYPE adds to them.

    The random number itself for bf16, its lower 13 bits for fp16, and 0 in rows that are odd; for int16 the bits of
    128 + it / 65536.

    seed, slot: int64. odd: see `store_state`.
    """
    column = tl.arange(0, BK)[None, :]
    c0 = (row.to(tl.uint32)[:, None] * (K // 8) + (column // 8).to(tl.uint32)).to(tl.uint32)
    c1 = tl.zeros_like(c0) + slot.to(tl.uint32)
    c2 = tl.zeros_like(c0) + (tl.full([], 0, tl.int64) + token).to(tl.uint32)
    c3 = tl.zeros_like(c0)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    j = column % 8
    word = tl.where(j < 4, tl.where(j < 2, c0, c1), tl.where(j < 6, c2, c3))
    if DTYPE == tl.int16:
        number = tl.where(j % 2 == 0, _with_half(word, 0x43000000, False), _with_half(word, 0x43000000, True))
    else:
        used = tl.where(odd * 0.0 == 0, 0x1FFF if DTYPE == tl.float16 else 0xFFFF, 0)
        number = tl.where(j % 2 == 0, word, word >> 16) & used.to(tl.uint32, bitcast=True)[:, None]
    return number.to(tl.uint32).to(tl.int32, bitcast=True)


@triton.jit
def rounded_stochastically(x, numbers, DTYPE: tl.constexpr):
    """fp32 x in bf16 or fp16; numbers: see `random_numbers`. NaN and infinities stay where the number is 0."""
    if DTYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True) + numbers
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    # times 2**-112 what is subnormal in fp16 is so in fp32: the last bit of fp16 is bit 13 in all
    bits = (x * 2.0**-112).to(tl.int32, bitcast=True) + numbers
    return ((bits & -0x2000).to(tl.float32, bitcast=True) * 2.0**112).to(DTYPE)


@triton.jit
def _quotient(a, b, inverse):
    """a / b rounded to nearest, from 1 / b rounded so, of numbers far from the least and the largest (Markstein)."""
    if INTERPRETED:
        zero = 0.0 * inverse
        q = tl.div_rn(zero + a, zero + b)
    else:
        q = a * inverse
        q = tl.fma(tl.fma(-q, b, a), inverse, q)
    return q


@triton.jit
def _floor_of_sum(x, w, number):
    """int32 whose lower half is floor(x w + r / 65536), |x w| < 2**15, of the bits of 128 + r / 65536."""
    if INTERPRETED or not is_cuda():
        y = tl.floor(x.to(tl.float64) * w.to(tl.float64) * 65536.0)
        return (y.to(tl.int32) + (number & 0xFFFF)) >> 16
    # the sum, and that + 1.5 * 2**23 - 128, both rounded down: the floor stays, and no conversion is made
    text: tl.constexpr = "{ .reg .f32 a; fma.rm.f32 a, $1, $2, $3; add.rm.f32 $0, a, 0f4B3FFF80; }"
    return tl.inline_asm_elementwise(text, "=r,f,f,r", [x, w, number], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def quantised(x, numbers, odd):
    """fp32 x [rows, K] in int16, and the scales [rows]; `numbers` None: to nearest. odd: see `store_state`."""
    size = tl.max(tl.abs(x), 1)
    kept = (size >= LEAST_ROW) & (size < float("inf"))
    quarter = tl.where(kept, size, 1.0) * 0.25  # whose reciprocal is a normal number
    inverse = reciprocal(quarter)
    if not INTERPRETED:
        inverse = tl.fma(tl.fma(-quarter, inverse, 1.0), inverse, inverse)
    w = tl.where(kept, _quotient(LARGEST / 4, quarter, inverse), 0.0)[:, None]
    scales = tl.where(kept, _quotient(size, LARGEST, INVERSE), 0.0)
    scales += tl.where(size < float("inf"), odd * 0.0, float("nan"))  # odd - odd may be fused with what made odd
    if numbers is None:
        # adding 1.5 * 2**23 rounds to an integer, which is in the low half then
        if INTERPRETED:
            y = (x.to(tl.float64) * w.to(tl.float64) + 12582912.0).to(tl.float32)
        else:
            y = tl.fma(x, w, 12582912.0)
        q = y.to(tl.int32, bitcast=True)
    else:
        q = _floor_of_sum(x, w, numbers)
    return q.to(tl.int16), scales


@triton.jit
def load_state(p, mask, scales, mask_rows, K_AXIS: tl.constexpr):
    """fp32: a tile of a state, zeros where there is none.

    Args:
        p, mask: of the elements; mask None: all are there. scales, mask_rows: of the rows of K channels, or None.
        K_AXIS: along which axis of the tile these lie.
    """
    x = tl.load(p) if mask is None else tl.load(p, mask=mask, other=0.0)
    if scales is None:
        x = x.to(tl.float32)
    else:
        x = _widened(x) * tl.expand_dims(tl.load(scales, mask=mask_rows, other=0.0), K_AXIS)
    return x


@triton.jit
def store_state(p, x, mask, scales, mask_rows, odd, seed, slot, token, row, K: tl.constexpr, BK: tl.constexpr):
    """Stores a tile x [rows, BK] of a state as its pool holds it.

    Args:
        p, mask, scales, mask_rows: as in `load_state`.
        odd: [rows], no finite number where a row has NaN; such rows have no finite number at all.
        seed: None: to nearest. row: hv V + v of each row. slot (int64), token: see `kda_kernels.reference.stored`.
    """
    DTYPE: tl.constexpr = p.dtype.element_ty
    numbers = None
    if seed is not None and DTYPE != tl.float32:
        numbers = random_numbers(seed, slot, token, row, odd, DTYPE, K, BK)
    if DTYPE == tl.int16:
        y, s = quantised(x, numbers, odd)
        tl.store(scales, s, mask=mask_rows)
    elif numbers is not None:
        y = rounded_stochastically(x, numbers, DTYPE)
    else:
        y = cast(x, DTYPE)
    if mask is None:
        tl.store(p, y)
    else:
        tl.store(p, y, mask=mask)


hash_now(globals())
