"""`kda profile`: times kernels on a GPU."""

import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from kda_kernels.errors import InputError
from kdacli import options
from kdacli.parallel.ranks import cp_option
from kdacli.presets import PRESETS
from kdacli.profile.cases import axes
from kdacli.profile.cases.suites import SUITES
from kdacli.profile.wanted import Wanted

SECONDS = click.FloatRange(min=0, max=60)


class Axis(click.ParamType):
    """T=1k..1M and the like; see `axes.parse`."""

    name = "axis"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> axes.Axis:
        return value if isinstance(value, axes.Axis) else axes.parse(value)


@click.command(
    "profile", cls=options.SectionedCommand, usual=("suite", "sweep", "layer", "seconds", "baseline", "plot")
)
@options.kernel_option
@click.option("--suite", type=click.Choice(list(SUITES)), help="A named set of shapes instead of one.")
@click.option(
    "--sweep", type=Axis(), multiple=True, metavar="AXIS", help="T=1k..1M, N=1..256 (doubling; :1 for every), H=12,96."
)
@click.option("--bump", type=click.FloatRange(min=0), metavar="%", help="Exit 1 where a sweep's point sticks out more.")
@click.option(
    "--layer", type=click.Choice(list(PRESETS)), help="What all KDA layers of a model cost; with --tp, -T, -N."
)
@click.option("--no-peers", is_flag=True, help="Only our kernels: a peer may tune for minutes at a new shape.")
@click.option("--warm", is_flag=True, help="Leave the L2 cache as the call before left it.")
@click.option("--eager", is_flag=True, help="Time the call, launch overhead included, not a CUDA graph of it.")
@click.option("--seconds", type=SECONDS, default=0.3, show_default=True, metavar="S", help="To sample each kernel.")
@click.option("--stages", is_flag=True, help="Also list the CUDA kernels inside each call.")
@click.option("--baseline", metavar="FILE", help="Compare with a recording (of --json); exit 1 on a regression.")
@click.option("--from", "source", metavar="FILE", help="Show a recording instead of timing; needs no GPU.")
@click.option("--plot", metavar="FILE", help="Draw the times, of a sweep against its axis: .png, .svg or .pdf.")
@click.option("--trace", metavar="FILE", help="Write a timeline of some calls for Perfetto.")
@click.option("--nsys", is_flag=True, help="Run under Nsight Systems; print its kernels and NVTX ranges.")
@click.option("--nsys-path", metavar="FILE", help="The program nsys, where it is not found by itself.")
@click.option("--ncu", is_flag=True, help="Run under Nsight Compute; print what limits each CUDA kernel.")
@click.option("--ncu-path", metavar="FILE", help="The program ncu, where it is not found by itself.")
@click.option("--output", "tool_output", metavar="FILE", help="Report of --nsys or --ncu. Default: kda-profile-<n>.")
@cp_option("Time a prefill")
@click.option(
    "--triton-config",
    type=click.IntRange(min=0),
    metavar="NUMBER",
    help="Kernels that tune themselves take the configuration with this number instead, as in `kda verify`.",
)
@options.problem_options
@options.json_option
@options.force_option
@click.pass_context
def command(ctx: click.Context, /, **params: Any) -> None:
    """Time kernels on a GPU.

    A time is the median GPU time of one call as the replay of a CUDA graph, with the L2 cache emptied (by reads) before
    it. Beside it stand the bytes that must move at least, as GB/s and as a share of what this GPU's memory did in the
    same run: a copy for prefill and the gate, an in-place update for decode. All kernels of a case get the same tensors
    and take turns, so that drifting clocks hit all alike; the first is timed twice, to see by how much a repetition
    differs. A ratio that the noise does not support is marked with a "?". Host times are of eager calls of one shape,
    and of calls that each have a shape not seen before, as in serving. What a timed call leaves is checked once, after
    its inputs have changed: wrong outputs have no time, and the exit code is 1.

    By default our kernels and the installed peers of one op are timed: a prefill of T=8192, H=96, or with --op decode
    the shapes of --suite decode. --gates may be repeated: how strong the gates are decides the time of some kernels.

    \b
    Examples:
      kda profile --gates bench --gates init --gates weak      one prefill shape in each gate regime
      kda profile --op decode -N 128 -H 32 --gate softplus     decode, against the in-place ceiling
      kda profile --suite prefill --json prefill.json          the named shapes P1 to P7
      kda profile --suite prefill --baseline prefill.json      what has changed since, beyond the noise
      kda profile --op decode --sweep N=1..256:1 --sweep H=12,96 --seconds 0.02 --bump 5
      kda profile --layer kimi-k3 --tp 8 -T 32k -N 64          ms of all KDA layers, for a prefill, decode and step
      kda profile --cp 4 -T 1M -H 12                           one prompt over 1, 2 and 4 GPUs; torchrun for more
      kda profile --layer kimi-k3 --tp 8 -T 1M --cp 4          all KDA layers of a prompt over 4 groups of GPUs
      kda profile --dump dump.pt --stages                      a live engine's tensors, CUDA kernel by CUDA kernel
      kda profile --ncu --kernel triton-prefill                DRAM, L2, tensor cores, stalls, spills of each launch
      kda profile --from prefill.json --plot times.svg         a recording, on a machine with no GPU
    """
    from kdacli.output import check_dest

    if (ranks := params.pop("cp")) is not None:
        _over_ranks(ctx, ranks, params)
        return
    config = params.pop("triton_config")
    wanted = Wanted.of(params)
    if config is not None:
        if wanted.source:
            raise InputError("--triton-config is for what is timed here: leave it or --from out")
        from kdacli import autotuning

        autotuning.take(config)
    for dest in (wanted.json, wanted.plot, wanted.trace):
        check_dest(dest, wanted.force)
    if wanted.plot:
        from kdacli import plots

        plots.require(wanted.plot)
    if wanted.source:
        from kdacli.profile import timed
        from kdacli.profile.records import record

        before = record.read(wanted.baseline) if wanted.baseline else None
        timed.finish(record.read(wanted.source), wanted, before)
    else:
        _measure(wanted, ctx.meta.get("kdacli.args") or sys.argv[1:])


