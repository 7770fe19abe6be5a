"""Rows as tables for people. Knows nothing of where they came from."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kdacli import output
from kdacli.profile.records.layer import LayerCosts
from kdacli.profile.records.record import Record
from kdacli.profile.records.row import FailedRow, Refusal, Row, TimedRow, failed, timed
from kdacli.profile.reporting.columns import fitting

if TYPE_CHECKING:
    from rich.table import Table

_LONGEST_NAME = 60
_SPARE = ("samples", "TFLOP/s", "call MB", "spread", "GB/s", "95%", "host us", "host new")


def tables(rows: Sequence[Row]) -> "Iterator[tuple[Table, list[str]]]":
    """For each op its times, and the columns there was no room for.

    With several gate regimes: a table of times with a column a regime, and one of how they compare.
    """
    for op in dict.fromkeys(row.op for row in rows):
        mine = [row for row in rows if row.op == op]
        regimes = list(dict.fromkeys(row.gates for row in mine))
        if len(regimes) == 1:
            yield _one_regime(f"{op}, {gates_named(regimes[0])}{_method(mine)}", mine)
        else:
            yield _times(f"{op}: us in each gate regime{_method(mine)}", mine, regimes)
            if _compared(mine):
                yield _speeds(f"{op}: speed against {_reference(mine, long=True)}", mine, regimes)


def _compared(rows: Sequence[Row]) -> bool:
    """Whether anything is held against anything else."""
    return any(row.vs and row.vs.supported is not None for row in timed(rows))


def gates_named(regime: str) -> str:
    return "the dump's gates" if regime == "dump" else f"{regime} gates"


def _method(rows: Sequence[Row]) -> str:
    """How the times were taken, where all were taken alike."""
    ways = {(row.mode, row.cache) for row in timed(rows)}
    if len(ways) != 1:
        return ""
    mode, cache = ways.pop()
    return f", {'CUDA graph' if mode == 'graph' else 'eager calls'}, L2 {cache}"


def _reference(rows: Sequence[Row], long: bool = False) -> str:
    if any(row.vs.best_peer for row in timed(rows) if row.vs):
        return "the best peer" if long else "vs best peer"
    return "the first kernel" if long else "vs first"


def _one_regime(title: str, rows: Sequence[Row]) -> "tuple[Table, list[str]]":
    columns = list(_cells([])) + ["TFLOP/s", "GB/s", "ceiling"]
    columns += [_reference(rows)] if _compared(rows) else []
    columns += [] if _method(rows) else ["mode"]
    lines, before = [], None
    for row in rows:
        cells: dict[str, object] = {"us": _time(row)}
        if isinstance(row, TimedRow):
            cells |= _cells([row]) | {
                "TFLOP/s": f"{row.tflops:.3g}" if row.tflops else None,
                "GB/s": f"{row.gbps:.0f}",
                "ceiling": f"{row.share:.0%}",
                "vs best peer": speedup(row),
                "vs first": speedup(row),
                "mode": f"{row.mode}, {row.cache}",
            }
        lines.append(["" if row.case == before else row.case, row.kernel, *(cells.get(n) for n in ["us", *columns])])
        before = row.case
    return fitting(title, ["case", "kernel", "us", *columns], lines, _SPARE)


def _cells(rows: Sequence[TimedRow]) -> dict[str, object]:
    """By column, of a kernel at a case: of several gate regimes the worst of each."""
    new = [row.host_new_us for row in rows if row.host_new_us is not None]
    taken = [row.call_bytes for row in rows if row.call_bytes is not None]
    return {
        "95%": _most([(row.high_us - row.low_us) / 2 / row.median_us for row in rows], ".1%"),
        "spread": _most([row.spread_us / row.median_us for row in rows], ".1%"),
        "samples": min((row.samples for row in rows), default=None),
        "host us": output.fmt_us(max((row.host_us for row in rows), default=None)),
        "host new": output.fmt_us(max(new, default=None)),
        "call MB": f"{max(taken) / 1e6:.3g}" if taken else None,
    }


def _most(values: Sequence[float], form: str) -> str | None:
    return format(max(values), form) if values else None


def speedup(row: TimedRow) -> object:
    """1.88x ±0.3%, dim and with a ? where the noise does not support a difference; None for the reference itself."""
    if not row.vs or row.vs.supported is None:
        return None
    text = f"{row.vs.speedup:.2f}x ±{(row.vs.high - row.vs.low) / 2 / row.vs.speedup:.1%}"
    return f"{text}  " if row.vs.supported else output.dim(f"{text} ?")


def _by_regime(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """(case, kernel) -> regime -> row."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row.case, row.kernel), {})[row.gates] = row
    return found


