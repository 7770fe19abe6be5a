"""`kda compile`: what the compiler makes of the Triton kernels, for one or several architectures, with no GPU."""

import itertools
from typing import Any

import click

from kda_kernels import registry
from kda_kernels.errors import CheckFailedError, InputError
from kda_kernels.problem import Op, Problem
from kda_kernels.registry import Kernel
from kdacli import options, output

RESOURCES = ("variant", "arch", "regs", "spill", "shared", "warps", "cubin", "s")
SASS = ("variant", "arch", "MMA", "LDG.128", "STG.128", "LDS", "STS", "local", "BAR")
MMA = ("HGMMA", "HMMA", "UTCHMMA")


@click.command("compile", cls=options.SectionedCommand)
@options.kernel_option
@options.problem_options
@click.option(
    "--arch", "arch_names", multiple=True, metavar="NAME", help="An architecture, such as sm_90a; may be repeated."
)
@click.option("--jobs", type=click.IntRange(min=1), help="Processes that compile. Default: one a core.")
@click.option("--sass", "show_sass", is_flag=True, help="Count SASS instructions too (JSON always has them).")
@options.json_option
@options.force_option
def command(
    kernels: tuple[str, ...],
    arch_names: tuple[str, ...],
    jobs: int | None,
    show_sass: bool,
    json_dest: str | None,
    force: bool,
    **params: Any,
) -> None:
    """Compile kernels ahead of time and print what came out.

    No GPU is needed. With a shape, a model or a dump, each kernel is built as that problem would build it on a GPU of
    132 multiprocessors. With no flags, each has a few named variants: the specialisations that the library launches
    most.

    Registers and spills (bytes stored plus loaded) are those of a thread, as ptxas counts them; shared memory is that
    of a block, and red where no block of that architecture has so much; s is the time to compile, without any cache.

    With --sass: MMA is HGMMA, HMMA and UTCHMMA together; LDG.128 is how many of the loads from global memory move 16
    bytes a thread, of how many, and STG.128 the same for stores; local is LDL and STL, where spilled registers go.
    These count instructions in the binary: a loop's body once. The exit code is 1 if anything did not compile.

    \b
    Examples:
      kda compile                                    every Triton kernel, for the GPU here (without one: sm_90a)
      kda compile --arch sm_80 --arch sm_100a        for two architectures
      kda compile --kernel triton-decode --sass      one kernel, with instruction counts
      kda compile --model kimi-k3 --tp 8             as Kimi K3's heads on one of 8 GPUs build them
      kda compile --op prefill --dtype fp16 -H 8 --v-heads 16 --head-dim 64
    """
    from kdacli.compile import arch, pool, toolchain

    output.check_dest(json_dest, force)
    toolchain.require_triton()
    archs = sorted({arch.parse(name) for name in arch_names}) or [arch.here()]
    wanted = choose(kernels, params)
    with pool.workers(jobs) as processes:
        with output.progress("loading kernels"):
            targets = pool.plan(processes, wanted, archs, bool(kernels))
        with output.progress("compiling", len(targets)) as advance:
            rows = pool.compile_targets(processes, targets, advance)
    show(rows, show_sass, stderr=json_dest == "-")
    if json_dest:
        from kdacli import provenance

        report = {"schema": "kda.compile/1", "provenance": provenance.collect(), "rows": rows}
        output.write_json(report, json_dest, force)
    if failed := [row for row in rows if "error" in row]:
        raise CheckFailedError(f"{len(failed)} of {len(rows)} did not compile")


def choose(names: tuple[str, ...], params: options.Params) -> list[tuple[Kernel, Problem | None]]:
    """The kernels named (none: all Triton kernels of ours) that serve the op, and what the flags ask of each.

    The problem is None where no flag says anything of one.

    Raises:
        InputError: a kernel is unknown or serves another op, or flags contradict each other.
    """
    from_dump = params["dump"] or params["call"]
    dumped = options.inputs_from(params, "cpu")[0] if from_dump else None
    op = dumped.op if dumped else params["op"]
    ours = [k for k in registry.kernels(op and Op(op)) if k.ours and k.backend == "triton"]
    kernels = [registry.get(name) for name in names] or ours
    for kernel in kernels:
        if op and kernel.op != op:
            raise InputError(f"kernel {kernel.name} serves the op {kernel.op}, not {op}: choose another kernel or --op")
    described = bool(options.given(params)) and not dumped
    return [(k, options.problem_from(params, default_op=k.op) if described else dumped) for k in kernels]


def show(rows: list[dict[str, Any]], with_sass: bool, stderr: bool = False) -> None:
    """Prints the tables of each kernel, and under them a line for everything that went wrong."""
    console = output.console(stderr)
    for kernel, group in itertools.groupby(rows, lambda row: row["kernel"]):
        mine = list(group)
        title = f"{kernel}{_problem(mine[0])} (sizes in bytes)"
        console.print(output.table(title, RESOURCES, [_resources(row) for row in mine]))
        if with_sass:
            counted = [_sass(row) for row in mine if row.get("sass")]
            console.print(output.table(f"{kernel}, SASS instructions", SASS, counted))
    for row in rows:
        for what in ("error", "note", "sass_error"):
            if what in row:
                output.say(f"{row['kernel']} {row['variant']} {row['arch']}: {row[what]}", stderr=stderr)


def _problem(row: dict[str, Any]) -> str:
    """For a title: what was compiled for, as far as a kernel depends on it most."""
    if not row.get("problem"):
        return ""
    problem = Problem.from_dict(row["problem"])
    layout = "packed" if problem.packed else "dense"
    return f", {problem.name} K={problem.K} V={problem.V} {problem.dtype} {layout}, {problem.options.gate} gate"


def _resources(row: dict[str, Any]) -> list[object]:
    head = [row["variant"], row["arch"]]
    if "error" in row:
        return [*head, output.bad("-"), *[None] * 5]
    spill, shared = row["spill_bytes"], row["shared_bytes"]
    return [
        *head,
        row["registers"],
        output.bad(spill) if spill else 0,
        output.bad(shared) if "note" in row else shared,
        row["num_warps"],
        row["binary_bytes"],
        f"{row['compile_s']:.1f}",
    ]


def _sass(row: dict[str, Any]) -> list[object]:
    counts = row["sass"]

    def wide(name: str) -> str:
        return f"{counts[name + '.128']}/{counts[name]}"

    return [
        row["variant"],
        row["arch"],
        sum(counts[name] for name in MMA),
        wide("LDG"),
        wide("STG"),
        counts["LDS"],
        counts["STS"],
        counts["LDL"] + counts["STL"],
        counts["BAR"],
    ]
