"""Two dumps of one call: how their outputs differ, and which of them, if any, is wrong.

Both are judged against the fp64 recurrence, so "different" and "wrong" are not the same thing: two right results
differ, each by its own roundings. Everything is read from the files in pieces.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import torch

from kda_kernels.checks import problem_of
from kda_kernels.errors import InputError
from kda_kernels.problem import CHUNK, Op, Problem
from kda_kernels.tensors import Inputs, Outputs
from kdacli.comparison.difference import Comparing, Difference
from kdacli.comparison.judging import Judge, Place, written_slots
from kdacli.comparison.layout import Layout, Stretch, stack, state_of
from kdacli.comparison.walk import Truth, Walk
from kdacli.dumps import Dump
from kdacli.dumps.pieces import pieces
from kdacli.judge import Verdict, state_dtype

# Two right results may each be off by the bound; a row of one token scatters more than the whole tensor.
_BEYOND = 4.0
# Errors within this factor of each other are of the same size: those of right kernels by different houses are.
_ALIKE = 2.0


@dataclasses.dataclass(frozen=True)
class PairRow:
    """One output tensor: the difference, and the verdicts on a and on b."""

    difference: Difference
    a: Verdict
    b: Verdict

    @property
    def wrong(self) -> list[str]:
        """Which of "A" and "B" are wrong."""
        return [name for name, verdict in (("A", self.a), ("B", self.b)) if not verdict.passed]

    @property
    def conclusion(self) -> str:
        """same, equal, closer (A or B), or wrong."""
        if self.wrong:
            return "wrong"
        if not self.difference.different:
            return "same"
        low, high = sorted((self.a.error, self.b.error))
        return "equal" if high <= _ALIKE * low or high == 0 else "closer"

    @property
    def words(self) -> str:
        """The conclusion as a sentence."""
        errors = f"A is {self.a.error:.1e} from fp64, B {self.b.error:.1e}, either may be {self.a.bound:.1e}"
        if self.conclusion == "wrong":
            notes = "; ".join(f"{name}: {v.note}" for name, v in (("A", self.a), ("B", self.b)) if not v.passed)
            if len(self.wrong) == 2:
                return f"both are wrong: {notes}"
            right = "B" if self.wrong == ["A"] else "A"
            return f"{self.wrong[0]} is wrong, {right} is right: {notes}"
        if self.conclusion == "same":
            return f"bit for bit the same, and right: {self.a.error:.1e} from fp64, may be {self.a.bound:.1e}"
        if self.conclusion == "equal":
            return f"different, and equally close to the truth: {errors}"
        (low, nearer), (high, _) = sorted(((self.a.error, "A"), (self.b.error, "B")))
        ratio = f"{high / low:.3g} times " if low else ""
        return f"different, both right; {nearer} is {ratio}closer to the truth: {errors}"


@dataclasses.dataclass(frozen=True)
class Pair:
    """One call of both dumps.

    Attributes:
        name: of the call. problem: what it computes.
        inputs: {name: relative difference} of the inputs that are not the same in both.
        options: those that are not the same, as "name: a, b".
        rows: one for each output that both hold.
        notes: what is to be known beside.
    """

    name: str
    problem: Problem
    inputs: dict[str, float]
    options: list[str]
    rows: list[PairRow]
    notes: list[str]


def match(a: Sequence[Dump], b: Sequence[Dump]) -> tuple[list[tuple[Dump, Dump]], list[str]]:
    """Calls of the same name, or in order where no names agree and there are as many; and which have no partner.

    Raises:
        InputError: no call of a has a partner.
    """
    named = {dump.call: dump for dump in b}
    pairs = [(dump, named[dump.call]) for dump in a if dump.call in named]
    if not pairs and len(a) == len(b):
        return list(zip(a, b, strict=True)), []
    if not pairs:
        told = [", ".join(dump.call or "one call without a name" for dump in dumps[:8]) for dumps in (a, b)]
        raise InputError(f"no call is in both: A holds {told[0]}; B holds {told[1]}")
    matched = {dump.call for dump, _ in pairs}
    alone = [
        f"only in {side}: {dump.call}"
        for side, dumps in (("A", a), ("B", b))
        for dump in dumps
        if dump.call not in matched
    ]
    return pairs, alone


def compare_pairs(pairs: Sequence[tuple[Dump, Dump]], device: str, advance: Callable[[str], None]) -> Iterator[Pair]:
    """Compares each pair of calls.

    Raises:
        InputError: the calls have other shapes, or one of them no outputs.
    """
    for a, b in pairs:
        yield _compare(a, b, device)
        advance(a.call or "done")


def _compare(a: Dump, b: Dump, device: str) -> Pair:
    name = a.call if a.call == b.call else f"{a.call} and {b.call}"
    problem, other = problem_of(a.inputs, a.op), problem_of(b.inputs, b.op)
    _require_alike(problem, other, a, b)
    layouts = Layout.of(a.inputs), Layout.of(b.inputs)
    unequal = dict(_unequal_inputs(a.inputs, b.inputs, layouts))
    options = _unequal_options(a, b)
    walks = [Walk(a.inputs, a.op, device)]
    if unequal or options:
        walks.append(Walk(b.inputs, b.op, device))
    both = _Both(a, b, layouts, device)
    for truths in zip(*walks, strict=True):
        both.add(truths[0], truths[-1])
    notes = [f"{side}: {note}" for side, dump in (("A", a), ("B", b)) for note in dump.notes]
    if (a.outputs.final_state is None) != (b.outputs.final_state is None):
        notes.append(f"final_state is not compared: only {'B' if a.outputs.final_state is None else 'A'} holds one")
    return Pair(name, problem, unequal, options, both.rows(walks[0].usual, walks[-1].usual), notes)


def _require_alike(problem: Problem, other: Problem, a: Dump, b: Dump) -> None:
    for side, dump in (("A", a), ("B", b)):
        if dump.outputs is None:
            raise InputError(f"{side}{f', call {dump.call},' if dump.call else ''} holds no outputs to compare")
    sizes = ("op", "seq_lens", "H", "HV", "K", "V")
    if any(getattr(problem, size) != getattr(other, size) for size in sizes):
        raise InputError(f"A is {problem.name} and B {other.name}: only calls of the same shape can be compared")


def _unequal_options(a: Dump, b: Dump) -> list[str]:
    return [
        f"{field.name}: {x}, {y}"
        for field in dataclasses.fields(a.inputs.options)
        for x, y in [(getattr(a.inputs.options, field.name), getattr(b.inputs.options, field.name))]
        if x != y
    ]


def _unequal_inputs(a: Inputs, b: Inputs, layouts: tuple[Layout, Layout]) -> Iterator[tuple[str, float]]:
    """The inputs that are not equal, element for element, with their relative difference."""
    for name in ("q", "k", "v", "g", "beta"):
        x, y = getattr(a, name), getattr(b, name)
        stretches = [Stretch(n, 0, length) for n, length in enumerate(layouts[0].lens)]
        yield from _if_unequal(name, ((layouts[0].tokens(x, s), layouts[1].tokens(y, s)) for s in stretches))
    for name in ("A_log", "dt_bias"):
        x, y = getattr(a, name), getattr(b, name)
        if (x is None) != (y is None):
            yield name, float("inf")
        elif x is not None:
            yield from _if_unequal(name, [(x.flatten(), y.flatten())])
    if (a.state is None) != (b.state is None):
        yield "state", float("inf")
    elif a.state is not None:
        states = [
            tuple(_state(x, layout, x.state, n) for x, layout in zip((a, b), layouts, strict=True))
            for n in range(layouts[0].dims.N)
        ]
        yield from _if_unequal("state", ((x, y) for x, y in states if x is not None and y is not None))


def _if_unequal(name: str, parts) -> Iterator[tuple[str, float]]:
    apart = norm = 0.0
    for x, y in parts:
        for x_piece, y_piece in zip(pieces(x.unsqueeze(0)), pieces(y.unsqueeze(0)), strict=True):
            if x_piece.dtype is y_piece.dtype and torch.equal(x_piece, y_piece):
                norm += 1e-300
                continue
            norm += y_piece.double().square().sum().item()
            apart += (x_piece.double() - y_piece.double()).square().sum().item()
    if apart:
        yield name, (apart / norm) ** 0.5 if norm else float("inf")


def _state(inputs: Inputs, layout: Layout, tensor: torch.Tensor, sequence: int) -> torch.Tensor | None:
    pooled = inputs.state_indices is not None
    return state_of(tensor, layout, sequence, pooled=pooled, v_first=inputs.state_v_first)


class _Both:
    """The outputs of both dumps, judged and compared group by group."""

    def __init__(self, a: Dump, b: Dump, layouts: tuple[Layout, Layout], device: str) -> None:
        self.dumps, self.layouts, self.device = (a, b), layouts, device
        self.tokens = Results("g_cumsum" if a.op is Op.GATE else "o", (a, b), layouts[0])
        with_states = all(dump.outputs.final_state is not None for dump in (a, b))
        self.states = Results("final_state", (a, b), layouts[0]) if with_states else None

    def add(self, truth: Truth, other: Truth) -> None:
        sides = zip(self.dumps, self.layouts, strict=True)
        outs = [stack(layout, dump.outputs.o, truth.group) for dump, layout in sides]
        self.tokens.add(token_place(truth.group), [out.to(self.device) for out in outs], (truth, other))
        if self.states is None:
            return
        for n in truth.states:
            held = [
                _state(dump.inputs, layout, dump.outputs.final_state, n)
                for dump, layout in zip(self.dumps, self.layouts, strict=True)
            ]
            if all(state is not None for state in held):
                self.states.add_state(n, [state.to(self.device) for state in held], (truth, other))

    def rows(self, *usual: torch.Tensor | None) -> list[PairRow]:
        """`usual`: of a's and b's `Walk`, at its end."""
        row = self.tokens.row(usual=usual)
        found = [dataclasses.replace(row, difference=first_token(row.difference, self._read))]
        if self.states is not None:
            found.append(self.states.row(self._written()))
        return found

    def _read(self, stretch: Stretch) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(
            layout.tokens(dump.outputs.o, stretch) for dump, layout in zip(self.dumps, self.layouts, strict=True)
        )

    def _written(self) -> list[str]:
        sides = zip(self.dumps, self.layouts, strict=True)
        return [written_slots(dump.inputs, layout, dump.outputs.final_state) for dump, layout in sides]


class Results:
    """Judges of one output tensor of two sources, and their difference."""

    def __init__(self, tensor: str, dumps: tuple[Dump, Dump], layout: Layout) -> None:
        d = layout.dims
        self.dims, self.layout = d, layout
        self.pooled = dumps[0].inputs.state_indices is not None
        outputs = [dump.outputs.final_state if tensor == "final_state" else dump.outputs.o for dump in dumps]
        terms = CHUNK if tensor == "g_cumsum" else d.K
        self.judges = [Judge(tensor, d.N, d.HV, judged_dtype(dump, tensor), terms) for dump in dumps]
        states = tensor == "final_state"
        lens = [1] * d.N if states else layout.lens
        self.comparing = Comparing(tensor, lens, d.HV, (outputs[0].dtype, outputs[1].dtype), states)

    def add(self, place: Place, outs: Sequence[torch.Tensor], truths: Sequence[Truth]) -> None:
        """Rows of tokens [R, HV, C]."""
        for judge, out, truth in zip(self.judges, outs, truths, strict=True):
            judge.add(place, out.double(), truth.o, truth.plain_o)
        self.comparing.add(place, *outs)

    def add_state(self, sequence: int, states: Sequence[torch.Tensor], truths: Sequence[Truth]) -> None:
        """The final state [HV, V, K] of a sequence."""
        place = state_place(self.layout, sequence, pooled=self.pooled)
        rows = [state.reshape(1, self.dims.HV, -1) for state in states]
        for judge, row, truth in zip(self.judges, rows, truths, strict=True):
            exact, plain = (s[sequence].reshape(1, self.dims.HV, -1) for s in (truth.states, truth.plain_states))
            judge.add(place, row.double(), exact, plain)
        self.comparing.add(place, *rows)

    def row(self, more: Sequence[str] = ("", ""), usual: Sequence[torch.Tensor | None] = (None, None)) -> PairRow:
        """The result; `more` is what else is wrong with each source, `usual` as for `Judge.verdict`."""
        each = zip(self.judges, more, usual, strict=True)
        a, b = (judge.verdict(size).with_fault(note) for judge, note, size in each)
        return PairRow(self.comparing.result(beyond([a, b])), a, b)


def first_token(difference: Difference, read: Callable[[Stretch], tuple[torch.Tensor, torch.Tensor]]) -> Difference:
    """The difference with the token, in the chunk that `material` names, where it begins to be more than rounding.

    Args:
        read: gives a's and b's rows [t, HV, C] of a stretch of tokens.
    """
    place = difference.material
    if place is None or "chunk" not in place:
        return difference
    n, chunk, head = (int(place[name]) for name in ("sequence", "chunk", "head"))
    a, b = read(Stretch(n, chunk * CHUNK, (chunk + 1) * CHUNK))
    apart = (a[:, head].double() - b[:, head].double()).square().sum(-1).sqrt()
    token = chunk * CHUNK + int((~(apart <= difference.material_limit)).nonzero()[0])
    names = {"sequence": n, "chunk": chunk, "token": token, "head": head}
    return dataclasses.replace(difference, material={name: str(value) for name, value in names.items()})


def beyond(verdicts: Sequence[Verdict]) -> float:
    """From which relative difference of a row on rounding does not explain it."""
    return _BEYOND * max((v.bound for v in verdicts if not math.isnan(v.bound)), default=0.0)


def judged_dtype(dump: Dump, tensor: str) -> torch.dtype:
    """What a result should be rounded to."""
    if tensor == "g_cumsum":
        return torch.float32
    if tensor == "o":
        return dump.inputs.v.dtype
    return state_dtype(dump.inputs, None)


def token_place(group: Sequence[Stretch]) -> Place:
    """The rows of a group of stretches."""
    owner = torch.cat([torch.full((s.stop - s.start,), s.sequence) for s in group])
    return Place(owner, torch.cat([torch.arange(s.start, s.stop) for s in group]))


def state_place(layout: Layout, sequence: int, *, pooled: bool) -> Place:
    """The one row of a sequence's state, V-first."""
    slot = layout.slots[sequence] if pooled else None
    return Place(torch.tensor([sequence]), torch.tensor([0]), (layout.dims.V, layout.dims.K), slot)