# What --cp can be given with.
_WITH_CP = (
    "cp", "layer", "model", "tp", "tokens", "seqs", "lens", "heads", "v_heads", "gate", "lower_bound", "gates", "keys",
    "seed", "seconds", "no_peers", "triton_config", "json_dest", "force",
)  # fmt: skip


def _over_ranks(ctx: click.Context, ranks: int, params: dict[str, Any]) -> None:
    options.require_alone(ctx, _WITH_CP, "--cp")
    if len(params["gates"]) > 1:
        raise InputError("--gates is given twice with --cp: leave one out")
    from kdacli.output import check_dest
    from kdacli.parallel.ranks import is_first, start

    if is_first():
        check_dest(params["json_dest"], params["force"])
    code = start(ranks, "cuda", ctx.meta.get("kdacli.args") or sys.argv[1:])
    if code is not None:
        ctx.exit(code)
    from kdacli.parallel.profile import profile

    profile(params)


# The shared --gates takes one regime; this command's may be repeated.
command.params = [
    click.Option(["--gates"], type=p.type, multiple=True, help="Gate regime, repeatable: bench, init or weak.")
    if p.name == "gates"
    else p
    for p in command.params
]


def _measure(wanted: Wanted, words: Sequence[str]) -> None:
    """Times, or is watched by a profiler, or starts one around this command line."""
    from kdacli.profile import timed
    from kdacli.profile.cases import select
    from kdacli.profile.cases.choose import cases_of
    from kdacli.profile.records import record
    from kdacli.profile.tools import inner, watched

    before = record.read(wanted.baseline) if wanted.baseline else None
    cases, load = cases_of(wanted)
    kernels = select.candidates([case.problem.op for case in cases], wanted.kernels, wanted.peers)
    run_watched = watched.prepared(wanted.profiler, words) if wanted.profiler else None
    timed.require_gpu(cases, kernels)
    if run_watched:
        run_watched(wanted, len(cases))
    elif inner.TRACE_ENV in os.environ:
        watched.traced(cases, load, kernels)
    else:
        timed.time_and_show(wanted, cases, load, kernels, before)
