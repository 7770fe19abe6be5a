"""The host half of the CuTe prefill without a GPU: a stand-in for what the compiler makes, as in `fake_gpu`.

It takes and refuses what the compiled function does, which TVM-FFI checks from the types of `prefill_build._arguments`,
and computes the operation in plain torch: whole sequences, or what is made of segments.
"""

import contextlib
import dataclasses
import itertools

import torch
from fake_gpu import check, on_h100

from kda_kernels.cute import prefill as module
from kda_kernels.cute.prefill_config import CHUNK, Part, PrefillSpec
from kda_kernels.problem import Gate, Options
from kda_kernels.reference import plain_recurrent
from kda_kernels.tensors import Inputs


class FakeFunction:
    """Attributes: spec. calls: how often it ran. workspace: bytes of the last split call's."""

    def __init__(self, spec: PrefillSpec):
        self.spec, self.calls, self.workspace = spec, 0, 0

    def __call__(
        self, q, k, v, g, beta, A_log, dt_bias, o, h0, ht, state_indices, cu_seqlens, summaries, starts, reads, h,
        scale, lower_bound, lead, segment, begin, limit,
    ):  # fmt: skip
        s = self.spec
        B, N = 1 if s.packed else "B", "N" if s.packed else "B"
        state = (s.HV, s.V, s.K)
        split = s.part is Part.SPLIT
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
            ("summaries", summaries, None if s.part is Part.WHOLE else "float32", ("2 units", *state)),
            ("starts", starts, "float32" if split else None, ("N + units", *state)),
            ("reads", reads, s.dtype if split else None, ("rows", s.HV, s.K)),
            ("h", h, s.dtype if s.boundaries else None, ("slots", s.HV, s.K, s.V)),
        ]
        check(arguments, q.device)
        for name, x in (("q", q), ("k", k), ("v", v), ("g", g), ("o", o)):
            bytes_apart = [stride * x.itemsize for stride in x.stride()[:3]]
            assert not x.data_ptr() % 16 and not any(apart % 16 for apart in bytes_apart), f"{name} is not for TMA"
        assert q.shape[1] > 0, "a TMA descriptor of nothing"
        bound = lower_bound if s.gate is Gate.SAFE else None
        options = Options(s.gate, bound, s.beta_is_logit, s.allow_neg_eigval, s.qk_l2norm, scale)
        inputs = Inputs(q, k, v, g, beta, options, A_log, dt_bias, h0, state_indices, cu_seqlens)
        cut = (lead, segment, begin, limit)
        assert all(type(tokens) is int for tokens in cut)
        if split:
            _check_split(sequences(inputs), summaries, starts, reads, *cut)
            self.workspace = sum(x.nbytes for x in (summaries, starts, reads))
        else:
            assert cut == (0, 0, 0, 0)
        self.calls += 1
        if split:
            _run_split(inputs, o, ht, summaries, starts, reads, *cut)
        elif s.part is Part.SUMMARY:
            _run_summary(inputs, summaries)
        else:
            if h is not None:
                _keep_states(inputs, h)
            outputs = plain_recurrent.run(inputs)
            o.copy_(outputs.o)
            if ht is not None:
                ht.copy_(outputs.final_state)


@dataclasses.dataclass(frozen=True)
class Sequence:
    """Tokens first..end of a row; slot: in the state or pool, negative for padding."""

    row: int
    first: int
    end: int
    slot: int


def sequences(inputs: Inputs) -> list[Sequence]:
    B, T = inputs.q.shape[:2]
    if inputs.cu_seqlens is None:
        where = [(row, 0, T) for row in range(B)]
    else:
        where = [(0, *ends) for ends in itertools.pairwise(inputs.cu_seqlens.tolist())]
    slots = range(len(where)) if inputs.state_indices is None else inputs.state_indices.tolist()
    return [Sequence(*tokens, slot) for tokens, slot in zip(where, slots, strict=True)]


def _check_split(found: list[Sequence], summaries, starts, reads, lead, segment, begin, limit) -> None:
    """That the workspaces fit, and that the kernel can go by the other arguments."""
    for x in (summaries, starts, reads):
        assert x.is_contiguous() and x.numel(), "not empty either: a TMA descriptor of nothing"
    units = len(starts) - len(found)
    assert len(summaries) == 2 * units and len(reads) == units * segment
    assert not any(tokens % CHUNK for tokens in (lead, segment, begin, limit)) and begin % limit == 0
    assert 0 < segment <= lead < limit, "a round without units would hand no state on"
    lengths = (min(x.end - x.first - begin, limit) for x in found)
    assert sum(len(range(lead, length, segment)) for length in lengths) <= units, "more units than there is room for"


