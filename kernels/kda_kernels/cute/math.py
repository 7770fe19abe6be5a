"""Device functions that every CuTe kernel here shares: the gate, sigmoid and sums within a warp, all fp32.

The formulas are those of `kda_kernels.reference.gate`.
"""

import math
import operator

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass._mlir.dialects import llvm, nvvm
from cutlass.cutlass_dsl import T, dsl_user_op

from kda_kernels.problem import Gate

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453


# Decays multiply a state token after token, so what they are made of is accurate to about an ulp: the approximations of
# the hardware (2 ulp, and lg2 an absolute 2**-22) would be three times the error of plain fp32 after three tokens. One
# thread a channel pays for it, once a token.
EXP2 = [LN_2**n / math.factorial(n) for n in range(8)]  # 2**f, |f| <= 1/2: the next term is under 5e-9
ATANH = [1 / (2 * n + 1) for n in range(8)]  # atanh(z) / z in z**2, z <= 1/3: the next term is under 2e-9


@cute.jit
def exp2(x: Float32) -> Float32:
    """2**x, 1 ulp; results under 2**-126 are 0. NaN stays NaN, here and below."""
    x = cute.arch.fmin(cute.arch.fmax(x, Float32(-127.0), nan=True), Float32(128.0), nan=True)
    shifted = x + 12582912.0  # 1.5 * 2**23: the sum's last bits are x, rounded to an integer
    f = x - (shifted - 12582912.0)
    power = (_bits(shifted) << 23) + 0x3F800000  # 2**n: what lies over the last 9 bits falls out
    return _horner(EXP2, f) * _float(power)


@cute.jit
def rsqrt(x: Float32) -> Float32:
    """x**-0.5, 1 ulp: a Newton step on the hardware's."""
    y = _approx("rsqrt.approx.ftz.f32", x)
    return y + (0.5 * y) * (1.0 - (x * y) * y)


@cute.jit
def sigmoid(x: Float32) -> Float32:
    """1 / (1 + exp(-x))."""
    return reciprocal(1.0 + exp2(x * -LOG2_E))


@cute.jit
def softplus(x: Float32) -> Float32:
    """log(1 + exp(x)) = max(x, 0) + log(1 + e), e = exp(-|x|): no overflow, and full precision where it is small.

    log(1 + e) = 2 atanh(z), z = e / (2 + e): no 1 + e that would round a small e away.
    """
    e = exp2(cute.arch.fmax(x, -x, nan=True) * -LOG2_E)
    z = e * reciprocal(2.0 + e)
    return cute.arch.fmax(x, Float32(0.0), nan=True) + 2.0 * z * _horner(ATANH, z * z)


@cute.jit
def _horner(coefficients: cutlass.Constexpr[list], x: Float32) -> Float32:
    """The polynomial with these coefficients, the constant one first."""
    y = Float32(coefficients[-1])
    for c in cutlass.range_constexpr(len(coefficients) - 1):
        y = y * x + coefficients[len(coefficients) - 2 - c]
    return y


@dsl_user_op
def reciprocal(x: Float32, *, loc=None, ip=None) -> Float32:
    """1 / x, 1 ulp."""
    return Float32(nvvm.rcp_approx_ftz_f(Float32(x).ir_value(loc=loc, ip=ip), loc=loc, ip=ip))


@dsl_user_op
def _approx(instruction: str, x: Float32, *, loc=None, ip=None) -> Float32:
    """One instruction without side effects: the compiler may move it and drop it."""
    operand = Float32(x).ir_value(loc=loc, ip=ip)
    result = llvm.inline_asm(
        T.f32(), [operand], f"{instruction} $0, $1;", "=f,f", has_side_effects=False, is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT, loc=loc, ip=ip,
    )  # fmt: skip
    return Float32(result)


@dsl_user_op
def _bits(x: Float32, *, loc=None, ip=None) -> Int32:
    return Int32(llvm.bitcast(T.i32(), Float32(x).ir_value(loc=loc, ip=ip), loc=loc, ip=ip))


@dsl_user_op
def _float(x: Int32, *, loc=None, ip=None) -> Float32:
    return Float32(llvm.bitcast(T.f32(), Int32(x).ir_value(loc=loc, ip=ip), loc=loc, ip=ip))


@cute.jit
def log2_decay(raw: Float32, A: Float32, bias: Float32, lower_bound: Float32, gate: cutlass.Constexpr[Gate]) -> Float32:
    """log2 of the decay, <= 0, of a raw gate. `A` is exp(A_log)."""
    if cutlass.const_expr(gate is Gate.SOFTPLUS):
        return (A * -LOG2_E) * softplus(raw + bias)
    elif cutlass.const_expr(gate is Gate.SAFE):
        return (lower_bound * LOG2_E) * sigmoid(A * (raw + bias))
    else:
        return raw * LOG2_E


@cute.jit
def lane_sum(x: Float32, lanes: cutlass.Constexpr[int]) -> Float32:
    """The sum over groups of so many neighbouring lanes, in each of them."""
    return cute.arch.warp_reduction(x, operator.add, threads_in_group=lanes)
