"""The tables of `kda compile`."""

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kda_kernels.problem import Problem
from kdacli import output

if TYPE_CHECKING:
    from kdacli.compile.baseline import Change

Row = dict[str, Any]
RESOURCES = ("regs", "spill", "shared", "warps", "per SM", "kB", "s")
SASS = ("instr", "MMA", "async", "LDG.128", "STG.128", "smem.128", "local", "BAR")
ISA = ("instr", "MFMA", "mem x4", "LDS b128", "scratch", "BAR")
LIMITS = {"registers": "regs", "tensor memory": "tmem"}  # shorter words for the table


def show(rows: Sequence[Row], with_sass: bool, stderr: bool = False) -> None:
    """Prints the tables of each kernel, and under them a line for everything that went wrong."""
    console = output.console(stderr)
    several = len({row["arch"] for row in rows}) > 1
    for kernel, group in itertools.groupby(rows, lambda row: row["kernel"]):
        mine = list(group)
        title = f"{kernel}{_problem(mine[0])}{'' if several else ', ' + mine[0]['arch']}"
        console.print(_table(title, RESOURCES, mine, _resources, several))
        if with_sass:
            nvidia = [row for row in mine if row.get("sass")]
            amd = [row for row in mine if row.get("isa")]
            for counted, columns, cells in ((nvidia, SASS, _sass), (amd, ISA, _isa)):
                if counted:
                    console.print(_table(f"{kernel}, instructions", columns, counted, cells, several))
    for row in rows:
        for what in ("error", "unsupported", "note", "sass_error"):
            if what in row:
                output.say(f"{row['kernel']} {row['variant']} {row['arch']}: {row[what]}", stderr=stderr)


def stuck(rows: Sequence[Row]) -> list[Row]:
    """What compiled and cannot be launched: of an autotuned function, if no configuration of it can."""

    def function(row: Row) -> tuple:
        return row["kernel"], row["arch"], row["variant"].rpartition(" ")[0] if row.get("tuned") else row["variant"]

    launched = {function(row) for row in rows if "binary_bytes" in row and "note" not in row}
    return [row for row in rows if "note" in row and function(row) not in launched]


def show_changes(changes: "Sequence[Change]", name: str, compared: int, stderr: bool = False) -> None:
    """Prints what is not as in the baseline called `name`; `compared` rows were looked at."""
    if not changes:
        output.say(f"no difference to {name} in {compared} variants", stderr=stderr)
        return
    rows, last = [], None
    for change in changes:
        label = [change.kernel, change.variant, change.arch]
        now = change.now if change.fatal is None else output.bad(change.now)
        rows.append([*(label if label != last else ["", "", ""]), change.what, change.before, now, _by(change)])
        last = label
    columns = ("kernel", "variant", "arch", "what", "before", "now", "by")
    output.console(stderr).print(output.table(f"against {name}", columns, rows))
    for change in changes:
        if change.fatal is not None:
            output.say(f"{change.kernel} {change.variant} {change.arch}: {change.what}: {change.fatal}", stderr=stderr)


def summary(rows: Sequence[Row], folders: Mapping[str, str | None] | None) -> list[str]:
    """A line for each cache that anything could go to: how much was compiled, and where it is.

    Args:
        folders: by backend, where what was compiled lies; None: nothing was kept on purpose.
    """
    compiled = [row for row in rows if "binary_bytes" in row]
    if folders is None:
        return [f"{len(compiled)} compiled; the cache was left alone"]
    lines = []
    for folder in dict.fromkeys(folders.values()):
        if all("unsupported" in row for row in rows if folders.get(row["backend"]) == folder):
            continue
        mine = [row for row in compiled if folders[row["backend"]] == folder]
        cached = sum(row["cached"] for row in mine)
        where = folder or "nothing is kept, KDA_CACHE_DIR is empty"
        lines.append(f"{len(mine) - cached} compiled, {cached} taken from the cache: {_tilde(where)}")
    return lines


def _by(change: "Change") -> str:
    if not isinstance(change.before, int) or not isinstance(change.now, int):
        return "-"
    return f"{change.now - change.before:+d}"


def _problem(row: Row) -> str:
    """For a title: what was compiled for, as far as a kernel depends on it most."""
    if not row.get("problem"):
        return ""
    problem = Problem.from_dict(row["problem"])
    layout = "packed" if problem.packed else "dense"
    return f", {problem.name} K={problem.K} V={problem.V} {problem.dtype} {layout}, {problem.options.gate} gate"


def _table(title: str, columns: Sequence[str], rows: Sequence[Row], cells: Any, several: bool) -> Any:
    """Rows by variant; their architectures too where there are several."""
    head = ("variant", "arch") if several else ("variant",)
    out, last = [], None
    for row in rows:
        name = row["variant"] if row["variant"] != last else ""
        last = row["variant"]
        out.append([name, *([row["arch"]] if several else []), *cells(row)])
    return output.table(title, [*head, *columns], out)


def _resources(row: Row) -> list[object]:
    if "binary_bytes" not in row:
        return [output.bad("-") if "error" in row else output.dim("-"), *[None] * (len(RESOURCES) - 1)]
    spill, shared = row["spill_bytes"], row["shared_bytes"]
    return [
        row["registers"],
        output.bad(spill) if spill else spill,
        output.bad(shared) if "note" in row else shared,
        row["num_warps"],
        f"{row['resident_blocks']} {LIMITS.get(row['limited_by'], row['limited_by'])}" if "limited_by" in row else None,
        f"{row['binary_bytes'] / 1000:.1f}",
        None if row["cached"] else f"{row['compile_s']:.1f}",
    ]


def _sass(row: Row) -> list[object]:
    counts = row["sass"]

    def wide(*names: str) -> str:
        return f"{sum(counts[name + '.128'] for name in names)}/{sum(counts[name] for name in names)}"

    return [
        counts["instructions"],
        counts["tensor"],
        counts["bulk"] + counts["LDGSTS"],
        wide("LDG"),
        wide("STG"),
        wide("LDS", "STS"),
        output.bad(counts["local"]) if counts["local"] else 0,
        counts["BAR"] + counts["SYNCS"],
    ]


def _isa(row: Row) -> list[object]:
    counts = row["isa"]
    scratch = output.bad(counts["scratch"]) if counts["scratch"] else 0
    return [counts["instructions"], counts["MFMA"], counts["global_x4"], counts["lds_b128"], scratch, counts["barrier"]]


def _tilde(where: str) -> str:
    """A path in the user's home as a shell would take it."""
    home = str(Path.home())
    return f"~{where[len(home) :]}" if where.startswith(home + os.sep) else where
