"""The host half of the CuTe decode kernel without a GPU: a stand-in for what the compiler makes.

`FakeFunction` takes and refuses what the compiled function does, which TVM-FFI checks from the types of
`decode_build._arguments`, and computes the operation in plain torch.
"""

import itertools
from collections.abc import Callable

import torch

from kda_kernels.cute import cache
from kda_kernels.cute import decode as module
from kda_kernels.cute.decode_config import DecodeSpec
from kda_kernels.errors import InputError
from kda_kernels.problem import Gate, Options
from kda_kernels.reference import plain_recurrent
from kda_kernels.tensors import Inputs


class FakeFunction:
    """Attributes: spec. calls: how often it ran."""

    def __init__(self, spec: DecodeSpec):
        self.spec, self.calls = spec, 0

    def __call__(self, q, k, v, g, beta, A_log, dt_bias, o, h0, ht, indices, offsets, token_states, scale, bound):
        s, activation = self.spec, self.spec.dtype
        B, T, N = 1 if s.packed else "B", 1 if s.one_token else "T", "N" if s.packed else "B"
        state = (s.HV, s.V, s.K)
        arguments = [
            ("q", q, activation, (B, T, s.H, s.K)),
            ("k", k, activation, (B, T, s.H, s.K)),
            ("v", v, activation, (B, T, s.HV, s.V)),
            ("g", g, s.g, (B, T, s.HV, s.K)),
            ("beta", beta, s.beta, (B, T, s.HV)),
            ("A_log", A_log, s.A_log, (s.HV,)),
            ("dt_bias", dt_bias, s.dt_bias, (s.HV * s.K,)),
            ("o", o, activation, (B, T, s.HV, s.V)),
            ("h0", h0, s.h0, ("P" if s.pooled else N, *state)),
            ("ht", ht, s.ht, (N, *state)),
            ("state_indices", indices, s.index, (N,)),
            ("cu_seqlens", offsets, s.offsets, ("offsets",)),
            ("token_states", token_states, s.token_states, (B, T, *state)),
        ]
        check(arguments, q.device)
        self.calls += 1
        options = Options(
            s.gate, bound if s.gate is Gate.SAFE else None, s.beta_is_logit, s.allow_neg_eigval, s.qk_l2norm, scale
        )
        inputs = Inputs(q, k, v, g, beta, options, A_log, dt_bias, h0, indices, offsets)
        try:
            outputs = plain_recurrent.run(inputs)
        except InputError as error:
            raise AssertionError(f"a GPU would have run this: {error}") from error
        o.copy_(outputs.o)
        if ht is not None:
            ht.copy_(outputs.final_state)


def check(arguments: list[tuple], device: torch.device) -> None:
    """Refuses (name, tensor, dtype, shape) as the compiled function would; names in shapes stand for one size each."""
    sizes: dict[str, int] = {}
    for name, x, dtype, shape in arguments:
        _check(name, x, dtype, shape, sizes, device)


def _check(name: str, x, dtype: str | None, shape: tuple, sizes: dict[str, int], device: torch.device) -> None:
    """Raises TypeError or ValueError, as TVM-FFI does, unless `x` is what the function was compiled for."""
    if dtype is None:
        if x is not None:
            raise TypeError(f"Mismatched type on argument {name}, expected None")
        return
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"Mismatched type on argument {name}, expected Tensor")
    if x.device != device or x.dtype is not getattr(torch, dtype) or x.ndim != len(shape):
        raise ValueError(f"Mismatched Tensor on argument {name}, expected {dtype} of {len(shape)} dimensions")
    for have, want in zip(x.shape, shape, strict=True):
        if have != (sizes.setdefault(want, have) if isinstance(want, str) else want):
            raise ValueError(f"Mismatched {name}.shape, expected {want}")
    # contiguous within the heads of a state; q, k, v, g, o and vectors in their last dimension; beta anywhere
    inner = 3 if name in ("h0", "ht", "token_states") else 0 if name == "beta" else 1
    expected = list(itertools.accumulate((1, *x.shape[:0:-1]), lambda a, b: a * b))
    for i in range(1, inner + 1):
        if x.shape[-i] != 1 and x.stride(-i) != expected[i - 1]:
            raise ValueError(f"Mismatched {name}.strides, expected {expected[i - 1]}")
    if inner == 3 and (x.data_ptr() % 16 or any(stride * x.itemsize % 16 for stride in x.stride()[:-3])):
        raise ValueError(f"Misaligned Tensor data on argument {name}")


def install(monkeypatch) -> list[FakeFunction]:
    """Makes the decode kernel believe in an H100; what it has compiled is in the list that comes back."""
    monkeypatch.setattr(module, "_last", (None, None, 0.0, 0.0))
    return on_h100(monkeypatch, module, FakeFunction)


def on_h100(monkeypatch, host, function: Callable) -> list:
    """Makes `host`, a kernel's host half, believe in an H100 and take `function(spec)` for what its compiler makes."""
    made = []

    def build(spec, arch: str, options: str = ""):
        made.append(function(spec))
        return made[-1]

    monkeypatch.setenv("KDA_CACHE_DIR", "")
    monkeypatch.setattr(host, "CACHE", cache.CompileCache())
    monkeypatch.setattr(host, "build", build)
    monkeypatch.setattr(host, "unsupported_here", lambda device=None: None)
    monkeypatch.setattr(host, "architecture", lambda device: "sm_90a")
    monkeypatch.setattr(host, "multiprocessors", lambda device: 132)
    return made
