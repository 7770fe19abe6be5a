"""What `kda profile` does once its flags are understood: time and show, or run itself under a profiler."""

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kda_kernels.errors import UnavailableError
from kda_kernels.registry import Kernel
from kdacli import output
from kdacli.profile import (
    baseline,
    ceilings,
    chrome,
    gpu_timer,
    halflife,
    inner,
    layer,
    ncu,
    nsys,
    nvtx,
    plot,
    report,
    report_baseline,
    report_ncu,
    report_sweep,
    watch,
)
from kdacli.profile.cases import Load
from kdacli.profile.measure import Method
from kdacli.profile.record import SCHEMA, Record, Saver, records, require_complete, require_smooth
from kdacli.profile.select import require_runnable
from kdacli.profile.stages import StageProfiler
from kdacli.profile.suites import Case
from kdacli.profile.timing import Budget
from kdacli.profile.trace import Ranges, trace
from kdacli.provenance import collect

if TYPE_CHECKING:
    from rich.table import Table

Params = dict[str, Any]


def require_gpu(cases: Sequence[Case], kernels: Sequence[Kernel]) -> None:
    """Raises `UnavailableError` where nothing could be timed."""
    if not torch.cuda.is_available():
        raise UnavailableError("kda profile needs a CUDA GPU and there is none: kda verify and kda compare do without")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UnavailableError("TRITON_INTERPRET=1 is set, so Triton would interpret its kernels: unset it")
    require_runnable(cases, kernels)


def timed(cases: Sequence[Case], load: Load, kernels: Sequence[Kernel], params: Params, before: Record | None) -> None:
    """Times the kernels, writes the record as it grows, and shows it.

    Raises:
        CheckFailedError: a kernel failed, a sweep's point sticks out (with --bump), or there is a regression.
        UnavailableError: a kernel asked for by name could run nowhere.
    """
    provenance = functools.partial(collect, params["seed"] or 0)
    if before is not None:
        baseline.require_same_gpu(before["provenance"], provenance())
    timer = gpu_timer.GpuTimer(cold=not params["warm"], graph=not params["eager"])
    method, extra = _method(timer, params)
    if params["dump"]:
        extra["half_lives"] = halflife.half_lives(load(cases[0]))
    record = _recorded(records(cases, load, kernels, method, provenance), len(cases), extra, params)
    if params["json_dest"] == "-":
        output.write_json(record, "-")
    trace_dest = params["trace_dest"]
    finish(
        record,
        params,
        before,
        (lambda: chrome.write(Path(trace_dest), cases, load, kernels, timer.evict)) if trace_dest else None,
    )
    require_complete(record, params["kernels"])


def _method(timer: gpu_timer.GpuTimer, params: Params) -> tuple[Method, Record]:
    """How to measure, and what the record should say of it."""
    read_clocks, not_watched = watch.nvml_reader()
    method = Method(
        timer,
        ceilings.measure(timer.prepare),
        Budget(params["seconds"]),
        StageProfiler(timer.evict) if params["stages"] else None,
        repeat=not params["sweep"],  # the points of a sweep say enough of each other
        **({"watch": watch.Watch(read_clocks)} if read_clocks else {}),
    )
    return method, {"not_watched": not_watched} if not_watched else {}


def _recorded(growing: Any, cases: int, extra: Record, params: Params) -> Record:
    """The whole record of `records`, written to --json on the way."""
    dest, save, record = params["json_dest"], None, {}
    if dest not in (None, "-"):
        save = Saver(lambda whole, force: output.write_json(whole, dest, force), params["force"])
    with output.progress("profile", total=cases) as advance:
        for record in growing:
            advance()
            record |= extra
            if record["complete"] and params["layer"]:
                record["layer"] = layer.costs(params["layer"], params["tp"] or 1, record["rows"])
            if save:
                save(record)
    return record


