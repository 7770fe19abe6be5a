"""`kda compile`: what the compilers make of the kernels, for one or several architectures, with no GPU."""

import dataclasses
from typing import Any

import click

from kda_kernels import registry
from kda_kernels.errors import CheckFailedError, InputError
from kda_kernels.problem import Op, Problem
from kda_kernels.registry import Kernel
from kdacli import options, output


@click.command("compile", cls=options.SectionedCommand, usual=("archs", "arch", "patterns", "baseline", "show_sass"))
@options.kernel_option
@options.problem_options
@click.option(
    "--arch",
    "arch_names",
    multiple=True,
    metavar="NAME",
    help="sm_80, sm_86, sm_89, sm_90a, sm_100a, sm_103a, sm_120a, gfx942, gfx950; may be repeated. Default: the GPU's"
    " here, or sm_90a.",
)
@click.option("--variant", "patterns", multiple=True, metavar="NAME", help="A variant, or a pattern; may be repeated.")
@click.option("--sms", type=click.IntRange(min=1), metavar="COUNT", help="Multiprocessors that launches are tuned for.")
@click.option("--jobs", type=click.IntRange(min=1), metavar="COUNT", help="Processes. Default: one a core.")
@click.option("--no-cache", is_flag=True, help="Compile everything anew, and leave the cache of launches alone.")
@click.option("--sass", "show_sass", is_flag=True, help="Count instructions too (JSON always has them).")
@click.option("--emit", metavar="DIR", help="Write PTX, cubin, SASS, TTIR, TTGIR, LLIR or MLIR of each into DIR.")
@click.option("--baseline", metavar="FILE", help="Show what differs from an earlier --json FILE.")
@click.option("--strict", is_flag=True, help="Exit 1 if a kernel spills more, or lost a wide access.")
@options.json_option
@options.force_option
def command(
    kernels: tuple[str, ...],
    arch_names: tuple[str, ...],
    patterns: tuple[str, ...],
    sms: int | None,
    jobs: int | None,
    no_cache: bool,
    show_sass: bool,
    emit: str | None,
    baseline: str | None,
    strict: bool,
    json_dest: str | None,
    force: bool,
    **params: Any,
) -> None:
    """Compile kernels ahead of time and print what came out.

    No GPU is needed. With a shape, a model or a dump, each kernel is built as a launch of that problem would build it,
    and lands in the cache where that launch looks: the same triton and kda on a server find it there, in the same
    folder (TRITON_CACHE_DIR; Triton keeps absolute paths. CuTe: KDA_CACHE_DIR). With no flags, each kernel has a few
    named variants: the specialisations that the library launches most. Tuning choices depend on the number of
    multiprocessors: they are those of this machine's GPU, of a common one of the architecture (JSON says which), or
    --sms.

    With a model and no lengths it is what serving launches, whatever the lengths and batches: on a pool, one or many
    sequences, packed or not; decode with drafts and verifying them, prefill with checkpoints and first states or not.

    Registers and spills (bytes stored plus loaded) are those of a thread, as ptxas counts them; shared memory is that
    of a block in bytes, and red where no block of that architecture has so much. "per SM" is how many blocks are
    resident on a multiprocessor at a time, and what keeps it from being more. s is the time to compile, - where it lay
    in the cache.

    With --sass: MMA counts instructions of the tensor cores; async is TMA, bulk and cp.async copies; LDG.128 is how
    many of the loads from global memory move 16 bytes per thread, of how many, STG.128 the same for stores,
    smem.128 for shared memory; local is LDL and STL, where spilled registers go; BAR is barriers. These count
    instructions in the binary: a loop's body once.

    A kernel of your own (--kernel path.py:function) is called on tensors of zeros, up to its launches: each Triton
    kernel that it would launch is compiled, an autotuned one in every configuration. A kernel in another language needs
    an attribute `variants` of the function.

    The exit code is 1 if anything did not compile, or cannot be launched on its architecture: of an autotuned kernel,
    if no configuration can. --strict, with --baseline, adds: a kernel spills more, has wide
    accesses that became narrower, or is gone.

    \b
    Examples:
      kda compile                                    every kernel, for the GPU here (without one: sm_90a)
      kda compile --arch sm_80 --arch sm_100a        for two architectures
      kda compile --kernel triton-decode --sass      one kernel, with instruction counts
      kda compile --model kimi-k3 --tp 8             all that serving Kimi K3 on one of 8 GPUs launches
      kda compile --variant 'chain*' --emit out/     some variants, and their PTX, SASS and IR
      kda compile --json before.json                 then change a kernel, and
      kda compile --baseline before.json --strict    see what the change did
      kda compile --kernel mine.py:prefill -T 4k -H 32
    """
    from kdacli.compile import arch, pool, report, toolchain
    from kdacli.compile import baseline as earlier
    from kdacli.compile import emit as files

    if strict and baseline is None:
        raise InputError("--strict is given without --baseline: it compares with one")
    output.check_dest(json_dest, force)
    before = None if baseline is None else earlier.load(baseline)
    toolchain.require_triton()
    archs = arch.select(list(arch_names), sms)
    wanted = choose(kernels, params)
    folder = None if emit is None else str(files.prepare(emit, force))
    stderr = json_dest == "-"
    with pool.workers(jobs, use_cache=not no_cache) as processes:
        with output.progress("loading kernels"):
            targets, left_out = pool.plan(processes, wanted, archs, bool(kernels), patterns)
        with output.progress("compiling", len(targets)) as advance:
            rows = pool.compile_targets(processes, targets, advance, folder)
        backends = dict.fromkeys([*(target.kernel.backend for target in targets), *(row["backend"] for row in rows)])
        caches = None if no_cache else {backend: processes.cache_folder(backend) for backend in backends}
    report.show(rows, show_sass, stderr)
    for name, reason in left_out.items():
        output.say(f"not compiled: {name}: {reason}", stderr=stderr)
    for line in report.summary(rows, caches):
        output.say(line, stderr=stderr)
    now = _report(rows, left_out)
    bad = {"did not compile": sum("error" in row for row in rows), "cannot be launched": len(report.stuck(rows))}
    failed = [f"{count} of {len(rows)} {what}" for what, count in bad.items() if count]
    if before is not None:
        for line in earlier.other_compilers(before, now):
            output.say(line, stderr=stderr)
        changes = earlier.compare(before, rows, patterns)
        report.show_changes(changes, str(baseline), len(rows), stderr)
        now["changes"] = changes
        worse = sum(change.fatal is not None for change in changes)
        if strict and worse:
            failed.append(f"{worse} {'is' if worse == 1 else 'are'} worse than in {baseline}")
    if json_dest:
        output.write_json(now, json_dest, force)
    if failed:
        raise CheckFailedError("; ".join(failed))


