"""`kda profile`: times kernels on a GPU."""

import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kda_kernels.errors import InputError, UnavailableError
from kdacli import options
from kdacli.profile import nsys
from kdacli.profile.suites import SUITES, Case

if TYPE_CHECKING:
    from kda_kernels.registry import Kernel
    from kdacli.profile.cases import Load
    from kdacli.profile.record import Record

SECONDS = click.FloatRange(min=0, max=60)


@click.command("profile", cls=options.SectionedCommand)
@options.kernel_option
@click.option("--suite", "suite_name", type=click.Choice(list(SUITES)), help="A named set of shapes instead of one.")
@click.option("--no-peers", is_flag=True, help="Only our kernels: a peer may tune for minutes at a new shape.")
@click.option("--warm", is_flag=True, help="Leave the L2 cache as the call before left it.")
@click.option("--eager", is_flag=True, help="Time the call, launch overhead included, not a CUDA graph of it.")
@click.option("--seconds", type=SECONDS, default=0.3, show_default=True, metavar="S", help="To sample each kernel.")
@click.option("--stages", is_flag=True, help="Also list the CUDA kernels inside each call.")
@click.option("--nsys", "with_nsys", is_flag=True, help="Run under Nsight Systems; print its kernels and NVTX ranges.")
@click.option("--nsys-path", metavar="FILE", help="The program nsys, where it is not found by itself.")
@click.option("--output", "nsys_output", metavar="FILE", help="Report of --nsys. Default: kda-profile-<n>.nsys-rep.")
@options.problem_options
@options.json_option
@options.force_option
@click.pass_context
def command(ctx: click.Context, /, **params: Any) -> None:
    """Time kernels on a GPU.

    A time is the median GPU time of one call as the replay of a CUDA graph, with the L2 cache emptied (by reads) before
    it. Beside it stand the bytes that must move at least, as GB/s and as a share of what this GPU's memory did in the
    same run: a copy for prefill and the gate, an in-place update for decode. All kernels of a case get the same tensors
    and take turns, so that drifting clocks hit all alike.

    By default our kernels and the installed peers of one op are timed: a prefill of T=8192, H=96 or a decode batch of
    32. --gates may be repeated: how strong the gates are decides the time of some kernels.

    \b
    Examples:
      kda profile --gates bench --gates init --gates weak      one prefill shape in each gate regime
      kda profile --op decode -N 128 -H 32 --gate softplus     decode, against the in-place ceiling
      kda profile --suite prefill --json prefill.json          the named shapes P1 to P7
      kda profile --dump dump.pt --stages                      a live engine's tensors, CUDA kernel by CUDA kernel
      kda profile --nsys --kernel triton-prefill               a report to open in Nsight Systems
    """
    from kdacli.output import check_dest
    from kdacli.profile.cases import cases_from
    from kdacli.profile.select import candidates

    check_dest(params["json_dest"], params["force"])
    if (params["nsys_path"] or params["nsys_output"]) and not params["with_nsys"]:
        raise InputError("--nsys-path and --output are for --nsys, which is not given")
    cases, load = cases_from(params)
    kernels = candidates([case.problem.op for case in cases], params["kernels"], not params["no_peers"])
    program = nsys.find(params["nsys_path"]) if params["with_nsys"] else None
    report = nsys.report_path(params["nsys_output"]) if params["with_nsys"] else None
    _require_gpu(cases, kernels)
    if program is not None:
        _under_nsys(program, report, ctx.meta.get("kdacli.args") or sys.argv[1:], params)
    elif nsys.TRACE_ENV in os.environ:
        _traced(cases, load, kernels)
    else:
        _timed(cases, load, kernels, params)


# The shared --gates takes one regime; this command's may be repeated.
command.params = [
    click.Option(["--gates"], type=p.type, multiple=True, help="Gate regime, repeatable: bench, init or weak.")
    if p.name == "gates"
    else p
    for p in command.params
]


def _require_gpu(cases: Sequence[Case], kernels: "Sequence[Kernel]") -> None:
    """Raises `UnavailableError` where nothing could be timed."""
    import torch

    from kdacli.profile.select import require_runnable

    if not torch.cuda.is_available():
        raise UnavailableError("kda profile needs a CUDA GPU and there is none: kda verify and kda compare do without")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UnavailableError("TRITON_INTERPRET=1 is set, so Triton would interpret its kernels: unset it")
    require_runnable(cases, kernels)


def _timed(cases: Sequence[Case], load: "Load", kernels: "Sequence[Kernel]", params: dict[str, Any]) -> None:
    from kdacli.output import progress, write_json
    from kdacli.profile import ceilings
    from kdacli.profile.gpu_timer import GpuTimer
    from kdacli.profile.measure import Method
    from kdacli.profile.record import records, require_complete
    from kdacli.profile.stages import StageProfiler
    from kdacli.profile.timing import Budget
    from kdacli.provenance import collect

    timer = GpuTimer(cold=not params["warm"], graph=not params["eager"])
    stages = StageProfiler(timer.evict) if params["stages"] else None
    method = Method(timer, ceilings.measure(timer.prepare), Budget(params["seconds"]), stages)
    dest, force, record = params["json_dest"], params["force"], {}
    with progress("profile", total=len(cases)) as advance:
        for record in records(cases, load, kernels, method, functools.partial(collect, params["seed"] or 0)):
            advance()
            if dest not in (None, "-"):
                write_json(record, dest, force)
                force = True  # the file is ours now
    _show(record, dest)
    if dest == "-":
        write_json(record, dest)
    require_complete(record, params["kernels"])


def _show(record: "Record", dest: str | None) -> None:
    from kdacli.output import console
    from kdacli.profile import report

    out, rows = console(stderr=dest == "-"), record["rows"]
    for table in (*report.tables(rows), *report.stage_tables(rows)):
        out.print(table)
    for line in (*report.notes(rows, record["refused"]), *report.footer(record)):
        out.print(line, markup=False)


def _traced(cases: Sequence[Case], load: "Load", kernels: "Sequence[Kernel]") -> None:
    """The inner process of --nsys."""
    import torch

    from kdacli.profile.gpu_timer import Evictor
    from kdacli.profile.trace import trace

    trace(cases, load, kernels, Evictor(), torch.cuda.synchronize)


def _under_nsys(program: str, path: Path, words: Sequence[str], params: dict[str, Any]) -> None:
    """Runs this command again under nsys and prints its summaries."""
    from kdacli.output import console, write_json
    from kdacli.profile import report
    from kdacli.profile.record import SCHEMA
    from kdacli.provenance import collect

    nsys.profile(program, path, words)
    kernels, ranges = nsys.stats(program, path)
    dest = params["json_dest"]
    out = console(stderr=dest == "-")
    for table in report.nsys_tables(kernels, ranges):
        out.print(table)
    out.print("Eager calls, the L2 cache emptied before each.", markup=False)
    out.print(f"Open it with: nsys-ui {path}", markup=False, soft_wrap=True)
    if dest is not None:
        found = {"report": path.name, "kernels": kernels, "ranges": ranges}
        record = {"schema": SCHEMA, "provenance": collect(params["seed"] or 0), "nsys": found, "rows": []}
        write_json(record, dest, params["force"])
