"""`--sweep T=1k..1M`: one flag's values, and the cases of every combination."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import click

from kda_kernels.errors import InputError
from kdacli.values import Count

PARAMETERS = {"T": "tokens", "N": "seqs", "H": "heads"}  # an axis, and the flag it stands for
MOST_CASES = 5000
FORM = "such as T=1k..1M, N=1..256:1 or H=12,24,96"


@dataclasses.dataclass(frozen=True)
class Axis:
    """Values of one flag, ascending and different."""

    name: str
    values: tuple[int, ...]


def parse(text: str) -> Axis:
    """An axis from NAME=FIRST..LAST (doubling), NAME=FIRST..LAST:STEP, NAME=FIRST..LAST:xFACTOR or NAME=A,B,C.

    The last value is always one of them.

    Raises:
        InputError: it is none of these forms.
    """
    name, equals, values = text.partition("=")
    if not equals or name not in PARAMETERS:
        raise InputError(f"--sweep is {text}: it should be an axis T, N or H with its values, {FORM}")
    if ".." not in values:
        return Axis(name, tuple(sorted({_count(part, text) for part in values.split(",")})))
    span, _, step = values.partition(":")
    first, last = (_count(part, text) for part in span.split("..", 1))
    if last < first:
        raise InputError(f"--sweep is {text}: {last} is less than {first}")
    return Axis(name, tuple(_span(first, last, step or "x2", text)))


def _span(first: int, last: int, step: str, text: str) -> list[int]:
    by_factor = step.startswith("x")
    amount = _count(step.removeprefix("x"), text)
    if by_factor and amount < 2:
        raise InputError(f"--sweep is {text}: the factor should be 2 or more")
    if not by_factor:
        values = list(range(first, last + 1, amount))
    else:
        values = list(itertools.takewhile(lambda v: v <= last, (first * amount**i for i in itertools.count())))
    return values if values[-1] == last else [*values, last]


def _count(word: str, text: str) -> int:
    try:
        return Count().convert(word, None, None)
    except click.UsageError:
        raise InputError(f"--sweep is {text}: {word or 'nothing'} is no count; write {FORM}") from None


def points(axes: Sequence[Axis]) -> list[dict[str, int]]:
    """Every combination; the first axis runs fastest, so that its points lie side by side.

    Raises:
        InputError: an axis is named twice, or there are too many combinations.
    """
    names = [axis.name for axis in axes]
    if len(set(names)) < len(names):
        raise InputError(f"--sweep names {', '.join(names)}: each axis once")
    rest = itertools.product(*(axis.values for axis in reversed(axes)))
    found = [dict(zip(names, reversed(values), strict=True)) for values in rest]
    if len(found) > MOST_CASES:
        raise InputError(f"--sweep makes {len(found)} cases: at most {MOST_CASES}; give a step, such as N=1..256:8")
    return found


def flags_of(point: Mapping[str, int]) -> dict[str, Any]:
    """The point as the command's parameters."""
    return {PARAMETERS[name]: value for name, value in point.items()}
