"""The host half of the CuTe prefill without a GPU: a stand-in for what the compiler makes, as in `fake_gpu`.

It takes and refuses what the compiled function does, which TVM-FFI checks from the types of `prefill_build._arguments`,
and computes the operation in plain torch: whole sequences, or what is made of segments.
"""

import contextlib
import dataclasses
import itertools

import torch
from fake_gpu import _check

from kda_kernels.cute import cache
from kda_kernels.cute import prefill as module
from kda_kernels.cute.prefill_config import CHUNK, Part, PrefillSpec
from kda_kernels.problem import Gate, Options
from kda_kernels.reference import plain_recurrent
from kda_kernels.tensors import Inputs


class FakeFunction:
    """Attributes: spec. calls: how often it ran."""

    def __init__(self, spec: PrefillSpec):
        self.spec, self.calls = spec, 0

    def __call__(
        self, q, k, v, g, beta, A_log, dt_bias, o, h0, ht, state_indices, cu_seqlens, segments, scale, lower_bound,
        segment, skip_last,
    ):  # fmt: skip
        s = self.spec
        B, N = 1 if s.packed else "B", "N" if s.packed else "B"
        state = (s.HV, s.V, s.K)
        whole = s.part is Part.WHOLE
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
            ("segments", segments, None if whole else "float32", ("units", *state)),
        ]
        sizes: dict[str, int] = {}
        for name, x, dtype, shape in arguments:
            _check(name, x, dtype, shape, sizes, q.device)
        for name, x in (("q", q), ("k", k), ("v", v), ("g", g), ("o", o)):
            bytes_apart = [stride * x.itemsize for stride in x.stride()[:3]]
            assert not x.data_ptr() % 16 and not any(apart % 16 for apart in bytes_apart), f"{name} is not for TMA"
        assert type(segment) is type(skip_last) is int and segment % CHUNK == 0 and whole == (segment == 0)
        assert q.shape[1] > 0, "a TMA descriptor of nothing"
        self.calls += 1
        bound = lower_bound if s.gate is Gate.SAFE else None
        options = Options(s.gate, bound, s.beta_is_logit, s.allow_neg_eigval, s.qk_l2norm, scale)
        inputs = Inputs(q, k, v, g, beta, options, A_log, dt_bias, h0, state_indices, cu_seqlens)
        if not whole:
            _run_segments(s.part, inputs, o, ht, segments, segment, skip_last)
            return
        outputs = plain_recurrent.run(inputs)
        o.copy_(outputs.o)
        if ht is not None:
            ht.copy_(outputs.final_state)


def _run_segments(part: Part, inputs: Inputs, o, ht, segments, segment: int, skip_last: int) -> None:
    """E and T of each segment into `segments`, or each segment from its state there."""
    indices, pool = inputs.state_indices, inputs.state
    N = len(inputs.q) if inputs.cu_seqlens is None else len(inputs.cu_seqlens) - 1
    ends = [0, *itertools.repeat(inputs.q.shape[1], N)] if inputs.cu_seqlens is None else inputs.cu_seqlens.tolist()
    unit = 0
    for n in range(N):
        row, first, end = (n, 0, ends[1]) if inputs.cu_seqlens is None else (0, ends[n], ends[n + 1])
        slot = n if indices is None else int(indices[n])
        starts = range(first, max(end, first + 1), segment)
        for start in starts:
            last, at = start == starts[-1], slice(start, min(start + segment, end))
            tokens = {name: getattr(inputs, name)[row : row + 1, at] for name in ("q", "k", "v", "g", "beta")}
            one = dataclasses.replace(inputs, **tokens, state_indices=None, cu_seqlens=None)
            if slot < 0:
                o[row, at] = 0
            elif part is Part.SEGMENTS:
                out = plain_recurrent.run(dataclasses.replace(one, state=segments[unit : unit + 1]))
                o[row, at] = out.o[0]
                if last and (ht is not None or (indices is not None and end > first)):
                    (ht if indices is None else pool)[slot] = out.final_state[0].to((pool if ht is None else ht).dtype)
            elif not (skip_last and last):
                for kind, state in enumerate((torch.zeros(128, 128), torch.eye(128))):
                    v = one.v if kind == 0 else torch.zeros_like(one.v)
                    state = state.expand(1, segments.shape[1], 128, 128).contiguous()
                    out = plain_recurrent.run(dataclasses.replace(one, v=v, state=state))
                    segments[2 * unit + kind] = out.final_state[0]
            unit += 1
    assert unit * (1 + (part is Part.SUMMARY)) <= len(segments)


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
    monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(module, "on_device", lambda tensor: contextlib.nullcontext())
    return made


class OnGpu(torch.Tensor):
    """A CPU tensor that says otherwise."""

    is_cuda = True
