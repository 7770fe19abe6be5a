"""The fp64 truth, and a plain implementation's errors, a stretch of tokens at a time: memory is bounded, length is not.

The same arithmetic as `kdacli.judge.baseline`, with the state carried from stretch to stretch in full precision.
"""

import dataclasses
from collections.abc import Iterator

import torch

from kda_kernels.problem import CHUNK, Op
from kda_kernels.reference.batch import prepare
from kda_kernels.reference.chunked import chunk_recurrence
from kda_kernels.reference.gate import L2NORM_EPS
from kda_kernels.reference.recurrent import token_recurrence
from kda_kernels.reference.rounding import operand_rounding
from kda_kernels.tensors import Inputs
from kdacli.comparison.layout import Layout, Stretch, stack, state_of
from kdacli.judge.baseline import expect, operand_dtype, plain

_TOKENS = ("q", "k", "v", "g", "beta")


@dataclasses.dataclass
class Truth:
    """What a group of stretches should give.

    Attributes:
        group: the stretches, in order.
        o, plain_o: [R, HV, C] of their tokens in fp64, exact and as a plain implementation has it.
        states, plain_states: {sequence: [HV, V, K] in fp64} of those that end in this group.
    """

    group: list[Stretch]
    o: torch.Tensor
    plain_o: torch.Tensor
    states: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    plain_states: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)


class Walk:
    """The truth of one call: iterate it, once, for the groups in order.

    Args:
        inputs: on the CPU, perhaps mapped from a file; not modified.
        device: where to compute.

    Attributes:
        usual: float64 [sequences, HV], once all groups were seen: how large o of each (sequence, head) is where nothing
            cancels, ||scale q|| ||S|| / sqrt(K), as `kdacli.judge` has it. None for the op `gate`.

    Raises:
        InputError: see `check_inputs`.
    """

    def __init__(self, inputs: Inputs, op: Op, device: str) -> None:
        self.inputs, self.op, self.device = inputs, op, device
        self.layout = Layout.of(inputs)
        d = self.layout.dims
        self._squares, self._states = (torch.zeros(d.N, d.HV, dtype=torch.float64) for _ in range(2))

    def __iter__(self) -> Iterator[Truth]:
        for truth in _walk(self.inputs, self.op, self.device, self.layout):
            if self.op is not Op.GATE:
                self._measure(truth)
            yield truth

    @property
    def usual(self) -> torch.Tensor | None:
        if self.op is Op.GATE:
            return None
        scale, K = self.inputs.scale, self.layout.dims.K
        return abs(scale) * self._squares.sqrt() * self._states / K**0.5

    def _measure(self, truth: Truth) -> None:
        d, inputs = self.layout.dims, self.inputs
        q = stack(self.layout, inputs.q, truth.group).to(self.device).double().square().sum(-1)
        if inputs.options.qk_l2norm:
            q = q / (q + L2NORM_EPS)
        owner = torch.cat([torch.full((s.stop - s.start,), s.sequence) for s in truth.group])
        self._squares.index_add_(0, owner, q.repeat_interleave(d.HV // d.H, dim=1).cpu())
        for n, state in truth.states.items():
            norm = state.flatten(1).norm(dim=-1).cpu()
            if inputs.state is not None:
                pooled = inputs.state_indices is not None
                held = state_of(inputs.state, self.layout, n, pooled=pooled, v_first=inputs.state_v_first)
                norm = torch.maximum(norm, held.to(self.device).double().flatten(1).norm(dim=-1).cpu())
            self._states[n] = norm


@torch.no_grad()
def _walk(inputs: Inputs, op: Op, device: str, layout: Layout) -> Iterator[Truth]:
    params = {name: t.to(device) for name in ("A_log", "dt_bias") if (t := getattr(inputs, name)) is not None}
    carried: tuple[torch.Tensor, torch.Tensor] | None = None
    for group in layout.groups():
        lens = [s.stop - s.start for s in group]
        tokens = {name: stack(layout, getattr(inputs, name), group).to(device).unsqueeze(0) for name in _TOKENS}
        cu_seqlens = torch.tensor([0, *lens], dtype=torch.int64).cumsum(0).to(device)
        small = Inputs(**tokens, options=inputs.options, cu_seqlens=cu_seqlens, **params)
        if op is Op.GATE:
            yield Truth(group, expect(small, op).o.flatten(0, 1), plain(small, op).o.flatten(0, 1).double())
            continue
        if group[0].start == 0:
            carried = _states(inputs, layout, group, device)
        exact, plainly = carried
        o = _run(small, op, exact, exact=True)
        plain_o = _run(small, op, plainly, exact=False)
        live = torch.tensor([layout.slots[s.sequence] >= 0 for s in group], device=device)
        rows = live.repeat_interleave(torch.tensor(lens, device=device)).view(-1, 1, 1)
        truth = Truth(group, torch.where(rows, o, 0.0), torch.where(rows, plain_o.to(inputs.v.dtype).double(), 0.0))
        dtype = torch.float32 if inputs.state is None else inputs.state.dtype
        for i, s in enumerate(group):
            if s.stop == layout.lens[s.sequence] and layout.slots[s.sequence] >= 0:
                truth.states[s.sequence], truth.plain_states[s.sequence] = exact[i], plainly[i].to(dtype).double()
        yield truth


def _states(inputs: Inputs, layout: Layout, group: list[Stretch], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Initial states of a group [n, HV, V, K] in fp64 and in fp32; zeros for padding."""
    d = layout.dims
    states = torch.zeros(len(group), d.HV, d.V, d.K, dtype=torch.float64, device=device)
    if inputs.state is not None:
        for i, s in enumerate(group):
            pooled = inputs.state_indices is not None
            held = state_of(inputs.state, layout, s.sequence, pooled=pooled, v_first=inputs.state_v_first)
            if held is not None:
                states[i] = held.to(device)
    return states, states.float()


def _run(inputs: Inputs, op: Op, states: torch.Tensor, *, exact: bool) -> torch.Tensor:
    """o [R, HV, V]; `states` move on in place."""
    batch = prepare(inputs, torch.float64 if exact else torch.float32)
    order = batch.index([s.slot for s in batch.sequences])
    running = states[order]
    if exact or op is Op.DECODE:
        o = token_recurrence(batch, running)
    else:
        o = chunk_recurrence(batch, running, CHUNK, operand_rounding(operand_dtype(inputs.q.dtype)))
    states[order] = running
    return o
