"""`kda profile --nsys` and `--ncu`: the process that starts the profiler, and the one that is watched."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kda_kernels.registry import Kernel
from kdacli import output
from kdacli.profile.cases.choose import Load
from kdacli.profile.cases.suites import TimedCase
from kdacli.profile.measuring import gpu_timer
from kdacli.profile.records.record import SCHEMA
from kdacli.profile.reporting import launches, tables
from kdacli.profile.timed import show
from kdacli.profile.tools import inner, ncu, nsys, nvtx
from kdacli.profile.tools.trace import Ranges, trace
from kdacli.profile.wanted import Profiler, Wanted
from kdacli.provenance import collect


def traced(cases: Sequence[TimedCase], load: Load, kernels: Sequence[Kernel]) -> None:
    """The inner process."""
    # Nsight Compute replays each launch some dozen times, so it looks at one call, between start and stop.
    once = Ranges(measured=torch.cuda.profiler.profile, calls=1)
    shown = once if os.environ[inner.TRACE_ENV] == "ncu" else Ranges()
    with nvtx.open_range(nvtx.EVICT):  # it fills its buffer
        evict = gpu_timer.Evictor()
    trace(cases, load, kernels, evict, torch.cuda.synchronize, shown)


def prepared(profiler: Profiler, words: Sequence[str]) -> Callable[[Wanted, int], None]:
    """What runs this command line again under nsys or ncu, and prints what it saw of so many cases.

    The program and the place of its report are looked for at once. What is returned raises `CheckFailedError` where the
    run inside failed or nothing was seen, and `UnavailableError` where this nsys cannot write a report.

    Raises:
        InputError: the report exists, or the path is no program.
        UnavailableError: the program, or the package nvtx, is not here.
    """
    nvtx.require()
    tool = nsys if profiler.name == "nsys" else ncu
    program, path = tool.find(profiler.path), inner.report_path(tool.SUFFIX, profiler.report)
    return lambda wanted, cases: _run(profiler.name, program, path, words, wanted, cases)


def _run(name: str, program: str, path: Path, words: Sequence[str], wanted: Wanted, cases: int) -> None:
    found: dict[str, Any] = {"report": path.name}
    if name == "nsys":
        nsys.profile(program, path, words)
        found["kernels"], found["ranges"] = nsys.stats(program, path)
        shown = list(tables.nsys_tables(found["kernels"], found["ranges"]))
        lines = tables.nsys_notes(cases, nvtx.structured())
    else:
        found["launches"] = ncu.profile(program, path, words)
        both = list(launches.tables(found["launches"]))
        shown = [table for table, _ in both]
        lines = [launches.NOTE, *tables.left_out_lines([n for _, missing in both for n in missing])]
    show(shown, lines, wanted.json)
    output.say(f"Open it with: {name}-ui {path}", stderr=wanted.json == "-")
    if wanted.json is not None:
        record = {"schema": SCHEMA, "provenance": collect(wanted.seed), name: found, "rows": []}
        output.write_json(record, wanted.json, wanted.force)