def choose(names: tuple[str, ...], params: options.Params) -> list[tuple[Kernel, Problem | None]]:
    """The kernels named (none: all of ours that a compiler sees) that serve the op, and what the flags ask of each.

    The problem is None where no flag says anything of one.

    Raises:
        InputError: a kernel is unknown or serves another op, or flags contradict each other.
    """
    from kdacli.userkernels import resolve

    from_dump = params["dump"] or params["call"]
    dumped = options.inputs_from(params, "cpu")[0] if from_dump else None
    op = dumped.op if dumped else params["op"]
    ours = [k for k in registry.kernels(op and Op(op)) if k.ours and k.backend != "torch"]
    kernels = [resolve(name, op) for name in names] or ours
    if dumped or not options.given(params):
        return [(k, dumped) for k in kernels]
    problems = {k.op: options.problem_from(params, default_op=k.op) for k in kernels}
    if params["model"] and not any(params[name] for name in ("seqs", "tokens", "lens")):  # as served: any lengths
        problems = {op: dataclasses.replace(problem, seq_lens=()) for op, problem in problems.items()}
    return [(k, problems[k.op]) for k in kernels]


def _report(rows: list[dict[str, Any]], left_out: dict[str, str]) -> dict[str, Any]:
    from kdacli import provenance
    from kdacli.compile.baseline import SCHEMA

    return {"schema": SCHEMA, "provenance": provenance.collect(), "rows": rows, "not_compiled": left_out}
