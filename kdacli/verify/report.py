"""What `kda verify` prints and writes, from its results."""

from collections.abc import Sequence
from typing import Any

from kdacli.output import bad, console, dim, fmt_sci, good, say, table
from kdacli.verify.cases import Case
from kdacli.verify.runner import Result

COLUMNS = ("case", "kernel", "o", "bound", "state", "bound", "verdict")


def print_results(results: Sequence[Result], not_run: Sequence[tuple[str, str]], title: str) -> None:
    """The table, and below it what did not run and why."""
    console().print(table(title, COLUMNS, [_cells(result) for result in results]))
    for result in results:
        if result.status == "refused":
            console().print(dim(f"refused: {result.kernel}, {result.case}: {result.notes[0]}"), soft_wrap=True)
    for kernel, reason in not_run:
        console().print(dim(f"not run: {kernel}: {reason}"), soft_wrap=True)


def print_failures(results: Sequence[Result], why: dict[str, str], reproduce: dict[tuple[str, str], str]) -> None:
    """Each failure: what is wrong and where, why the case is there, and the command that shows it again.

    Args:
        why: by case. reproduce: by (case, kernel).
    """
    for result in results:
        if result.ok:
            continue
        console().print(bad(f"\nFAIL {result.case}, {result.kernel}"), soft_wrap=True)
        for line in explanation(result):
            say(f"  {line}")
        if result.case in why:
            say(f"  the case: {why[result.case]}")
        say(f"  again:    {reproduce[result.case, result.kernel]}")


def explanation(result: Result) -> list[str]:
    """What is wrong with a failed result, a line for each tensor and property."""
    return [f"{v.tensor}: {v.note}" for v in result.verdicts if not v.passed] + list(result.notes)


def summary(results: Sequence[Result], not_run: Sequence[tuple[str, str]]) -> str:
    """61 checks: 60 passed, 1 refused; 3 kernels not run."""
    counts = {"passed": "pass", "failed": "fail", "crashed": "error", "refused": "refused"}
    found = {word: sum(r.status == status for r in results) for word, status in counts.items()}
    parts = ", ".join(f"{n} {word}" for word, n in found.items() if n)
    line = f"{len(results)} check{'s' * (len(results) != 1)}: {parts}"
    return line + (f"; {len(not_run)} kernel{'s' * (len(not_run) > 1)} not run" if not_run else "")


def print_cases(cases: Sequence[Case]) -> None:
    """The case table, for `kda verify --list`."""
    rows = [(case.name, _inputs_of(case), case.why) for case in cases]
    console().print(table(None, ("case", "inputs", "why it is there"), rows))


def json_case(case: Case) -> dict[str, Any]:
    """A case for a JSON report."""
    return {
        "case": case.name,
        "op": case.problem.op,
        "why": case.why,
        "gates": case.gates,
        "keys": case.keys,
        "transform": case.transform,
        "decode_steps": case.decode_steps,
        "gpu_only": case.gpu_only,
        "problem": case.problem.to_dict(),
    }


def _cells(result: Result) -> tuple[object, ...]:
    by_name = {"o" if v.tensor == "g_cumsum" else v.tensor: v for v in result.verdicts}
    numbers = []
    for name in ("o", "final_state"):
        verdict = by_name.get(name)
        numbers += [None, None] if verdict is None else [fmt_sci(verdict.error), fmt_sci(verdict.bound)]
    word = {"pass": good("pass"), "fail": bad("FAIL"), "error": bad("ERROR"), "refused": dim("refused")}[result.status]
    return (result.case, result.kernel, *numbers, word)


def _inputs_of(case: Case) -> str:
    problem = case.problem
    sizes = f"K={problem.K}" + (f" V={problem.V}" if problem.V != problem.K else "")
    parts = [problem.name, sizes, f"{case.gates} gates"]
    parts += [f"{case.keys} keys"] if case.keys != "random" else []
    parts += [case.transform] if case.transform else []
    parts += ["GPU only"] if case.gpu_only else []
    return ", ".join(parts)
