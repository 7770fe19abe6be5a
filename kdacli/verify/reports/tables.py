"""What `kda verify` prints and writes, from its results."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kdacli.output import bad, console, dim, fmt_sci, good, say, table
from kdacli.verify.cases.case import Case
from kdacli.verify.checks.check import Result
from kdacli.verify.failures.error_map import KEY
from kdacli.verify.failures.explanation import Explanation, wrong_lines
from kdacli.verify.properties import PROPERTIES

COLUMNS = ("case", "kernel", "o", "bound", "state", "bound", "verdict")
MANY = 40  # results from which on a table of kernels says more than one of cases
Key = tuple[str, str]  # case, kernel


def print_results(
    results: Sequence[Result], not_run: Sequence[tuple[str, str]], title: str, verbose: bool = False
) -> None:
    """The table: of cases, or, where there are many, of kernels; and below it what did not run and why."""
    if len(results) <= MANY or verbose:
        rows, described = [_cells(result) for result in results], {result.case for result in results}
        columns: tuple[str, ...] = COLUMNS
        if not any(row[4] for row in rows):  # the op gate has no state, and what nothing came of has none either
            columns, rows = (*COLUMNS[:4], COLUMNS[-1]), [(*row[:4], row[-1]) for row in rows]
        if len(described) == 1 and " " in results[0].case:  # long, and every row would repeat it
            say(f"{title}:")
            columns = (*columns[1:4], "o/once", *columns[4:])
            rows = [(*row[1:4], _o_once(result), *row[4:]) for row, result in zip(rows, results, strict=True)]
            console().print(table(results[0].case, columns, rows))
            say("o/once: the error of o over that of rounding the exact o once, to its dtype")
        else:
            console().print(table(title, columns, rows))
    else:
        print_kernels(results, title)
    for line in refusals(results):
        console().print(dim(line), soft_wrap=True)
    for kernel, reason in not_run:
        console().print(dim(f"not run: {kernel}: {reason}"), soft_wrap=True)


def print_kernels(results: Sequence[Result], title: str) -> None:
    """One row per kernel: its counts of cases, and how near it came to a bound where it passed."""
    rows = []
    names = [result.kernel.removesuffix("+decode") for result in results]  # a prefill's own, decode after it or not
    for kernel in dict.fromkeys(names):
        mine = [result for name, result in zip(names, results, strict=True) if name == kernel]
        passed, failed, crashed, refused = (
            sum(r.status == s for r in mine) for s in ("pass", "fail", "error", "refused")
        )
        nearest = max((_share(r) for r in mine if r.status == "pass"), default=None)
        word = bad("FAIL") if failed or crashed else good("pass") if passed else dim("refused")
        rows.append((kernel, passed, failed, crashed, refused, None if nearest is None else f"{nearest:.0%}", word))
    columns = ("kernel", "passed", "failed", "crashed", "refused", "of bound", "verdict")
    console().print(table(title, columns, rows))
    say("of bound: the largest error of those that passed, as a share of what it may be")


def refusals(results: Sequence[Result]) -> list[str]:
    """Every refusal: of cases, those of one kernel for one reason together; of properties, all for one reason. And what
    properties that held are worth saying.
    """
    cases: dict[tuple[str, str], list[str]] = {}
    properties: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    remarks: dict[str, None] = {}
    for result in results:
        if result.status == "refused":
            cases.setdefault((result.kernel, result.notes[0]), []).append(result.case)
        for held in result.properties:
            if held.status == "pass":
                remarks |= {f"{result.kernel}, {result.case}: {held.name}: {note}": None for note in held.notes}
            if held.status == "refused":
                names, kernels = properties.setdefault(held.notes[0], ({}, {}))
                names[held.name] = kernels[result.kernel] = None
    return (
        [f"refused: {kernel}, {_and_more(names)}: {reason}" for (kernel, reason), names in cases.items()]
        + [
            f"refused: {', '.join(names)} of {_and_more(list(kernels))}: {reason}"
            for reason, (names, kernels) in properties.items()
        ]
        + list(remarks)
    )


def _and_more(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def print_failures(
    results: Sequence[Result],
    why: Mapping[str, str],
    explained: Mapping[Key, Explanation],
    reproduce: Mapping[Key, str],
    saved: Mapping[Key, Any],
) -> None:
    """Each failure: what is wrong and where, what it looks like, why the case is there, how to see it again."""
    told: set[tuple[str, str | None]] = set()
    for result in results:
        if result.ok:
            continue
        key, found = (result.case, result.kernel), explained.get((result.case, result.kernel))
        console().print(bad(f"\nFAIL {result.case}, {result.kernel}"), soft_wrap=True)
        again = found is not None and found.smallest is not None and (result.kernel, found.smallest) in told
        for line in failure_lines(result, found, again):
            say(f"  {line}")
        if found is not None:
            told.add((result.kernel, found.smallest))
        if result.case in why:
            say(f"  the case: {why[result.case]}")
        say(f"  again:    {reproduce[key]}")
        if key in saved:
            say(f"  saved:    {saved[key]} (kda compare opens it)")


def failure_lines(result: Result, found: Explanation | None, told: bool = False) -> list[str]:
    """What is wrong, in the case as it is and in the smallest one that fails (unless that was told before)."""
    lines = wrong_lines(result)
    if found is None:
        return lines
    if told:
        return [*lines, f"smallest: {found.smallest}, as above"]
    if found.smallest is not None and found.smallest != result.case:
        state = "smallest" if found.complete else "smaller"
        lines += [f"{state}: {found.smallest}", *(f"  {line}" for line in found.wrong)]
    lines += [f"looks like: {line}" for line in found.looks_like]
    if found.maps:
        lines += ["where:", *(f"  {line}" for line in found.maps), f"  ({KEY})"]
    return lines


def summary(results: Sequence[Result], not_run: Sequence[tuple[str, str]]) -> str:
    """61 checks: 60 passed, 1 refused; 3 kernels not run."""
    counts = {"passed": "pass", "failed": "fail", "crashed": "error", "refused": "refused"}
    found = {word: sum(r.status == status for r in results) for word, status in counts.items()}
    parts = ", ".join(f"{n} {word}" for word, n in found.items() if n)
    line = f"{len(results)} check{'s' * (len(results) != 1)}: {parts}"
    return line + (f"; {len(not_run)} kernel{'s' * (len(not_run) > 1)} not run" if not_run else "")


def print_cases(cases: Sequence[Case]) -> None:
    """The case table, for `kda verify --list`, and the properties that they name."""
    rows = [(case.name, _inputs_of(case), case.why) for case in cases]
    console().print(table(None, ("case", "inputs", "why it is there"), rows))
    used = {name for case in cases for name in case.properties}
    reasons = [(name, p.reason) for name, p in PROPERTIES.items() if name in used]
    if reasons:
        console().print(table("Properties", ("property", "why it must hold"), reasons))


def json_case(case: Case) -> dict[str, Any]:
    """A case for a JSON report."""
    return {
        "case": case.name,
        "op": case.problem.op,
        "why": case.why,
        "gates": case.gates,
        "keys": case.keys,
        "transforms": case.transforms,
        "properties": case.properties,
        "decode_steps": case.decode_steps,
        "gpu_only": case.gpu_only,
        "seed": case.seed,
        "problem": case.problem.to_dict(),
    }


def json_row(result: Result, found: Explanation | None, reproduce: str | None, saved: object | None) -> dict[str, Any]:
    """A result for a JSON report."""
    return {
        "op": result.op,
        "case": result.case,
        "kernel": result.kernel,
        "status": result.status,
        "seconds": result.seconds,
        "tensors": result.verdicts,
        "properties": result.properties,
        "notes": result.notes,
        "crashed": result.crashed,
        "smallest": found.smallest if found else None,
        "looks_like": found.looks_like if found else (),
        "maps": found.maps if found else (),
        "reproduce": reproduce,
        "saved": None if saved is None else str(saved),
    }


def _cells(result: Result) -> tuple[object, ...]:
    by_name = {"o" if v.tensor == "g_cumsum" else v.tensor: v for v in result.verdicts}
    numbers: list[str | None] = []
    for name in ("o", "final_state"):
        verdict = by_name.get(name)
        numbers += [None, None] if verdict is None else [fmt_sci(verdict.error), fmt_sci(verdict.bound)]
    word = {"pass": good("pass"), "fail": bad("FAIL"), "error": bad("ERROR"), "refused": dim("refused")}[result.status]
    return (result.case, result.kernel, *numbers, word)


def _o_once(result: Result) -> str | None:
    """The error of o, in those of rounding the exact o once."""
    o = next((v for v in result.verdicts if v.tensor in ("o", "g_cumsum")), None)
    return None if o is None or not o.rounding > 0 else f"{o.error / o.rounding:.2f}"


def _share(result: Result) -> float:
    """The largest share of a bound that a result takes up."""
    shares = [v.error / v.bound for v in result.verdicts if v.bound] + [
        v.worst / v.worst_bound for v in result.verdicts if v.worst_bound
    ]
    return max((share for share in shares if math.isfinite(share)), default=0.0)


def _inputs_of(case: Case) -> str:
    problem = case.problem
    sizes = f"K={problem.K}" + (f" V={problem.V}" if problem.V != problem.K else "")
    parts = [problem.name, sizes, f"{case.gates} gates"]
    parts += [f"{case.keys} keys"] if case.keys != "random" else []
    parts += [*case.transforms, *case.properties]
    parts += ["GPU only"] if case.gpu_only else []
    return ", ".join(parts)
