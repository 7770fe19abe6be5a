"""What results are measured with, in pieces: the fp64 recurrence, and the errors of plain implementations beside it.

A piece is a stretch of tokens or some whole sequences; from stretch to stretch the state is carried in full precision.
So memory is bounded and length is not, and a result is judged alike whether its call fits into memory or not.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from kda_kernels.problem import Op
from kda_kernels.reference import oracle
from kda_kernels.reference.batch import Batch, prepare
from kda_kernels.reference.fused import gated_norm
from kda_kernels.reference.recurrent import token_recurrence
from kda_kernels.reference.stored import Stored, stored
from kda_kernels.reference.targets import Recurrence, Snapshots, Target
from kda_kernels.tensors import Convolution, Inputs, Outputs
from kdacli.judge.layout import Layout, Place, Stretch
from kdacli.judge.plain import by_a_gpu, gate_cumsum_fp32, plains, rounding_steps

KEPT = 1 << 27  # elements of a call's outputs up to which its pieces are kept: 1 GiB of fp64
_TOKENS = ("q", "k", "v", "g", "beta")
# Bits of mantissa that what is rounded on its way is left with: tf32's and fp16's of float32, bf16's of fp16.
LEFT = {torch.float32: 10, torch.float16: 7}


def expect(inputs: Inputs, op: Op | str) -> Outputs:
    """The fp64 reference for `op`: o (for the op `gate`: the chunk-local cumsum) and final_state, float64.

    final_state is there whether it was asked for or not; with a pool it is the whole pool after the call. `inputs` are
    not modified. Raises `InputError` (see `check_inputs`).
    """
    if Op(op) is Op.GATE:
        return Outputs(oracle.gate_cumsum(inputs))
    return oracle.recurrence(dataclasses.replace(inputs, output_final_state=True))


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of one output tensor: tokens or states.

    Attributes:
        place: whose they are. exact: float64 [R, HV, C].
        squares, worst: float64 [draws, R, HV], of each plain implementation's errors the sum of squares, and the
            largest.
        finite: whether the plain implementations made numbers.
        fine: bool [R, HV, C], of states: which elements need more bits of mantissa than `LEFT`, and a plain
            implementation has them. A single product of short numbers is short.
    """

    place: Place
    exact: torch.Tensor
    squares: torch.Tensor
    worst: torch.Tensor
    finite: bool
    fine: torch.Tensor | None = None

    @classmethod
    def of(cls, place: Place, exact: torch.Tensor, made: Sequence[torch.Tensor]) -> "Rows":
        """`made`: by each plain implementation, [R, HV, C], rounded as a result is."""
        exact = exact.double()
        errors = [(one.double() - exact).abs_() for one in made]
        squares = torch.stack([error.square().sum(-1) for error in errors])
        worst = torch.stack([error.amax(-1) if error.numel() else error.sum(-1) for error in errors])
        finite = all(bool(one.isfinite().all()) for one in made)
        dtype = made[0].dtype
        needed = fine(exact.to(dtype), dtype) & fine(made[0], dtype) if not place.group and dtype in LEFT else None
        return cls(place, exact, squares, worst, finite, needed)