def _times(title: str, rows: Sequence[Row], regimes: Sequence[str]) -> "tuple[Table, list[str]]":
    lines, before = [], None
    for (case, kernel), by in _by_regime(rows).items():
        good = timed(list(by.values()))
        share = f"{min(row.share for row in good):.0%}" if good else None
        times = [_time(by[regime]) if regime in by else None for regime in regimes]
        lines.append(["" if case == before else case, kernel, *times, *_cells(good).values(), share])
        before = case
    return fitting(title, ["case", "kernel", *regimes, *_cells([]), "ceiling"], lines, _SPARE)


def _time(row: Row) -> object:
    if isinstance(row, TimedRow):
        return output.fmt_us(row.median_us)
    return output.bad("wrong" if isinstance(row, FailedRow) and row.output_error is not None else "failed")


def _speeds(title: str, rows: Sequence[Row], regimes: Sequence[str]) -> "tuple[Table, list[str]]":
    lines, before = [], None
    for (case, kernel), by in _by_regime(rows).items():
        cells = [speedup(row) if isinstance(row := by.get(regime), TimedRow) else None for regime in regimes]
        lines.append(["" if case == before else case, kernel, *cells])
        before = case
    return fitting(title, ["case", "kernel", *regimes], lines)


def notes(rows: Sequence[Row], refused: Sequence[Refusal]) -> list[str]:
    """What the tables cannot hold: errors, why a time is not a graph's, and kernels that cannot run."""
    lines = [f"{row.kernel} failed at {row.case} {row.gates}: {row.error}" for row in failed(rows)]
    lines += [f"{row.kernel} is timed eagerly: {row.note}" for row in timed(rows) if row.note]
    lines += [f"{refusal.kernel} cannot run: {refusal.reason}" for refusal in refused]
    return list(dict.fromkeys(lines))


def footer(record: Record, left_out: Sequence[str] = ()) -> list[str]:
    """On what, against what and how it was measured; `left_out` are columns that the terminal was too narrow for."""
    good, ceilings = timed(record.rows), record.ceilings
    lines = [_gpu_line(record.gpu)] if record.gpu else []
    lines += [line for line in (_clocks_line(good), record.not_watched) if line]
    product = f"bf16 products {ceilings.tensor_tflops:.0f} TFLOP/s; " if ceilings.tensor_tflops else ""
    lines.append(
        f"Ceilings measured in the same run: copy {ceilings.copy_gbps:.0f} GB/s (prefill and gate), in place "
        f"{ceilings.inplace_gbps:.0f} GB/s (decode); {product}the least any kernel takes: {ceilings.least_us:.1f} us."
    )
    if good:
        counts = sorted(row.samples for row in good)
        many = f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
        caches = " and ".join(dict.fromkeys(row.cache for row in good))
        lines.append(
            f"us: median of {many} samples, L2 {caches}. 95%: how far off it may be. Spread: 10th to 90th percentile. "
            "Host: CPU time of an eager call, its output allocated; host new: at a shape not seen before; call MB: "
            "what it takes of torch's memory. GB/s: bytes that must move once; ceiling: their share of it."
        )
        lines += _comparison_lines(good)
    return lines + left_out_lines(left_out)


def left_out_lines(names: Sequence[str]) -> list[str]:
    """Names the columns that the terminal was too narrow for, if any."""
    named = ", ".join(dict.fromkeys(names))
    return [f"No room for: {named} (a wider terminal or --json has them)."] if named else []


def _comparison_lines(rows: Sequence[TimedRow]) -> list[str]:
    if not _compared(rows):
        return []
    line = "vs: how many times as fast, 2x is half the time; ?: the noise does not support a difference."
    repeats = [row.repeat for row in rows if row.repeat is not None]
    return [line + (f" The same kernel timed twice differed by up to {max(repeats):.1%}." if repeats else "")]


def _gpu_line(gpu: dict[str, Any]) -> str:
    line = f"{gpu.get('name')}, driver {gpu.get('driver')}"
    for title, key in (("SM", "sm_clock"), ("memory", "memory_clock")):
        now, most = gpu.get(f"{key}_mhz"), gpu.get(f"{key}_max_mhz")
        if isinstance(now, int | float) and isinstance(most, int | float):
            line += f", {title} {now:.0f} of {most:.0f} MHz"
    return line + "."


