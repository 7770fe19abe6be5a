"""What the flags of `kdacli.flags` mean: a `Problem`, and its inputs, synthetic or from a dump."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kda_kernels.errors import InputError, UnavailableError
from kda_kernels.problem import SAFE_BOUND, Gate, Op, Options, Parts, Problem
from kdacli.flags import (
    SHAPE_FLAGS,
    SectionedCommand,
    device_option,
    flag,
    force_option,
    json_option,
    kernel_option,
    problem_options,
    require_alone,
)
from kdacli.presets import PRESETS

if TYPE_CHECKING:
    from kda_kernels.tensors import Inputs, Outputs

__all__ = [
    "SectionedCommand",
    "device_option",
    "force_option",
    "given",
    "inputs_from",
    "json_option",
    "kernel_option",
    "problem_from",
    "problem_options",
    "regime_from",
    "require_alone",
    "require_memory",
]

Params = Mapping[str, Any]
_LARGE_SHAPE = {Op.PREFILL: (1, 8192), Op.GATE: (1, 8192), Op.DECODE: (32, 1), Op.STEP: (32, 1)}  # N, T each
_SMALL_SHAPE = {Op.PREFILL: (1, 256), Op.GATE: (1, 256), Op.DECODE: (4, 1), Op.STEP: (4, 1)}  # for a CPU
_LARGE_HEADS, _SMALL_HEADS = 96, 2


def given(params: Params) -> list[str]:
    """The shape flags that the user gave, as typed: --lens, --no-l2norm, ..."""
    return [flag(name, params[name]) for name in SHAPE_FLAGS if params.get(name) is not None]


def problem_from(params: Params, device: str = "cuda", default_op: Op | str = Op.PREFILL) -> Problem:
    """The problem that the flags describe.

    Args:
        params: the command's parameters (missing ones count as not given).
        device: where nothing is said of the shape, "cuda" gets P1 (T=8192, H=96) or a decode batch of 32, "cpu" a small
            one that an interpreter can run.
        default_op: the op where --op is not given.

    Raises:
        InputError: flags contradict each other; one line says which.
    """
    op = Op(params.get("op") or default_op)
    heads, v_heads, K, V = _heads(params, device)
    seq_lens = _seq_lens(params, op, device)
    dtype = _or(params, "dtype", "bfloat16")
    pool, padding = _pool(params, op, len(seq_lens))
    dense = _or(params, "dense", op.decodes and len(set(seq_lens)) == 1)
    if dense and len(set(seq_lens)) > 1:
        raise InputError("--dense is given with --lens of different lengths: a dense batch needs equal ones")
    return Problem(
        op=op,
        seq_lens=seq_lens,
        H=heads,
        HV=v_heads,
        K=K,
        V=V,
        packed=not dense,
        dtype=dtype,
        g_dtype=_or(params, "g_dtype", dtype),
        beta_dtype=_or(params, "beta_dtype", dtype),
        param_dtype=_or(params, "param_dtype", "float32"),
        state_dtype=_or(params, "state_dtype", "float32"),
        state_rounding=_or(params, "state_rounding", "nearest"),
        initial_state=not params.get("no_initial_state"),
        final_state=not params.get("no_final_state"),
        pool_slots=pool,
        padding=padding,
        state_v_first=not params.get("state_k_first"),
        options=_options(params),
        parts=_parts(params, op),
    )


_PARTS = ("conv_width", "conv_bias", "conv_dtype", "conv_state_dtype", "channels_first", "no_norm")


def _parts(params: Params, op: Op) -> Parts | None:
    """What a step does beside the recurrence, or a prefill of which something is said."""
    said = [name for name in _PARTS if params.get(name) is not None]
    if op is Op.PREFILL and said and "no_norm" not in said:
        params = {**params, "no_norm": True}
    elif op is not Op.STEP:
        if said:
            wanted = "only a step has one" if op is Op.PREFILL else "only a step and a prefill have such parts"
            raise InputError(f"{flag(said[0])} is given with the op {op}: {wanted}")
        return None
    usual = Parts()
    if params.get("conv_width") == 0 and (of_conv := [name for name in said[1:] if name != "no_norm"]):
        raise InputError(f"{flag(of_conv[0])} is given with --conv-width 0, which is no convolution")
    return Parts(
        width=_or(params, "conv_width", usual.width),
        bias=bool(params.get("conv_bias")),
        weight_dtype=_or(params, "conv_dtype", usual.weight_dtype),
        state_dtype=_or(params, "conv_state_dtype", usual.state_dtype),
        tokens_first=not params.get("channels_first"),
        norm=not params.get("no_norm"),
    )


def regime_from(params: Params) -> dict[str, Any]:
    """gates, keys and seed, as keyword arguments of `kdacli.synthetic.make_inputs`."""
    return {
        "gates": _or(params, "gates", "bench"),
        "keys": _or(params, "keys", "random"),
        "seed": _or(params, "seed", 0),
    }


def inputs_from(
    params: Params, device: str, default_op: Op | str = Op.PREFILL
) -> "tuple[Problem, Inputs, Outputs | None, str]":
    """Problem, inputs on `device`, the outputs recorded in a dump (else None), and a line that says what they are.

    Raises:
        InputError: contradicting flags, or a dump that is not as it should be.
        UnavailableError: the inputs do not fit into memory.
    """
    if params.get("dump"):
        return _from_dump(params, device)
    if params.get("call"):
        raise InputError("--call is given without --dump: it names a call of a dump")
    from kdacli.synthetic import make_inputs

    problem, regime = problem_from(params, device, default_op), regime_from(params)
    require_memory(problem, device)
    label = f"{problem.name}, {regime['gates']} gates, {regime['keys']} keys, seed {regime['seed']}"
    if device == "cpu" and not any(params.get(name) for name in ("seqs", "tokens", "lens", "heads", "model")):
        label += " (a small shape, since this is a CPU; -T and -H change it)"
    return problem, make_inputs(problem, **regime, device=device), None, label


def require_memory(problem: Problem, device: str) -> None:
    """Raises `UnavailableError` where a problem's tensors cannot fit; says how much they need."""
    from kdacli.device import free_memory
    from kdacli.output import fmt_bytes
    from kdacli.synthetic import elements

    need, free = 4 * elements(problem), free_memory(device)  # each tensor is drawn in float32
    if free is not None and need > free:
        where = "the GPU" if device == "cuda" else "this machine"
        raise UnavailableError(f"{problem.name} needs about {fmt_bytes(need)}: {where} has {fmt_bytes(free)} free")


