"""What a run of `kda verify` came to: the report in its three forms, and how the command ends."""

import click

from kda_kernels.errors import CheckFailedError, UnavailableError
from kdacli.device import describe
from kdacli.output import say, write_json
from kdacli.provenance import collect, command_line
from kdacli.verify.adapt import adapt
from kdacli.verify.checks.check import Result, runner_of
from kdacli.verify.failures.explanation import command_for
from kdacli.verify.reports import tables
from kdacli.verify.verification import Key, Outcome, kernel_of


def report(outcome: Outcome, json_dest: str | None, junit: str | None, verbose: bool, force: bool) -> None:
    """Prints what came out, and writes it to the files that are named (None: not at all; JSON "-": to stdout alone)."""
    again = {(r.case, r.kernel): reproduce(outcome, r) for r in outcome.failures}
    if junit:
        _write_junit(outcome, again, junit)
    if json_dest:
        _write_json(outcome, again, json_dest, force)
    if json_dest == "-" or (outcome.stopped and not outcome.results):
        return
    wanted = outcome.wanted
    title = f"Relative errors against the fp64 oracle, on {describe(wanted.device)}"
    title = title if wanted.params["dump"] else f"{title}, seed {wanted.seed}"
    tables.print_results(outcome.results, outcome.not_run, title, verbose)
    with_conv = {name for name, case in outcome.cases.items() if "conv" in case.problem.features}
    convolved = {kernel_of(result) for result in outcome.results if result.case in with_conv}
    for kernel in outcome.kernels:
        if kernel.carried_state:
            say(f"{kernel.name} declares that it carries states in {kernel.carried_state}: they are judged as such")
        if kernel.rounded_convolution and kernel.name in convolved:
            say(f"{kernel.name} declares that its convolution rounds what it gives: results are judged as such")
    for line in outcome.searched + _as_in_a_suite(outcome):
        say(line)
    why = {case.name: case.why for case in outcome.cases.values()}
    tables.print_failures(outcome.results, why, outcome.explained, again, outcome.saved)
    say(("\n" if again else "") + summary(outcome))


def _as_in_a_suite(outcome: Outcome) -> list[str]:
    """Of cases that were named and refused, the commands that check what a suite has in their place."""
    wanted, kernels, lines = outcome.wanted, {kernel.name: kernel for kernel in outcome.kernels}, []
    for result in outcome.results:
        if wanted.case_names and result.status == "refused":
            kernel, case = kernels[kernel_of(result)], outcome.cases[result.case]
            fitting = adapt(kernel, case)
            if fitting != case and runner_of(kernel, case.decode_steps).unsupported(fitting.problem) is None:
                again = command_for(fitting.name, kernel.name, wanted.seed, wanted.device, wanted.triton_config)
                lines.append(f"as a suite has it: {again}")
    return lines


def reproduce(outcome: Outcome, result: Result) -> str:
    """The command that shows a failure again, and nothing else."""
    wanted, kernel = outcome.wanted, kernel_of(result)
    if wanted.one_problem:
        typed = command_line()
        return typed if "--kernel" in typed else f"{typed} --kernel {kernel}"
    found = outcome.explained.get((result.case, result.kernel))
    case = found.smallest if found is not None and found.smallest else result.case
    return command_for(case, kernel, wanted.seed, wanted.device, wanted.triton_config)


def summary(outcome: Outcome) -> str:
    """How many checks ended how, and what was not made."""
    said = tables.summary(outcome.results, outcome.not_run)
    if outcome.complete:
        return said
    left, kernels = outcome.total - len(outcome.results), len(outcome.kernels)
    unsearched = kernels - len(outcome.searched)
    if left > 0:
        said += f"; ended early, {left} of {outcome.total} were not made"
    elif outcome.wanted.searching and unsearched:
        said += f"; ended early, {unsearched} of {kernels} kernels were not searched to the end"
    return said


def _write_junit(outcome: Outcome, again: dict[Key, str], path: str) -> None:
    from kdacli.verify.reports.junit import write

    details = {
        key: "\n".join([*tables.failure_lines(r, outcome.explained.get(key)), again[key]])
        for r in outcome.failures
        for key in [(r.case, r.kernel)]
    }
    write(path, outcome.results, details, outcome.complete)


def _write_json(outcome: Outcome, again: dict[Key, str], dest: str, force: bool) -> None:
    wanted = outcome.wanted
    part, parts = wanted.shard
    keys = [(r.case, r.kernel) for r in outcome.results]
    write_json(
        {
            "schema": "kda.verify/1",
            "provenance": collect(None if wanted.params["dump"] else wanted.seed),
            "device": describe(wanted.device),
            "triton_config": wanted.triton_config,
            "shard": f"{part}/{parts}" if parts > 1 else None,
            "carried_states": {kernel.name: kernel.carried_state for kernel in outcome.kernels if kernel.carried_state},
            "cases": [tables.json_case(case) for case in outcome.cases.values()],
            "rows": [
                tables.json_row(r, outcome.explained.get(key), again.get(key), outcome.saved.get(key))
                for r, key in zip(outcome.results, keys, strict=True)
            ],
            "not_run": [{"kernel": kernel, "reason": reason} for kernel, reason in outcome.not_run],
            "searched": outcome.searched,
            "seconds": outcome.took,
            "complete": outcome.complete,
            "summary": summary(outcome),
        },
        dest,
        force,
    )


def conclude(outcome: Outcome) -> None:
    """How the command ends.

    Raises:
        Abort: Ctrl-C ended it. CheckFailedError: something failed.
        UnavailableError: nothing ran, or nothing more could.
    """
    if outcome.interrupted:
        raise click.Abort
    if outcome.stopped:
        raise UnavailableError(f"{outcome.stopped}; --no-isolate checks without it")
    if failed := outcome.failures:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise CheckFailedError(f"{failed[0].kernel} failed {failed[0].case}{more}")
    if all(result.status == "refused" for result in outcome.results):
        raise UnavailableError("nothing could run: every kernel refused every case")
