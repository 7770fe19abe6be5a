"""`kda profile` once its flags are understood: kernels are timed, and the record is written and shown."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kda_kernels.errors import UnavailableError
from kda_kernels.registry import Kernel
from kdacli import output
from kdacli.profile.cases.choose import Load
from kdacli.profile.cases.select import require_runnable
from kdacli.profile.cases.suites import TimedCase
from kdacli.profile.measuring import ceilings, gpu_timer, watch
from kdacli.profile.measuring.all_cases import records
from kdacli.profile.measuring.one_case import Method
from kdacli.profile.measuring.stages import StageProfiler
from kdacli.profile.measuring.timing import Budget
from kdacli.profile.records import baseline, halflife, layer, sweep
from kdacli.profile.records.record import Record, Saver, require_complete
from kdacli.profile.reporting import baseline as baseline_report
from kdacli.profile.reporting import plot, tables
from kdacli.profile.reporting import sweep as sweep_report
from kdacli.profile.tools import chrome
from kdacli.profile.wanted import Wanted
from kdacli.provenance import collect

if TYPE_CHECKING:
    from rich.table import Table


def require_gpu(cases: Sequence[TimedCase], kernels: Sequence[Kernel]) -> None:
    """Raises `UnavailableError` where nothing could be timed."""
    if not torch.cuda.is_available():
        raise UnavailableError("kda profile needs a CUDA GPU and there is none: kda verify and kda compare do without")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UnavailableError("TRITON_INTERPRET=1 is set, so Triton would interpret its kernels: unset it")
    require_runnable(cases, kernels)


def time_and_show(
    wanted: Wanted, cases: Sequence[TimedCase], load: Load, kernels: Sequence[Kernel], before: Record | None
) -> None:
    """Times the kernels, writes the record as it grows, and shows it.

    Raises:
        CheckFailedError: a kernel failed or its outputs are wrong, a sweep's point sticks out (with --bump), or there
            is a regression.
        UnavailableError: a kernel asked for by name could run nowhere.
    """
    provenance = functools.partial(collect, wanted.seed)
    if before is not None:
        baseline.require_same_gpu(before.provenance, provenance())
    timer = gpu_timer.GpuTimer(cold=wanted.cold, graph=wanted.graph)
    read_clocks, not_watched = watch.nvml_reader()
    method = Method(
        timer,
        ceilings.measure(timer.prepare),
        Budget(wanted.seconds),
        StageProfiler(timer.evict) if wanted.stages else None,
        watch.Watch(read_clocks) if read_clocks else None,
        swept=bool(wanted.sweep),
    )
    half_lives = halflife.half_lives(load(cases[0])) if wanted.dump else None
    growing = records(cases, load, kernels, method, provenance)
    record = recorded(wanted, growing, len(cases), half_lives, not_watched)
    traced = functools.partial(chrome.write, cases=cases, load=load, kernels=kernels, evict=timer.evict)
    finish(record, wanted, before, traced)
    require_complete(record, wanted.kernels)


def recorded(
    wanted: Wanted,
    growing: Iterator[Record],
    cases: int,
    half_lives: halflife.HalfLives | None = None,
    not_watched: str | None = None,
) -> Record:
    """The whole record of `records`, written to --json on the way."""
    dest = wanted.json
    save = Saver(lambda whole, force: output.write_json(whole, dest or "-", force), wanted.force)
    with output.progress("profile", total=cases) as advance:
        for record in growing:
            advance()
            record.half_lives, record.not_watched = half_lives, record.not_watched or not_watched
            if record.complete and wanted.layer:
                record.layer = layer.costs(wanted.layer, wanted.shape["tp"] or 1, record.rows)
            if dest and (dest != "-" or record.complete):
                save(record)
    return record


def finish(
    record: Record, wanted: Wanted, before: Record | None, write_trace: Callable[[Path], None] | None = None
) -> None:
    """Prints a whole record, draws, traces and compares it, and raises where it breaks what was asked of it.

    Raises:
        CheckFailedError: a sweep's point sticks out (with --bump), or there is a regression.
        InputError: the baseline is of another GPU.
    """
    _show(record, wanted.json)
    out = output.console(stderr=wanted.json == "-")
    if wanted.plot:
        plot.draw(record, wanted.plot)
        out.print(f"Written: {wanted.plot}", markup=False, soft_wrap=True)
    if wanted.trace and write_trace:
        write_trace(Path(wanted.trace))
        out.print(f"Written: {wanted.trace}; open it at https://ui.perfetto.dev", markup=False, soft_wrap=True)
    changes = []
    if before is not None:
        baseline.require_same_gpu(before.provenance, record.provenance)
        changes = baseline.compare(before, record)
        show([baseline_report.table(changes)], baseline_report.notes(changes, before, record), wanted.json)
    if wanted.bump is not None:
        sweep.require_smooth(record.rows, wanted.bump / 100)
    if before is not None:
        baseline.require_no_regression(changes)


def _show(record: Record, dest: str | None) -> None:
    rows = record.rows
    both = list(sweep_report.tables(rows) if record.sweep else tables.tables(rows))
    shown = [table for table, _ in both] + list(tables.stage_tables(rows))
    shown += tables.layer_tables(record.layer) if record.layer else []
    lines = halflife.lines(record.half_lives) if record.half_lives else []
    lines += tables.notes(rows, record.refused)
    lines += sweep_report.notes(rows) if record.sweep else []
    lines += tables.footer(record, [name for _, missing in both for name in missing])
    show(shown, lines, dest)


def show(tables: "Sequence[Table]", lines: Sequence[str], dest: str | None) -> None:
    """On stdout, or on stderr where stdout is for the JSON."""
    out = output.console(stderr=dest == "-")
    for table in tables:
        out.print(table)
    for line in lines:
        out.print(line, markup=False)