def finish(
    record: Record, params: Params, before: Record | None, write_trace: Callable[[], None] | None = None
) -> None:
    """Prints a whole record, draws, traces and compares it, and raises where it breaks what was asked of it.

    Raises:
        CheckFailedError: a sweep's point sticks out (with --bump), or there is a regression.
        InputError: the baseline is of another GPU.
    """
    _show(record, params["json_dest"])
    out = output.console(stderr=params["json_dest"] == "-")
    if params["plot"]:
        plot.draw(record, params["plot"])
        out.print(f"Written: {params['plot']}", markup=False, soft_wrap=True)
    if write_trace is not None:
        write_trace()
        out.print(f"Written: {params['trace_dest']}; open it at https://ui.perfetto.dev", markup=False, soft_wrap=True)
    changes = []
    if before is not None:
        baseline.require_same_gpu(before["provenance"], record["provenance"])
        changes = baseline.compare(before, record)
        out.print(report_baseline.table(changes))
        for line in report_baseline.notes(changes, before, record):
            out.print(line, markup=False)
    if params["bump"] is not None:
        require_smooth(record, params["bump"] / 100)
    if before is not None:
        baseline.require_no_regression(changes)


def _show(record: Record, dest: str | None) -> None:
    rows, swept = record["rows"], "sweep" in record
    both = list((report_sweep if swept else report).tables(rows))
    tables = [table for table, _ in both] + list(report.stage_tables(rows))
    if "layer" in record:
        tables += report.layer_tables(record["layer"])
    lines = halflife.lines(record["half_lives"]) if "half_lives" in record else []
    lines += report.notes(rows, record["refused"])
    lines += report_sweep.notes(rows) if swept else []
    lines += report.footer(record, [name for _, missing in both for name in missing])
    _print(tables, lines, dest)


def _print(tables: "Sequence[Table]", lines: Sequence[str], dest: str | None) -> None:
    """On stdout, or on stderr where stdout is for the JSON."""
    out = output.console(stderr=dest == "-")
    for table in tables:
        out.print(table)
    for line in lines:
        out.print(line, markup=False)


def traced(cases: Sequence[Case], load: Load, kernels: Sequence[Kernel]) -> None:
    """The inner process of --nsys and --ncu."""
    # Nsight Compute replays each launch some dozen times, so it looks at one call, between start and stop.
    once = Ranges(measured=torch.cuda.profiler.profile, calls=1)
    shown = once if os.environ[inner.TRACE_ENV] == "ncu" else Ranges()
    with nvtx.open_range(nvtx.EVICT):  # it fills its buffer
        evict = gpu_timer.Evictor()
    trace(cases, load, kernels, evict, torch.cuda.synchronize, shown)


def under_profiler(name: str, program: str, path: Path, words: Sequence[str], params: Params, cases: int) -> None:
    """Runs this command again under nsys or ncu and prints what it saw of so many cases.

    Raises:
        CheckFailedError: the run inside failed, or nothing was seen.
        UnavailableError: this nsys cannot write a report.
    """
    found: dict[str, Any] = {"report": path.name}
    if name == "nsys":
        nsys.profile(program, path, words)
        found["kernels"], found["ranges"] = nsys.stats(program, path)
        tables = list(report.nsys_tables(found["kernels"], found["ranges"]))
        lines = report.nsys_notes(cases, nvtx.structured())
    else:
        ncu.profile(program, path, words)
        found["launches"], note = ncu.stats(program, path)
        both = list(report_ncu.tables(found["launches"]))
        tables = [table for table, _ in both]
        lines = report_ncu.notes(note) + report.left_out_lines([n for _, missing in both for n in missing])
    dest = params["json_dest"]
    _print(tables, lines, dest)
    output.say(f"Open it with: {name}-ui {path}", stderr=dest == "-")
    if dest is not None:
        record = {"schema": SCHEMA, "provenance": collect(params["seed"] or 0), name: found, "rows": []}
        output.write_json(record, dest, params["force"])
