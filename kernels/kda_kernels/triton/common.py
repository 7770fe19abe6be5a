"""Device functions that every Triton kernel here shares: the gate, the norm, and the constants they need.

The formulas are those of `kda_kernels.reference.gate`; both are checked against each other by the tests.

Offsets, everywhere: 64-bit in scalars, among them each number of a program, of a token, a slot or a chunk; 32-bit in
tiles, which hold rows of at most a chunk (`kda_kernels.triton.runtime.require_strides`). A tile of 64-bit addresses
costs registers that products need. Grids have one axis, since the others end at 65535.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from kda_kernels.problem import Gate
from kda_kernels.triton.runtime import interpreted

# How the gate is told to a kernel: a constexpr int, since Triton specialises on those.
GATE_NONE, GATE_SOFTPLUS, GATE_SAFE = 0, 1, 2
GATE_CODES = {Gate.NONE: GATE_NONE, Gate.SOFTPLUS: GATE_SOFTPLUS, Gate.SAFE: GATE_SAFE}

INTERPRETED = tl.constexpr(interpreted())


@triton.constexpr_function
def _bf16_of_interpreter(x):
    """x.to(tl.bfloat16) as a GPU rounds, on the interpreter's numpy arrays."""
    import numpy as np  # here, since Triton looks into all global names of a function that it may compile
    from triton.runtime.interpreter import TensorHandle

    if x.dtype == tl.bfloat16:
        return x
    bits = x.handle.data.astype(np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    made = (np.where(np.isnan(x.handle.data), bits, rounded) >> 16).astype(np.uint16)
    dtype = x.type.with_element_ty(tl.bfloat16) if x.type.is_block() else tl.bfloat16
    return tl.tensor(TensorHandle(made, tl.bfloat16), dtype)


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """x.to(DTYPE), rounded to nearest even. Triton's interpreter cuts off what bf16 has no room for."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        return _bf16_of_interpreter(x)
    return x.to(DTYPE)


@triton.jit
def operand(x, DOT: tl.constexpr):
    """x as the operand of a matrix product in DOT: bf16, or fp32 rounded to tf32, which tensor cores would cut off."""
    if DOT == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return cast(x, DOT)


@triton.jit
def dot(a, b, acc=None):
    """a @ b + acc with fp32 sums. Triton's interpreter multiplies the bits of bf16 operands; there they are widened."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def split(x):
    """x in fp32 as the sum of two bf16."""
    hi = cast(x, tl.bfloat16)
    return hi, cast(x - hi.to(tl.float32), tl.bfloat16)


@triton.jit
def exp2(x):
    """2**x, fp32, 2 ulp; results under 2**-126 are 0. One instruction: tl.exp2 spends three more on denormals."""
    if INTERPRETED or not is_cuda():
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal(x):
    """1 / x, fp32, 1 ulp."""
    if INTERPRETED or not is_cuda():
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def anew(x):
    """The integer x, of which no compiler knows that it has it already."""
    if INTERPRETED or not is_cuda():
        return x
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), fp32."""
    return reciprocal(1.0 + exp2(x * -1.4426950408889634))


@triton.jit
def softplus(x):
    """max(x, 0) + log(1 + exp(-|x|)), fp32: no overflow, and full relative precision where the result is small."""
    e = exp2(tl.abs(x) * -1.4426950408889634)
    series = e * (1.0 - e * (0.5 - e * (1.0 / 3 - e * (0.25 - e * 0.2))))  # 1 + e would round a small e away
    return tl.maximum(x, 0.0) + tl.where(e < 0.03125, series, tl.log(1.0 + e))


@triton.jit
def gate_parameters(A_log, bias, GATE: tl.constexpr):
    """exp(A_log) and the bias for `log2_decay`, fp32. The first is at most 2**120: inf makes NaN of a gate of 0.

    Without a bound it is at most exp(60), and the rest of A_log goes to the bias: where the decay is not 0 anyway,
    softplus is exp, and exp(A_log) * exp(x) is exp(60) * exp(x + A_log - 60), of which no factor rounds to 0.
    """
    A_log = A_log.to(tl.float32)
    if GATE == 1:
        low = tl.minimum(A_log, 60.0, propagate_nan=tl.PropagateNan.ALL)
        return tl.exp(low), bias + (A_log - low)
    return tl.minimum(tl.exp(A_log), 1.329227995784916e36, propagate_nan=tl.PropagateNan.ALL), bias


@triton.jit
def log2_decay(raw, A, bias, lower_bound, GATE: tl.constexpr):
    """log2 of the decay, fp32, <= 0. `A` and `bias` are those of `gate_parameters`; all arguments broadcast."""
    if GATE == 1:
        g = (A * -1.4426950408889634) * softplus(raw + bias)
    elif GATE == 2:
        # Factors on A and the bound, which are few, instead of on every gate. raw * A + bias * A, one instruction less,
        # rounds bias * A, which is more than raw + bias where A is large.
        A = A * -1.4426950408889634
        g = (lower_bound * 1.4426950408889634) * reciprocal(1.0 + exp2((raw + bias) * A))
    else:
        g = raw * 1.4426950408889634
    return g


@triton.jit
def log_decay(raw, A, bias, lower_bound, GATE: tl.constexpr):
    """The log decay (natural log, <= 0) of raw gates, fp32: see `log2_decay`."""
    if GATE == 0:
        return raw
    return log2_decay(raw, A, bias, lower_bound, GATE) * 0.6931471805599453


@triton.jit
def beta_value(raw, IS_LOGIT: tl.constexpr, NEG_EIGVAL: tl.constexpr):
    """beta in fp32 from its logit or its value."""
    b = raw.to(tl.float32)
    if IS_LOGIT:
        b = sigmoid(b)
        if NEG_EIGVAL:
            b = b * 2.0
    return b


@triton.jit
def load_slot(state_indices, i_n, stride_n, null_slot):
    """The pool's slot of a sequence, int64; negative for padding."""
    slot = tl.load(state_indices + i_n * stride_n).to(tl.int64)
    return tl.where(slot == null_slot, -1, slot)


