"""`kda run`: one kernel on synthetic or dumped inputs, and what came out."""

from typing import TYPE_CHECKING, Any

import click

from kda_kernels import registry
from kda_kernels.errors import UnavailableError
from kda_kernels.problem import Op, Problem
from kda_kernels.registry import Kernel
from kdacli import options

if TYPE_CHECKING:
    import torch

    from kda_kernels.tensors import Inputs, Outputs


@click.command("run", cls=options.SectionedCommand, usual=("kernel_name", "save"))
@click.option("--kernel", "kernel_name", metavar="NAME", help="The kernel (default: the first of ours that can).")
@options.problem_options
@options.device_option
@click.option("--save", metavar="FILE", help="Save inputs and outputs as a dump: .pt or .safetensors.")
@options.json_option
@options.force_option
def command(
    kernel_name: str | None, device: str, save: str | None, json_dest: str | None, force: bool, **params: Any
) -> None:
    """Run one kernel and say what came out of it.

    Prints shape, dtype, norm, extremes and the count of NaN and Inf of each output. Nothing is judged here: that is
    `kda verify` and `kda compare`. Of a state pool only the slots in use are counted.

    \b
    Examples:
      kda run                                              a prefill: T=8192 H=96 on a GPU, small on a CPU
      kda run --op decode --model kimi-k3 --tp 8 -N 64     a decode step over a state pool
      kda run --kernel torch-prefill --lens 130,0,64 -H 2 --gates weak --save out.pt
      kda run --dump dump.pt --kernel triton-prefill --json -
    """
    from kdacli.device import describe, pick_device
    from kdacli.output import check_dest, console, fmt_sci, progress, say, table, write_json
    from kdacli.provenance import collect
    from kdacli.userkernels import resolve

    check_dest(json_dest, force)
    if save:
        from kdacli import dumps

        dumps.check_path(save, force)
    device = pick_device(device)
    kernel = resolve(kernel_name, params["op"]) if kernel_name else None
    problem, inputs, _, label = options.inputs_from(params, device, kernel.op if kernel else Op.PREFILL)
    kernel = pick_kernel(kernel, problem)
    with progress(f"running {kernel.name}"):
        outputs = run_kernel(kernel, inputs)
    rows = [describe_tensor(name, t, note) for name, t, note in parts(inputs, outputs)]
    if save:
        meta = {"kernel": kernel.name, "device": describe(device), "label": label}
        dumps.save(save, inputs, outputs, op=problem.op, meta=meta, force=force)
    if json_dest:
        report = {
            "schema": "kda.run/1",
            "provenance": collect(None if params["dump"] else options.regime_from(params)["seed"]),
            "problem": problem.to_dict(),
            "label": label,
            "kernel": kernel.name,
            "device": describe(device),
            "rows": rows,
        }
        write_json(report, json_dest, force)
    if json_dest == "-":
        return
    say(f"inputs  {label}")
    say(f"kernel  {kernel.name} on {describe(device)}{' (Triton interpreter)' if interpreted(kernel, device) else ''}")
    stats = ("norm", "min", "max", "mean_abs")
    cells = [(r["name"], r["shape"], r["dtype"], *(fmt_sci(r[s], 3) for s in stats), r["nan"], r["inf"]) for r in rows]
    console().print(table(None, ("output", "shape", "dtype", "norm", "min", "max", "mean |x|", "NaN", "Inf"), cells))
    for row in rows:
        if row["note"]:
            say(f"{row['name']}: {row['note']}")
    if save:
        say(f"saved to {save}")


def interpreted(kernel: Kernel, device: str) -> bool:
    """Whether `kernel` runs in Triton's interpreter on `device`."""
    return kernel.backend == "triton" and device == "cpu"


def pick_kernel(kernel: Kernel | None, problem: Problem) -> Kernel:
    """The kernel asked for, or the first of ours that can run `problem`.

    Raises:
        UnavailableError: with the reason.
    """
    if kernel is None:
        return registry.choose(problem)
    if reason := kernel.unsupported(problem):
        raise UnavailableError(f"{kernel.name} cannot run {problem.name} here: {reason}")
    return kernel


def run_kernel(kernel: Kernel, inputs: "Inputs") -> "Outputs":
    """Checks the inputs, runs the kernel on a copy of the state, and waits for the GPU."""
    import torch

    from kda_kernels.checks import check_inputs

    check_inputs(inputs, values=True)
    outputs = kernel.run(inputs.fresh())
    if outputs.o.is_cuda:
        torch.cuda.synchronize()
    return outputs


def parts(inputs: "Inputs", outputs: "Outputs") -> "list[tuple[str, torch.Tensor, str | None]]":
    """Each output with its name and a note; of a pool, the slots in use."""
    import torch

    from kda_kernels.reference.stored import Stored

    found = []
    for name, tensor in outputs.tensors().items():
        note = None
        if name in ("final_state", "state_scales") and inputs.state_indices is not None:
            used = inputs.state_indices[inputs.state_indices >= 0].long()
            note = f"the {len(used)} slots in use, of a pool of {tensor.shape[0]}"
            tensor = tensor[used]
            if name == "final_state" and (scales := outputs.state_scales) is not None:
                note += ", times state_scales"
                tensor = Stored(tensor, scales[used]).values(torch.float32)
        found.append((name, tensor, note))
    return found


def describe_tensor(name: str, tensor: "torch.Tensor", note: str | None = None) -> dict[str, Any]:
    """name, shape, dtype; norm, min, max, mean_abs of the finite elements (None if there are none); nan, inf; note."""
    import torch

    nan, inf = torch.isnan(tensor).sum().item(), torch.isinf(tensor).sum().item()
    finite = tensor[torch.isfinite(tensor)] if nan or inf else tensor.flatten()
    row = {
        "name": name,
        "shape": "x".join(map(str, tensor.shape)),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "norm": None,
        "min": None,
        "max": None,
        "mean_abs": None,
        "nan": nan,
        "inf": inf,
        "note": note,
    }
    if finite.numel():
        low, high = torch.aminmax(finite)
        row |= {
            "norm": torch.linalg.vector_norm(finite, dtype=torch.float64).item(),
            "min": low.item(),
            "max": high.item(),
            "mean_abs": finite.abs().mean(dtype=torch.float64).item(),
        }
    return row
