"""The host half of the CuTe prefill without a GPU: a stand-in for what the compiler makes, as in `fake_gpu`.

It takes and refuses what the compiled function does, which TVM-FFI checks from the types of `prefill_build._arguments`,
and computes the operation in plain torch.
"""

import torch
from fake_gpu import _check

from kda_kernels.cute import cache
from kda_kernels.cute import prefill as module
from kda_kernels.cute.prefill_config import PrefillSpec
from kda_kernels.problem import Gate, Options
from kda_kernels.reference import plain_recurrent
from kda_kernels.tensors import Inputs


class FakeFunction:
    """Attributes: spec. calls: how often it ran."""

    def __init__(self, spec: PrefillSpec):
        self.spec, self.calls = spec, 0

    def __call__(self, q, k, v, g, beta, A_log, dt_bias, o, h0, ht, state_indices, cu_seqlens, scale, lower_bound):
        s = self.spec
        B, N = 1 if s.packed else "B", "N" if s.packed else "B"
        state = (s.HV, s.V, s.K)
        arguments = [
            ("q", q, s.dtype, (B, "T", s.H, s.K)),
            ("k", k, s.dtype, (B, "T", s.H, s.K)),
            ("v", v, s.dtype, (B, "T", s.HV, s.V)),
            ("g", g, s.g, (B, "T", s.HV, s.K)),
            ("beta", beta, s.beta, (B, "T", s.HV)),
            ("A_log", A_log, s.A_log, (s.HV,)),
            ("dt_bias", dt_bias, s.dt_bias, (s.HV * s.K,)),
            ("o", o, s.dtype, (B, "T", s.HV, s.V)),
            ("h0", h0, s.h0, ("P" if s.pooled else N, *state)),
            ("ht", ht, s.ht, (N, *state)),
            ("state_indices", state_indices, s.index, (N,)),
            ("cu_seqlens", cu_seqlens, s.offsets, ("offsets",)),
        ]
        sizes: dict[str, int] = {}
        for name, x, dtype, shape in arguments:
            _check(name, x, dtype, shape, sizes, q.device)
        for name, x in (("q", q), ("k", k), ("v", v), ("g", g), ("o", o)):
            bytes_apart = [stride * x.itemsize for stride in x.stride()[:3]]
            assert not x.data_ptr() % 16 and not any(apart % 16 for apart in bytes_apart), f"{name} is not for TMA"
        assert q.shape[1] > 0, "a TMA descriptor of nothing"
        self.calls += 1
        bounded = s.gate is Gate.SAFE
        options = Options(
            s.gate, lower_bound if bounded else None, s.beta_is_logit, s.allow_neg_eigval, s.qk_l2norm, scale
        )
        inputs = Inputs(q, k, v, g, beta, options, A_log, dt_bias, h0, state_indices, cu_seqlens)
        outputs = plain_recurrent.run(inputs)
        o.copy_(outputs.o)
        if ht is not None:
            ht.copy_(outputs.final_state)


def install(monkeypatch) -> list[FakeFunction]:
    """Makes the prefill believe in an H100; what it has compiled is in the list that comes back."""
    made = []

    def build(spec: PrefillSpec, arch: str, options: str = "") -> FakeFunction:
        made.append(FakeFunction(spec))
        return made[-1]

    monkeypatch.setenv("KDA_CACHE_DIR", "")
    monkeypatch.setattr(module, "CACHE", cache.CompileCache())
    monkeypatch.setattr(module, "build", build)
    monkeypatch.setattr(module, "unsupported_here", lambda device=None: None)
    monkeypatch.setattr(module, "architecture", lambda device: "sm_90a")
    return made


class OnGpu(torch.Tensor):
    """A CPU tensor that says otherwise."""

    is_cuda = True