def _from_dump(params: Params, device: str) -> "tuple[Problem, Inputs, Outputs | None, str]":
    if flags := given(params):
        raise InputError(f"{flags[0]} is given with --dump, which says that already: leave one out")
    from kda_kernels.checks import problem_of
    from kdacli.dumps import load
    from kdacli.dumps.strides import copy_of

    dump = load(params["dump"], params.get("call"))
    op = Op(params.get("op") or dump.op)
    inputs, outputs = dump.inputs, dump.outputs if op is dump.op else None
    if inputs.q.device.type != device:
        inputs = copy_of(inputs, device)
    if outputs is not None:
        outputs = dataclasses.replace(outputs, **{name: t.to(device) for name, t in outputs.tensors().items()})
    problem = problem_of(inputs, op)
    call = f" call {dump.call}" if dump.call else ""
    return problem, inputs, outputs, "; ".join([f"{problem.name}, from {Path(params['dump']).name}{call}", *dump.notes])


def _or(params: Params, name: str, default: Any) -> Any:
    value = params.get(name)
    return default if value is None else value


def _exclusive(params: Params, name: str, others: tuple[str, ...], reason: str) -> None:
    if params.get(name) is None:
        return
    for other in others:
        if (value := params.get(other)) is not None:
            raise InputError(f"{flag(other, value)} is given with {flag(name)}, {reason}: leave one out")


def _heads(params: Params, device: str) -> tuple[int, int, int, int]:
    """H, HV, K, V."""
    _exclusive(params, "model", ("heads", "v_heads", "head_dim", "v_head_dim"), "which sets the heads")
    if params.get("model") is None:
        if params.get("tp") is not None:
            raise InputError("--tp is given without --model: it divides a model's heads")
        heads = _or(params, "heads", _LARGE_HEADS if device == "cuda" else _SMALL_HEADS)
        K = _or(params, "head_dim", 128)
        return heads, _or(params, "v_heads", heads), K, _or(params, "v_head_dim", K)
    preset = PRESETS[params["model"]]
    heads = preset.heads_per_gpu(_or(params, "tp", 1))
    return heads, heads, preset.head_dim, preset.head_dim


def _seq_lens(params: Params, op: Op, device: str) -> tuple[int, ...]:
    _exclusive(params, "lens", ("seqs", "tokens"), "which sets every length")
    if params.get("lens") is not None:
        return params["lens"]
    N, T = (_LARGE_SHAPE if device == "cuda" else _SMALL_SHAPE)[op]
    return (_or(params, "tokens", T),) * _or(params, "seqs", N)


def _pool(params: Params, op: Op, N: int) -> tuple[int | None, int]:
    """Slots of the pool (None: a plain state) and padding rows."""
    padding = _or(params, "padding", 0)
    wanted = params.get("pool")
    stored = params.get("state_dtype") == "int16" or params.get("state_rounding") == "stochastic"
    if wanted is None and (op.decodes or padding or stored):
        wanted = 2 * N
    if padding and not wanted:
        raise InputError("--padding is given with --pool 0: padding rows need a pool")
    if padding > N:
        raise InputError(f"--padding is {padding}: there are {N} sequences")
    return wanted or None, padding


def _options(params: Params) -> Options:
    _exclusive(params, "model", ("gate", "lower_bound"), "which sets the gate")
    if params.get("model") is not None:
        preset = PRESETS[params["model"]]
        gate, lower_bound = preset.gate, preset.lower_bound
    else:
        gate = Gate(_or(params, "gate", Gate.SAFE))
        lower_bound = _or(params, "lower_bound", SAFE_BOUND if gate is Gate.SAFE else None)
    _exclusive(params, "beta_values", ("allow_neg_eigval",), "but it needs logits")
    for name in ("scale", "lower_bound"):
        if not math.isfinite(_or(params, name, 1.0)):
            raise InputError(f"{flag(name)} is {params[name]}: it should be a finite number")
    return Options(
        gate=gate,
        lower_bound=lower_bound,
        beta_is_logit=not params.get("beta_values"),
        allow_neg_eigval=bool(params.get("allow_neg_eigval")),
        qk_l2norm=not params.get("no_l2norm"),
        scale=params.get("scale"),
    )
