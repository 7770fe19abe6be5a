"""A sweep as tables: some of its points side by side, and what each kernel's line says."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kdacli import output
from kdacli.profile.columns import fitting
from kdacli.profile.report import gates_named, speedup
from kdacli.profile.sweep import BUMP, UNITS, Series, series

if TYPE_CHECKING:
    from rich.table import Table

MOST_POINTS = 16  # in a table; all of them are in --json and --plot


def tables(rows: Sequence[dict[str, Any]]) -> "Iterator[tuple[Table, list[str]]]":
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
    by_x = {one.kernel: dict(zip((row["point"][one.axis] for row in one.rows), one.rows, strict=True)) for one in group}
    every = sorted({x for rows in by_x.values() for x in rows})
    bumped = {row["point"][one.axis] for one in group for row in _bumped(one)}
    shown = spaced(every, bumped)
    against = next((one for one in group if not one.rows[0]["peer"]), first)
    lines = []
    for x in shown:
        cells = [output.fmt_us(rows[x]["median_us"]) if x in rows else None for rows in by_x.values()]
        row = by_x[against.kernel].get(x)
        lines.append([x, *cells, f"{row['share']:.0%}" if row else None, speedup(row) if row else None])
    what = f"{_title(first)}: us against {first.axis}"
    if len(shown) < len(every):
        what += f" ({len(shown)} of {len(every)} points)"
    vs = "vs best peer" if any(row["vs"]["best_peer"] for row in against.rows) else "vs first"
    columns = [first.axis, *by_x, "ceiling", vs]
    if len(group) == 1:
        columns, lines = columns[:-1], [line[:-1] for line in lines]
    table, left_out = fitting(what, columns, lines, [name for name in reversed(list(by_x)) if name != against.kernel])
    return table, left_out


def _bumped(one: Series) -> list[dict[str, Any]]:
    over = {bump.x for bump in one.bumps()}
    return [row for x, row in zip(one.x, one.rows, strict=True) if x in over]


def spaced(values: Sequence[int], wanted: set[int] = frozenset(), most: int = MOST_POINTS) -> list[int]:
    """At most `most` of ascending values, evenly spaced in their logarithm, and half as many of `wanted` besides."""
    if len(values) <= most:
        return list(values)
    low, high = math.log(values[0]), math.log(values[-1])
    marks = [math.exp(low + (high - low) * i / (most - 1)) for i in range(most)]
    kept = {min(values, key=lambda v, mark=mark: abs(v - mark)) for mark in marks}
    return sorted(kept | set(sorted(wanted)[: most // 2]))


def _lines(group: Sequence[Series]) -> "tuple[Table, list[str]]":
    unit = UNITS[group[0].axis]
    columns = ("kernel", f"us a {unit}", "±", "us at 0", "off the line", f"over {BUMP:.0%}", "worst vs peer")
    lines = []
    for one in group:
        line, slowest = one.line(), one.slowest()
        cells: list[object] = [None] * 4
        if line is not None:
            where = _original(one, line.worst_x)
            cells = [
                f"{line.slope:.4g}", f"{line.slope_error:.1g}", f"{line.intercept:.3g}",
                f"{line.worst:+.0%} at {one.axis}={where}",
            ]  # fmt: skip
        over = len(one.bumps())
        worst = f"{slowest['vs']['speedup']:.2f}x at {one.axis}={slowest['point'][one.axis]}" if slowest else None
        lines.append([one.kernel, *cells, output.bad(over) if over and not one.rows[0]["peer"] else over, worst])
    return fitting(f"{_title(group[0])}: lines fitted to all points", columns, lines, ("±", "us at 0"))


def _original(one: Series, x: float) -> int:
    """The value of the axis at a fitted x, which for T counts the tokens of all sequences."""
    return next(row["point"][one.axis] for at, row in zip(one.x, one.rows, strict=True) if at == x)


def notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Each point of ours over the line through its neighbours (peers' are only counted), and what the columns mean."""
    lines = []
    for one in series(rows):
        for bump in [] if one.rows[0]["peer"] else one.bumps():
            at = f"{one.kernel} {one.label} at {one.axis}={_original(one, bump.x)}"
            sure = "" if bump.least > 0 else ", which the noise does not support"
            lines.append(f"{at} is {bump.over:.1%} over the line through its neighbours{sure}")
    if len(lines) > MOST_POINTS:
        lines[MOST_POINTS:] = [f"and {len(lines) - MOST_POINTS} more points: they are in --json, under sweep"]
    return [
        *lines,
        "All points are in --json. Lines: least squares of relative errors. Off the line: the point furthest from it. "
        f"Over {BUMP:.0%}: points that much over the line through both neighbours; ours are timed again for longer.",
    ]
