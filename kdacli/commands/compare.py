"""`kda compare`: kernels on the tensors of a dump, or two dumps, against the oracle and against each other."""

from typing import TYPE_CHECKING, Any

import click

from kda_kernels.errors import CheckFailedError, InputError
from kdacli import options

if TYPE_CHECKING:
    from kdacli.comparison import Comparison, Row
    from kdacli.comparison.difference import Difference
    from kdacli.comparison.pair import Pair
    from kdacli.dumps import Dump

WIDE = 96  # columns from which on the table says where the worst element is
_NARROW = (0, 1, 2, 3, 6, 7)
SLOW_S = 20.0  # from here on the time is told beforehand


@click.command("compare")
@click.argument("dump", metavar="A")
@click.argument("other", metavar="[B]", required=False)
@click.option(
    "--call", "calls", multiple=True, metavar="NAME", help="Of several calls in the dump, this one; repeatable."
)
@click.option("--join", "joined", is_flag=True, help="Join the calls of tensor-parallel ranks along their heads.")
@options.kernel_option
@click.option("--detail", is_flag=True, help="Say of each kernel where and how it differs from what A recorded.")
@click.option("--plot", metavar="FILE", help="Draw the differences: .png, .svg or .pdf.")
@options.device_option
@options.json_option
@options.force_option
def command(
    dump: str,
    other: str | None,
    calls: tuple[str, ...],
    joined: bool,
    kernels: tuple[str, ...],
    detail: bool,
    plot: str | None,
    device: str,
    json_dest: str | None,
    force: bool,
) -> None:
    """Run kernels on the inputs of dump A, or compare the outputs of dumps A and B.

    A dump is a .pt or .safetensors file with the tensors of one or several KDA calls, under the names of any engine (q,
    query, ...; g, a, raw_g, ...; h0, ssm_state, ...), flat or in sections inputs, outputs, options and meta; or a
    folder of `kda capture` or of SGLang's dumper, of which broken files are named (exit 1) and the others compared.
    What it does not say is inferred where that is safe, and printed. Nothing in it is ever unpickled, it is not
    modified, and it may be larger than memory. Of the dumps of tensor-parallel ranks --join makes one call each, under
    its name on rank 0, so that TP=8 can be held against TP=1.

    Each result, that of the dump included, is judged against the fp64 token recurrence; the bound is twice the error
    that a plain implementation makes on the same inputs, plus one rounding. "vs dump" is how far a kernel is from what
    the dump recorded. Without --kernel, all of ours run that can; the others are listed with the reason.

    Of two dumps the calls of the same name are compared: how large the difference is, also in steps of the dtype
    (ULPs), where it begins, and whether it grows along the sequence. Since both are judged too, the verdict tells
    "different but equally close to the truth" from "wrong". Exit 1 if one is wrong, however close they are.

    On a CPU, Triton kernels run in Triton's interpreter and take some tenths of a second for 100 tokens of one head:
    for a large dump, choose calls with --call or kernels with --kernel torch-prefill, or use a machine with a GPU.

    \b
    Examples:
      kda compare dump.pt
      kda compare dump.safetensors --kernel triton-decode --json report.json
      kda compare serving.pt --call prefill --device cpu
      kda compare before/ after/ --plot difference.png
      kda compare tp8/ tp1/ --join
      kda compare dump.pt --kernel mine.py:prefill --detail
    """
    from kdacli.output import bad, check_dest, console

    check_dest(json_dest, force)
    if plot:
        from kdacli.plots import require

        check_dest(plot, force)
        require(plot)
    if other is not None and kernels:
        raise InputError("--kernel is given with two dumps, whose outputs are compared: leave it or B out")
    broken: list[str] = []
    first = _load(dump, calls, joined, broken)
    if other is not None:
        second = _load(other, calls, joined, broken, like=first)
        wrong = _two_dumps((dump, first), (other, second), broken, plot, device, json_dest, force)
    else:
        wrong = _one_dump((dump, first), broken, kernels, detail, plot, device, json_dest, force)
    if json_dest != "-":
        for line in broken:
            console().print(bad(f"FAIL {line}"), soft_wrap=True)
    if wrong or broken:
        raise CheckFailedError(wrong or f"{len(broken)} of the dumps cannot be read: {broken[0]}")


