"""`kda verify --cp`: every case over all ranks; rank 0 judges and prints."""

from typing import Any

import torch.distributed as dist

from kda_kernels.errors import CheckFailedError
from kdacli import output, provenance
from kdacli.parallel.checks import cases, judged, prefilled
from kdacli.parallel.ranks import joined

SCHEMA = "kda.verify-cp/1"


def verify(device: str, json_dest: str | None, force: bool) -> None:
    """Raises `CheckFailedError` on rank 0 where a case is wrong."""
    if device == "cpu":
        from kdacli.interpreter import quicken

        quicken()
    rows: list[dict[str, Any]] = []
    with joined(device) as (rank, ranks):
        for name, case in cases(ranks, device).items():
            inputs = case.inputs(device)
            parts = prefilled(case, inputs, None)
            if rank == 0:
                verdicts, wrong = judged(case, inputs, parts)
                rows += [
                    {
                        "case": name, "tensor": v.tensor, "error": v.error, "bound": v.bound,
                        "passed": v.passed and not wrong, "note": "; ".join(filter(None, (v.note, wrong))),
                    }
                    for v in verdicts
                ]  # fmt: skip
            dist.barrier()
        if rank:
            return
        _print(rows, ranks, device, dist.get_backend())
        if json_dest is not None:
            head = {"schema": SCHEMA, "provenance": provenance.collect(5), "ranks": ranks, "device": device}
            output.write_json({**head, "rows": rows}, json_dest, force)
        failed = {row["case"] for row in rows if not row["passed"]}
        if failed:
            raise CheckFailedError(
                f"{len(failed)} of {len(cases(ranks, device))} cases failed: {', '.join(sorted(failed))}"
            )


def _print(rows: list[dict[str, Any]], ranks: int, device: str, backend: str) -> None:
    cells = [
        (
            row["case"], row["tensor"], output.fmt_sci(row["error"]), output.fmt_sci(row["bound"]),
            output.good("ok") if row["passed"] else output.bad("FAIL"), row["note"],
        )
        for row in rows
    ]  # fmt: skip
    columns = ("case", "tensor", "error", "bound", "", "note")
    output.console().print(output.table(f"prefill over {ranks} ranks, {backend} on {device}", columns, cells))
