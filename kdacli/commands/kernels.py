"""`kda kernels`: what is there, what can run here, and if not why."""

import contextlib
from collections.abc import Sequence
from typing import Any

import click

from kda_kernels import registry
from kda_kernels.errors import CheckFailedError, InputError
from kda_kernels.problem import Op, Problem
from kda_kernels.registry import Kernel
from kdacli import options

FAILED = "failed when it was asked"
COMPILED_ONLY = {  # by backend
    "triton": ("triton-*", "sm_80, sm_86, sm_89, sm_100a, sm_103a, sm_120a, gfx942, gfx950"),
    "cute": ("cute-decode, cute-step", "sm_100a, sm_103a, sm_120a"),
}


@click.command("kernels", cls=options.SectionedCommand)
@options.kernel_option
@options.problem_options
@options.device_option
@options.json_option
@options.force_option
def command(kernels: tuple[str, ...], device: str, json_dest: str | None, force: bool, **params: Any) -> None:
    """List the kernels, and say which can run here and why not.

    With no flags, each kernel is asked whether it can run anything on this machine. With a shape or a model, each is
    asked about that problem; kernels of ours come first, the fastest before the others, and `kda run` takes the first
    that says yes. Then come other people's, and those that installed packages declare in the entry-point group
    kda.kernels. "Interpreted" is Triton's interpreter: right, but slow.

    Your own kernel is a function in a file or a module, such as mykernel.py:prefill. It is called with those of these
    arguments that its signature names, and returns o or (o, final_state): q, k, v, g, beta, A_log, dt_bias, cu_seqlens,
    scale, lower_bound, initial_state, state_indices, output_final_state, state_v_first, and FLA's switches such as
    use_qk_l2norm_in_kernel. What the signature cannot take is refused here with the reason.

    \b
    Examples:
      kda kernels
      kda kernels --op decode --model kimi-k3 --tp 8 -N 64
      kda kernels --dump dump.pt
      kda kernels --kernel mykernel.py:prefill --model kimi-k3
    """
    from kdacli.device import describe, pick_device
    from kdacli.output import check_dest, write_json
    from kdacli.provenance import collect

    check_dest(json_dest, force)
    device = pick_device(device)
    rows = survey(params, device, kernels)
    if json_dest:
        report = {"schema": "kda.kernels/1", "provenance": collect(), "device": device, "rows": rows}
        write_json(report, json_dest, force)
    if json_dest != "-":
        _print(rows, describe(device))
    if failed := [row["kernel"] for row in rows if row["note"].startswith(FAILED)]:
        raise CheckFailedError(f"{', '.join(failed)}: their own code failed, see above")


def _print(rows: list[dict[str, Any]], device: str) -> None:
    """A table, and under it the reasons, whole: one may hold a command to type."""
    from kdacli.output import bad, console, good, say, table

    asked = sorted({r["problem"] for r in rows if r["problem"]})
    title = f"Kernels on {device}" + (f": {'; '.join(asked)}" if asked else "")
    cells = [(r["kernel"], r["op"], good(r["note"]) if r["runs"] else bad("no"), r["summary"]) for r in rows]
    console().print(table(title, ("kernel", "op", "runs here?", "what it is"), cells))
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if not row["runs"]:
            reasons.setdefault(row["note"], []).append(row["kernel"])
    for reason, names in reasons.items():
        say(f"not here: {', '.join(names)}: {reason}")
    if any(row["ours"] and row["backend"] in COMPILED_ONLY for row in rows):
        archs = "; ".join(f"{kernels} for {names}" for kernels, names in COMPILED_ONLY.values())
        say(f"ours have run on sm_90a; compiled only, never run: {archs}")


def survey(params: options.Params, device: str, names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """One row per kernel: kernel, op, backend, ours, runs, note, summary, problem (None where none was described).

    Args:
        params: the shape flags.
        device: "cuda" or "cpu".
        names: only these, users' own among them; none: all there are, those that packages declare included.
    """
    dumped = options.inputs_from(params, device)[0] if params.get("dump") else None
    op = dumped.op if dumped else params.get("op") and Op(params["op"])
    described = bool(options.given(params)) and not dumped

    def problem_for(kernel: Kernel) -> Problem | None:
        return options.problem_from(params, device, kernel.op) if described else dumped

    found, broken = _chosen(names, op) if names else _all(op)
    return [_row(kernel, problem_for(kernel), device) for kernel in found] + broken


def _chosen(names: Sequence[str], op: Op | None) -> tuple[list[Kernel], list[dict[str, Any]]]:
    from kdacli.userkernels import resolve

    return [resolve(name, op) for name in dict.fromkeys(names)], []


def _all(op: Op | None) -> tuple[list[Kernel], list[dict[str, Any]]]:
    """Kernels of the op (None: of any), and a row for each entry point that is none."""
    from kdacli.userkernels import installed

    kernels, broken = list(registry.kernels(op)), []
    for name, found in installed():
        if isinstance(found, str):
            broken.append(_no_kernel(name, found))
        elif op in (None, found.op):
            kernels.append(found)
    return kernels, broken


def _row(kernel: Kernel, problem: Problem | None, device: str) -> dict[str, Any]:
    reason = kernel.unsupported(problem)
    if kernel.failure:
        reason = f"{FAILED}: {kernel.failure}"
    return {
        "kernel": kernel.name,
        "op": kernel.op,
        "backend": kernel.backend,
        "ours": kernel.ours,
        "runs": reason is None,
        "note": reason or _how(kernel, device),
        "summary": kernel.summary,
        "problem": problem.name if problem else None,
    }


def _how(kernel: Kernel, device: str) -> str:
    """How a kernel runs that can run here: of ours, whether it has run on such a GPU before."""
    from kdacli.compile import arch

    if device == "cpu":
        return "yes, interpreted" if kernel.backend == "triton" else "yes"
    if not kernel.ours or kernel.backend == "torch":
        return "yes"
    with contextlib.suppress(InputError):  # a GPU that is not known here has not been tried either
        if (here := arch.here()) is not None and here.name in arch.HAVE_RUN:
            return "yes"
    return "yes, but only compiled for such a GPU, never run"


def _no_kernel(name: str, reason: str) -> dict[str, Any]:
    """The row of an entry point that could not be made a kernel."""
    return {
        "kernel": name,
        "op": None,
        "backend": "user",
        "ours": False,
        "runs": False,
        "note": reason,
        "summary": "entry point kda.kernels",
        "problem": None,
    }
