"""`kda engines`: where our kernels run in serving engines, and why not elsewhere."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from kda_kernels.errors import InputError
from kdacli import options

SWITCHES = {"sglang": "sglang serve --linear-attn-backend kda --linear-attn-verify-backend kda", "vllm": "KDA_VLLM=1"}


@click.command("engines")
@click.option(
    "--sources", metavar="DIR", type=click.Path(exists=True, file_okay=False), help="Of wheels unpacked there instead."
)
@options.json_option
@options.force_option
def command(sources: str | None, json_dest: str | None, force: bool) -> None:
    """List the KDA calls of SGLang and vLLM, and say which of them ours replace and why not the others.

    The engines that are installed are read, not imported or changed: this says what would be replaced once an engine is
    started with the switch that stands above its table. What runs then is what `kda kernels` says runs here. --json has
    the rows of engines that are not installed, too.

    \b
    Examples:
      kda engines
      kda engines --sources DIR      of the Python files of wheels, unpacked: DIR/vllm/..., DIR/sglang/...
    """
    from kdacli.output import check_dest, write_json
    from kdacli.provenance import collect

    check_dest(json_dest, force)
    root = Path(sources) if sources else None
    from kda_kernels.engines.sites import absence

    absent = {engine: absence(engine, root) for engine in SWITCHES}
    if sources and all(absent.values()):
        raise InputError(f"--sources {sources}: it holds none of {', '.join(SWITCHES)}, as a wheel's unpacked files do")
    rows = survey(root)
    if json_dest:
        write_json({"schema": "kda.engines/1", "provenance": collect(), "rows": rows}, json_dest, force)
    if json_dest != "-":
        _print(rows, absent)


def survey(root: Path | None = None) -> list[dict[str, Any]]:
    """One row per call site: engine, models, what, target, ours (None where there is nothing), replaced, note."""
    from kda_kernels.engines import sglang, sites, vllm

    rows = []
    for engine, table in (("sglang", sglang.SITES), ("vllm", vllm.SITES)):
        for site, reason in sites.reasons(table, root).items():
            rows.append(
                {
                    "engine": engine,
                    "models": site.models,
                    "what": site.what,
                    "target": site.target,
                    "ours": site.ours or None,
                    "replaced": reason is None,
                    "note": reason,
                }
            )
    return rows


def _print(rows: list[dict[str, Any]], absent: Mapping[str, str | None]) -> None:
    from kdacli.output import bad, console, good, say, table

    for engine, switch in SWITCHES.items():
        mine = [row for row in rows if row["engine"] == engine]
        if reason := absent[engine]:
            say(f"{reason}: --sources DIR reads its wheel, unpacked")
            continue
        cells = [
            (
                row["models"],
                row["what"],
                row["target"].rpartition(":")[2],
                good("yes") if row["replaced"] else bad("no"),
            )
            for row in mine
        ]
        console().print(table(f"{engine}, with {switch}", ("models", "what", "call", "ours?"), cells))
        reasons: dict[str, list[str]] = {}
        for row in mine:
            if not row["replaced"]:
                reasons.setdefault(row["note"], []).append(row["target"].rpartition(":")[2])
        for reason, names in reasons.items():
            say(f"not {', '.join(dict.fromkeys(names))}: {reason}")