def _load(
    path: str, calls: tuple[str, ...], joined: bool, broken: list[str], like: "list[Dump] | None" = None
) -> "list[Dump]":
    """The calls of a dump; `broken` is given what is wrong with those that cannot be read."""
    from kdacli.dumps import join, load_all

    found = load_all(path, () if joined else calls, like or (), broken)
    if not joined:
        return found
    found = [dump for dump in join(found) if not calls or dump.call in calls]
    if not found:
        raise InputError(f"{path} has none of the calls {', '.join(calls)}, by their names on rank 0")
    return found


def _one_dump(
    named: "tuple[str, list[Dump]]",
    broken: list[str],
    kernels: tuple[str, ...],
    detail: bool,
    plot: str | None,
    device: str,
    json_dest: str | None,
    force: bool,
) -> str | None:
    """Kernels on the inputs of a dump; what is wrong, if anything is."""
    from kdacli.device import describe, pick_device
    from kdacli.output import progress, write_json
    from kdacli.provenance import collect

    dump, dumps = named
    device = pick_device(device)
    from kdacli import comparison  # after the device is known, since it decides how Triton is imported

    plans = comparison.plan(dumps, kernels)
    if (seconds := comparison.seconds_on_cpu(plans)) > SLOW_S and device == "cpu":
        _tell_time(seconds, "--call and --kernel choose less")
    results = []
    with progress("comparing", comparison.steps(plans)) as advance:
        for result in comparison.compare(plans, device, advance, detail=detail or bool(plot)):
            results.append(result)
    if plot:
        _plot([(r.call, r.source, r.difference) for result in results for r in result.rows if r.difference], plot)
    if json_dest:
        rows = [_json_row(result, row) for result in results for row in result.rows]
        report = {
            "schema": "kda.compare/1",
            "provenance": collect(),
            "dump": dump,
            "device": describe(device),
            "calls": [_json_call(result) for result in results],
            "broken": broken,
            "rows": rows,
        }
        write_json(report, json_dest, force)
    if json_dest != "-":
        _print(dump, describe(device), results, detail)
    failed = [row for result in results for row in result.failed]
    return _failure(failed) if failed else None


def _two_dumps(
    named_a: "tuple[str, list[Dump]]",
    named_b: "tuple[str, list[Dump]]",
    broken: list[str],
    plot: str | None,
    device: str,
    json_dest: str | None,
    force: bool,
) -> str | None:
    """The outputs of two dumps; what is wrong, if anything is."""
    from kdacli.comparison import report
    from kdacli.comparison.pair import compare_pairs, match
    from kdacli.device import describe, pick_device
    from kdacli.output import progress, write_json
    from kdacli.provenance import collect

    (a, first), (b, second) = named_a, named_b
    pairs, alone = match(first, second)
    device = pick_device(device)
    if (seconds := _oracle_seconds(pairs)) > SLOW_S and device == "cpu":
        _tell_time(seconds, "--call chooses less")
    with progress("comparing", len(pairs)) as advance:
        results = list(compare_pairs(pairs, device, advance))
    if plot:
        _plot([(pair.name, "", row.difference) for pair in results for row in pair.rows], plot)
    if json_dest:
        found = {
            "schema": "kda.compare-dumps/1",
            "provenance": collect(),
            "a": a,
            "b": b,
            "device": describe(device),
            "calls": [report.pair_json(pair) for pair in results],
            "unmatched": alone,
            "broken": broken,
            "rows": [report.pair_row_json(pair, row) for pair in results for row in pair.rows],
        }
        write_json(found, json_dest, force)
    if json_dest != "-":
        _print_pairs(a, b, results, alone)
    wrong = [(pair, row) for pair in results for row in pair.rows if row.wrong]
    if not wrong:
        return None
    pair, row = wrong[0]
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    call = f" in call {pair.name}" if pair.name else ""
    return f"{row.difference.tensor}{call}: {row.words}{more}"


def _oracle_seconds(pairs: "list[tuple[Dump, Dump]]") -> float:
    """Roughly how long judging takes on a CPU."""
    from kda_kernels.checks import problem_of
    from kdacli.comparison.kernels import Plan, seconds_on_cpu

    return seconds_on_cpu(Plan(dump, problem_of(dump.inputs, dump.op), [], []) for dump, _ in pairs)


