"""Second kernel of the prefill: Z, the part below the diagonal of the inverse of I + L, one warp per chunk and head.

Exact block substitution, never a Neumann series: the inverse of [[P, 0], [R, S]] is [[P', 0], [-S' R P', S']], applied
to blocks of 1, 2, 4 and 8, then across the four 16 x 16 blocks of a row. Products are as exact as fp32 operands cut to
16 bits make them. A kernel of its own, since here every product fits one warp: no barriers, and an eighth of the
instructions that 64 x 64 tiles spread over four warps took. Only blocks on and below the
diagonal are read (160 bytes per token and head) and written (80).
"""

import triton
import triton.language as tl

from kda_kernels.triton.common import dot, operand, split

B = tl.constexpr(16)


@triton.jit
def product(a, b):
    """a @ b of fp32 operands with 16 bits each: three bf16 products, that of both low halves left out."""
    a_hi, a_lo = split(a)
    b_hi, b_lo = split(b)
    return dot(a_hi, b_hi, dot(a_hi, b_lo, dot(a_lo, b_hi)))


@triton.jit
def inverse(L):
    """(I + L)^-1 of a strictly lower triangular L [B, B]."""
    r = tl.arange(0, B)
    below = r[:, None] - r[None, :]
    X = tl.where(below == 0, 1.0, tl.where((below == 1) & (r % 2 == 1)[:, None], -L, 0.0))
    for level in tl.static_range(1, 4):
        block = r >> level
        part = (block[:, None] - block[None, :] == 1) & (block % 2 == 1)[:, None]
        X -= product(product(X, tl.where(part, L, 0.0)), X)
    return X


@triton.jit
def load_block(L, i: tl.constexpr, j: tl.constexpr):
    r = tl.arange(0, B)
    return tl.load(L + (r + i * B)[:, None] * (4 * B) + (r + j * B)[None, :])


@triton.jit
def store_block(Z, i: tl.constexpr, j: tl.constexpr, x):
    r = tl.arange(0, B)
    tl.store(Z + (r + i * B)[:, None] * (4 * B) + (r + j * B)[None, :], operand(x, Z.dtype.element_ty))


@triton.jit(do_not_specialize=["slots", "cu_seqlens", "chunk_indices"])
def chunk_inverse_kernel(
    L,  # fp32 [HV, slots, C, C], strictly lower
    Z,  # [HV, slots, C, C]
    chunk_indices,  # [slots, 2] or None
    cu_seqlens,  # [N + 1] or None
    slots,
    HV: tl.constexpr,
    C: tl.constexpr,
):
    i_hv = tl.program_id(0) % HV
    i_c = (tl.program_id(0) // HV).to(tl.int64)
    slot = i_c
    if chunk_indices is not None:
        i_n = tl.load(chunk_indices + 2 * i_c)
        if i_n < 0:
            return
        slot = tl.load(cu_seqlens + i_n).to(tl.int64) // C + i_n + tl.load(chunk_indices + 2 * i_c + 1)
    tile = (i_hv * slots.to(tl.int64) + slot) * (C * C)
    L += tile
    Z += tile
    L_10 = load_block(L, 1, 0)
    L_20 = load_block(L, 2, 0)
    L_21 = load_block(L, 2, 1)
    L_30 = load_block(L, 3, 0)
    L_31 = load_block(L, 3, 1)
    L_32 = load_block(L, 3, 2)
    X_00 = inverse(load_block(L, 0, 0))
    X_11 = inverse(load_block(L, 1, 1))
    X_22 = inverse(load_block(L, 2, 2))
    X_33 = inverse(load_block(L, 3, 3))
    X_10 = -product(X_11, product(L_10, X_00))
    X_21 = -product(X_22, product(L_21, X_11))
    X_32 = -product(X_33, product(L_32, X_22))
    X_20 = -product(X_22, product(L_20, X_00) + product(L_21, X_10))
    X_31 = -product(X_33, product(L_31, X_11) + product(L_32, X_21))
    X_30 = -product(X_33, product(L_30, X_00) + product(L_31, X_10) + product(L_32, X_20))
    r = tl.arange(0, B)
    eye = tl.where(r[:, None] == r[None, :], 1.0, 0.0)
    store_block(Z, 0, 0, X_00 - eye)
    store_block(Z, 1, 0, X_10)
    store_block(Z, 1, 1, X_11 - eye)
    store_block(Z, 2, 0, X_20)
    store_block(Z, 2, 1, X_21)
    store_block(Z, 2, 2, X_22 - eye)
    store_block(Z, 3, 0, X_30)
    store_block(Z, 3, 1, X_31)
    store_block(Z, 3, 2, X_32)
    store_block(Z, 3, 3, X_33 - eye)