def _clocks_line(rows: Sequence[TimedRow]) -> str | None:
    """The clocks seen while timing, over all cases."""
    seen = list({(row.case, row.gates): row.clocks for row in rows if row.clocks}.values())
    if not seen:
        return None
    parts = []
    for title, clocks in (("SM", [c.sm_mhz for c in seen]), ("memory", [c.memory_mhz for c in seen])):
        low, high = min(map(min, clocks)), max(map(max, clocks))
        parts.append(f"{title} {low:.0f} MHz" if low == high else f"{title} {low:.0f} to {high:.0f} MHz")
    power, heat = max(c.power_w for c in seen), max(c.temperature_c for c in seen)
    line = f"While timing: {', '.join(parts)}, up to {power:.0f} W and {heat:.0f} C; "
    reasons = sorted({reason for c in seen for reason in c.throttle})
    if not reasons:
        return line + "nothing throttled."
    slowed = sum(bool(c.throttle) for c in seen)
    return line + f"throttled in {slowed} of {len(seen)} cases: {', '.join(reasons)}."


def stage_tables(rows: Sequence[Row]) -> "Iterator[Table]":
    """One table for each row that has stages; times are of one eager call."""
    for row in timed(rows):
        if row.stages is None:
            continue
        total = sum(stage.us for stage in row.stages)
        lines = [
            [s.stage, short(s.kernel), f"{s.launches:g}", output.fmt_us(s.us), f"{s.us / total:.0%}"]
            for s in row.stages
        ]
        title = f"{row.kernel} at {row.case} {row.gates}: {output.fmt_us(total)} us in kernels"
        yield output.table(title, ("stage", "CUDA kernel", "launches", "us", "share"), lines)


def layer_tables(layer: LayerCosts) -> "Iterator[Table]":
    """What KDA costs a model, an op a table."""
    for op in dict.fromkeys(row.op for row in layer.rows):
        rows = [row for row in layer.rows if row.op == op]
        what = f"{op} of {rows[0].tokens} {'tokens' if op == 'prefill' else 'sequences'}"
        what += " with convolution and norm" if op == "step" else ""
        title = f"{layer.model}, TP {layer.tp}, {layer.kda_layers} KDA layers, {what}"
        lines = [
            [
                r.gates, r.kernel, output.fmt_us(r.layer_us), f"{r.ms:.{_digits(r.ms)}f}",
                f"{(r.high_ms - r.low_ms) / 2:.{_digits(r.ms)}f}", f"{r.tokens_per_ms:.1f}",
            ]
            for r in rows
        ]  # fmt: skip
        names = ["gates", "kernel", "us per layer", "ms", "± ms", "tokens/ms"]
        if any(r.saved_ms is not None for r in rows):
            names.append("saved ms")
            lines = [
                [*line, "-" if r.saved_ms is None else f"{r.saved_ms:.{_digits(r.ms)}f}"]
                for line, r in zip(lines, rows, strict=True)
            ]
        yield output.table(title, names, lines)


def _digits(ms: float) -> int:
    """After the point: an interval of a hundredth of a millisecond counts where there are few."""
    return 3 if ms < 10 else 2


def nsys_tables(kernels: Sequence[dict[str, Any]], ranges: Sequence[dict[str, Any]]) -> "Iterator[Table]":
    """What Nsight Systems saw: kernels by GPU time, and the ranges of calls and stages."""
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
        "Ranges, mean of each",
        ("range", "instances", "launches", "GPU us", "host us"),
        [
            [
                r["range"],
                r["instances"],
                f"{r['launches']:.3g}",
                output.fmt_us(r["gpu_us"]),
                output.fmt_us(r["host_us"]),
            ]
            for r in ranges
        ],
    )


def nsys_notes(cases: int, payloads: bool) -> list[str]:
    """What must be known to read `nsys_tables`.

    Args:
        cases: how many were run.
        payloads: whether ranges carry their shapes.
    """
    together = f" All {cases} cases are taken together: for figures of one, run one." if cases > 1 else ""
    shapes = "each range of the domain kda has its shape as payload" if payloads else (
        "each range would have its shape as payload with a newer package nvtx: pip install -U nvtx"
    )  # fmt: skip
    return [
        f"Eager calls, the L2 cache emptied before each.{together}",
        "GPU us of a range: from its first kernel's start to its last one's end, with the gaps that launching leaves.",
        f"In nsys-ui {shapes}.",
    ]


def short(name: str) -> str:
    """A kernel's name without what would fill a line: templates make names of hundreds of letters."""
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 3] + "..."
