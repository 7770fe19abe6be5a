"""`kda kernels`: what is there, what can run here, and if not why."""

from typing import Any

import click

from kda_kernels import registry
from kda_kernels.problem import Op, Problem
from kda_kernels.registry import Kernel
from kdacli import options


@click.command("kernels", cls=options.SectionedCommand)
@options.problem_options
@options.device_option
@options.json_option
@options.force_option
def command(device: str, json_dest: str | None, force: bool, **params: Any) -> None:
    """List the kernels, and say which can run here and why not.

    With no flags, each kernel is asked whether it can run anything on this machine. With a shape or a model, each is
    asked about that problem; kernels of ours come first, the fastest before the others, and `kda run` takes the first
    that says yes. "Interpreted" is Triton's interpreter: right, but slow.

    \b
    Examples:
      kda kernels
      kda kernels --op decode --model kimi-k3 --tp 8 -N 64
      kda kernels --dump dump.pt
    """
    from kdacli.device import describe, pick_device
    from kdacli.output import bad, check_dest, console, good, table, write_json
    from kdacli.provenance import collect

    check_dest(json_dest, force)
    device = pick_device(device)
    rows = survey(params, device)
    if json_dest:
        report = {"schema": "kda.kernels/1", "provenance": collect(), "device": device, "rows": rows}
        write_json(report, json_dest, force)
    if json_dest == "-":
        return
    cells = [(r["kernel"], r["op"], r["backend"], (good if r["runs"] else bad)(r["note"]), r["summary"]) for r in rows]
    asked = sorted({r["problem"] for r in rows if r["problem"]})
    title = f"Kernels on {describe(device)}" + (f": {'; '.join(asked)}" if asked else "")
    console().print(table(title, ("kernel", "op", "backend", "runs here?", "what it is"), cells))


def survey(params: options.Params, device: str) -> list[dict[str, Any]]:
    """One row a kernel: kernel, op, backend, ours, runs, note, summary, problem (None where none was described)."""
    op = params.get("op")
    if params.get("dump"):
        dumped = options.inputs_from(params, device)[0]
        return [_row(kernel, dumped, device) for kernel in registry.kernels(dumped.op)]
    described = bool(options.given(params))
    return [
        _row(kernel, options.problem_from(params, device, kernel.op) if described else None, device)
        for kernel in registry.kernels(op and Op(op))
    ]


def _row(kernel: Kernel, problem: Problem | None, device: str) -> dict[str, Any]:
    reason = kernel.unsupported(problem)
    interpreted = device == "cpu" and kernel.backend == "triton"
    return {
        "kernel": kernel.name,
        "op": kernel.op,
        "backend": kernel.backend,
        "ours": kernel.ours,
        "runs": reason is None,
        "note": reason or ("yes, interpreted" if interpreted else "yes"),
        "summary": kernel.summary,
        "problem": problem.name if problem else None,
    }
