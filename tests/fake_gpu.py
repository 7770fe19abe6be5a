"""The host half of the CuTe decode kernel without a GPU: a stand-in for what the compiler makes.

`FakeFunction` takes and refuses what the compiled function does, which TVM-FFI checks from the types of
`decode/build._arguments`, and computes the operation in plain torch.
"""

import dataclasses
import itertools
from collections.abc import Callable
from types import ModuleType

import torch

from kda_kernels.cute import cache
from kda_kernels.cute.decode import host as module
from kda_kernels.cute.decode.config import DecodeSpec
from kda_kernels.errors import InputError
from kda_kernels.problem import Gate, Options
from kda_kernels.reference import plain_recurrent
from kda_kernels.tensors import Convolution, GatedNorm, Inputs


class FakeFunction:
    """Attributes: spec. calls: how often it ran."""

    def __init__(self, spec: DecodeSpec):
        self.spec, self.calls = spec, 0

    def __call__(
        self, q, k, v, g, beta, A_log, dt_bias, o, h0, ht, indices, offsets, token_states, accepted, token_rows,
        started, taps, taps_bias, past_states, past_indices, norm_weight, norm_gate, state_scales, seed,
        null_slot, scale, bound, eps,
    ):  # fmt: skip
        s, activation = self.spec, self.spec.dtype
        B, T, N = 1 if s.packed else "B", 1 if s.one_token else "T", "N" if s.packed else "B"
        H, HV = "H", "H" if s.group == 1 else "HV"
        state = (HV, s.V, s.K)
        arguments = [
            ("q", q, activation, (B, T, H, s.K)),
            ("k", k, activation, (B, T, H, s.K)),
            ("v", v, activation, (B, T, HV, s.V)),
            ("g", g, s.g, (B, T, HV, s.K)),
            ("beta", beta, s.beta, (B, T, HV)),
            ("A_log", A_log, s.A_log, (HV,)),
            ("dt_bias", dt_bias, s.dt_bias, ("channels",)),
            ("o", o, activation, (B, T, HV, s.V)),
            ("h0", h0, s.h0, ("P" if s.pooled else N, *state)),
            ("ht", ht, s.ht, (N, *state)),
            ("state_indices", indices, s.index, ("indices",) if s.accepted is None else ("indices", "C")),
            ("cu_seqlens", offsets, s.offsets, ("offsets",)),
            ("token_states", token_states, s.token_states, (*((B, T) if s.token_rows is None else "RS"), *state)),
            ("num_accepted_tokens", accepted, s.accepted, (N,)),
            ("token_state_indices", token_rows, s.token_rows, (N,)),
            ("has_initial_state", started, "bool" if s.fresh else None, (N,)),
            ("taps", taps, s.taps_dtype, ("D", s.taps)),
            ("taps_bias", taps_bias, s.taps_bias, ("D",)),
            ("past_states", past_states, s.past, ("slots", "L", "D") if s.tokens_first else ("slots", "D", "L")),
            ("past_indices", past_indices, s.past_index, ("past indices",)),
            ("norm_weight", norm_weight, s.norm, (s.V,)),
            ("norm_gate", norm_gate, s.norm_gate, (B, T, HV, s.V)),
            ("state_scales", state_scales, "float32" if s.h0 == "int16" else None, ("P", HV, s.V)),
            ("seed", seed, "int64" if s.stochastic else None, (1,)),
        ]
        check(arguments, q.device)
        self.calls += 1
        options = Options(
            s.gate, bound if s.gate is Gate.SAFE else None, s.beta_is_logit, s.allow_neg_eigval, s.qk_l2norm, scale
        )
        null = None if null_slot < 0 else null_slot
        inputs = Inputs(
            q, k, v, g, beta, options, A_log, dt_bias, h0, indices, offsets, null_slot=null,
            has_initial_state=started, num_accepted_tokens=accepted, update_state=s.update, token_states=token_states,
            token_state_indices=token_rows,
            conv=Convolution(taps, taps_bias, past_states, past_indices, s.tokens_first) if s.taps else None,
            norm=GatedNorm(norm_gate, norm_weight, eps) if s.norm else None, state_scales=state_scales,
            rounding_seed=seed,
        )  # fmt: skip
        if token_states is not None and token_rows is None:  # which the reference does not write
            inputs = dataclasses.replace(inputs, token_states=None)
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
    inner = (
        3
        if name in ("h0", "ht", "h_kept", "token_states")
        else 2
        if name == "state_scales"
        else 0
        if name in ("beta", "state_indices", "past_indices")
        else 1
    )
    expected = list(itertools.accumulate((1, *x.shape[:0:-1]), lambda a, b: a * b))
    for i in range(1, inner + 1):
        if x.shape[-i] != 1 and x.stride(-i) != expected[i - 1]:
            raise ValueError(f"Mismatched {name}.strides, expected {expected[i - 1]}")
    if inner == 3 and (x.data_ptr() % 16 or any(stride * x.itemsize % 16 for stride in x.stride()[:-3])):
        raise ValueError(f"Misaligned Tensor data on argument {name}")


def install(monkeypatch) -> list[FakeFunction]:
    """Makes the decode kernel believe in an H100; what it has compiled is in the list that comes back."""
    monkeypatch.setattr(module, "_last", module._Last())
    return on_h100(monkeypatch, FakeFunction, module)


def on_h100(monkeypatch, function: Callable, *host: ModuleType) -> list:
    """Makes the modules of a kernel's host half believe in an H100 and take `function(spec)` for what it compiles."""
    made = []

    def build(spec, arch: str, options: str = ""):
        made.append(function(spec))
        return made[-1]

    monkeypatch.setenv("KDA_CACHE_DIR", "")
    believed = {
        "CACHE": cache.CompileCache(),
        "build": build,
        "unsupported_here": lambda device=None: None,
        "architecture": lambda device: "sm_90a",
        "multiprocessors": lambda device: 132,
    }
    for name, value in believed.items():
        having = [one for one in host if hasattr(one, name)]
        assert having, name
        for one in having:
            monkeypatch.setattr(one, name, value)
    return made
