"""A finished sweep: its lines, what lies over them, and where the best peer is faster. From rows, with no GPU."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from kdacli.profile.fit import Bump, Line, bumps, fit

BUMP = 0.05  # over the line through the neighbours
RECHECK = 10  # times the sampling time, for points that stick out
UNITS = {"T": "token", "N": "sequence", "H": "head"}
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Series:
    """One kernel along the first axis of a sweep.

    Attributes:
        kernel, op, gates: whose.
        rest: the other axes' values.
        axis: the first axis: T (then x is tokens in all), N or H.
        rows: with times, ascending in x.
    """

    kernel: str
    op: str
    gates: str
    rest: tuple[tuple[str, int], ...]
    axis: str
    rows: tuple[Row, ...]

    @property
    def x(self) -> list[int]:
        return [sum(row["problem"]["seq_lens"]) if self.axis == "T" else row["point"][self.axis] for row in self.rows]

    @property
    def y(self) -> list[float]:
        return [row["median_us"] for row in self.rows]

    @property
    def shape(self) -> str:
        """What all points have in common: H=96, N=1 T=.. where they are not swept, and a state that is not fp32."""
        problem = self.rows[0]["problem"]
        lens = problem["seq_lens"]
        parts = [] if self.axis == "N" or (self.op != "decode" and len(lens) == 1) else [f"N={len(lens)}"]
        parts += [] if self.axis == "T" or self.op == "decode" else [f"T={lens[0]}"]
        parts += [] if self.axis == "H" else [f"H={problem['H']}"]
        return " ".join([*parts, *(["bf16 state"] if problem["state_dtype"] == "bfloat16" else [])])

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.shape, self.gates)))

    def line(self) -> Line | None:
        return fit(self.x, self.y)

    def bumps(self, limit: float = BUMP) -> list[Bump]:
        return bumps(self.x, self.y, [row["low_us"] for row in self.rows], [row["high_us"] for row in self.rows], limit)

    def slowest(self) -> Row | None:
        """The row that does worst against the best peer; None where no peer ran, or for a peer."""
        rows = [row for row in self.rows if row["vs"]["best_peer"] and not row["peer"]]
        return min(rows, key=lambda row: row["vs"]["speedup"], default=None)


def series(rows: Sequence[Row]) -> list[Series]:
    """The series of a record's rows, in their order; rows that failed are left out."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        if "error" not in row and row.get("point"):
            (axis, _), *rest = row["point"].items()
            found.setdefault((row["kernel"], row["op"], row["gates"], tuple(rest), axis), []).append(row)
    return [Series(*key, tuple(sorted(mine, key=lambda row: row["point"][key[-1]]))) for key, mine in found.items()]


def sticking_out(rows: Sequence[Row], limit: float = BUMP) -> set[tuple[str, str]]:
    """(case, gates) of our points over the line, and of the neighbours that this rests on: worth a longer look."""
    found = set()
    for one in series(rows):
        if one.rows[0]["peer"]:
            continue
        over = {bump.x for bump in one.bumps(limit)}
        for i, x in enumerate(one.x):
            if x in over:
                found |= {(row["case"], row["gates"]) for row in one.rows[i - 1 : i + 2]}
    return found


def to_json(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """One object for each series: kernel, op, gates, rest, axis, unit, line (us and us per unit), bumps."""
    for one in series(rows):
        line = one.line()
        yield {
            "kernel": one.kernel, "op": one.op, "gates": one.gates, "rest": dict(one.rest), "axis": one.axis,
            "unit": UNITS[one.axis], "line": line and dataclasses.asdict(line), "limit": BUMP,
            "bumps": [dataclasses.asdict(bump) for bump in one.bumps()],
        }  # fmt: skip
