"""The record of a run: what `kda profile --json` writes."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kda_kernels.errors import CheckFailedError, UnavailableError
from kda_kernels.registry import Kernel
from kdacli.profile.cases import Load
from kdacli.profile.measure import Method, measure_case
from kdacli.profile.suites import Case

SCHEMA = "kda.profile/1"
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
    `measure.Result`).
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
    for n, case in enumerate(cases, 1):
        result = measure_case(case, load, kernels, method)
        record["rows"] += result.rows
        record["refused"] += result.refused
        if n == len(cases):
            record["provenance"], record["complete"] = provenance(), True
        yield record


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
