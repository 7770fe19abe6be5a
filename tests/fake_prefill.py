"""The host half of the CuTe prefill without a GPU: a stand-in for what the compiler makes, as in `fake_gpu`.

It takes and refuses what the compiled function does, which TVM-FFI checks from the types of `prefill/build._arguments`,
and computes the operation in plain torch: whole sequences, or what is made of segments.
"""

import contextlib
import dataclasses
import itertools

import torch
from fake_gpu import check, on_h100

from kda_kernels.cute.prefill import functions as prefill_functions
from kda_kernels.cute.prefill import host as module
from kda_kernels.cute.prefill.config import CHUNK, Part, PrefillSpec
from kda_kernels.problem import Gate, Options
from kda_kernels.reference import plain_recurrent
from kda_kernels.tensors import Checkpoints, Inputs
from kda_kernels.triton import segment_outputs, segment_scan


class FakeFunction:
    """Attributes: spec. calls: how often it ran. workspace: bytes of the last split call's."""

    def __init__(self, spec: PrefillSpec):
        self.spec, self.calls, self.workspace = spec, 0, 0

    def __call__(
        self, q, k, v, g, beta, A_log, dt_bias, o, h0, ht, state_indices, cu_seqlens, started, workspace, kept, rows,
        offsets, null_slot, every, units, scale, lower_bound, lead, segment, begin, limit, sms,
    ):  # fmt: skip
        s = self.spec
        B, N = 1 if s.packed else "B", "N" if s.packed else "B"
        H, HV = "H", "H" if s.group == 1 else "HV"
        state = (HV, s.V, s.K)
        arguments = [
            ("q", q, s.dtype, (B, "T", H, s.K)),
            ("k", k, s.dtype, (B, "T", H, s.K)),
            ("v", v, s.dtype, (B, "T", HV, s.V)),
            ("g", g, s.g, (B, "T", HV, s.K)),
            ("beta", beta, s.beta, (B, "T", HV)),
            ("A_log", A_log, s.A_log, (HV,)),
            ("dt_bias", dt_bias, s.dt_bias, ("channels",)),
            ("o", o, s.dtype, (B, "T", HV, s.V)),
            ("h0", h0, s.h0, ("P" if s.pooled else N, *state)),
            ("ht", ht, s.ht, (N, *state)),
            ("state_indices", state_indices, s.index, ("indices",)),
            ("cu_seqlens", cu_seqlens, s.offsets, ("offsets",)),
            ("has_initial_state", started, "bool" if s.fresh else None, (N,)),
            ("workspace", workspace, None if s.part is Part.WHOLE else "float32", ("floats",)),
            ("h_kept", kept, s.kept, ("R", *state)),
            ("rows", rows, s.rows, (N, "C")),
            ("offsets", offsets, None if s.every else s.rows, (N, "C")),
        ]
        check(arguments, q.device)
        for name, x in (("q", q), ("k", k), ("v", v), ("g", g), ("o", o)):
            bytes_apart = [stride * x.itemsize for stride in x.stride()[:3]]
            assert not x.data_ptr() % 16 and not any(apart % 16 for apart in bytes_apart), f"{name} is not for TMA"
        assert q.shape[1] > 0, "a TMA descriptor of nothing"
        bound = lower_bound if s.gate is Gate.SAFE else None
        options = Options(s.gate, bound, s.beta_is_logit, s.allow_neg_eigval, s.qk_l2norm, scale)
        null = None if null_slot < 0 else null_slot
        inputs = Inputs(q, k, v, g, beta, options, A_log, dt_bias, h0, state_indices, cu_seqlens, null_slot=null)
        inputs.has_initial_state = started
        if kept is not None:
            inputs.checkpoints = Checkpoints(kept, rows, offsets, every if s.every else None)
        found, cut = sequences(inputs), (lead, segment, begin, limit)
        assert all(type(tokens) is int for tokens in cut)
        self.calls += 1
        if s.part is Part.SUMMARY:
            _run_summary(inputs, workspace.view(2 * len(found), *v.shape[2:], s.K))
            return
        if s.part.whole:
            assert (units, *cut) == (0, 0, 0, 0, 0)
            cut = (max(x.end for x in found) + 1, 1, 0, 1 << 30)  # a first segment that holds any sequence
        sizes = (len(found) + units, 2 * units, units * segment // 2)
        square = v.shape[2] * s.V * s.K
        if not s.part.whole:
            self.workspace = workspace.nbytes
            assert workspace.data_ptr() % 16 == 0
        parts = [torch.empty(0)] * 3
        if not s.part.whole:
            lengths = [sizes[0] * square, sizes[1] * square, sizes[2] * v.shape[2] * s.K]
            parts = workspace[: sum(lengths)].split(lengths)
        if s.stays:
            assert 0 < sms < v.shape[2] * len(found), "a CTA each"
            assert workspace.nbytes >= 4 and workspace.view(torch.int32)[0] == 0, "the counter"
        starts = parts[0].view(-1, *v.shape[2:], s.K)
        if s.part is Part.JOIN:
            assert sms > 0, "it chooses by them who makes the final state"
            final = ht if state_indices is None else h0
            joined = segment_scan.Segments(
                workspace, final, state_indices, cu_seqlens, len(found), units, null, lead, segment, begin, limit
            )
            segment_scan.scan_segments(joined, q.shape[1], v.shape[2])
            segment_outputs.add_segment_outputs(joined, o)
            return
        if s.part is Part.KEPT:
            _keep_in_units(inputs, starts[len(found) :], *cut)
            return
        summaries, reads = parts[1].view(-1, *v.shape[2:], s.K), parts[2].view(q.dtype).view(-1, v.shape[2], s.K)
        if s.part.splits:
            _check_split(found, units, *cut)
        _run(inputs, o, ht, summaries, starts, reads, *cut)


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
    slots = list(range(len(where))) if inputs.state_indices is None else inputs.state_indices.tolist()[: len(where)]
    return [
        Sequence(*tokens, -1 if slot == inputs.null_slot else slot) for tokens, slot in zip(where, slots, strict=True)
    ]


def _check_split(found: list[Sequence], units: int, lead, segment, begin, limit) -> None:
    """That the workspace fits, and that the kernel can go by the other arguments."""
    assert units, "a TMA descriptor of nothing"
    assert not any(tokens % CHUNK for tokens in (lead, segment, begin, limit)) and begin % limit == 0
    assert segment > 0 and 0 <= lead < limit, "a round without units would hand no state on"
    lengths = (min(x.end - x.first - begin, limit) for x in found)
    assert sum(len(range(lead, length, segment)) for length in lengths) <= units, "more units than there is room for"


def _run(inputs: Inputs, o, ht, summaries, starts, reads, lead, segment, begin, limit) -> None:
    """One round: first segments to their ends, E and T of the others, and what their tokens read."""
    pool, pooled, found = inputs.state, inputs.state_indices is not None, sequences(inputs)
    unit = 0
    if begin == 0 and inputs.cu_seqlens is not None:
        o[0, found[-1].end :] = 0
    for n, x in enumerate(found):
        end = min(x.end, x.first + begin + limit)
        edges = [x.first + begin, *range(x.first + begin + lead, end, segment), max(end, x.first + begin)]
        units = len(edges) - 2
        lost = pooled and x.slot >= len(pool)
        if x.slot < 0 or lost:
            o[x.row, edges[0] : end] = float("nan") if lost else 0
        elif edges[0] < end or (begin == 0 and not pooled):
            nothing = torch.zeros(*inputs.v.shape[2:], inputs.q.shape[3])
            comes = pool is not None and (inputs.has_initial_state is None or inputs.has_initial_state[n])
            state = starts[n] if begin else pool[x.slot].float() if comes else nothing
            o_first, S = _recurrence(inputs, x.row, slice(*edges[:2]), state)
            _keep(inputs, n, x, edges[0], edges[1], state)
            o[x.row, edges[0] : edges[1]] = o_first
            final = pool if pooled else ht
            if not units and final is not None:
                final[x.slot] = S.to(final.dtype)
            elif units and (edges[0] < edges[1] or not pooled):  # of a pool, no tokens hand no state on
                starts[len(found) + unit] = S
            for u, at in enumerate(itertools.starmap(slice, itertools.pairwise(edges[1:])), unit):
                o[x.row, at], summaries[2 * u] = _recurrence(inputs, x.row, at, torch.zeros_like(S))
                read, transition = _recurrence(_on_nothing(inputs), x.row, at, _identity(S))
                reads[u * segment : u * segment + len(read)] = read
                upper = transition.bfloat16()
                parts = torch.stack((upper, (transition - upper.float()).bfloat16()), 1)  # [HV, 2, K, K]
                summaries[2 * u + 1].view(torch.bfloat16).view(parts.shape).copy_(parts)
        unit += units


def _keep(inputs: Inputs, n: int, x: Sequence, first: int, end: int, state: torch.Tensor) -> None:
    """The checkpoints of a sequence behind `first` and up to `end`, `state` being that before `first`."""
    if (kept := inputs.checkpoints) is None:
        return
    for column, row in enumerate(kept.rows[n].tolist()):
        at = (column + 1) * kept.every if kept.offsets is None else int(kept.offsets[n, column])
        if not (0 <= row < len(kept.states) and first - x.first < at <= end - x.first):
            continue
        S = _recurrence(inputs, x.row, slice(first, x.first + at), state)[1]
        kept.states[row] = S.to(kept.states.dtype) if at % (2 * CHUNK) == 0 else float("nan")


def _keep_in_units(inputs: Inputs, starts: torch.Tensor, lead, segment, begin, limit) -> None:
    """The checkpoints inside of units, from the states before these."""
    unit = 0
    for n, x in enumerate(sequences(inputs)):
        end = min(x.end, x.first + begin + limit)
        for at in range(x.first + begin + lead, end, segment):
            if 0 <= x.slot < (x.slot + 1 if inputs.state_indices is None else len(inputs.state)):
                _keep(inputs, n, x, at, min(at + segment, end), starts[unit])
            unit += 1


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
    features = {"null_slot": None, "has_initial_state": None, "checkpoints": None, "state_indices": None}
    one = dataclasses.replace(inputs, **tokens, **features, state=state[None].clone(), cu_seqlens=None)
    outputs = plain_recurrent.run(one)
    return outputs.o[0], outputs.final_state[0]


def _on_nothing(inputs: Inputs) -> Inputs:
    """Values of zero: with these the identity makes T of itself."""
    return dataclasses.replace(inputs, v=torch.zeros_like(inputs.v))


def _identity(like: torch.Tensor) -> torch.Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype).expand_as(like)


def install(monkeypatch) -> list[FakeFunction]:
    """Makes the prefill believe in an H100; what it has compiled is in the list that comes back."""
    monkeypatch.setattr(segment_scan, "BV", 128)  # the interpreter takes as long for a small program as for a large one
    monkeypatch.setattr(module, "_last", module._Last())
    monkeypatch.setattr(module, "on_device", lambda tensor: contextlib.nullcontext())
    return on_h100(monkeypatch, FakeFunction, module, prefill_functions)


class OnGpu(torch.Tensor):
    """A CPU tensor that says otherwise."""

    is_cuda = True
