"""`kda_step`: a decode step from the projection's output to that of the gated norm, in one launch.

For engines; `api` is where it is imported from.
"""

from typing import Any

import torch

from kda_kernels import checks, ops, registry  # noqa: F401  `ops` registers torch.ops.kda
from kda_kernels.boundary import forward_only, forward_only_traced, options_of, seed_of
from kda_kernels.errors import InputError
from kda_kernels.problem import Op
from kda_kernels.run import run_decode
from kda_kernels.tensor_checks import shape_error
from kda_kernels.tensors import Convolution, GatedNorm, Inputs

_NAMES = dict.fromkeys("qkv", "mixed_qkv")


def kda_step(
    mixed_qkv: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    state: torch.Tensor,
    state_indices: torch.Tensor,
    conv: Convolution | None = None,
    norm: GatedNorm | None = None,
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
    token_state_indices: torch.Tensor | None = None,
    null_slot: int | None = None,
    has_initial_state: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    update_state: bool = True,
    state_scales: torch.Tensor | None = None,
    state_rounding: str = "nearest",
    rounding_seed: torch.Tensor | int | None = None,
    kernel: str | None = None,
) -> torch.Tensor:
    """Convolution of q, k and v, one or a few tokens of the recurrence, and the gated norm of its output.

    Args:
        mixed_qkv: [N, D], one token of each sequence; [N, S, D], S of each; or with cu_seqlens [total tokens, D]. D is
            2 H K + HV V: q, k, then v, head by head, as the projection wrote them; rows may lie apart. H follows from D
            and the state's shape.
        g: [.., HV, K] or [.., HV * K], beta: [.., HV], with the leading dimensions of mixed_qkv.
        state: pool [P, HV, V, K], updated in place. state_indices: as in `kda_decode`.
        conv: the convolution, whose states are shifted in place: see `Convolution`. None: mixed_qkv comes convolved.
        norm: the norm, see `GatedNorm`; its gate is [.., HV, V] or [.., HV * V] with those leading dimensions. None:
            the output is that of the recurrence.
        out: [.., HV, V] in the dtype of mixed_qkv, where the result goes; token_states: [B, T, HV, V, K] or, with
            token_state_indices, [R, S, HV, V, K].
        kernel: "cute-step", "triton-step" or "torch-step", or another that `kda_kernels.registry` has of the op `step`.
        The others: as in `kda_decode`.

    Returns:
        o [.., HV, V].

    Raises:
        InputError: an argument is wrong, or no kernel here has what is asked for.
        UnavailableError: no GPU, and Triton's interpreter is not on; or `kernel` cannot run here.
    """
    if not use_gate_in_kernel:
        A_log = dt_bias = None
    axis = (0 if cu_seqlens is not None else 1) if getattr(mixed_qkv, "ndim", 0) == 2 else None
    HV, V, K = _sizes(state)
    qkv = _tokens(mixed_qkv, axis)
    q, k, v = _split(qkv, HV, V, K)
    g, beta = _by_head(_tokens(g, axis), HV, K), _tokens(beta, axis)
    if norm is not None:
        norm = GatedNorm(_by_head(_tokens(norm.gate, axis), HV, V), norm.weight, norm.eps)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device) if out is None else _tokens(out, axis)
    shape = o.shape if axis is None else o.squeeze(axis).shape
    seed = seed_of(state_rounding, rounding_seed, q)
    if checks.is_traced(q):
        torch.ops.kda.decode(
            q, k, v, g, beta, o, A_log, dt_bias, state, state_indices, cu_seqlens, None, token_states, state_scales,
            None if conv is None else conv.states, has_initial_state, num_accepted_tokens, token_state_indices, True,
            null_slot, update_state, use_gate_in_kernel, lower_bound, use_beta_sigmoid_in_kernel, allow_neg_eigval,
            use_qk_l2norm_in_kernel, scale, kernel, seed, True,
            *(() if conv is None else (conv.weight, conv.bias, conv.indices, conv.tokens_first)),
            **({} if norm is None else {"norm_gate": norm.gate, "norm_weight": norm.weight, "norm_eps": norm.eps}),
        )  # fmt: skip
        return forward_only_traced(o, (q, k, v, g, beta, A_log, dt_bias, state)).view(shape)
    options = options_of(
        use_gate_in_kernel, lower_bound, use_beta_sigmoid_in_kernel, allow_neg_eigval, use_qk_l2norm_in_kernel, scale
    )
    call = (
        q, k, v, g, beta, options, A_log, dt_bias, state, state_indices, cu_seqlens, True, True, null_slot,
        has_initial_state, num_accepted_tokens, update_state, token_states, token_state_indices, None, False, None,
        None, conv, norm, state_scales, seed,
    )  # fmt: skip
    plain = kernel is None and checks.CHECK_VALUES != "1" and not torch.is_grad_enabled()
    if plain and registry.decode_again(call, o):
        return o.view(shape) if out is None else out
    inputs = Inputs(*call)
    if state_indices is None:
        raise InputError("state_indices", "is missing", "it should be a tensor")
    o = forward_only(lambda: (run_decode(inputs, o, None, kernel, _NAMES, Op.STEP).o,), inputs)[0]
    return o.view(shape) if out is None else out


def _sizes(state: torch.Tensor) -> tuple[int, int, int]:
    """HV, V and K."""
    if getattr(state, "ndim", 0) != 4:
        raise InputError("state", "is no tensor of four dimensions", "it should be a pool [P, HV, V, K]")
    _, HV, V, K = state.shape
    return HV, V, K


def _split(qkv: torch.Tensor, HV: int, V: int, K: int) -> tuple[torch.Tensor, ...]:
    """q, k and v of [B, T, D]."""
    D = getattr(qkv, "shape", (0,))[-1]
    H, rest = divmod(D - HV * V, 2 * K)
    if qkv.ndim != 3 or rest or H < 1:
        wanted = f"[N, D] or [N, S, D] with D = 2 * H * K + HV * V = H * {2 * K} + {HV * V}"
        raise shape_error("mixed_qkv", qkv, wanted)
    q, k, v = qkv.split([H * K, H * K, HV * V], 2)
    return q.unflatten(2, (H, K)), k.unflatten(2, (H, K)), v.unflatten(2, (HV, V))


def _tokens(x: Any, axis: int | None) -> Any:
    """With a dimension more, where a batch has one dimension less than [B, T, ..]."""
    return x.unsqueeze(axis) if axis is not None and isinstance(x, torch.Tensor) else x


def _by_head(x: torch.Tensor, HV: int, size: int) -> torch.Tensor:
    """[B, T, HV * size] as [B, T, HV, size]; anything else as it is."""
    if getattr(x, "ndim", 0) != 3 or x.shape[2] != HV * size:
        return x
    return x.unflatten(2, (HV, size))
