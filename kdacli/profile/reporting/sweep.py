"""A sweep as tables: some of its points side by side, and what each kernel's line says."""

import math
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from kdacli import output
from kdacli.profile.records.row import Row
from kdacli.profile.records.sweep import BUMP, UNITS, Series, series
from kdacli.profile.reporting.columns import fitting
from kdacli.profile.reporting.tables import gates_named, speedup

if TYPE_CHECKING:
    from rich.table import Table

MOST_POINTS = 16  # in a table; all of them are in --json and --plot


def tables(rows: Sequence[Row]) -> "Iterator[tuple[Table, list[str]]]":
    """For each group of kernels that share the op, the gates and the other axes: its points, then its lines."""
    found = series(rows)
    for key in dict.fromkeys((one.op, one.rest, one.gates) for one in found):
        group = [one for one in found if (one.op, one.rest, one.gates) == key]
        yield _points(group)
        yield _lines(group)


def _title(one: Series) -> str:
    return ", ".join([" ".join(filter(None, (one.op, one.shape))), gates_named(one.gates)])


def _points(group: Sequence[Series]) -> "tuple[Table, list[str]]":
    """us of each kernel, with the ceiling's share and the comparison of the first of them."""
    first = group[0]
    by_x = {one.kernel: dict(zip(one.at, one.rows, strict=True)) for one in group}
    every = sorted({x for rows in by_x.values() for x in rows})
    shown = spaced(every, {one.at[i] for one in group for i, _ in one.over()})
    against = next((one for one in group if not one.peer), first)
    lines = []
    for x in shown:
        cells = [output.fmt_us(rows[x].median_us) if x in rows else None for rows in by_x.values()]
        row = by_x[against.kernel].get(x)
        lines.append([x, *cells, f"{row.share:.0%}" if row else None, speedup(row) if row else None])
    what = f"{_title(first)}: us against {first.axis}"
    if len(shown) < len(every):
        what += f" ({len(shown)} of {len(every)} points)"
    vs = "vs best peer" if any(row.vs and row.vs.best_peer for row in against.rows) else "vs first"
    columns = [first.axis, *by_x, "ceiling", vs]
    if len(group) == 1:
        columns, lines = columns[:-1], [line[:-1] for line in lines]
    return fitting(what, columns, lines, [name for name in reversed(list(by_x)) if name != against.kernel])


def spaced(values: Sequence[int], wanted: Collection[int] = (), most: int = MOST_POINTS) -> list[int]:
    """At most `most` of ascending values, evenly spaced in their logarithm, and half as many of `wanted` besides."""
    if len(values) <= most:
        return list(values)
    low, high = math.log(values[0]), math.log(values[-1])
    marks = [math.exp(low + (high - low) * i / (most - 1)) for i in range(most)]
    kept = {min((abs(v - mark), v) for v in values)[1] for mark in marks}
    return sorted(kept | set(sorted(wanted)[: most // 2]))


def _lines(group: Sequence[Series]) -> "tuple[Table, list[str]]":
    unit = UNITS[group[0].axis]
    columns = ("kernel", f"us per {unit}", "±", "us at 0", "off the line", f"over {BUMP:.0%}", "worst vs peer")
    lines = []
    for one in group:
        line, slowest, over = one.line(), one.slowest(), len(one.bumps())
        cells: list[object] = [None] * 4
        if line is not None:
            where = one.at[one.x.index(int(line.worst_x))]
            cells = [
                f"{line.slope:.4g}", f"{line.slope_error:.1g}", f"{line.intercept:.3g}",
                f"{line.worst:+.0%} at {one.axis}={where}",
            ]  # fmt: skip
        worst = f"{slowest[0]:.2f}x at {one.axis}={slowest[1]}" if slowest else None
        lines.append([one.kernel, *cells, output.bad(over) if over and not one.peer else over, worst])
    return fitting(f"{_title(group[0])}: lines fitted to all points", columns, lines, ("±", "us at 0"))


def notes(rows: Sequence[Row]) -> list[str]:
    """Each point of ours over the line through its neighbours (peers' are only counted), and what the columns mean."""
    lines = []
    for one in series(rows):
        for i, bump in [] if one.peer else one.over():
            at = f"{one.kernel} {one.label} at {one.axis}={one.at[i]}"
            sure = "" if bump.least > 0 else ", which the noise does not support"
            lines.append(f"{at} is {bump.over:.1%} over the line through its neighbours{sure}")
    if len(lines) > MOST_POINTS:
        lines[MOST_POINTS:] = [f"and {len(lines) - MOST_POINTS} more points: they are in --json, under sweep"]
    return [
        *lines,
        "All points are in --json. Lines: least squares of relative errors. Off the line: the point furthest from it. "
        f"Over {BUMP:.0%}: points that much over the line through both neighbours; ours are timed again for longer.",
    ]
