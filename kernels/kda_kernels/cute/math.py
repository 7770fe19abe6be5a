"""Device functions that every CuTe kernel here shares: the gate, sigmoid and sums within a warp, all fp32.

The formulas are those of `kda_kernels.reference.gate` and the instructions those of `kda_kernels.triton.common`; the
tests hold all three against each other.
"""

import operator

import cutlass
import cutlass.cute as cute
from cutlass import Float32
from cutlass._mlir.dialects import llvm, nvvm
from cutlass.cutlass_dsl import T, dsl_user_op

from kda_kernels.problem import Gate

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453


@dsl_user_op
def exp2(x: Float32, *, loc=None, ip=None) -> Float32:
    """2**x, 2 ulp; results under 2**-126 are 0."""
    return _approx("ex2.approx.ftz.f32", x, loc, ip)


@dsl_user_op
def log2(x: Float32, *, loc=None, ip=None) -> Float32:
    """log2(x), 1 ulp away from x = 1."""
    return _approx("lg2.approx.ftz.f32", x, loc, ip)


@dsl_user_op
def rsqrt(x: Float32, *, loc=None, ip=None) -> Float32:
    """x**-0.5, 2 ulp."""
    return _approx("rsqrt.approx.ftz.f32", x, loc, ip)


@dsl_user_op
def reciprocal(x: Float32, *, loc=None, ip=None) -> Float32:
    """1 / x, 1 ulp."""
    return Float32(nvvm.rcp_approx_ftz_f(Float32(x).ir_value(loc=loc, ip=ip), loc=loc, ip=ip))


def _approx(instruction: str, x: Float32, loc, ip) -> Float32:
    """One instruction without side effects: the compiler may move it and drop it."""
    operand = Float32(x).ir_value(loc=loc, ip=ip)
    result = llvm.inline_asm(
        T.f32(), [operand], f"{instruction} $0, $1;", "=f,f", has_side_effects=False, is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT, loc=loc, ip=ip,
    )  # fmt: skip
    return Float32(result)


@cute.jit
def sigmoid(x: Float32) -> Float32:
    """1 / (1 + exp(-x))."""
    return reciprocal(1.0 + exp2(x * -LOG2_E))


@cute.jit
def softplus(x: Float32) -> Float32:
    """max(x, 0) + log(1 + exp(-|x|)): no overflow, and full relative precision where the result is small."""
    e = exp2(cute.arch.fmax(x, -x) * -LOG2_E)
    series = e * (1.0 - e * (0.5 - e * (1.0 / 3 - e * (0.25 - e * 0.2))))  # 1 + e would round a small e away
    log = log2(1.0 + e) * LN_2
    return cute.arch.fmax(x, Float32(0.0)) + (series if e < 0.03125 else log)


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