@triton.jit
def conv_taps(conv_weight, conv_bias, channels, mask, W: tl.constexpr):
    """Of each channel, fp32: its weights for the token itself and the three before it, and its bias."""
    p = conv_weight + channels * W + (W - 1)
    w0 = tl.load(p, mask=mask, other=0.0).to(tl.float32)
    w1 = tl.load(p - 1, mask=mask, other=0.0).to(tl.float32)
    w2 = tl.zeros_like(w0)
    w3 = tl.zeros_like(w0)
    if W > 2:
        w2 = tl.load(p - 2, mask=mask, other=0.0).to(tl.float32)
    if W > 3:
        w3 = tl.load(p - 3, mask=mask, other=0.0).to(tl.float32)
    bias = tl.zeros_like(w0)
    if conv_bias is not None:
        bias = tl.load(conv_bias + channels, mask=mask, other=0.0).to(tl.float32)
    return w0, w1, w2, w3, bias


@triton.jit
def convolved(x0, x1, x2, x3, w0, w1, w2, w3, bias):
    """A channel's token, convolved and activated."""
    y = bias + w3 * x3 + w2 * x2 + w1 * x1 + w0 * x0
    return y * sigmoid(y)


def hash_now(names):
    """Hashes the functions of a module, in order of definition: for the end of one whose functions others call.

    Triton merges the globals of a called function before it hashes that function, so that a kernel's key in the cache
    depends on what was hashed earlier in the process. With the called functions hashed first, always, it does not: a
    launch finds what `kda compile` made, whatever ran before it.
    """
    for function in list(names.values()):
        if isinstance(function, triton.JITFunction):
            function.cache_key  # noqa: B018


hash_now(globals())


@triton.jit
def place_of_chunk(cu_seqlens, chunk_indices, i_n, i_c, T, C: tl.constexpr):
    """Of the i_c-th chunk: batch row, number in its sequence, tokens of the sequence, workspace slot, first token.

    i_n: its sequence, where there are cu_seqlens. All int64.
    """
    if cu_seqlens is not None:
        i_b = 0
        i_t = tl.load(chunk_indices + 2 * i_c + 1).to(tl.int64)
        first = tl.load(cu_seqlens + i_n).to(tl.int64)
        length = tl.load(cu_seqlens + i_n + 1).to(tl.int64) - first
        slot = first // C + i_n + i_t
        token = first + i_t * C
    else:
        chunks = tl.cdiv(T, C)
        i_b = i_c // chunks
        i_t = i_c % chunks
        length = T
        slot = i_c
        token = i_t * C
    return i_b, i_t, length, slot, token