def _tell_time(seconds: float, hint: str) -> None:
    from kdacli.output import say

    say(f"about {_duration(seconds)} on this CPU ({hint})", stderr=True)


def _plot(found: list, path: str) -> None:
    from kdacli.comparison.plot import draw

    if not found:
        raise InputError("--plot has nothing to draw: the dump holds no outputs to compare with")
    draw([(" ".join(filter(None, (call, source, d.tensor))), d) for call, source, d in found], path)


def _print_pairs(a: str, b: str, results: "list[Pair]", alone: list[str]) -> None:
    from kdacli.comparison import report
    from kdacli.comparison.difference_map import KEY
    from kdacli.output import bad, console, dim, good, say, table

    out = console()
    for pair in results:
        say(f"A  {a}\nB  {b}")
        call = f"call {pair.name}: " if pair.name else ""
        out.print(f"{call}{pair.problem.name}; {report.inputs_line(pair)}", markup=False)
        out.print(table(None, report.COLUMNS, [report.cells(row) for row in pair.rows]))
        for row in pair.rows:
            style = bad if row.wrong else good
            out.print(style(f"{row.difference.tensor}: {row.words}"))
            bound = max(row.a.bound, row.b.bound)
            for line in report.lines(row.difference, bound, out.width - 3):
                out.print(f"   {line}", markup=False, highlight=False, soft_wrap=True)
        if any(row.difference.different for row in pair.rows):
            out.print(f"   map: {KEY}", markup=False, soft_wrap=True)
        for note in pair.notes:
            out.print(dim(f"note: {note}"), soft_wrap=True)
        say("")
    for line in alone:
        out.print(dim(f"not compared: {line}"), soft_wrap=True)


def _print(dump: str, device: str, results: "list[Comparison]", detail: bool) -> None:
    from kdacli.comparison import report
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
                report.at(v.where),
                fmt_sci(row.vs_dump),
                good("ok") if v.passed else bad("FAIL"),
            )
            for row in result.rows
            for v in [row.verdict]
        ]
        columns = ("result of", "tensor", "error", "bound", "worst", "at", "vs dump", "")
        narrow = console().width < WIDE
        if narrow:
            say(title)  # a table folds its title to its own width
        shown = _NARROW if narrow else range(len(columns))
        console().print(
            table(None if narrow else title, [columns[i] for i in shown], [[row[i] for i in shown] for row in cells])
        )
        for row in result.failed:
            console().print(bad(f"FAIL {row.source}, {row.verdict.tensor}: {row.verdict.note}"), soft_wrap=True)
        for row in result.rows if detail else ():
            if row.difference is not None:
                _print_detail(row, row.difference)
        for skipped in result.not_run:
            console().print(dim(f"not run: {skipped.kernel}: {skipped.reason}"), soft_wrap=True)
        for note in [*result.dump.notes, *(["the dump holds no outputs"] if result.dump.outputs is None else [])]:
            console().print(dim(f"note: {note}"), soft_wrap=True)
        say("")
    if not any(result.failed for result in results):
        say(f"{sum(len(result.rows) for result in results)} results within their bounds")


def _print_detail(row: "Row", d: "Difference") -> None:
    from kdacli.comparison import report
    from kdacli.comparison.difference_map import KEY
    from kdacli.output import console

    out = console()
    size = (
        f"max abs {d.max_abs:.2e}, rms {d.rms:.2e}, 1 - cosine {1 - d.cosine:.1e}"
        if d.different
        else "bit for bit the same"
    )
    out.print(f"{row.source} (A) and the dump (B), {d.tensor}: {size}", markup=False, soft_wrap=True)
    for line in report.lines(d, row.verdict.bound, out.width - 3):
        out.print(f"   {line}", markup=False, highlight=False, soft_wrap=True)
    if d.different:
        out.print(f"   map: {KEY}", markup=False, soft_wrap=True)


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
    from kdacli.comparison import DUMP, report

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
        "difference": None if row.difference is None else report.difference_json(row.difference),
    }


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
