"""What every public function does on its way in: options from switches, checks, and no way back for gradients."""

import functools
from collections.abc import Callable

import torch

from kda_kernels.checks import check_inputs
from kda_kernels.errors import InputError, KdaError
from kda_kernels.problem import Gate, Options
from kda_kernels.tensors import Inputs


@functools.lru_cache
def options_of(
    use_gate: bool,
    lower_bound: float | None,
    beta_is_logit: bool,
    allow_neg_eigval: bool,
    qk_l2norm: bool,
    scale: float | None,
    promise: float | None = None,
) -> Options:
    """FLA's switches as `Options`. `promise`: the bound of gates that come in activated."""
    if use_gate:
        gate = Gate.SOFTPLUS if lower_bound is None else Gate.SAFE
    else:
        gate, lower_bound = Gate.NONE, promise
    return Options(gate, lower_bound, bool(beta_is_logit), bool(allow_neg_eigval), bool(qk_l2norm), scale)


def check(inputs: Inputs, names: dict[str, str] | None = None) -> None:
    """`check_inputs`, with the caller's names for the arguments in its message."""
    try:
        check_inputs(inputs)
    except InputError as error:
        argument, _, rest = str(error).partition(" ")
        raise InputError(f"{(names or {}).get(argument, argument)} {rest}") from None


def check_out(out: torch.Tensor | None, v: torch.Tensor) -> None:
    """A buffer for o, if one is given, must be like v; rows may lie apart. Raises `InputError`."""
    if out is None:
        return
    for what in ("shape", "dtype", "device"):
        if getattr(out, what) != getattr(v, what):
            raise InputError(f"out has {what} {getattr(out, what)}: it should be {getattr(v, what)}, as v")
    if out.shape[-1] > 1 and out.stride(-1) != 1:
        raise InputError(f"out has stride {out.stride(-1)} in its last dimension: it should be 1")


def check_token_states(token_states: torch.Tensor | None, inputs: Inputs) -> None:
    """A buffer for the states after each token must have room for them, contiguous from HV on. Raises `InputError`."""
    if token_states is None:
        return
    B, T, HV, V = inputs.v.shape
    K = inputs.q.shape[3]
    shape = (B, T, HV, V, K) if inputs.state_v_first else (B, T, HV, K, V)
    if token_states.shape != shape:
        raise InputError(f"token_states has shape {list(token_states.shape)}: it should be {list(shape)}")
    if token_states.dtype not in (torch.float32, torch.bfloat16):
        raise InputError(f"token_states is {token_states.dtype}: it should be float32 or bfloat16")
    if token_states.device != inputs.q.device:
        raise InputError(f"token_states is on {token_states.device}: it should be on {inputs.q.device}, as q")
    if not token_states[:1, :1].is_contiguous():
        raise InputError(f"token_states has strides {list(token_states.stride())}: it should be contiguous from HV on")


def check_chunk_indices(chunk_indices: torch.Tensor | None, cu_seqlens: torch.Tensor | None) -> None:
    """A table of chunks, if one is given, must look like one of `prepare_chunk_indices`. Raises `InputError`."""
    if chunk_indices is None:
        return
    if cu_seqlens is None:
        raise InputError("chunk_indices is given without cu_seqlens: a dense batch needs no table")
    if chunk_indices.ndim != 2 or chunk_indices.shape[1] != 2 or not chunk_indices.is_contiguous():
        raise InputError(
            f"chunk_indices has shape {list(chunk_indices.shape)}: it should be [chunks, 2], contiguous, as "
            "prepare_chunk_indices makes it"
        )
    if chunk_indices.dtype not in (torch.int32, torch.int64) or chunk_indices.device != cu_seqlens.device:
        raise InputError(
            f"chunk_indices is {chunk_indices.dtype} on {chunk_indices.device}: it should be int32 or int64 on "
            f"{cu_seqlens.device}, as cu_seqlens"
        )


class _ForwardOnly(torch.autograd.Function):
    """Runs a function that returns a tuple, and says what is missing when somebody differentiates through it."""

    @staticmethod
    def forward(ctx, run: Callable[[], tuple], *tensors: torch.Tensor):
        return run()

    @staticmethod
    def backward(ctx, *grads):
        raise KdaError("kda has no backward: use FLA's function of the same name for training")


def forward_only(run: Callable[[], tuple], inputs: Inputs) -> tuple:
    """`run()`; with results whose backward raises `KdaError` if it was asked to record gradients of `inputs`."""
    if torch.is_grad_enabled() and _requires_grad(inputs):
        return _ForwardOnly.apply(run, *inputs.tensors().values())
    return run()


def _requires_grad(inputs: Inputs) -> bool:
    i = inputs  # spelled out: this is on the way of every decoding step
    tensors = (i.q, i.k, i.v, i.g, i.beta, i.A_log, i.dt_bias, i.state)
    return any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors)
