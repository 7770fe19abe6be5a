"""What every public function does on its way in: options from switches, checks, and no way back for gradients."""

import functools
from collections.abc import Callable, Mapping

import torch

from kda_kernels.checks import check_inputs, require_memory
from kda_kernels.errors import InputError, KdaError
from kda_kernels.problem import ROUNDINGS, Options
from kda_kernels.tensor_checks import FLOAT_DTYPES, INDEX_DTYPES, check_tensor, shape_error
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
    """FLA's switches as `Options`, see `Options.of_switches`; remembered, as it is on the way of every call."""
    return Options.of_switches(
        use_gate,
        lower_bound,
        promise=promise,
        beta_is_logit=bool(beta_is_logit),
        allow_neg_eigval=bool(allow_neg_eigval),
        qk_l2norm=bool(qk_l2norm),
        scale=scale,
    )


def seed_of(state_rounding: str, seed: torch.Tensor | int | None, owner: torch.Tensor) -> torch.Tensor | None:
    """`Inputs.rounding_seed` of a call that rounds states "nearest" or "stochastic"; None: to nearest.

    Args:
        seed: int64 [1]; a number becomes one on the device of `owner`, by a launch of its own.

    Raises:
        InputError: the two do not fit together.
    """
    if state_rounding == "nearest" and seed is None:  # nearly every call
        return None
    if state_rounding not in ROUNDINGS:
        raise InputError("state_rounding", f"is {state_rounding}", "it should be nearest or stochastic")
    if (state_rounding == "nearest") != (seed is None):
        found, wanted = ("is missing", "give one") if seed is None else ("is given", "leave it out")
        raise InputError("rounding_seed", f"{found} and state_rounding is {state_rounding}", wanted)
    if not isinstance(seed, int):
        return seed
    if not -(2**63) <= seed < 2**63:
        raise InputError("rounding_seed", f"is {seed}", "it should fit 64 bits with a sign")
    return torch.full((1,), seed, dtype=torch.int64, device=owner.device)


def check(inputs: Inputs, names: Mapping[str, str] | None = None) -> None:
    """`check_inputs`, with the caller's names for the arguments in its message; the tensors must have memory."""
    try:
        check_inputs(inputs)
        require_memory(inputs.q)
    except InputError as error:
        raise error.renamed(names or {}) from None


def check_out(out: torch.Tensor | None, v: torch.Tensor) -> None:
    """A buffer for o, if one is given, must be like v; rows may lie apart. Raises `InputError`."""
    if out is None:
        return
    for what in ("shape", "dtype", "device"):
        if getattr(out, what) != getattr(v, what):
            raise InputError("out", f"has {what} {getattr(out, what)}", f"it should be {getattr(v, what)}, as v")
    if out.shape[-1] > 1 and out.stride(-1) != 1:
        raise InputError("out", f"has stride {out.stride(-1)} in its last dimension", "it should be 1")


def check_final_state(final_state: torch.Tensor | None, inputs: Inputs) -> None:
    """Room for the final states, if it is given, must be [N, HV, V, K], contiguous. Raises `InputError`."""
    if final_state is None:
        return
    if inputs.state_indices is not None or not inputs.output_final_state:
        why = "a pool is updated in place" if inputs.state_indices is not None else "output_final_state is False"
        raise InputError("final_state", "is given", f"leave it out: {why}")
    check_tensor("final_state", final_state, FLOAT_DTYPES, inputs.q, "q")
    wanted = inputs.state_shape(inputs.N)
    if tuple(final_state.shape) != wanted or not final_state.is_contiguous():
        raise shape_error("final_state", final_state, f"{list(wanted)}, contiguous")


def check_chunk_indices(chunk_indices: torch.Tensor | None, cu_seqlens: torch.Tensor | None) -> None:
    """A table of chunks, if one is given, must look like one of `prepare_chunk_indices`. Raises `InputError`."""
    if chunk_indices is None:
        return
    if cu_seqlens is None:
        raise InputError("chunk_indices", "is given without cu_seqlens", "a dense batch needs no table")
    check_tensor("chunk_indices", chunk_indices, INDEX_DTYPES, cu_seqlens, "cu_seqlens")
    if chunk_indices.ndim != 2 or chunk_indices.shape[1] != 2 or not chunk_indices.is_contiguous():
        raise shape_error("chunk_indices", chunk_indices, "[chunks, 2], contiguous, as prepare_chunk_indices makes it")


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


def forward_only_of(run: Callable[[], tuple], tensors: tuple[torch.Tensor | None, ...]) -> tuple:
    """`forward_only` where there are no `Inputs`, of the results of `tensors`."""
    if torch.is_grad_enabled() and _any_requires_grad(tensors):
        return _ForwardOnly.apply(run, *(t for t in tensors if t is not None))
    return run()


def forward_only_traced(o: torch.Tensor, tensors: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
    """`forward_only` for a call that was traced, with the result `o` of `tensors`."""
    if not (torch.is_grad_enabled() and _any_requires_grad(tensors)):
        return o
    return torch.ops.kda.no_backward(o, [t for t in tensors if t is not None])


def _requires_grad(inputs: Inputs) -> bool:
    i = inputs  # spelled out: this is on the way of every decoding step
    return _any_requires_grad((i.q, i.k, i.v, i.g, i.beta, i.A_log, i.dt_bias, i.state))


def _any_requires_grad(tensors: tuple[torch.Tensor | None, ...]) -> bool:
    return any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors)
