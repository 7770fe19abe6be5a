"""The record of a run: what `kda profile --json` writes."""

import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kda_kernels.errors import CheckFailedError, UnavailableError
from kda_kernels.registry import Kernel
from kdacli.profile import sweep
from kdacli.profile.cases import Load
from kdacli.profile.measure import Method, measure_case
from kdacli.profile.suites import Case

SCHEMA = "kda.profile/2"
READS = ("kda.profile/1", SCHEMA)  # version 1 has no confidence intervals
Record = dict[str, Any]


def records(
    cases: Sequence[Case],
    load: Load,
    kernels: Sequence[Kernel],
    method: Method,
    provenance: Callable[[], dict[str, Any]],
) -> Iterator[Record]:
    """Times case after case, yielding the record so far after each: a run that is cut short keeps what it has.

    Keys: schema, provenance (taken at the start and again at the end, with the clocks that the work left behind),
    ceilings, seconds (sampling time a kernel), complete (False until the last case), rows and refused (see
    `measure.Result`), and sweep (see `sweep.to_json`) where the cases are points of one. Points that stick out of a
    sweep are timed again, `sweep.RECHECK` times as long, and their rows (then with `rechecked`) replaced.
    """
    record = {
        "schema": SCHEMA,
        "provenance": provenance(),
        "ceilings": dataclasses.asdict(method.ceilings),
        "seconds": method.budget.seconds,
        "complete": False,
        "rows": [],
        "refused": [],
    }
    gc.freeze()  # what is there now stays: collecting after each case need not look at it, which takes long with torch
    try:
        for n, case in enumerate(cases, 1):
            result = measure_case(case, load, _concerned(kernels, case, cases), method)
            record["rows"] += result.rows
            record["refused"] += result.refused
            if n < len(cases):
                yield record
        if any(case.point for case in cases):
            _recheck(record, cases, load, kernels, method)
            record["sweep"] = list(sweep.to_json(record["rows"]))
    finally:
        gc.unfreeze()
    if lost := getattr(method.watch, "lost", None):
        record["not_watched"] = lost
    record["provenance"], record["complete"] = provenance(), True
    yield record


def _concerned(kernels: Sequence[Kernel], case: Case, cases: Sequence[Case]) -> list[Kernel]:
    """Those of the case's op, and those of no case's op, which are then refused: the others have rows elsewhere."""
    ops = {case.problem.op for case in cases}
    return [k for k in kernels if k.op is case.problem.op or k.op not in ops]


def _recheck(record: Record, cases: Sequence[Case], load: Load, kernels: Sequence[Kernel], method: Method) -> None:
    longer = dataclasses.replace(method.budget, seconds=sweep.RECHECK * method.budget.seconds)
    longer = dataclasses.replace(longer, min_samples=min(longer.max_samples, sweep.RECHECK * longer.min_samples))
    again = sweep.sticking_out(record["rows"])
    for case in cases:
        if (case.name, case.gates) in again:
            rows = measure_case(
                case, load, _concerned(kernels, case, cases), dataclasses.replace(method, budget=longer)
            ).rows
            better = {row["kernel"]: row | {"rechecked": True} for row in rows if "error" not in row}
            for i, row in enumerate(record["rows"]):
                if (row["case"], row["gates"]) == (case.name, case.gates):
                    record["rows"][i] = better.get(row["kernel"], row)


class Saver:
    """Writes a record as it grows: every five seconds, and less often where writing itself takes long."""

    EVERY_S, SHARE = 5.0, 0.05  # of the time

    def __init__(
        self,
        write: Callable[[Record, bool], None],
        force: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Takes what writes a record (and may overwrite a file), and whether the first write may overwrite one."""
        self.write, self.force, self.clock, self.due = write, force, clock, 0.0

    def __call__(self, record: Record) -> None:
        """Writes a record that is complete, or where enough time has gone by."""
        start = self.clock()
        if record["complete"] or start >= self.due:
            self.write(record, self.force)
            self.force = True  # the file is ours now
            end = self.clock()
            self.due = end + max(self.EVERY_S, (end - start) / self.SHARE)


def require_complete(record: Record, named: Sequence[str]) -> None:
    """The verdict on a whole run.

    Raises:
        CheckFailedError: a kernel raised an error.
        UnavailableError: a kernel asked for by name could run nowhere.
    """
    rows = record["rows"]
    if failed := [row for row in rows if "error" in row]:
        raise CheckFailedError(f"{len(failed)} of {len(rows)} timings failed")
    reasons = {r["kernel"]: r["reason"] for r in record["refused"]}
    if missing := [name for name in named if name not in {row["kernel"] for row in rows}]:
        raise UnavailableError("; ".join(f"{name} cannot run: {reasons[name]}" for name in missing))


def require_smooth(record: Record, limit: float) -> None:
    """Raises `CheckFailedError` where one of our kernels has a point more than `limit` over its neighbours' line."""
    found = [
        f"{one.kernel} {one.axis}={bump.x:g} {one.label} by {bump.over:.1%}"
        for one in sweep.series(record["rows"])
        if not one.rows[0]["peer"]
        for bump in one.bumps(limit)
    ]
    if found:
        raise CheckFailedError(f"points over the line through their neighbours: {len(found)}: {'; '.join(found)}")