def judge_streamed(
    dump: Dump, outputs: Outputs, device: str, *, partial: bool = False, carried_state: str | None = None
) -> list[Verdict]:
    """`kdacli.judge.judge` in bounded memory: outputs [B, T, HV, .] and states as in the dump's layout, on any device.

    Args:
        partial: a missing final_state is no fault. carried_state: as of `judge`.
    """
    both = dataclasses.replace(dump, outputs=outputs)
    layout = Layout.of(dump.inputs)
    name = "g_cumsum" if dump.op is Op.GATE else "o"
    d = layout.dims
    wanted = (d.B, d.T, d.HV, d.K if dump.op is Op.GATE else d.V)
    if tuple(outputs.o.shape) != wanted:
        return [_failed(name, f"shape is {list(outputs.o.shape)}: it should be {list(wanted)}")]
    tokens = Judge(name, d.N, d.HV, judged_dtype(both, name), CHUNK if dump.op is Op.GATE else d.K)
    states = Judge("final_state", d.N, d.HV, state_dtype(dump.inputs, carried_state), d.K)
    pooled = dump.inputs.state_indices is not None
    truths = Walk(dump.inputs, dump.op, device)
    for truth in truths:
        out = stack(layout, outputs.o, truth.group).to(device).double()
        tokens.add(token_place(truth.group), out, truth.o, truth.plain_o)
        if outputs.final_state is None:
            continue
        for n, exact in truth.states.items():
            state = _state(dump.inputs, layout, outputs.final_state, n).to(device).double()
            rows = [x.reshape(1, d.HV, -1) for x in (state, exact, truth.plain_states[n])]
            states.add(state_place(layout, n, pooled=pooled), *rows)
    verdicts = [tokens.verdict(truths.usual)]
    if outputs.final_state is not None and dump.op is not Op.GATE:
        verdicts.append(states.verdict().with_fault(written_slots(dump.inputs, layout, outputs.final_state)))
    elif dump.inputs.output_final_state and not partial and dump.op is not Op.GATE:
        verdicts.append(_failed("final_state", "missing: the kernel returned none"))
    return verdicts


def _failed(name: str, note: str) -> Verdict:
    nan = float("nan")
    return Verdict(name, nan, nan, nan, nan, {}, False, note)
