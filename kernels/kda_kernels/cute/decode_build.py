"""Compiles the decode kernel for a spec: the one place that knows how its arguments look to the DSL."""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32

from kda_kernels.cute.decode_config import DecodeSpec
from kda_kernels.cute.decode_kernel import DecodeKernel

DTYPES = {
    "float32": cutlass.Float32,
    "float16": cutlass.Float16,
    "bfloat16": cutlass.BFloat16,
    "int32": cutlass.Int32,
    "int64": cutlass.Int64,
}


def compile_decode(spec: DecodeSpec, arch: str, options: str = "") -> Any:
    """What `cute.compile` returns: called with torch tensors in the order of `DecodeKernel.__call__`.

    Args:
        arch: the DSL's name of an architecture; no GPU has to be there.
        options: further options of the compiler.
    """
    return cute.compile(DecodeKernel(spec), *_arguments(spec), options=f"--enable-tvm-ffi --gpu-arch {arch} {options}")


def _arguments(spec: DecodeSpec) -> tuple:
    """Stand-ins for the tensors: dtypes, which sizes are equal, and what strides are known to be."""
    B = 1 if spec.packed else cute.sym_int()
    T = 1 if spec.one_token else cute.sym_int()
    N = cute.sym_int() if spec.packed else B

    def tokens(dtype: str, *shape: int, contiguous: bool = True):
        inner = [1] if contiguous else []
        strides = [cute.sym_int64() for _ in range(2 + len(shape) - len(inner))] + inner
        return stand_in(dtype, (B, T, *shape), strides)

    def vector(dtype: str | None, size):
        return dtype and stand_in(dtype, (size,), (1,))

    def states(dtype: str | None, *outer):
        """The innermost [V, K] is contiguous, and so are the heads; what lies further out may be anywhere, aligned."""
        if dtype is None:
            return None
        inner = (spec.V * spec.K, spec.K, 1)
        strides = [cute.sym_int64(divisibility=spec.vector) for _ in outer]
        align = spec.vector * DTYPES[dtype].width // 8
        return stand_in(dtype, (*outer, spec.HV, spec.V, spec.K), (*strides, *inner), align)

    return (
        tokens(spec.dtype, spec.H, spec.K),
        tokens(spec.dtype, spec.H, spec.K),
        tokens(spec.dtype, spec.HV, spec.V),
        tokens(spec.g, spec.HV, spec.K),
        tokens(spec.beta, spec.HV, contiguous=False),
        vector(spec.A_log, spec.HV),
        vector(spec.dt_bias, spec.HV * spec.K),
        tokens(spec.dtype, spec.HV, spec.V),
        states(spec.h0, cute.sym_int() if spec.pooled else N),
        states(spec.ht, N),
        vector(spec.index, N),
        vector(spec.offsets, cute.sym_int()),
        states(spec.token_states, B, T),
        Float32(0.0),
        Float32(0.0),
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
    )


def stand_in(dtype: str, shape: tuple, strides, align: int | None = None):
    """A tensor for the compiler: aligned to its elements, or to `align` bytes."""
    kind = DTYPES[dtype]
    return cute.runtime.make_fake_tensor(kind, shape, tuple(strides), assumed_align=align or kind.width // 8)
