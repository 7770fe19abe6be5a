"""`kda verify`: kernels against the fp64 oracle, case by case."""

from typing import TYPE_CHECKING, Any

import click

from kda_kernels.errors import CheckFailedError, InputError, UnavailableError
from kda_kernels.problem import Op
from kdacli import options

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kda_kernels.registry import Kernel
    from kdacli.verify.cases import Case
    from kdacli.verify.runner import Result


@click.command("verify", cls=options.SectionedCommand)
@options.kernel_option
@click.option("--case", "case_names", multiple=True, metavar="NAME", help="A case by name; may be repeated.")
@click.option("--list", "list_only", is_flag=True, help="List the cases and why each is there; check nothing.")
@click.option("--fail-fast", is_flag=True, help="Stop at the first failure.")
@options.problem_options
@options.device_option
@options.json_option
@options.force_option
def command(
    kernels: tuple[str, ...],
    case_names: tuple[str, ...],
    list_only: bool,
    fail_fast: bool,
    device: str,
    json_dest: str | None,
    force: bool,
    **params: Any,
) -> None:
    """Check kernels against the fp64 oracle, case by case.

    Without arguments, every kernel of ours that can run here over a table of cases (on a CPU, Triton kernels in
    Triton's interpreter). A shape flag or a dump takes the place of the table; --op then says what to do with it.

    A kernel passes when its error against the fp64 token recurrence is within twice that of a plain implementation
    that rounds where the kernel must round, plus one output rounding: over each output, each (sequence, head), and for
    each element. NaN, Inf and unwritten elements never pass. It must not touch its inputs nor the unused slots of a
    pool, and (but for the interpreter) a second call must give the same bits. Where it fails, the place is told, and a
    command that shows it again.

    \b
    Examples:
      kda verify                                      everything that can run here
      kda verify --op decode --fail-fast
      kda verify --kernel triton-prefill --case prefill-lengths
      kda verify --kernel triton-prefill --lens 65,0,130 -H 2 --gates weak --seed 7
      kda verify --dump dump.pt
    """
    from kdacli.output import check_dest

    check_dest(json_dest, force)
    if list_only:
        _list(params, case_names, json_dest, force)
        return
    _check(kernels, case_names, fail_fast, device, json_dest, force, params)


def _list(params: options.Params, names: tuple[str, ...], json_dest: str | None, force: bool) -> None:
    """The cases, those of one op with --op."""
    from kdacli.output import write_json
    from kdacli.provenance import collect
    from kdacli.verify.cases import CASES
    from kdacli.verify.report import json_case, print_cases

    cases = [c for c in CASES if params["op"] in (None, c.problem.op) and (not names or c.name in names)]
    if json_dest:
        rows = [json_case(case) for case in cases]
        write_json({"schema": "kda.verify-cases/1", "provenance": collect(), "rows": rows}, json_dest, force)
    if json_dest != "-":
        print_cases(cases)


def _check(
    names: tuple[str, ...],
    case_names: tuple[str, ...],
    fail_fast: bool,
    device: str,
    json_dest: str | None,
    force: bool,
    params: options.Params,
) -> None:
    from kdacli.device import describe, pick_device
    from kdacli.output import progress, say, write_json
    from kdacli.provenance import collect
    from kdacli.verify import report
    from kdacli.verify.runner import pairs
    from kdacli.verify.selection import select_cases, select_kernels

    one_problem = [flag for flag in options.given(params) if flag != "--seed"] + ["--dump"] * bool(params["dump"])
    if one_problem and case_names:
        raise InputError(f"--case is given with {one_problem[0]}, which describes a problem of its own: leave one out")
    device = pick_device(device)
    kernels, not_run = select_kernels(names, params["op"] and Op(params["op"]))
    seed = params["seed"] or 0
    if one_problem:
        cases, total = [], len(kernels)
        found = _check_problem(kernels, params, device)
    else:
        cases = select_cases(case_names, kernels, device)
        total = sum(len(served) for _, served in pairs(kernels, cases))
        found = _check_cases(kernels, cases, device, seed)
    results = []
    with progress("verifying", total) as advance:
        for result in found:
            results.append(result)
            advance(f"{result.case}, {result.kernel}")
            if fail_fast and not result.ok:
                break
    failed = [result for result in results if not result.ok]
    again = {(r.case, r.kernel): _command_for(r, bool(one_problem), seed, device) for r in failed}
    if json_dest:
        write_json(
            {
                "schema": "kda.verify/1",
                "provenance": collect(None if params["dump"] else seed),
                "device": describe(device),
                "cases": [report.json_case(case) for case in cases],
                "rows": [_json_row(result, again) for result in results],
                "not_run": [{"kernel": kernel, "reason": reason} for kernel, reason in not_run],
                "summary": report.summary(results, not_run),
            },
            json_dest,
            force,
        )
    if json_dest != "-":
        title = f"Relative errors against the fp64 oracle, on {describe(device)}"
        report.print_results(results, not_run, title if params["dump"] else f"{title}, seed {seed}")
        report.print_failures(results, {case.name: case.why for case in cases}, again)
        say(("\n" if failed else "") + report.summary(results, not_run))
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise CheckFailedError(f"{failed[0].kernel} failed {failed[0].case}{more}")
    if all(result.status == "refused" for result in results):
        raise UnavailableError("nothing could run: every kernel refused every case")


def _check_cases(kernels: "list[Kernel]", cases: "list[Case]", device: str, seed: int) -> "Iterator[Result]":
    from kdacli.verify.runner import verify

    return verify(kernels, cases, device, seed)


def _check_problem(kernels: "list[Kernel]", params: options.Params, device: str) -> "Iterator[Result]":
    """The problem that the flags or the dump hold, for those of `kernels` that serve its op."""
    from kdacli.verify.runner import Bench, check

    ops = {kernel.op for kernel in kernels}
    problem, inputs, _, label = options.inputs_from(params, device, ops.pop() if len(ops) == 1 else Op.PREFILL)
    served = [kernel for kernel in kernels if kernel.op is problem.op]
    if not served:
        raise InputError(f"{label}: none of the kernels chosen serves {problem.op}; --op chooses what to do with it")
    bench = Bench.of_inputs(label, problem, inputs)
    for kernel in served:
        yield check(kernel, bench)


def _command_for(result: "Result", one_problem: bool, seed: int, device: str) -> str:
    """The command that shows a failure again, and nothing else."""
    from kdacli.provenance import command_line

    kernel = result.kernel.removesuffix("+decode")
    if one_problem:
        typed = command_line()
        return typed if "--kernel" in typed else f"{typed} --kernel {kernel}"
    return f"kda verify --case {result.case} --kernel {kernel} --seed {seed} --device {device}"


def _json_row(result: "Result", again: dict[tuple[str, str], str]) -> dict[str, Any]:
    return {
        "op": result.op,
        "case": result.case,
        "kernel": result.kernel,
        "status": result.status,
        "tensors": result.verdicts,
        "notes": result.notes,
        "reproduce": again.get((result.case, result.kernel)),
    }
