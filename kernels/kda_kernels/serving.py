"""The serving forms: a V-first state pool, updated in place. For engines; `api` is where they are imported from."""

import torch

from kda_kernels.boundary import check, check_out, forward_only, options_of
from kda_kernels.errors import InputError
from kda_kernels.problem import Gate
from kda_kernels.tensors import Inputs
from kda_kernels.triton.decode import decode
from kda_kernels.triton.prefill import prefill


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
) -> torch.Tensor:
    """One or a few tokens of each sequence, on a state pool that is updated in place.

    Args:
        q, k: [B, T, H, K]; v: [B, T, HV, V]; g: [B, T, HV, K]; beta: [B, T, HV]. Dense, [N, T, ..], or packed,
            [1, total tokens, ..], with cu_seqlens. Any strides with a contiguous last dimension: nothing is copied.
        state: pool [P, HV, V, K], fp32 or bf16; slots may lie apart, a slot is contiguous.
        state_indices: int32 or int64 [N], the slot of each sequence, none twice; -1 is padding: nothing is read or
            written, and its rows of o are zero.
        A_log [HV], dt_bias [HV * K] or [HV, K], lower_bound, use_..., allow_neg_eigval, scale: as in `chunk_kda`.
        out: [B, T, HV, V] in the dtype of v, where o goes.

    Returns:
        o [B, T, HV, V].

    Raises:
        InputError: an argument is wrong.
        UnavailableError: no GPU, and Triton's interpreter is not on.
    """
    options = options_of(
        use_gate_in_kernel, lower_bound, use_beta_sigmoid_in_kernel, allow_neg_eigval, use_qk_l2norm_in_kernel, scale
    )
    inputs = _pooled(q, k, v, g, beta, options, A_log, dt_bias, state, state_indices, cu_seqlens, out)
    return forward_only(lambda: (decode(inputs, out).o,), inputs)[0]


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
) -> torch.Tensor:
    """Whole prompts, on the same pool as `kda_decode`: a sequence is decoded from where its prefill left it.

    Args, Returns, Raises: as `kda_decode`, and
        chunk_indices: from `prepare_chunk_indices(cu_seqlens, total tokens)`; an engine makes them once a batch and
            passes them to every layer. Made here if not given.
    """
    options = options_of(
        use_gate_in_kernel, lower_bound, use_beta_sigmoid_in_kernel, allow_neg_eigval, use_qk_l2norm_in_kernel, scale
    )
    inputs = _pooled(q, k, v, g, beta, options, A_log, dt_bias, state, state_indices, cu_seqlens, out)
    return forward_only(lambda: (prefill(inputs, chunk_indices=chunk_indices, out=out).o,), inputs)[0]


def _pooled(q, k, v, g, beta, options, A_log, dt_bias, state, state_indices, cu_seqlens, out) -> Inputs:
    """Checked inputs of a serving form."""
    for name, value in (("state", state), ("state_indices", state_indices)):
        if value is None:
            raise InputError(f"{name} is missing: it should be a tensor")
    raw = options.gate is not Gate.NONE
    inputs = Inputs(
        q, k, v, g, beta, options, A_log if raw else None, dt_bias if raw else None, state, state_indices, cu_seqlens
    )  # fmt: skip
    check(inputs)
    check_out(out, v)
    return inputs
