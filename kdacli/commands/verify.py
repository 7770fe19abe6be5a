"""`kda verify`: kernels against the fp64 oracle, case by case."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kda_kernels.errors import InputError
from kdacli import options
from kdacli.parallel.ranks import cp_option, is_first, start
from kdacli.values import Part

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from kdacli.dumps import Dump
    from kdacli.verify.processes.checker import Checker
    from kdacli.verify.processes.isolated import IsolatedChecker

STRESS_SECONDS = 60.0
HUNG_SECONDS = 300.0  # more than any check takes whose kernels compile and tune themselves meanwhile


@click.command(
    "verify", cls=options.SectionedCommand, usual=("suite_name", "case_names", "shard", "list_only", "save_dir")
)
@options.kernel_option
@click.option("--suite", "suite_name", type=click.Choice(["quick", "full", "stress"]), help="Default: quick.")
@click.option("--case", "case_names", multiple=True, metavar="NAME", help="A case by name; may be repeated.")
@click.option(
    "--seconds",
    type=click.FloatRange(0, 86400),
    help="Of random search, which follows the cases of --suite stress; all kernels together. Default: 60.",
)
@click.option(
    "--shard",
    type=Part(),
    metavar="I/N",
    help="Only the I-th of N parts of the suite, for N runs that share it: on N GPUs, or side by side on one.",
)
@click.option("--list", "list_only", is_flag=True, help="List the cases and why each is there; check nothing.")
@click.option("--verbose", is_flag=True, help="A line for every check, however many.")
@click.option("--fail-fast", is_flag=True, help="Stop at the first failure.")
@click.option(
    "--shrink",
    type=click.FloatRange(0, 3600),
    default=10.0,
    metavar="SECONDS",
    help="How long to look for the smallest case of a failure. Default: 10; 0: not at all.",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=0),
    metavar="COUNT",
    help="Processes that compile ahead of the cases, on a GPU. Default: one a core; 0: none.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="COUNT",
    help="Processes that check the cases of a suite side by side. Default: on a GPU, whose memory they would share, 1;"
    " without one, for 100 checks or more, one a core, up to 4.",
)
@click.option(
    "--isolate/--no-isolate",
    default=None,
    help="Check in a process apart, which a kernel may crash or hang without ending the run. Default: on a GPU.",
)
@click.option(
    "--limit",
    type=click.FloatRange(0.1, 86400),
    default=HUNG_SECONDS,
    metavar="SECONDS",
    help="A check that takes longer, in a process apart, counts as hung. Default: 300.",
)
@click.option(
    "--triton-config",
    type=click.IntRange(min=0),
    metavar="NUMBER",
    help="Autotuned Triton kernels take the configuration with this number and are not tuned. Numbers start at 0; one"
    " past the last counts on from the first. Default: on a GPU kernels are tuned; without one, 0.",
)
@click.option("--save", "save_dir", metavar="DIR", help="Save the tensors of failures as dumps in DIR.")
@click.option("--junit", metavar="FILE", help="Write a JUnit XML report to FILE.")
@click.option(
    "--plot", metavar="FILE", help="Draw how errors grow along the decode traces of a dump: .png, .svg, .pdf."
)
@cp_option("Check prefills")
@options.problem_options
@options.device_option
@options.json_option
@options.force_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    kernels: tuple[str, ...],
    suite_name: str | None,
    case_names: tuple[str, ...],
    seconds: float | None,
    shard: tuple[int, int] | None,
    list_only: bool,
    verbose: bool,
    fail_fast: bool,
    shrink: float,
    jobs: int | None,
    workers: int | None,
    isolate: bool | None,
    limit: float,
    triton_config: int | None,
    save_dir: str | None,
    junit: str | None,
    plot: str | None,
    cp: int | None,
    device: str,
    json_dest: str | None,
    force: bool,
    **params: Any,
) -> None:
    """Check kernels against the fp64 oracle, case by case.

    Without arguments, it checks every kernel of ours that can run here over the suite quick. On a CPU, Triton kernels
    run in Triton's interpreter. The suite full adds every pair of options and more edges. stress adds three other
    seeds, and then random cases for --seconds. A shape flag or a dump takes the place of a suite.

    A kernel passes when its error against the fp64 token recurrence is within a tolerance: twice the error of a plain
    implementation that rounds where the kernel must round, plus one rounding of the output. It holds over each output,
    over each head of each sequence, and for each element. A prefill has eight plain implementations, which round in
    different units, and the largest error counts. For products in tf32, the error of truncated operands is added once.
    NaN, Inf and unwritten elements never pass. Nor does a float32 state that was rounded to less on its way, unless the
    kernel declares so (carried_state); and where a convolution rounds the q, k and v that it gives, the kernel must
    declare that (rounded_convolution). A kernel must not touch its inputs, the unused slots of a pool, nor memory
    around any tensor, and a second call must give the same bits (but in the interpreter). Cases name more that must
    hold, such as that neighbours in a batch, threads or an earlier call change nothing.

    The first failures of a kernel are shrunk to the smallest case that fails, with the place, what it looks like, and
    a command that shows it again. What a kernel says beforehand that it cannot do is reported, and is no failure. In a
    suite, a case is first changed, in what it is not about, to what a kernel supports, as its name then shows.

    --workers checks the cases of a suite side by side. On a GPU, kernels that a suite launches and the caches of Triton
    and CuTe lack are compiled first, in --jobs processes; and the checks run in a process apart, so that a kernel which
    crashes it, breaks the GPU's context, or hangs, fails its case, and the next case runs. Ctrl-C ends a run early:
    what was checked is reported.

    A kernel that tunes itself is checked in the configuration that was fastest, and no other: --triton-config checks it
    in another, and saves the time of tuning for every new shape.

    A dump of several calls, such as a folder of kda capture, is replayed: each call from its recorded states, by every
    kernel that can run it, peers too. Decode calls of a layer that carry on one where the other ended are also run as a
    whole, each kernel from the first recorded states on its own, beside the fp64 recurrence; --plot draws the drift.

    --cp checks prefills of batches that are cut between ranks, in a list of cases of its own. Ranks share GPUs where
    there are fewer.

    A case may be changed where it is named: --case prefill-pool/lens=3,17/HV=2 (--list has the names).

    \b
    Examples:
      kda verify                                      everything that can run here
      kda verify --kernel mine.py:prefill --suite full --junit report.xml
      kda verify --op decode --fail-fast
      kda verify --kernel triton-prefill --case prefill-lengths
      kda verify --kernel triton-prefill --lens 65,0,130 -H 2 --gates weak --seed 7
      kda verify --suite stress --seconds 3600 --save failures
      kda verify --dump dump.pt
      kda verify --dump dumps/ --plot drift.png
      kda verify --cp 4                               prefills over 4 GPUs; with torchrun, over those of its machines
    """
    from kdacli.output import check_dest

    if cp is not None:
        _over_ranks(ctx, cp, device, json_dest, force)
        return
    check_dest(json_dest, force)
    check_dest(junit, force)
    if junit == "-":
        raise InputError("--junit is -: it should be a file")
    _check_flags(params, suite_name, case_names, seconds, shard)
    _check_workers(params, workers, isolate)
    if several := _several(params):
        options.require_alone(ctx, _REPLAYED, "a dump of several calls (--call names one)")
        _replay(params["dump"], several, kernels, device, plot, json_dest, force)
        return
    if plot:
        raise InputError("--plot is given without --dump of several calls: it draws decode traces")
    if list_only:
        if shard:
            raise InputError("--shard is given with --list, which lists whole suites: leave one out")
        _list(params, suite_name or "quick", case_names, json_dest, force)
        return
    if junit:
        from kdacli.verify.reports.junit import require

        require()
    folder = _folder(save_dir)
    from kdacli.device import pick_device
    from kdacli.verify.reports.summary import conclude, report
    from kdacli.verify.verification import Verification, Wanted

    device = pick_device(device)
    wanted = Wanted(
        kernels=kernels,
        suite=suite_name or "quick",
        case_names=case_names,
        shard=shard or (1, 1),
        one_problem=bool(_one_problem(params)),
        params=params,
        device=device,
        seconds=STRESS_SECONDS if seconds is None else seconds,
        triton_config=triton_config,
        workers=1 if isolate is False else workers,
        limit=limit,
    )
    with _checker(device, wanted.seed, isolate, limit, triton_config) as checker:
        run = Verification(wanted, checker)
        run.go(jobs, fail_fast, shrink, folder, force)
    report(run.outcome, json_dest, junit, verbose, force)
    conclude(run.outcome)


def _over_ranks(ctx: click.Context, ranks: int, device: str, json_dest: str | None, force: bool) -> None:
    options.require_alone(ctx, ("cp", "device", "json_dest", "force"), "--cp")
    from kdacli.device import pick_device
    from kdacli.output import check_dest

    if is_first():
        check_dest(json_dest, force)
    device = pick_device(device)
    code = start(ranks, device, ctx.meta.get("kdacli.args") or sys.argv[1:], shared=True)
    if code is not None:
        ctx.exit(code)
    from kdacli.parallel.verify import verify

    verify(device, json_dest, force)


def _several(params: options.Params) -> "tuple[list[Dump], list[str]] | None":
    """The calls of a dump that holds more than one, where none is named, and what is wrong with others."""
    if not params["dump"] or params.get("call"):
        return None
    from kdacli.dumps import load_all

    broken: list[str] = []
    dumps = load_all(params["dump"], broken=broken)
    return (dumps, broken) if len(dumps) + len(broken) > 1 else None


_REPLAYED = ("dump", "kernels", "device", "plot", "json_dest", "force")  # flags that a replay has a use for


def _replay(
    dump: str,
    found: "tuple[list[Dump], list[str]]",
    kernels: tuple[str, ...],
    device: str,
    plot: str | None,
    json_dest: str | None,
    force: bool,
) -> None:
    from kdacli.device import pick_device

    if plot:
        from kdacli.output import check_dest
        from kdacli.plots import require

        check_dest(plot, force)
        require(plot)
    device = pick_device(device)
    from kdacli.verify.reports.replay import Wanted, run

    run(Wanted(dump, kernels, device, json_dest, plot, force), *found)


def _checker(
    device: str, seed: int, isolate: bool | None, limit: float, config: int | None
) -> "AbstractContextManager[Checker | IsolatedChecker]":
    """What does the checks: here, or, on a GPU by default, in a process that may crash."""
    if isolate or (isolate is None and device == "cuda"):
        from kdacli.verify.processes.isolated import IsolatedChecker

        return IsolatedChecker(device, seed, limit, config)
    from contextlib import nullcontext

    from kdacli import autotuning
    from kdacli.verify.processes.checker import Checker

    if config is not None:
        autotuning.take(config)
    return nullcontext(Checker(device, seed))


def _check_flags(
    params: options.Params,
    suite_name: str | None,
    case_names: tuple[str, ...],
    seconds: float | None,
    shard: tuple[int, int] | None,
) -> None:
    """Raises `InputError` where flags contradict each other."""
    one_problem = _one_problem(params)
    if one_problem and case_names:
        raise InputError(f"--case is given with {one_problem[0]}, which describes a problem of its own: leave one out")
    if suite_name and (other := [*one_problem, *["--case"] * bool(case_names)]):
        raise InputError(f"--suite is given with {other[0]}, which says what to check already: leave one out")
    if shard and (other := [*one_problem, *["--case"] * bool(case_names)]):
        raise InputError(f"--shard is given with {other[0]}: it takes a part of a suite")
    if seconds is not None and suite_name != "stress":
        raise InputError("--seconds is given without --suite stress: only its random search takes a time")


def _check_workers(params: options.Params, workers: int | None, isolate: bool | None) -> None:
    """Raises `InputError` where there is nothing for several processes to share, or there may be none."""
    if workers and (one_problem := _one_problem(params)):
        raise InputError(f"--workers is given with {one_problem[0]}: they share the cases of a suite")
    if workers and workers > 1 and isolate is False:
        raise InputError(f"--workers {workers} is given with --no-isolate: they are processes of their own")


def _one_problem(params: options.Params) -> list[str]:
    """The flags that describe a problem of their own."""
    return [flag for flag in options.given(params) if flag != "--seed"] + ["--dump"] * bool(params["dump"])


def _folder(save_dir: str | None) -> Path | None:
    if save_dir is None:
        return None
    folder = Path(save_dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{save_dir} is a file: --save takes a directory")
    return folder


def _list(params: options.Params, suite_name: str, names: tuple[str, ...], json_dest: str | None, force: bool) -> None:
    """The cases of a suite, those of one op with --op, or those named."""
    from kdacli.output import write_json
    from kdacli.provenance import collect
    from kdacli.verify.cases import spec
    from kdacli.verify.cases.suites import suite
    from kdacli.verify.reports.tables import json_case, print_cases

    cases = [spec.parse(name) for name in names] if names else suite(suite_name)
    cases = [case for case in cases if params["op"] in (None, case.problem.op)]
    if json_dest:
        rows = [json_case(case) for case in cases]
        write_json({"schema": "kda.verify-cases/1", "provenance": collect(), "rows": rows}, json_dest, force)
    if json_dest != "-":
        print_cases(cases)
