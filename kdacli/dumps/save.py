"""Writes dumps that `load` reads back to the same tensors, under our names."""

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kda_kernels.errors import InputError
from kda_kernels.problem import Gate, Op, Options
from kda_kernels.tensors import Inputs, Outputs
from kdacli.dumps.strides import copies
from kdacli.output import check_dest, whole_file

_TORN = "the disk took only a part of it (is it full?)"


def save(
    path: str | Path,
    inputs: Inputs,
    outputs: Outputs | None = None,
    *,
    op: Op | str | None = None,
    meta: Mapping[str, Any] | None = None,
    force: bool = False,
) -> None:
    """Writes one call to `path`, in the format that its suffix names; the file appears whole or not at all.

    Strides survive in .pt, and which tensors share memory (see `copies`: nothing else of a larger storage is written).
    .safetensors knows no strides: tensors come back contiguous. A pool in `inputs` must be as it was before the call,
    and in `outputs` as it was after it.

    Args:
        op: the operation; None leaves it to be inferred when the dump is loaded.
        meta: plain values to keep beside the tensors.
        force: overwrite an existing file.

    Raises:
        InputError: the suffix is unknown, the file exists, or it cannot be written.
    """
    check_path(path, force)
    path = Path(path)
    tree = {"inputs": _inputs(inputs), "outputs": outputs.tensors() if outputs else {}}
    tree["options"] = said_options(inputs, op)
    tree["meta"] = dict(meta or {})
    try:
        with whole_file(path) as part:
            _WRITERS[path.suffix.lower()](tree, part)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error


def check_path(path: str | Path, force: bool = False) -> None:
    """Raises `InputError` if `save` could not write there: call it before the work that would be lost."""
    if (suffix := Path(path).suffix).lower() not in _WRITERS:
        raise InputError(f"{path} ends in {suffix or 'nothing'}: a dump ends in {' or '.join(_WRITERS)}")
    check_dest(path, force)


def said_options(inputs: Inputs, op: Op | str | None) -> dict[str, Any]:
    """Every option of a call by the name that FLA's functions give it; one that is None is left out."""
    options: Options = inputs.options
    said = {
        "op": None if op is None else str(Op(op)),
        "use_gate_in_kernel": options.gate is not Gate.NONE,
        "safe_gate": options.gate is Gate.SAFE,
        "lower_bound": options.lower_bound,
        "use_qk_l2norm_in_kernel": options.qk_l2norm,
        "use_beta_sigmoid_in_kernel": options.beta_is_logit,
        "allow_neg_eigval": options.allow_neg_eigval,
        "scale": options.scale,
        "state_v_first": inputs.state_v_first,
        "output_final_state": inputs.output_final_state,
        "update_state": None if inputs.update_state else False,
        "null_slot": inputs.null_slot,
        "batch_invariant": inputs.batch_invariant or None,
        "checkpoint_every": inputs.checkpoints and inputs.checkpoints.every,
        "conv_tokens_first": inputs.conv and inputs.conv.tokens_first,
        "conv_rounded": (inputs.conv and inputs.conv.rounded) or None,
        "norm_eps": inputs.norm and inputs.norm.eps,
    }
    return {name: value for name, value in said.items() if value is not None}


def _inputs(inputs: Inputs) -> dict[str, torch.Tensor]:
    """The tensors of a call by their names in a dump; without what the host needs to make it."""
    tensors = {name: t for name, t in inputs.tensors().items() if name not in ("workspace", "cu_seqlens_cpu")}
    if (kept := inputs.checkpoints) is not None:
        found = {"states": kept.states, "rows": kept.rows, "offsets": kept.offsets}
        tensors |= {f"checkpoint_{name}": t for name, t in found.items() if t is not None}
    if (conv := inputs.conv) is not None:
        parts = {"weight": conv.weight, "bias": conv.bias, "states": conv.states, "indices": conv.indices}
        tensors |= {f"conv_{name}": t for name, t in parts.items() if t is not None}
    if (norm := inputs.norm) is not None:
        tensors |= {"norm_gate": norm.gate, "norm_weight": norm.weight}
    return tensors


def _write_pt(tree: Mapping[str, Any], path: Path) -> None:
    parts = {part: copies(tree[part]) for part in ("inputs", "outputs")}
    write_pt({**tree, **parts}, path)


def write_pt(tree: Mapping[str, Any], path: Path) -> None:
    """Saves what is on the CPU already; raises OSError where torch raises RuntimeError for a full disk."""
    try:
        torch.save(tree, path)
    except RuntimeError as error:
        raise OSError(errno.ENOSPC, _TORN) from error


def _write_safetensors(tree: Mapping[str, Any], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {  # cloned, since the format refuses tensors that share memory
        f"{part}.{name}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for part in ("inputs", "outputs")
        for name, tensor in tree[part].items()
    }
    words = {f"{part}.{name}": _text(value) for part in ("options", "meta") for name, value in tree[part].items()}
    try:
        save_file(tensors, path, metadata=words)
    except SafetensorError as error:
        raise OSError(errno.ENOSPC, _TORN) from error


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


_WRITERS = {".pt": _write_pt, ".safetensors": _write_safetensors}
