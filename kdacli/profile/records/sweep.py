"""A finished sweep: its lines, what lies over them, and where the best peer is faster. From rows, with no GPU."""

import dataclasses
import functools
from collections.abc import Sequence

from kda_kernels.errors import CheckFailedError
from kdacli.profile.records.fit import Bump, Line, bumps, fit
from kdacli.profile.records.row import Row, TimedRow, timed

BUMP = 0.05  # over the line through the neighbours
RECHECK = 10  # times the sampling time, for points that stick out
_DECODES = ("decode", "step")  # T is one token there
UNITS = {"T": "token", "N": "sequence", "H": "head"}


@dataclasses.dataclass(frozen=True)
class Series:
    """One kernel along the first axis of a sweep.

    Attributes:
        kernel, op, gates: whose.
        rest: the other axes' values.
        axis: the first axis: T (then x is tokens in all), N or H.
        rows: ascending in x.
    """

    kernel: str
    op: str
    gates: str
    rest: tuple[tuple[str, int], ...]
    axis: str
    rows: tuple[TimedRow, ...]

    @property
    def at(self) -> list[int]:
        """The axis' values."""
        return [value_at(row, self.axis) for row in self.rows]

    @property
    def x(self) -> list[int]:
        return [row.problem.T for row in self.rows] if self.axis == "T" else self.at

    @property
    def y(self) -> list[float]:
        return [row.median_us for row in self.rows]

    @property
    def peer(self) -> bool:
        return self.rows[0].peer

    @property
    def shape(self) -> str:
        """What all points have in common: H=96, N=1 T=.. where they are not swept, and a state that is not fp32."""
        problem = self.rows[0].problem
        parts = [] if self.axis == "N" or (self.op not in _DECODES and problem.N == 1) else [f"N={problem.N}"]
        parts += [] if self.axis == "T" or self.op in _DECODES else [f"T={problem.seq_lens[0]}"]
        parts += [] if self.axis == "H" else [f"H={problem.H}"]
        return " ".join(filter(None, (*parts, problem.state_name)))

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.shape, self.gates)))

    def line(self) -> Line | None:
        return fit(self.x, self.y)

    def bumps(self, limit: float = BUMP) -> list[Bump]:
        return bumps(self.x, self.y, [row.low_us for row in self.rows], [row.high_us for row in self.rows], limit)

    def over(self) -> list[tuple[int, Bump]]:
        """The bumps, each with its place among the rows."""
        return [(self.x.index(int(bump.x)), bump) for bump in self.bumps()]

    def slowest(self) -> tuple[float, int] | None:
        """The least speedup over the best peer, and where on the axis; None where no peer ran, or for a peer."""
        against = [(row.vs.speedup, value_at(row, self.axis)) for row in self.rows if row.vs and row.vs.best_peer]
        return None if self.peer else min(against, default=None)


@dataclasses.dataclass(frozen=True)
class SeriesSummary:
    """A series in a record: its line (us, and us per unit) and the points more than `limit` over their neighbours'."""

    kernel: str
    op: str
    gates: str
    rest: dict[str, int]
    axis: str
    unit: str
    line: Line | None
    limit: float
    bumps: list[Bump]


def value_at(row: Row, axis: str) -> int:
    """Where a row of a sweep lies."""
    return (row.point or {})[axis]


def series(rows: Sequence[Row]) -> list[Series]:
    """The series of a record's rows, in their order; rows that failed are left out."""
    found: dict[tuple[str, str, str, tuple[tuple[str, int], ...], str], list[TimedRow]] = {}
    for row in timed(rows):
        if row.point:
            (axis, _), *rest = row.point.items()
            found.setdefault((row.kernel, row.op, row.gates, tuple(rest), axis), []).append(row)
    return [
        Series(*key, rows=tuple(sorted(mine, key=functools.partial(value_at, axis=key[-1]))))
        for key, mine in found.items()
    ]


def sticking_out(rows: Sequence[Row]) -> set[tuple[str, str]]:
    """(case, gates) of our points over the line, and of the neighbours that this rests on: worth a longer look."""
    return {
        (row.case, row.gates)
        for one in series(rows)
        if not one.peer
        for i, _ in one.over()
        for row in one.rows[i - 1 : i + 2]
    }


def summaries(rows: Sequence[Row]) -> list[SeriesSummary]:
    return [
        SeriesSummary(
            one.kernel, one.op, one.gates, dict(one.rest), one.axis, UNITS[one.axis], one.line(), BUMP, one.bumps()
        )
        for one in series(rows)
    ]


def require_smooth(rows: Sequence[Row], limit: float) -> None:
    """Raises `CheckFailedError` where one of our kernels has a point more than `limit` over its neighbours' line."""
    found = [
        f"{one.kernel} {one.axis}={bump.x:g} {one.label} by {bump.over:.1%}"
        for one in series(rows)
        if not one.peer
        for bump in one.bumps(limit)
    ]
    if found:
        raise CheckFailedError(f"points over the line through their neighbours: {len(found)}: {'; '.join(found)}")
