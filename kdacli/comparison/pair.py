"""Two dumps of one call: how their outputs differ, and which of them, if any, is wrong.

Both are judged against the fp64 recurrence, so "different" and "wrong" are not the same thing: two right results
differ, each by its own roundings. Everything is read from the files in pieces.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from kda_kernels.checks import problem_of
from kda_kernels.errors import InputError
from kda_kernels.problem import Problem
from kda_kernels.tensors import Inputs, Outputs
from kdacli.comparison.difference import CallDifference, Difference
from kdacli.comparison.kernels import carried_state
from kdacli.dumps import Dump
from kdacli.dumps.pieces import pieces
from kdacli.judge import CallJudge, Reference, Verdict
from kdacli.judge.layout import Layout, Stretch

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
    outputs = _require_alike(problem, other, a, b)
    if any(one.final_state is None for one in outputs):
        outputs = [Outputs(one.o) for one in outputs]
    references = [Reference(dump.inputs, dump.op, device) for dump in (a, b)]
    unequal = dict(_unequal_inputs(a.inputs, b.inputs, (references[0].layout, references[1].layout)))
    options = _unequal_options(a, b)
    if not unequal and not options and _alike(*references):  # one oracle for both
        pairs: Iterable[tuple[Any, ...]] = ((p, p.placed(references[1].layout)) for p in references[0].walk())
        measured = [references[0]] * 2
    else:
        pairs, measured = zip(*(one.walk() for one in references), strict=True), references
    judges = [
        CallJudge(reference, its, carried_state=carried_state(dump), partial=True)
        for reference, its, dump in zip(references, outputs, (a, b), strict=True)
    ]
    difference = CallDifference(references, outputs)
    for each in pairs:
        difference.add(each)
        for one, piece in zip(judges, each, strict=True):
            one.add(piece)
    verdicts = (judge.verdicts(reference.usual) for judge, reference in zip(judges, measured, strict=True))
    rows = []
    for x, y in zip(*verdicts, strict=True):
        if (found := difference.of([x, y])) is None:
            raise InputError(f"{x.tensor} cannot be compared: {x.note or y.note}")
        rows.append(PairRow(found, x, y))
    return Pair(name, problem, unequal, options, rows, _notes(a, b))


def _alike(a: Reference, b: Reference) -> bool:
    """Whether calls of the same numbers have the same padding and dtypes."""
    dtypes = [{name: t.dtype for name, t in one.inputs.tensors().items() if t.is_floating_point()} for one in (a, b)]
    return dtypes[0] == dtypes[1] and [s < 0 for s in a.layout.slots] == [s < 0 for s in b.layout.slots]


def _notes(a: Dump, b: Dump) -> list[str]:
    notes = [f"{side}: {note}" for side, dump in (("A", a), ("B", b)) for note in dump.notes]
    held = [dump.outputs is not None and dump.outputs.final_state is not None for dump in (a, b)]
    if held[0] != held[1]:
        notes.append(f"final_state is not compared: only {'A' if held[0] else 'B'} holds one")
    return notes


def _require_alike(problem: Problem, other: Problem, a: Dump, b: Dump) -> list[Outputs]:
    """The outputs of both."""
    outputs = []
    for side, dump in (("A", a), ("B", b)):
        if dump.outputs is None:
            raise InputError(f"{side}{f', call {dump.call},' if dump.call else ''} holds no outputs to compare")
        outputs.append(dump.outputs)
    sizes = ("op", "seq_lens", "H", "HV", "K", "V")
    if any(getattr(problem, size) != getattr(other, size) for size in sizes):
        hint = " (--join makes one call of those of tensor-parallel ranks)" if problem.HV != other.HV else ""
        raise InputError(f"A is {problem.name} and B {other.name}: only calls of the same shape can be compared{hint}")
    return outputs


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
    else:
        each = (
            [layout.initial(inputs, n) for layout, inputs in zip(layouts, (a, b), strict=True)]
            for n in range(layouts[0].dims.N)
        )
        yield from _if_unequal("state", ((x, y) for x, y in each if x is not None and y is not None))


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
