"""Case after case, and the record that grows meanwhile."""

import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kda_kernels.registry import Kernel
from kdacli.profile.cases.choose import Load
from kdacli.profile.cases.suites import TimedCase
from kdacli.profile.measuring.one_case import Method, measure_case
from kdacli.profile.records import sweep
from kdacli.profile.records.record import Record
from kdacli.profile.records.row import TimedRow, timed


def records(
    cases: Sequence[TimedCase],
    load: Load,
    kernels: Sequence[Kernel],
    method: Method,
    provenance: Callable[[], dict[str, Any]],
) -> Iterator[Record]:
    """Times case after case, yielding the record so far after each: a run that is cut short keeps what it has.

    The provenance is taken at the start and again at the end, with the clocks that the work left behind. Points that
    stick out of a sweep are timed again, `sweep.RECHECK` times as long, and their rows replaced.
    """
    record = Record(
        provenance=provenance(), ceilings=method.ceilings, seconds=method.budget.seconds, complete=False, rows=[],
        refused=[],
    )  # fmt: skip
    gc.freeze()  # what is there now stays: collecting after each case need not look at it, which takes long with torch
    try:
        for n, case in enumerate(cases, 1):
            rows, refused = measure_case(case, load, _concerned(kernels, case, cases), method)
            record.rows += rows
            record.refused += refused
            if n < len(cases):
                yield record
        if any(case.point for case in cases):
            _recheck(record, cases, load, kernels, method)
            record.sweep = sweep.summaries(record.rows)
    finally:
        gc.unfreeze()
    if method.clocks and method.clocks.lost:
        record.not_watched = method.clocks.lost
    record.provenance, record.complete = provenance(), True
    yield record


def _concerned(kernels: Sequence[Kernel], case: TimedCase, cases: Sequence[TimedCase]) -> list[Kernel]:
    """Those of the case's op, and those of no case's op, which are then refused: the others have rows elsewhere."""
    ops = {case.problem.op for case in cases}
    return [k for k in kernels if k.op is case.problem.op or k.op not in ops]


def _recheck(record: Record, cases: Sequence[TimedCase], load: Load, kernels: Sequence[Kernel], method: Method) -> None:
    budget, again = method.budget, sweep.sticking_out(record.rows)
    samples = min(budget.max_samples, sweep.RECHECK * budget.min_samples)
    budget = dataclasses.replace(budget, seconds=sweep.RECHECK * budget.seconds, min_samples=samples)
    for case in cases:
        if (case.name, case.gates) in again:
            longer = dataclasses.replace(method, budget=budget)
            rows, _ = measure_case(case, load, _concerned(kernels, case, cases), longer)
            better: dict[str, TimedRow] = {row.kernel: dataclasses.replace(row, rechecked=True) for row in timed(rows)}
            for i, row in enumerate(record.rows):
                if (row.case, row.gates) == (case.name, case.gates):
                    record.rows[i] = better.get(row.kernel, row)
