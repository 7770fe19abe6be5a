"""`kda verify --cp`: every case over all ranks, which share the judging; rank 0 prints."""

import contextlib
import itertools
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from kda_kernels.errors import CheckFailedError, one_line
from kda_kernels.problem import Op
from kdacli import output, provenance
from kdacli.judge import Reference, Verdict, judge
from kdacli.parallel.checks import alone, cases, drop_in, equal_parts, gathered, judged, prefilled
from kdacli.parallel.ranks import joined, progress
from kdacli.parallel.rehearsal import Rehearsal
from kdacli.peers import fla
from kdacli.verify.processes.ahead import compile_foreseen

SCHEMA = "kda.verify-cp/1"


def verify(device: str, json_dest: str | None, force: bool) -> None:
    """Raises `CheckFailedError` on rank 0 where a case is wrong."""
    if device == "cpu":
        from kdacli.interpreter import quicken

        quicken()
    with joined(device, shared=True) as (rank, ranks):
        if device == "cuda":
            _compile_ahead(ranks)
        rows = _checked(ranks, rank, device)
        verdicts, not_run = _through_fla(ranks, device)
        rows += _rows("FLA's context", verdicts)
        if rank:
            return
        gpus = min(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()) if device == "cuda" else 0
        where = f"{gpus} x {torch.cuda.get_device_name()}" if gpus else device
        _print(rows, f"prefill over {ranks} ranks, {dist.get_backend()} on {where}", not_run, json_dest == "-")
        if json_dest is not None:
            head = {"schema": SCHEMA, "provenance": provenance.collect(5), "ranks": ranks, "device": device}
            output.write_json({**head, "gpus_a_machine": gpus, "rows": rows}, json_dest, force)
        failed = {row["case"] for row in rows if not row["passed"]}
        if failed:
            raise CheckFailedError(
                f"{len(failed)} of {len({row['case'] for row in rows})} cases failed: {', '.join(sorted(failed))}"
            )


def _compile_ahead(ranks: int) -> None:
    """What all ranks launch, by one process of each machine, into the caches that its others share."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with contextlib.suppress(Exception):  # whatever is wrong, the run meets it too, and says so
            compile_foreseen([Rehearsal(ranks)])
    dist.barrier(device_ids=[torch.cuda.current_device()])


def _checked(ranks: int, rank: int, device: str) -> list[dict[str, Any]]:
    """Rows of all cases, on every rank. Each judges some of them: the fp64 oracle takes longer than what it judges."""
    whole, made, mine = cases(ranks, device), {}, {}
    share = list(whole)[rank::ranks]
    with progress(rank, "verifying", len(whole) + len(share)) as advance:
        for name, case in whole.items():
            advance(name, 0)
            made[name] = prefilled(case, case.inputs(device), None)
            advance()
        for name in share:
            advance(f"judging {name}", 0)
            inputs = whole[name].inputs(device)
            reference = Reference(inputs, Op.PREFILL).computed()
            verdicts, wrong = judged(whole[name], inputs, made[name], reference)
            mine[name] = _rows(name, verdicts, wrong, judge(reference, alone(inputs)))
            advance()
    found = {name: rows for one in gathered(mine, None) for name, rows in one.items()}
    return [row for name in whole for row in found[name]]


def _rows(name: str, verdicts: list[Verdict], wrong: str = "", alone: Sequence[Verdict] = ()) -> list[dict[str, Any]]:
    """alone: of the whole batch on one rank."""
    return [
        {
            "case": name, "tensor": v.tensor, "error": v.error, "one_rank": None if one is None else one.error,
            "bound": v.bound, "passed": v.passed and not wrong, "note": "; ".join(filter(None, (v.note, wrong))),
        }
        for v, one in itertools.zip_longest(verdicts, alone)
    ]  # fmt: skip


def _through_fla(ranks: int, device: str) -> tuple[list[Verdict], str | None]:
    """Of equal parts; or why FLA's helper makes no context here."""
    if (reason := fla.unsupported_here()) is not None:
        return [], reason
    case = equal_parts(ranks)
    ends = torch.tensor([0, *itertools.accumulate(case.lens)], dtype=torch.int32, device=device)
    try:
        from fla.ops.cp import build_cp_context

        context = build_cp_context(ends, dist.group.WORLD)
    except Exception as error:  # a peer's failure is its own
        return [], one_line(error, 200)
    return drop_in(case, context, None, device)[0], None


def _print(rows: list[dict[str, Any]], title: str, not_run: str | None, stderr: bool) -> None:
    """not_run: why there is no row of FLA's context."""
    cells = [
        (
            row["case"], row["tensor"], output.fmt_sci(row["error"]), output.fmt_sci(row["one_rank"]),
            output.fmt_sci(row["bound"]),
            output.good("ok") if row["passed"] else output.bad("FAIL"), row["note"],
        )
        for row in rows
    ]  # fmt: skip
    columns = ("case", "tensor", "error", "one rank", "bound", "", "note")
    output.console(stderr).print(output.table(title, columns, cells))
    larger = max(row["error"] / row["one_rank"] for row in rows if row["one_rank"])
    output.say(f"errors are at most {larger:.2f} times those of the same batch on one rank", stderr=stderr)
    if not_run is not None:
        output.say(f"not run: chunk_kda with FLA's own context: {not_run}", stderr=stderr)
