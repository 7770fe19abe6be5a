"""Rows as tables for people. Knows the rows' keys, nothing of where they came from."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kdacli import output

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("case", "gates", "kernel", "us", "spread", "GB/s", "ceiling", "vs first", "mode")
_LONGEST_NAME = 60


def tables(rows: Sequence[dict[str, Any]]) -> "Iterator[Table]":
    """One table of times for each op."""
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = [row for row in rows if row["op"] == op]
        yield output.table(op, COLUMNS, list(_lines(mine)))


def _lines(rows: Sequence[dict[str, Any]]) -> Iterator[list[object]]:
    first: dict[tuple[str, str], dict[str, Any]] = {}  # the first kernel of each case that has a time
    before = None
    for row in rows:
        case = (row["case"], row["gates"])
        shown = ("", "") if case == before else case
        before = case
        if "error" in row:
            yield [*shown, row["kernel"], output.bad("failed"), None, None, None, None, None]
            continue
        reference = first.setdefault(case, row)
        yield [
            *shown,
            row["kernel"],
            output.fmt_us(row["median_us"]),
            f"{row['spread_us'] / row['median_us']:.1%}",
            f"{row['gbps']:.0f}",
            f"{row['share']:.0%}",
            f"{row['median_us'] / reference['median_us']:.2f}x",
            row["mode"],
        ]


def notes(rows: Sequence[dict[str, Any]], refused: Sequence[dict[str, Any]]) -> list[str]:
    """What the tables cannot hold: errors, why a time is not a graph's, and kernels that cannot run."""
    lines = [f"{r['kernel']} failed at {r['case']} {r['gates']}: {r['error']}" for r in rows if "error" in r]
    lines += [f"{r['kernel']} is timed eagerly: {r['note']}" for r in rows if r.get("note")]
    lines += [f"{r['kernel']} cannot run: {r['reason']}" for r in refused]
    return list(dict.fromkeys(lines))


def footer(record: dict[str, Any]) -> list[str]:
    """On what, against what and how it was measured."""
    timed = [row for row in record["rows"] if "error" not in row]
    gpu, ceilings = record["provenance"].get("gpu"), record["ceilings"]
    lines = [_gpu_line(gpu)] if gpu else []
    lines.append(
        f"Ceilings measured now: copy {ceilings['copy_gbps']:.0f} GB/s (prefill and gate), in place "
        f"{ceilings['inplace_gbps']:.0f} GB/s (decode); the least any kernel takes: {ceilings['least_us']:.1f} us."
    )
    if timed:
        counts = sorted(row["samples"] for row in timed)
        many = f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
        lines.append(
            f"Median of {many} samples, L2 {timed[0]['cache']}; spread: 10th to 90th percentile. "
            "GB/s: bytes that must move once."
        )
    return lines


def _gpu_line(gpu: dict[str, Any]) -> str:
    line = f"{gpu.get('name')}, driver {gpu.get('driver')}"
    for title, key in (("SM", "sm_clock"), ("memory", "memory_clock")):
        now, most = gpu.get(f"{key}_mhz"), gpu.get(f"{key}_max_mhz")
        if isinstance(now, int | float) and isinstance(most, int | float):
            line += f", {title} {now:.0f} of {most:.0f} MHz"
    return line + "."


def stage_tables(rows: Sequence[dict[str, Any]]) -> "Iterator[Table]":
    """One table for each row that has stages; times are of one eager call."""
    for row in rows:
        if "stages" not in row:
            continue
        total = sum(stage["us"] for stage in row["stages"])
        lines = [
            [s["stage"], short(s["kernel"]), f"{s['launches']:g}", output.fmt_us(s["us"]), f"{s['us'] / total:.0%}"]
            for s in row["stages"]
        ]
        title = f"{row['kernel']} at {row['case']} {row['gates']}: {output.fmt_us(total)} us in kernels"
        yield output.table(title, ("stage", "CUDA kernel", "launches", "us", "share"), lines)


def nsys_tables(kernels: Sequence[dict[str, Any]], ranges: Sequence[dict[str, Any]]) -> "Iterator[Table]":
    """What Nsight Systems saw: kernels by GPU time, and the ranges with the GPU time under each."""
    total = sum(row["total_us"] for row in kernels)
    yield output.table(
        "Kernels, named range and kernel",
        ("kernel", "launches", "median us", "total us", "share"),
        [
            [short(r["kernel"]), r["launches"], output.fmt_us(r["median_us"]), output.fmt_us(r["total_us"]),
             f"{r['total_us'] / total:.0%}"]
            for r in kernels
        ],
    )  # fmt: skip
    yield output.table(
        "Ranges",
        ("range", "instances", "GPU us", "host us"),
        [[r["range"], r["instances"], output.fmt_us(r["gpu_us"]), output.fmt_us(r["host_us"])] for r in ranges],
    )


def short(name: str) -> str:
    """A kernel's name without what would fill a line: templates make names of hundreds of letters."""
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 3] + "..."
