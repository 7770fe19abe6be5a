"""Compiles the prefill kernel for a spec: the one place that knows how its arguments look to the DSL."""

from typing import Any

import cutlass.cute as cute
from cutlass import Float32, Int32

from kda_kernels.cute.arguments import DTYPES, stand_in
from kda_kernels.cute.prefill.config import Part, PrefillSpec
from kda_kernels.cute.prefill.join import JoinKernel
from kda_kernels.cute.prefill.kernel import PrefillKernel


def compile_prefill(spec: PrefillSpec, arch: str, options: str = "") -> Any:
    """What `cute.compile` returns: called with torch tensors in the order of `PrefillKernel.__call__`.

    Args:
        arch: the DSL's name of an architecture; no GPU has to be there.
        options: further options of the compiler.
    """
    kernel = JoinKernel(spec) if spec.part is Part.JOIN else PrefillKernel(spec)
    return cute.compile(kernel, *_arguments(spec), options=f"--enable-tvm-ffi --gpu-arch {arch} {options}")


def _arguments(spec: PrefillSpec) -> tuple:
    """Stand-ins for the tensors: dtypes, which sizes are equal, and what strides are known to be."""
    B = 1 if spec.packed else cute.sym_int()
    T = cute.sym_int()
    N = cute.sym_int() if spec.packed else B
    H = cute.sym_int()
    HV = H if spec.group == 1 else cute.sym_int()

    def rows(dtype: str, heads, size: int):
        """Rows of 16-byte pieces anywhere."""
        strides = [cute.sym_int64(divisibility=128 // DTYPES[dtype].width) for _ in range(3)]
        return stand_in(dtype, (B, T, heads, size), (*strides, 1), 16)

    def vector(dtype: str | None, size):
        return dtype and stand_in(dtype, (size,), (1,))

    def states(dtype: str | None, outer):
        if dtype is None:
            return None
        shape, inner = (outer, HV, spec.V, spec.K), (spec.V * spec.K, spec.K, 1)
        return stand_in(dtype, shape, (cute.sym_int64(divisibility=128 // DTYPES[dtype].width), *inner), 16)

    def table(dtype: str | None):
        """[N, C]."""
        return dtype and stand_in(dtype, (N, C), (cute.sym_int64(), 1))

    C = cute.sym_int()
    offsets_of = None if spec.every else spec.rows
    return (
        rows(spec.dtype, H, spec.K),
        rows(spec.dtype, H, spec.K),
        rows(spec.dtype, HV, spec.V),
        rows(spec.g, HV, spec.K),
        stand_in(spec.beta, (B, T, HV), tuple(cute.sym_int64() for _ in range(3))),
        vector(spec.A_log, HV),
        vector(spec.dt_bias, cute.sym_int()),
        rows(spec.dtype, HV, spec.V),
        states(spec.h0, cute.sym_int() if spec.pooled else N),
        states(spec.ht, N),
        spec.index and stand_in(spec.index, (cute.sym_int(),), (cute.sym_int64(),)),
        vector(spec.offsets, cute.sym_int()),
        vector("bool" if spec.fresh else None, N),
        None if spec.part is Part.WHOLE else stand_in("float32", (cute.sym_int(),), (1,), 16),
        states(spec.kept, cute.sym_int()),
        table(spec.rows),
        table(offsets_of),
        *(Int32(0) for _ in ("null_slot", "every", "units")),
        *(Float32(0.0) for _ in ("scale", "lower_bound")),
        *(Int32(0) for _ in ("lead", "segment", "begin", "limit", "sms")),
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
    )
