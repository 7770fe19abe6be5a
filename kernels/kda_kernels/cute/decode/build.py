"""Compiles the decode kernel for a spec: the one place that knows how its arguments look to the DSL."""

from typing import Any

import cutlass.cute as cute
from cutlass import Float32, Int32

from kda_kernels.cute.arguments import DTYPES, stand_in
from kda_kernels.cute.decode.config import DecodeSpec
from kda_kernels.cute.decode.kernel import DecodeKernel


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
    H, P = cute.sym_int(), cute.sym_int()
    HV = H if spec.group == 1 else cute.sym_int()

    def tokens(dtype: str, *shape, contiguous: bool = True):
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
        return stand_in(dtype, (*outer, HV, spec.V, spec.K), (*strides, *inner), align)

    def indices():
        """[N], or more of them; [N, C] where there are accepted tokens."""
        if spec.index is None or (spec.accepted is None and not spec.strided):
            return vector(spec.index, cute.sym_int())
        shape = [cute.sym_int() for _ in range(1 if spec.accepted is None else 2)]
        return stand_in(spec.index, tuple(shape), [cute.sym_int64() for _ in shape])

    def pasts():
        """Slots are contiguous and may lie apart."""
        if not spec.taps:
            return None
        L = cute.sym_int()
        inner = (L, channels) if spec.tokens_first else (channels, L)
        return stand_in(spec.past, (cute.sym_int(), *inner), (cute.sym_int64(), cute.sym_int64(), 1))

    def taps():
        if not spec.taps:
            return None
        align = spec.taps * DTYPES[spec.taps_dtype].width // 8 if spec.wide else None
        return stand_in(spec.taps_dtype, (channels, spec.taps), (spec.taps, 1), align)

    channels = cute.sym_int()
    rows = (B, T) if spec.token_rows is None else (cute.sym_int(), cute.sym_int())
    return (
        tokens(spec.dtype, H, spec.K),
        tokens(spec.dtype, H, spec.K),
        tokens(spec.dtype, HV, spec.V),
        tokens(spec.g, HV, spec.K),
        tokens(spec.beta, HV, contiguous=False),
        vector(spec.A_log, HV),
        vector(spec.dt_bias, cute.sym_int()),
        tokens(spec.dtype, HV, spec.V),
        states(spec.h0, P if spec.pooled else N),
        states(spec.ht, N),
        indices(),
        vector(spec.offsets, cute.sym_int()),
        states(spec.token_states, *rows),
        vector(spec.accepted, N),
        vector(spec.token_rows, N),
        vector("bool" if spec.fresh else None, N),
        taps(),
        vector(spec.taps_bias, channels),
        pasts(),
        stand_in(spec.past_index, (cute.sym_int(),), (cute.sym_int64(),)) if spec.past_index else None,
        vector(spec.norm, spec.V),
        tokens(spec.norm_gate, HV, spec.V) if spec.norm_gate else None,
        stand_in("float32", (P, HV, spec.V), (cute.sym_int64(), spec.V, 1)) if spec.h0 == "int16" else None,
        vector("int64" if spec.stochastic else None, 1),
        Int32(0),
        Float32(0.0),
        Float32(0.0),
        Float32(0.0) if spec.norm else None,
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
    )
