"""Device functions that load and store states, in all that a pool may hold: see `kda_kernels.reference.stored`.

Floor of rounding at random, an element: a seventh part of Philox' 7 rounds is 1.75 products of 32 x 32 to 64 bits and
1.75 three-way XORs, and there are 2 (bf16) to 6 instructions more.
"""

import triton
import triton.language as tl

from kda_kernels.triton.common import INTERPRETED, cast


@triton.jit
def _round(c0, c1, c2, c3, k0, k1):
    """One of Philox' rounds; all of uint32."""
    p0 = c0.to(tl.uint64) * 0xD2511F53
    p2 = c2.to(tl.uint64) * 0xCD9E8D57
    return (p2 >> 32).to(tl.uint32) ^ c1 ^ k0, p2.to(tl.uint32), (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)


@triton.jit
def random_numbers(seed, slot, token, row, K: tl.constexpr, BK: tl.constexpr):
    """[rows, BK] int32 under 65536: those of the elements of these rows, hv V + v, of a state. seed, slot: int64."""
    group = tl.arange(0, BK // 8)
    c0 = (row.to(tl.uint32)[:, None] * (K // 8) + group.to(tl.uint32)[None, :]).to(tl.uint32)
    zero = tl.zeros_like(c0)
    c1 = zero + slot.to(tl.uint32)
    c2 = zero + (tl.full([], 0, tl.int64) + token).to(tl.uint32)
    c3 = zero
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(7):
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3)).to(tl.int32, bitcast=True)
    return tl.reshape(tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF), [row.shape[0], BK])


@triton.jit
def rounded_at_random(x, numbers, DTYPE: tl.constexpr):
    """fp32 x in bf16 or fp16."""
    if DTYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        y = ((bits + numbers) & -0x10000).to(tl.float32, bitcast=True)
    else:
        size = tl.abs(x)
        offset = tl.where(size < 6.103515625e-05, 6.103515625e-05, 0.0)
        bits = (size + offset).to(tl.int32, bitcast=True)
        y = ((bits + (numbers & 0x1FFF)) & -0x2000).to(tl.float32, bitcast=True) - offset
        sign = x.to(tl.int32, bitcast=True) & -0x80000000
        y = (y.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.where(x == x, y, x).to(DTYPE)


@triton.jit
def quantised(x, numbers):
    """fp32 x [rows, K] in int16, and the scales [rows]; `numbers` None: to nearest."""
    most = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)  # as integers, whose largest is NaN
    size = most.to(tl.float32, bitcast=True)
    finite = most < 0x7F800000
    kept = finite & (size >= 7.703719777548943e-34)  # 2**-110
    w = tl.where(kept, tl.div_rn(32767.0, tl.where(kept, size, 1.0)), 0.0)[:, None]
    scales = tl.where(kept, tl.div_rn(size, 32767.0), tl.where(finite, 0.0, float("nan")))
    x = tl.where(kept[:, None], x, 0.0)
    if numbers is None:
        # adding 1.5 * 2**23 rounds to an integer, which is in the low bits then
        if INTERPRETED:
            y = (x.to(tl.float64) * w.to(tl.float64) + 12582912.0).to(tl.float32)
        else:
            y = tl.fma(x, w, 12582912.0)
        q = y.to(tl.int32, bitcast=True) - 0x4B400000
    else:
        y = tl.floor(x * w * 65536.0)
        y = tl.minimum(tl.maximum(y, -2147418112.0), 2147418112.0).to(tl.int32)
        q = (y + numbers) >> 16
    return q.to(tl.int16), scales


@triton.jit
def load_state(p, mask, scales, mask_rows, K_AXIS: tl.constexpr):
    """fp32: a tile of a state, zeros where there is none.

    Args:
        p, mask: of the elements; mask None: all are there. scales, mask_rows: of the rows of K channels, or None.
        K_AXIS: along which axis of the tile these lie.
    """
    x = tl.load(p) if mask is None else tl.load(p, mask=mask, other=0.0)
    x = x.to(tl.float32)
    if scales is not None:
        x *= tl.expand_dims(tl.load(scales, mask=mask_rows, other=0.0), K_AXIS)
    return x


@triton.jit
def store_state(p, x, mask, scales, mask_rows, seed, slot, token, row, K: tl.constexpr, BK: tl.constexpr):
    """Stores a tile x [rows, BK] of a state as its pool holds it.

    Args:
        p, mask, scales, mask_rows: as in `load_state`. seed: None: to nearest.
        row: hv V + v of each row. slot (int64), token: see `kda_kernels.reference.stored`.
    """
    DTYPE: tl.constexpr = p.dtype.element_ty
    numbers = None
    if seed is not None and DTYPE != tl.float32:
        numbers = random_numbers(seed, slot, token, row, K, BK)
    if DTYPE == tl.int16:
        y, s = quantised(x, numbers)
        tl.store(scales, s, mask=mask_rows)
    elif numbers is not None:
        y = rounded_at_random(x, numbers, DTYPE)
    else:
        y = cast(x, DTYPE)
    if mask is None:
        tl.store(p, y)
    else:
        tl.store(p, y, mask=mask)