def fine(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Which elements need more bits of mantissa than `dtype` would be left with."""
    return rows.float().view(torch.int32).bitwise_and((1 << (23 - LEFT[dtype])) - 1).ne(0)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A group of stretches, and by output tensor (o, final_state, ...) its rows."""

    group: list[Stretch]
    rows: dict[str, Rows]

    def placed(self, layout: Layout) -> "Piece":
        """The same for a call whose tensors are laid out otherwise."""
        rows = {}
        for field, one in self.rows.items():
            if field == "o":
                place = Place.of_tokens(layout, self.group)
            else:
                mine = set(zip(one.place.owner.tolist(), one.place.token.tolist(), strict=True))
                targets = [t for t in layout.targets[field] if (t.sequence, t.tokens) in mine]
                place = Place.of_states(layout, targets, several=one.place.several)
            rows[field] = dataclasses.replace(one, place=place)
        return Piece(self.group, rows)


class Reference:
    """What one call should give; iterate it for the pieces, in order.

    Args:
        inputs: on any device, perhaps mapped from a file; not modified.
        device: where to compute; None: where the inputs are.
        stepwise: each token is a call of its own, which rounds the states.

    Attributes:
        layout: of the call. plains: the plain implementations.
        usual: float64 [sequences, HV], once all pieces were seen: how large o of each (sequence, head) is where q and
            the state know nothing of each other. o = scale * S q is a sum over K. With few, nearly parallel keys and a
            q at a right angle to them the sum cancels: o is then far smaller than its terms, and a rounding error,
            which goes with the terms, far larger beside it. What one implementation makes of such a block is chance; so
            it is granted what a block that does not cancel would be: ||scale q|| ||S|| / sqrt(K), the norm of the
            terms, times what the norm of o, if there is one, makes of it. S is the larger of the states before and
            after. None for the op `gate`.

    Raises:
        InputError: see `check_inputs`.
    """

    def __init__(
        self, inputs: Inputs, op: Op | str, device: str | torch.device | None = None, *, stepwise: bool = False
    ) -> None:
        self.inputs, self.op = inputs, Op(op)
        self.device = torch.device(inputs.q.device if device is None else device)
        self.layout = Layout.of(inputs)
        self._stepwise = stepwise
        self.seed = None if inputs.rounding_seed is None else int(inputs.rounding_seed)
        steps = rounding_steps(stored_dtype(inputs, "final_state"), self.seed) if stepwise else None
        self.plains = plains(self.op, inputs.q.dtype, max(self.layout.lens, default=0), steps)
        shape = self.layout.dims.N, self.layout.dims.HV
        self._squares, self._states = torch.zeros(2, *shape).double()
        self._normed = torch.zeros(2, *shape).double()  # the sums of squares of o before its norm, and after it
        d = self.layout.dims
        states = sum(map(len, self.layout.targets.values())) * d.HV * d.V * d.K
        self._small = sum(self.layout.lens) * d.HV * max(d.K, d.V) + states <= KEPT
        self._kept: list[Piece] | None = None

    def computed(self) -> "Reference":
        """Itself, with its pieces made and kept, as far as they are kept at all."""
        if self._small:
            for _ in self:
                pass
        return self

    def on(self, inputs: Inputs) -> "Reference":
        """The same for a call that means the same, with its tensors in other dtypes or memory."""
        other = Reference(inputs, self.op, self.device)
        other._kept = [piece.placed(other.layout) for piece in self]
        other._squares, other._states, other._normed = self._squares, self._states, self._normed
        return other

    def granted(self, rounded_convolution: bool) -> "Reference":
        """What a kernel is judged by whose convolution rounds what it gives, where it says so."""
        return self._with_rounded_convolution if rounded_convolution and self.inputs.conv is not None else self

    @functools.cached_property
    def _with_rounded_convolution(self) -> "Reference":
        assert (conv := self.inputs.conv) is not None
        inputs = dataclasses.replace(self.inputs, conv=dataclasses.replace(conv, rounded=True))
        return Reference(inputs, self.op, self.device, stepwise=self._stepwise)

    def name(self, field: str) -> str:
        """What a field of `Outputs` is called in verdicts."""
        return "g_cumsum" if self.op is Op.GATE else field

    def shape(self, field: str) -> list[int]:
        """Of a field of `Outputs`."""
        d = self.layout.dims
        if field == "o":
            return [d.B, d.T, d.HV, d.K if self.op is Op.GATE else d.V]
        if field in (written := written_by(self.inputs)):
            return list(written[field].shape)
        return [d.N, d.HV, *((d.V, d.K) if self.inputs.state_v_first else (d.K, d.V))]

    def fits(self, field: str, tensor: torch.Tensor) -> bool:
        return list(tensor.shape) == self.shape(field)

    def __iter__(self) -> Iterator[Piece]:
        if self._kept is not None:
            yield from self._kept
            return
        if not self._small:
            yield from self.walk()
            return
        seen = []
        for piece in self.walk():
            seen.append(piece)
            yield piece
        self._kept = seen

    @property
    def usual(self) -> torch.Tensor | None:
        if self.op is Op.GATE:
            return None
        usual = self._squares.sqrt() * self._states / self.layout.dims.K**0.5
        if self.inputs.norm is None:
            return usual
        before, after = self._normed
        return usual * torch.where(before > 0, after / before, 0.0).sqrt()

    @torch.no_grad()
    def walk(self) -> Iterator[Piece]:
        """Its pieces, none of them kept."""
        self._squares.zero_()
        self._normed.zero_()
        inputs, layout, carried = self.inputs, self.layout, []
        given: dict[str, Any] = {name: getattr(inputs, name) for name in ("A_log", "dt_bias")}
        params = {name: t.to(self.device) for name, t in given.items() if t is not None}
        for group in layout.groups():
            lens = [s.stop - s.start for s in group]
            ends = torch.tensor([0, *lens], dtype=torch.int64).cumsum(0).to(self.device)
            tokens: dict[str, Any] = {
                name: layout.stacked(getattr(inputs, name), group).to(self.device)[None] for name in _TOKENS
            }
            small = Inputs(**tokens, options=inputs.options, cu_seqlens=ends, **params, **self._parts(group))
            if self.op is Op.GATE:
                made = oracle.gate_cumsum(small).flatten(0, 1), [gate_cumsum_fp32(small, lens).flatten(0, 1)]
                yield Piece(group, {"o": Rows.of(Place.of_tokens(layout, group), *made)})
                continue
            if group[0].start == 0:
                carried = self._initial(group)
            exact = prepare(small, torch.float64)
            piece = self._piece(group, small, exact, carried)
            self._measure(group, exact.q, carried[0])
            yield piece

    def _parts(self, group: list[Stretch]) -> dict[str, Any]:
        """`conv` and `norm` of a group, as arguments of `Inputs`."""
        inputs, layout = self.inputs, self.layout
        conv = norm = None
        if inputs.conv is not None:
            windows = torch.stack([self._window(inputs.conv, s) for s in group])
            conv = dataclasses.replace(inputs.conv, states=windows, indices=None, tokens_first=True)
            conv = conv.map(lambda t: t.to(self.device))
        if inputs.norm is not None:
            gate = layout.stacked(inputs.norm.gate, group)[None]
            norm = dataclasses.replace(inputs.norm, gate=gate).map(lambda t: t.to(self.device))
        return {"conv": conv, "norm": norm}

    def _window(self, conv: Convolution, stretch: Stretch) -> torch.Tensor:
        """float32 [W - 1, D]: the raw tokens before a stretch."""
        inputs, kept, d = self.inputs, conv.width - 1, self.layout.dims
        slot, has, accepted = self.layout.conv_slots[stretch.sequence], inputs.has_initial_state, 1
        if inputs.num_accepted_tokens is not None:
            accepted = int(inputs.num_accepted_tokens[stretch.sequence])
        window = torch.zeros(kept, 2 * d.H * d.K + d.HV * d.V)
        if slot >= 0 and (has is None or bool(has[stretch.sequence])):
            window = conv.by_channel[slot, :, accepted - 1 : accepted - 1 + kept].T.float().cpu()
        if before := min(kept, stretch.start):
            last = Stretch(stretch.sequence, stretch.start - before, stretch.start)
            rows = [self.layout.tokens(x, last).flatten(1).float().cpu() for x in (inputs.q, inputs.k, inputs.v)]
            window = torch.cat([window, torch.cat(rows, 1)])[-kept:]
        return window

    def _initial(self, group: list[Stretch]) -> list[torch.Tensor]:
        """Initial states [n, HV, V, K] of a group, in fp64, and for each plain implementation in fp32."""
        d = self.layout.dims
        states = torch.zeros(len(group), d.HV, d.V, d.K, dtype=torch.float64, device=self.device)
        for i, s in enumerate(group):
            if (held := self.layout.initial(self.inputs, s.sequence)) is not None:
                states[i] = held.to(self.device)
        return [states, *(states.float() for _ in self.plains)]

    def _piece(self, group: list[Stretch], small: Inputs, exact: Batch, carried: list[torch.Tensor]) -> Piece:
        """`exact`: of `small`. `carried` moves on in place."""
        targets = {name: _within(every, group) for name, every in self.layout.targets.items()}
        asked = {(t.sequence, t.tokens) for every in targets.values() for t in every}
        rounded = by_a_gpu(small, prepare(small, torch.float32))
        o, states = _run(token_recurrence, exact, carried[0], group, asked)
        made = [_run(one.run, rounded, c, group, asked) for one, c in zip(self.plains, carried[1:], strict=True)]
        if (norm := small.norm) is not None:
            owner, before = Place.of_tokens(self.layout, group).owner, o
            o, *normed = (gated_norm(one, norm, norm.gate[0]) for one in (o, *(one for one, _ in made)))
            made = [(one, held) for one, (_, held) in zip(normed, made, strict=True)]
            for sums, one in zip(self._normed, (before, o), strict=True):
                sums.index_add_(0, owner, one.square().sum(-1).cpu())
        live = torch.cat([torch.full((s.stop - s.start,), self.layout.slots[s.sequence] >= 0) for s in group])
        live = live.to(self.device).view(-1, 1, 1)
        plain_o = [torch.where(live, one.to(self.inputs.v.dtype), 0.0) for one, _ in made]
        rows = {"o": Rows.of(Place.of_tokens(self.layout, group), torch.where(live, o, 0.0), plain_o)}
        for name, every in targets.items():
            if every:
                one = torch.stack([states[t.sequence, t.tokens] for t in every]).flatten(2)
                others = [
                    torch.stack([self._stored(name, t, held[t.sequence, t.tokens]) for t in every]).flatten(2)
                    for _, held in made
                ]
                place = Place.of_states(self.layout, every, several=_several(self.layout.targets[name]))
                rows[name] = Rows.of(place, one, others)
        return Piece(group, rows)

    def _stored(self, field: str, target: Target, state: torch.Tensor) -> torch.Tensor:
        """A state [HV, V, K] rounded as it is stored: in that dtype, or of integers in fp64."""
        held = stored(
            state, stored_dtype(self.inputs, field), self.seed, self.layout.slots[target.sequence], target.tokens - 1
        )
        return held.state if held.scales is None else held.values(torch.float64)

    def _measure(self, group: list[Stretch], q: torch.Tensor, states: torch.Tensor) -> None:
        """What `usual` is made of; `q` as the recurrence has it, [R, HV, K]."""
        owner = torch.cat([torch.full((s.stop - s.start,), s.sequence) for s in group])
        self._squares.index_add_(0, owner, q.square().sum(-1).cpu())
        for i, s in enumerate(group):
            norm = states[i].flatten(1).norm(dim=-1).cpu()
            if (held := self.layout.initial(self.inputs, s.sequence)) is not None:
                norm = torch.maximum(norm, held.to(self.device).double().flatten(1).norm(dim=-1).cpu())
            self._states[s.sequence] = norm


def rows_of(place: Place, outputs: Outputs, field: str) -> torch.Tensor:
    """[R, HV, C] of a field of `outputs`: the numbers that it means, states V-first."""
    rows = place.rows(tensor := getattr(outputs, field))
    if tensor.dtype is not torch.int16 or outputs.state_scales is None:
        return rows
    d = place.layout.dims
    held = Stored(rows.unflatten(-1, (d.V, d.K)), place.rows(outputs.state_scales))
    return held.values(torch.float32).flatten(2)


def written_by(inputs: Inputs) -> dict[str, torch.Tensor]:
    """By field of `Outputs`, the tensors of a call that it writes states to."""
    kept = inputs.checkpoints
    own = None if kept is None or kept.states is inputs.state else kept.states
    pool = inputs.state if inputs.state_indices is not None else None
    conv = None if inputs.conv is None else inputs.conv.states
    found = {
        "final_state": pool,
        "token_states": inputs.token_states,
        "checkpoints": own,
        "conv_states": conv,
        "state_scales": inputs.state_scales,
    }
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def pool_as_final_state(outputs: Outputs, inputs: Inputs) -> Outputs:
    """What was written in place is an output, whatever the kernel returned: a pool as the final state."""
    return dataclasses.replace(outputs, **written_by(inputs))


def stored_dtype(inputs: Inputs, tensor: str) -> torch.dtype:
    """In what a result is stored."""
    if tensor == "o":
        return inputs.v.dtype
    if tensor in (written := written_by(inputs)):
        return written[tensor].dtype
    return torch.float32 if inputs.state is None else inputs.state.dtype


def _several(targets: Sequence[Target]) -> bool:
    """Whether a sequence has more than one."""
    return len(targets) > len({t.sequence for t in targets})


def _within(targets: Sequence[Target], group: list[Stretch]) -> list[Target]:
    """Those that are reached in a group: behind its tokens, or at its start where nothing is before."""
    spans = {s.sequence: (s.start if s.start else -1, s.stop) for s in group}
    return [t for t in targets if t.sequence in spans and spans[t.sequence][0] < t.tokens <= spans[t.sequence][1]]


States = dict[tuple[int, int], torch.Tensor]  # [HV, V, K] of a sequence after so many tokens


def _run(
    run: Recurrence, batch: Batch, states: torch.Tensor, group: list[Stretch], asked: set[tuple[int, int]]
) -> tuple[torch.Tensor, States]:
    """o [R, HV, V], and the states that are asked for; `states` [n, HV, V, K] move on in place."""
    starts = {s.sequence: (i, s.start) for i, s in enumerate(group)}
    found = {(s.sequence, s.start): states[i].clone() for i, s in enumerate(group) if s.start == 0}
    inside = {(starts[n][0], tokens - starts[n][1]) for n, tokens in asked if tokens > starts[n][1]}
    snapshots, order = Snapshots(batch, inside), batch.index([s.number for s in batch.sequences])
    moving = states[order]
    o = run(batch, moving, snapshots.after)
    states[order] = moving
    taken = snapshots.end(moving).items()
    return o, found | {(group[i].sequence, group[i].start + tokens): state for (i, tokens), state in taken}
