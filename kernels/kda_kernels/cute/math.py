"""Device functions that every CuTe kernel here shares: the gate, sigmoid and sums within a warp, all fp32; early loads.

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
L2_EPS = 1e-6  # under the root of an L2 norm


# Decays multiply a state token after token, so what they are made of is accurate to about an ulp: the approximations of
# the hardware (2 ulp) would be three times the error of plain fp32 after three tokens. One thread a channel pays for
# it, once per token. Where all that goes out is rounded to 8 or 11 bits, nobody could see it: `exact` is False there.
EXP2 = [LN_2**n / math.factorial(n) for n in range(8)]  # 2**f, |f| <= 1/2: the next term is under 5e-9
ATANH = [1 / (2 * n + 1) for n in range(8)]  # atanh(z) / z in z**2, z <= 1/3: the next term is under 2e-9
# log(1 + e) / e, 0 <= e <= 1, within 1.5e-6 of it and 1 at 0: a fit by least squares of relative errors, reweighted
LOG1P = [1.0, -0.49990746, 0.33140427, -0.23611343, 0.15102768, -0.067851186, 0.014588313]


@cute.jit
def exp2(x: Float32, exact: cutlass.Constexpr[bool] = True) -> Float32:
    """2**x, 1 ulp and 2**127 at most, or 2 in one instruction; results under 2**-126 are 0. NaN stays NaN, as below."""
    if cutlass.const_expr(exact):
        x = cute.arch.fmin(cute.arch.fmax(x, Float32(-127.0), nan=True), Float32(127.0), nan=True)
        shifted = x + 12582912.0  # 1.5 * 2**23: the sum's last bits are x, rounded to an integer
        f = x - (shifted - 12582912.0)
        power = (float_bits(shifted) << 23) + 0x3F800000  # 2**n: what lies over the last 9 bits falls out
        return _horner(EXP2, f) * float_of(power)
    else:
        return _approx("ex2.approx.ftz.f32", x)


@cute.jit
def rsqrt(x: Float32, exact: cutlass.Constexpr[bool] = True) -> Float32:
    """x**-0.5, 1 ulp by a Newton step on the hardware's, which is within 2."""
    y = _approx("rsqrt.approx.ftz.f32", x)
    if cutlass.const_expr(exact):
        y = y + (0.5 * y) * (1.0 - (x * y) * y)
    return y


@cute.jit
def sigmoid(x: Float32, exact: cutlass.Constexpr[bool] = True) -> Float32:
    """1 / (1 + exp(-x))."""
    return reciprocal(1.0 + exp2(x * -LOG2_E, exact))


@cute.jit
def softplus(x: Float32, exact: cutlass.Constexpr[bool] = True) -> Float32:
    """log(1 + exp(x)) = max(x, 0) + log(1 + e), e = exp(-|x|): no overflow, and full precision where it is small.

    No 1 + e, which would round a small e away: log(1 + e) = 2 atanh(z), z = e / (2 + e), or a polynomial times e.
    """
    e = exp2(cute.arch.fmax(x, -x, nan=True) * -LOG2_E, exact)
    top = cute.arch.fmax(x, Float32(0.0), nan=True)
    if cutlass.const_expr(exact):
        z = e * reciprocal(2.0 + e)
        return top + 2.0 * z * _horner(ATANH, z * z)
    else:
        return top + e * _horner(LOG1P, e)


@cute.jit
def log2_softplus(x: Float32) -> Float32:
    """log2(1 + 2**x), within 1.6e-6 of itself, in few instructions. NaN stays NaN.

    So what a log decay of -L leaves of a state is off by 1.6e-6 L exp(-L) of it, 6e-7 at most.
    """
    e = exp2(-cute.arch.fmax(x, -x), exact=False)
    return cute.arch.fmax(x, Float32(0.0)) + e * _horner([c / LN_2 for c in LOG1P], e)


def sum_in_pairs(values: list) -> Float32:
    """Of a power of two of numbers: in pairs, these in pairs, and so on, so that few roundings lie on each other."""
    while len(values) > 1:
        values = [x + y for x, y in zip(values[::2], values[1::2], strict=True)]
    return values[0]


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
def float_bits(x: Float32, *, loc=None, ip=None) -> Int32:
    return Int32(llvm.bitcast(T.i32(), Float32(x).ir_value(loc=loc, ip=ip), loc=loc, ip=ip))


@dsl_user_op
def float_of(x: Int32, *, loc=None, ip=None) -> Float32:
    return Float32(llvm.bitcast(T.f32(), Int32(x).ir_value(loc=loc, ip=ip), loc=loc, ip=ip))


@cute.jit
def rate(A_log: Float32, exact: cutlass.Constexpr[bool] = True) -> Float32:
    """exp(A_log), neither 0 nor infinite: times a gate that is infinite or 0 either would be no number."""
    x = cute.arch.fmax(A_log * LOG2_E, Float32(-126.0), nan=True)
    if cutlass.const_expr(not exact):
        x = cute.arch.fmin(x, Float32(126.0), nan=True)
    return exp2(x, exact)


@cute.jit
def log2_decay(
    raw: Float32,
    A: Float32,
    bias: Float32,
    lower_bound: Float32,
    gate: cutlass.Constexpr[Gate],
    exact: cutlass.Constexpr[bool] = True,
) -> Float32:
    """log2 of the decay, <= 0, of a raw gate. `A` is exp(A_log)."""
    if cutlass.const_expr(gate is Gate.SOFTPLUS):
        return (A * -LOG2_E) * softplus(raw + bias, exact)
    elif cutlass.const_expr(gate is Gate.SAFE):
        return (lower_bound * LOG2_E) * sigmoid(A * (raw + bias), exact)
    else:
        return raw * LOG2_E


@cute.jit
def lane_sum(x: Float32, lanes: cutlass.Constexpr[int]) -> Float32:
    """The sum over groups of so many neighbouring lanes, in each of them."""
    return cute.arch.warp_reduction(x, operator.add, threads_in_group=lanes)


@dsl_user_op
def load_now(x: cute.Tensor, at: tuple, *, loc=None, ip=None):
    """x[at], of 16 or 32 bits, asked for here: a plain load moves to where the compiler finds its value first used."""
    first = x.iterator + cute.crd2idx(at, x.layout, loc=loc, ip=ip)
    bits = x.element_type.width
    word, letter = {16: (T.i16(), "h"), 32: (T.i32(), "r")}[bits]
    result = llvm.inline_asm(
        word, [first.toint(loc=loc, ip=ip).ir_value(loc=loc, ip=ip)], f"ld.global.b{bits} $0, [$1];", f"={letter},l",
        has_side_effects=True, is_align_stack=False, asm_dialect=llvm.AsmDialect.AD_ATT, loc=loc, ip=ip,
    )  # fmt: skip
    return x.element_type(llvm.bitcast(x.element_type.mlir_type, result, loc=loc, ip=ip))
