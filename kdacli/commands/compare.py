"""`kda compare`: kernels on the tensors of a dump, against the oracle and against what the dump recorded."""

from typing import TYPE_CHECKING, Any

import click

from kda_kernels.errors import CheckFailedError
from kdacli import options

if TYPE_CHECKING:
    from kdacli.comparison import Comparison, Row

_SHORT = {"sequence": "seq", "token": "tok", "head": "h", "channel": "ch"}
SLOW_S = 20.0  # from here on the time is told beforehand


@click.command("compare")
@click.argument("dump", metavar="DUMP")
@click.option(
    "--call", "calls", multiple=True, metavar="NAME", help="Of several calls in the dump, this one; repeatable."
)
@options.kernel_option
@options.device_option
@options.json_option
@options.force_option
def command(
    dump: str, calls: tuple[str, ...], kernels: tuple[str, ...], device: str, json_dest: str | None, force: bool
) -> None:
    """Run kernels on the inputs of DUMP and compare the results.

    DUMP is a .pt or .safetensors file with the tensors of one or several KDA calls, under the names of any engine (q,
    query, ...; g, a, raw_g, ...; h0, ssm_state, ...), flat or in sections inputs, outputs, options and meta. What it
    does not say is inferred where that is safe, and printed. Nothing in it is ever unpickled, and it is not modified.

    Each result, that of the dump included, is judged against the fp64 token recurrence; the bound is twice the error
    that a plain implementation makes on the same inputs, plus one rounding. "vs dump" is how far a kernel is from what
    the dump recorded. Without --kernel, all of ours run that can; the others are listed with the reason.

    On a CPU, Triton kernels run in Triton's interpreter and take about half a second for 100 tokens of one head: for a
    large dump, choose calls with --call or kernels with --kernel torch-prefill, or use a machine with a GPU.

    \b
    Examples:
      kda compare dump.pt
      kda compare dump.safetensors --kernel triton-decode --json report.json
      kda compare serving.pt --call prefill --device cpu
    """
    from kdacli.device import describe, pick_device
    from kdacli.dumps import load_all
    from kdacli.output import check_dest, progress, say, write_json
    from kdacli.provenance import collect

    check_dest(json_dest, force)
    dumps = load_all(dump, calls)
    device = pick_device(device)
    from kdacli import comparison  # after the device is known, since it decides how Triton is imported

    plans = comparison.plan(dumps, kernels)
    if (seconds := comparison.seconds_on_cpu(plans)) > SLOW_S and device == "cpu":
        say(f"about {_duration(seconds)} on this CPU (--call and --kernel choose less)", stderr=True)
    results = []
    with progress("comparing", comparison.steps(plans)) as advance:
        for result in comparison.compare(plans, device, advance):
            results.append(result)
    if json_dest:
        rows = [_json_row(result, row) for result in results for row in result.rows]
        report = {
            "schema": "kda.compare/1",
            "provenance": collect(),
            "dump": dump,
            "device": describe(device),
            "calls": [_json_call(result) for result in results],
            "rows": rows,
        }
        write_json(report, json_dest, force)
    if json_dest != "-":
        _print(dump, describe(device), results)
    if failed := [row for result in results for row in result.failed]:
        raise CheckFailedError(_failure(failed))


def _print(dump: str, device: str, results: "list[Comparison]") -> None:
    from kdacli.output import bad, console, dim, fmt_sci, good, say, table

    for result in results:
        where = f"{dump}, call {result.dump.call}" if result.dump.call else dump
        title = f"{where}: {result.problem.name} on {device}"
        cells = [
            (
                row.source,
                v.tensor,
                fmt_sci(v.error),
                fmt_sci(v.bound),
                fmt_sci(v.worst, 1),
                " ".join(f"{_SHORT.get(name, name)}{value}" for name, value in v.where.items()),
                fmt_sci(row.vs_dump),
                good("ok") if v.passed else bad("FAIL"),
            )
            for row in result.rows
            for v in [row.verdict]
        ]
        columns = ("result of", "tensor", "error", "bound", "worst", "at", "vs dump", "")
        console().print(table(title, columns, cells))
        for row in result.failed:
            console().print(bad(f"FAIL {row.source}, {row.verdict.tensor}: {row.verdict.note}"), soft_wrap=True)
        for skipped in result.not_run:
            console().print(dim(f"not run: {skipped.kernel}: {skipped.reason}"), soft_wrap=True)
        for note in [*result.dump.notes, *(["the dump holds no outputs"] if result.dump.outputs is None else [])]:
            console().print(dim(f"note: {note}"), soft_wrap=True)
        say("")
    if not any(result.failed for result in results):
        say(f"{sum(len(result.rows) for result in results)} results within their bounds")


def _failure(failed: "list[Row]") -> str:
    """The first failure in full, and how many there are."""
    from kdacli.comparison import DUMP

    first = failed[0]
    v, call = first.verdict, f" in call {first.call}" if first.call else ""
    whose = f"the dump's {v.tensor} is wrong" if first.source == DUMP else f"{first.source}'s {v.tensor} is wrong"
    more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
    return f"{whose}{call}: {v.note}{more}"


def _json_call(result: "Comparison") -> dict[str, Any]:
    return {
        "call": result.dump.call,
        "problem": result.problem.to_dict(),
        "meta": result.dump.meta,
        "notes": result.dump.notes,
        "not_run": [{"kernel": skipped.kernel, "reason": skipped.reason} for skipped in result.not_run],
    }


def _json_row(result: "Comparison", row: "Row") -> dict[str, Any]:
    """A row of the report; `kernel` is null for what the dump recorded."""
    from kdacli.comparison import DUMP

    v = row.verdict
    return {
        "op": result.problem.op,
        "call": row.call,
        "case": result.problem.name,
        "kernel": None if row.source == DUMP else row.source,
        "tensor": v.tensor,
        "error": v.error,
        "bound": v.bound,
        "worst": v.worst,
        "worst_bound": v.worst_bound,
        "where": v.where,
        "vs_dump": row.vs_dump,
        "passed": v.passed,
        "note": v.note,
    }


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
