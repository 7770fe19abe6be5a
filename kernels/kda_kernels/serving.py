"""The serving forms: a V-first state pool, updated in place; and `chunk_kda_fwd`, the prefill with every switch.

For engines; `api` is where they are imported from.
"""

import torch

from kda_kernels import checks, dispatch
from kda_kernels.boundary import (
    check,
    check_chunk_indices,
    check_out,
    forward_only,
    options_of,
)
from kda_kernels.errors import InputError
from kda_kernels.problem import Gate
from kda_kernels.tensors import Inputs


def kda_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    state: torch.Tensor,
    state_indices: torch.Tensor,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    scale: float | None = None,
    lower_bound: float | None = None,
    use_gate_in_kernel: bool = True,
    use_qk_l2norm_in_kernel: bool = True,
    use_beta_sigmoid_in_kernel: bool = True,
    allow_neg_eigval: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    token_states: torch.Tensor | None = None,
    kernel: str | None = None,
) -> torch.Tensor:
    """One or a few tokens of each sequence, on a state pool that is updated in place.

    Args:
        q, k: [B, T, H, K]; v: [B, T, HV, V]; g: [B, T, HV, K]; beta: [B, T, HV]. Dense, [N, T, ..], or packed,
            [1, total tokens, ..], with cu_seqlens. Any strides with a contiguous last dimension: nothing is copied.
        state: pool [P, HV, V, K], fp32 or bf16; slots may lie apart, a slot is contiguous.
        state_indices: int32 or int64 [N], the slot of each sequence, none twice; -1 is padding: nothing is read or
            written, and its rows of o are zero.
        A_log [HV], dt_bias [HV * K] or [HV, K], lower_bound, use_..., allow_neg_eigval, scale: as in `chunk_kda`.
        out: [B, T, HV, V] in the dtype of v, where o goes; nothing is allocated then.
        token_states: [B, T, HV, V, K], fp32, bf16 or fp16, contiguous from HV on: the state after each token goes there
            too (to go back to the last accepted one of a draft); nothing is written for padding.
        kernel: "cute-decode" or "triton-decode"; by default `kda_kernels.dispatch.decode_kernel` says which.

    Returns:
        o [B, T, HV, V].

    Raises:
        InputError: an argument is wrong.
        UnavailableError: no GPU, and Triton's interpreter is not on; or `kernel` cannot run here.
    """
    options = options_of(
        use_gate_in_kernel, lower_bound, use_beta_sigmoid_in_kernel, allow_neg_eigval, use_qk_l2norm_in_kernel, scale
    )
    if options.gate is Gate.NONE:
        A_log = dt_bias = None
    inputs = Inputs(
        q, k, v, g, beta, options, A_log, dt_bias, state, state_indices, cu_seqlens, token_states=token_states
    )  # fmt: skip
    _require_pool(inputs)
    values = checks.CHECK_VALUES == "1"
    plain = kernel is None and out is not None and not torch.is_grad_enabled() and not values
    if plain and dispatch.decode_again(inputs, out):
        return out
    chosen = dispatch.decode_kernel(inputs) if kernel is None else kernel
    if chosen != dispatch.CUTE or values:  # the CuTe function checks shapes, strides and dtypes itself
        check(inputs)
        check_out(out, v)

    def run() -> tuple[torch.Tensor]:
        return (dispatch.decode(inputs, out, kernel=chosen).o,)

    return forward_only(run, inputs)[0]


def kda_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    state: torch.Tensor,
    state_indices: torch.Tensor,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    scale: float | None = None,
    lower_bound: float | None = None,
    use_gate_in_kernel: bool = True,
    use_qk_l2norm_in_kernel: bool = True,
    use_beta_sigmoid_in_kernel: bool = True,
    allow_neg_eigval: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_indices: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    kernel: str | None = None,
) -> torch.Tensor:
    """Whole prompts, on the same pool as `kda_decode`: a sequence is decoded from where its prefill left it.

    Args, Returns, Raises: as `kda_decode`, and
        chunk_indices: from `prepare_chunk_indices(cu_seqlens, total tokens)`; an engine makes them once a batch and
            passes them to every layer. Where triton-prefill runs, they are made here if not given; cute-prefill needs
            none.
        kernel: "cute-prefill" or "triton-prefill"; by default `kda_kernels.dispatch.prefill_kernel` says which.
    """
    options = options_of(
        use_gate_in_kernel, lower_bound, use_beta_sigmoid_in_kernel, allow_neg_eigval, use_qk_l2norm_in_kernel, scale
    )
    inputs = _pooled(q, k, v, g, beta, options, A_log, dt_bias, state, state_indices, cu_seqlens, out)
    check_chunk_indices(chunk_indices, cu_seqlens)

    def run() -> tuple[torch.Tensor]:
        return (dispatch.prefill(inputs, out, chunk_indices=chunk_indices, kernel=kernel).o,)

    return forward_only(run, inputs)[0]


def chunk_kda_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    state_indices: torch.Tensor | None = None,
    output_final_state: bool = True,
    state_v_first: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    chunk_indices: torch.Tensor | None = None,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The chunk pipeline behind `chunk_kda` and `kda_prefill`.

    Args:
        A_log: given, g is raw, and the pipeline activates and sums it; not given, g is the log decay already and is
            only summed, and a lower_bound is then a promise that every g lies in [lower_bound, 0], which allows the
            faster of two ways.
        dt_bias: only with A_log.
        initial_state: [N, HV, V, K] ([N, HV, K, V] without state_v_first), fp32 or bf16, not modified; with
            state_indices a pool [P, ..] that is updated in place.
        The others: as in `kda_prefill`.

    Returns:
        o [B, T, HV, V] in the dtype of v, and the final state (the pool, if there is one) or None.

    Raises:
        InputError: an argument is wrong.
        UnavailableError: no GPU, and Triton's interpreter is not on.
    """
    raw = A_log is not None
    options = options_of(
        raw, lower_bound, use_beta_sigmoid_in_kernel, allow_neg_eigval, use_qk_l2norm_in_kernel, scale, lower_bound
    )
    inputs = Inputs(
        q, k, v, g, beta, options, A_log, dt_bias, initial_state, state_indices, cu_seqlens,
        state_v_first, output_final_state,
    )  # fmt: skip
    check(inputs, {"state": "initial_state"})
    check_out(out, v)
    check_chunk_indices(chunk_indices, cu_seqlens)

    def run() -> tuple[torch.Tensor, torch.Tensor | None]:
        outputs = dispatch.prefill(inputs, out, chunk_indices=chunk_indices)
        return outputs.o, outputs.final_state

    return forward_only(run, inputs)


def _pooled(q, k, v, g, beta, options, A_log, dt_bias, state, state_indices, cu_seqlens, out) -> Inputs:
    """Checked inputs of a serving form."""
    raw = options.gate is not Gate.NONE
    inputs = Inputs(
        q, k, v, g, beta, options, A_log if raw else None, dt_bias if raw else None, state, state_indices, cu_seqlens
    )  # fmt: skip
    _require_pool(inputs)
    check(inputs)
    check_out(out, v)
    return inputs


def _require_pool(inputs: Inputs) -> None:
    if inputs.state is None or inputs.state_indices is None:
        name = "state" if inputs.state is None else "state_indices"
        raise InputError(name, "is missing", "it should be a tensor")
