"""Pairwise covers: few rows of options in which every two values of any two options meet.

Most faults of a kernel need one option, or two together. Libraries for this exist; ours must honour what cannot be
combined, and run on GPU machines that reach no package registry.
"""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Pair = tuple[str, object, str, object]
_TRIES = 30  # rows drawn for each row kept
_SEED = 20261122


def pairwise_cover(axes: Mapping[str, Sequence], mend: Callable[[Row], Row]) -> list[tuple[Row, list[Pair]]]:
    """Rows that between them hold every pair of values that can be had, the same on every machine.

    Args:
        axes: the values of each option.
        mend: turns a row into the nearest one that is allowed; a pair that it always breaks up cannot be had.

    Returns:
        Each row with the pairs that it is the first to hold.
    """
    draw = random.Random(_SEED)
    names = list(axes)
    missing = {
        (a, x, b, y) for a, b in itertools.combinations(names, 2) for x, y in itertools.product(axes[a], axes[b])
    }
    cover: list[tuple[Row, list[Pair]]] = []
    for pair in sorted(missing, key=repr):
        if pair not in missing:
            continue
        a, x, b, y = pair
        rows = (mend({name: draw.choice(axes[name]) for name in names} | {a: x, b: y}) for _ in range(_TRIES))
        held = [(row, found & missing) for row in rows if pair in (found := set(pairs(row)))]
        missing.discard(pair)
        if held:
            row, new = max(held, key=lambda candidate: len(candidate[1]))
            missing -= new
            cover.append((row, sorted(new, key=repr)))
    return cover


def pairs(row: Row) -> list[Pair]:
    """All pairs of values that a row holds, in the order of its options."""
    return [(a, row[a], b, row[b]) for a, b in itertools.combinations(row, 2)]
