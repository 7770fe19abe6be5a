"""Compiles the prefill kernel for a spec: the one place that knows how its arguments look to the DSL."""

import math
from typing import Any

import cutlass.cute as cute
from cutlass import Float32, Int32

from kda_kernels.cute.decode_build import DTYPES, stand_in
from kda_kernels.cute.prefill_config import Part, PrefillSpec
from kda_kernels.cute.prefill_kernel import PrefillKernel


def compile_prefill(spec: PrefillSpec, arch: str, options: str = "") -> Any:
    """What `cute.compile` returns: called with torch tensors in the order of `PrefillKernel.__call__`.

    Args:
        arch: the DSL's name of an architecture; no GPU has to be there.
        options: further options of the compiler.
    """
    return cute.compile(PrefillKernel(spec), *_arguments(spec), options=f"--enable-tvm-ffi --gpu-arch {arch} {options}")


def _arguments(spec: PrefillSpec) -> tuple:
    """Stand-ins for the tensors: dtypes, which sizes are equal, and what strides are known to be."""
    B = 1 if spec.packed else cute.sym_int()
    T = cute.sym_int()
    N = cute.sym_int() if spec.packed else B

    def rows(dtype: str, heads: int, size: int):
        """Rows of 16-byte pieces anywhere."""
        strides = [cute.sym_int64(divisibility=128 // DTYPES[dtype].width) for _ in range(3)]
        return stand_in(dtype, (B, T, heads, size), (*strides, 1), 16)

    def vector(dtype: str | None, size):
        return dtype and stand_in(dtype, (size,), (1,))

    def states(dtype: str | None, outer):
        if dtype is None:
            return None
        shape, inner = (outer, spec.HV, spec.V, spec.K), (spec.V * spec.K, spec.K, 1)
        return stand_in(dtype, shape, (cute.sym_int64(divisibility=4), *inner), 16)

    def workspace(dtype: str, *inner: int):
        strides = tuple(math.prod(inner[i:]) for i in range(len(inner) + 1))
        return stand_in(dtype, (cute.sym_int(), *inner), strides, 16)

    square, split = (spec.HV, spec.V, spec.K), spec.part is Part.SPLIT

    return (
        rows(spec.dtype, spec.H, spec.K),
        rows(spec.dtype, spec.H, spec.K),
        rows(spec.dtype, spec.HV, spec.V),
        rows(spec.g, spec.HV, spec.K),
        stand_in(spec.beta, (B, T, spec.HV), tuple(cute.sym_int64() for _ in range(3))),
        vector(spec.A_log, spec.HV),
        vector(spec.dt_bias, spec.HV * spec.K),
        rows(spec.dtype, spec.HV, spec.V),
        states(spec.h0, cute.sym_int() if spec.pooled else N),
        states(spec.ht, N),
        vector(spec.index, N),
        vector(spec.offsets, cute.sym_int()),
        None if spec.part is Part.WHOLE else workspace("float32", *square),
        workspace("float32", *square) if split else None,
        workspace(spec.dtype, spec.HV, spec.K) if split else None,
        workspace(spec.dtype, spec.HV, spec.K, spec.V) if spec.boundaries else None,
        Float32(0.0),
        Float32(0.0),
        Int32(0),
        Int32(0),
        Int32(0),
        Int32(0),
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
    )
