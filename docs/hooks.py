"""What the site makes from the code and the records when it is built: speed, the report, and every help page."""

import re
from pathlib import Path
from typing import Any

import click
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks"
# Suites on the page "Speed": record, what it shows.
SPEED = {
    "prefill-h100": "Prefill with a bounded gate, P1 to P7, by gate regime",
    "prefill-h200": "The same on an H200",
    "prefill-softplus-h200": "Prefill with the softplus gate, P1 to P7, on an H200",
    "prefill-softplus-peers-h200": "The same beside FLA and SGLang, not tuned, gates of a new layer",
    "prefill-nvidia-h200": "Prefill at the shapes of NVIDIA's benchmark, on an H200, bench gates",
    "decode-h100": "Decode, fp32 states",
    "decode-h200": "The same on an H200",
    "decode-bf16-h100": "Decode, bf16 states",
    "decode-states-h200": "Decode on an H200, states in two bytes",
    "step-h200": "The fused decode step, on an H200",
    "step-bf16-h200": "The same, bf16 states",
}


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made anew at each build."""
    from kdacli.report import page
    from kdacli.report.records import read, shown

    found = {path.stem: shown(read(str(path))) for path in sorted(RECORDS.glob("*.json"))}
    report = page.render([part for parts in found.values() for part in parts], "Every record of kda")
    charts = {name: parts[0].charts for name, parts in found.items()}
    add = {"speed.md": _speed(charts), "cli.md": _cli(), "records/report.html": report}
    for name, content in add.items():
        files.append(File.generated(config, name, content=content))
    return files


def _speed(charts: dict[str, list[str]]) -> str:
    """Times beside peers, from the records and their charts."""
    from kdacli.profile.records import record
    from kdacli.profile.records.row import timed

    lines = ["# Speed", ""]
    lines += [
        "Each chart and table is drawn from a record in `benchmarks/` when this page is built. A record holds the GPU, "
        "the versions, the commit and the command; all of its figures: [every record](report.md).",
        "",
    ]
    for name, title in SPEED.items():
        if name not in charts:
            continue
        found = record.read(str(RECORDS / f"{name}.json"))
        rows = timed(found.rows)
        kernels = list(dict.fromkeys(row.kernel for row in rows))
        date = str(found.provenance.get("date"))[:10]
        lines += [f"## {title}", "", f"{found.gpu.get('name')}, commit `{found.commit}`, {date}:", ""]
        lines += [f"    {found.provenance.get('command')}", "", '<div class="charts" markdown="0">']
        lines += [*charts[name], "</div>", "", f"us per call | {' | '.join(kernels)}", "--- |" * len(kernels) + " ---"]
        for case, gates in dict.fromkeys((row.case, row.gates) for row in rows):
            by_kernel = {row.kernel: row.median_us for row in rows if (row.case, row.gates) == (case, gates)}
            cells = [f"{by_kernel[kernel]:.4g}" if kernel in by_kernel else "-" for kernel in kernels]
            lines.append(f"{case}, {gates} | {' | '.join(cells)}")
        lines.append("")
    return "\n".join(lines)


def _cli() -> str:
    """The help of every command."""
    from kdacli.main import COMMANDS, cli

    lines = ["# Command line", ""]
    for name in COMMANDS:
        with click.Context(cli, info_name="kda") as parent:
            command = cli.get_command(parent, name)
            assert command is not None
            ctx = click.Context(command, info_name=name, parent=parent, max_content_width=100)
            ctx.meta["kdacli.help-all"] = True
            text = command.get_help(ctx)
        lines += [f"## kda {name}", "", "```text", re.sub(r"\x1b\[[0-9;]*m", "", text), "```", ""]
    return "\n".join(lines)