def _run_split(inputs: Inputs, o, ht, summaries, starts, reads, lead, segment, begin, limit) -> None:
    """One round: first segments to their ends, E and T of the others, and what their tokens read."""
    pool, pooled, found = inputs.state, inputs.state_indices is not None, sequences(inputs)
    unit = 0
    for n, x in enumerate(found):
        end = min(x.end, x.first + begin + limit)
        edges = [x.first + begin, *range(x.first + begin + lead, end, segment), max(end, x.first + begin)]
        units = len(edges) - 2
        if x.slot < 0:
            o[x.row, edges[0] : end] = 0
        elif edges[0] < end or (begin == 0 and not pooled):
            state = starts[n] if begin else torch.zeros_like(starts[n]) if pool is None else pool[x.slot].float()
            o_first, S = _recurrence(inputs, x.row, slice(*edges[:2]), state)
            o[x.row, edges[0] : edges[1]] = o_first
            if units:
                starts[len(found) + unit] = S
            elif pooled or ht is not None:
                final = pool if pooled else ht
                final[x.slot] = S.to(final.dtype)
            for u, at in enumerate(itertools.starmap(slice, itertools.pairwise(edges[1:])), unit):
                o[x.row, at], summaries[2 * u] = _recurrence(inputs, x.row, at, torch.zeros_like(S))
                read, transition = _recurrence(_on_nothing(inputs), x.row, at, _identity(S))
                reads[u * segment : u * segment + len(read)] = read
                upper = transition.bfloat16()
                parts = torch.stack((upper, (transition - upper.float()).bfloat16()), 1)  # [HV, 2, K, K]
                summaries[2 * u + 1].view(torch.bfloat16).view(parts.shape).copy_(parts)
        unit += units


def _keep_states(inputs: Inputs, h) -> None:
    """The state before every second chunk, in slots that leave gaps between packed sequences."""
    for n, x in enumerate(sequences(inputs)):
        rows = -(-inputs.q.shape[1] // (2 * CHUNK))
        slot = n * rows if inputs.cu_seqlens is None else x.first // (2 * CHUNK) + n
        if x.slot < 0:
            continue
        S = torch.zeros(h.shape[1], *h.shape[:1:-1]) if inputs.state is None else inputs.state[x.slot].float()
        for first in range(x.first, x.end, 2 * CHUNK):
            h[slot] = S.mT
            S = _recurrence(inputs, x.row, slice(first, min(first + 2 * CHUNK, x.end)), S)[1]
            slot += 1


def _run_summary(inputs: Inputs, summaries) -> None:
    """E and T of each sequence."""
    nothing = torch.zeros_like(summaries[0])
    for n, x in enumerate(sequences(inputs)):
        if x.slot >= 0:
            at = slice(x.first, x.end)
            summaries[2 * n] = _recurrence(inputs, x.row, at, nothing)[1]
            summaries[2 * n + 1] = _recurrence(_on_nothing(inputs), x.row, at, _identity(nothing))[1]


def _recurrence(inputs: Inputs, row: int, at: slice, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """o [T, HV, V] and the final state [HV, V, K], fp32, of tokens of a row and the state before them, fp32."""
    if at.start == at.stop:
        return inputs.v[row, at], state
    tokens = {name: getattr(inputs, name)[row : row + 1, at] for name in ("q", "k", "v", "g", "beta")}
    one = dataclasses.replace(inputs, **tokens, state=state[None].clone(), state_indices=None, cu_seqlens=None)
    outputs = plain_recurrent.run(one)
    return outputs.o[0], outputs.final_state[0]


def _on_nothing(inputs: Inputs) -> Inputs:
    """Values of zero: with these the identity makes T of itself."""
    return dataclasses.replace(inputs, v=torch.zeros_like(inputs.v))


def _identity(like: torch.Tensor) -> torch.Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype).expand_as(like)


def install(monkeypatch) -> list[FakeFunction]:
    """Makes the prefill believe in an H100; what it has compiled is in the list that comes back."""
    monkeypatch.setattr(module, "on_device", lambda tensor: contextlib.nullcontext())
    return on_h100(monkeypatch, module, FakeFunction)


class OnGpu(torch.Tensor):
    """A CPU tensor that says otherwise."""

    is_cuda = True
