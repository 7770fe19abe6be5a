"""The operators `torch.ops.kda.decode`, `prefill` and `conv`, for whoever traces a call instead of running it.

The public functions call their kernels directly; only under torch.compile, torch.export or FakeTensorMode do they go
through these (`checks.is_traced`). The operators write to buffers that are given, which they declare as mutated, and
return nothing, so that their fake implementation is nothing at all.

None of their arguments is called `kernel`: Inductor hands them on by keyword to a function of its own that has one.
Arguments that are written have no default: torch drops trailing arguments that are as their defaults, and up to 2.11
looks for each that is written among those that are left.
"""

import torch
from torch import Tensor

from kda_kernels.boundary import options_of
from kda_kernels.errors import KdaError
from kda_kernels.problem import Op
from kda_kernels.run import run_conv, run_decode, run_prefill
from kda_kernels.tensors import Checkpoints, Convolution, GatedNorm, Inputs


@torch.library.custom_op(
    "kda::decode", mutates_args=("out", "state", "final_state", "token_states", "conv_states", "state_scales")
)
def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    out: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    state_indices: Tensor | None,
    cu_seqlens: Tensor | None,
    final_state: Tensor | None,
    token_states: Tensor | None,
    state_scales: Tensor | None,
    conv_states: Tensor | None,
    has_initial_state: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    token_state_indices: Tensor | None = None,
    state_v_first: bool = True,
    null_slot: int | None = None,
    update_state: bool = True,
    use_gate_in_kernel: bool = True,
    lower_bound: float | None = None,
    use_beta_sigmoid_in_kernel: bool = True,
    allow_neg_eigval: bool = False,
    use_qk_l2norm_in_kernel: bool = True,
    scale: float | None = None,
    kernel_name: str | None = None,
    rounding_seed: Tensor | None = None,
    fused: bool = False,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    conv_indices: Tensor | None = None,
    conv_tokens_first: bool = False,
    norm_gate: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> None:
    """`kda_kernels.api.kda_decode` into `out`, and without a pool the final states into `final_state`.

    With `fused` it is `kda_step`, on q, k and v [B, T, ..] that it split.
    """
    options = options_of(
        use_gate_in_kernel, lower_bound, use_beta_sigmoid_in_kernel, allow_neg_eigval, use_qk_l2norm_in_kernel, scale
    )
    conv = norm = None
    if conv_weight is not None and conv_states is not None:
        conv = Convolution(conv_weight, conv_bias, conv_states, conv_indices, conv_tokens_first)
    if norm_gate is not None and norm_weight is not None:
        norm = GatedNorm(norm_gate, norm_weight, norm_eps)
    inputs = Inputs(
        q, k, v, g, beta, options, A_log, dt_bias, state, state_indices, cu_seqlens, state_v_first,
        final_state is not None or fused, null_slot=null_slot, has_initial_state=has_initial_state,
        num_accepted_tokens=num_accepted_tokens, update_state=update_state, token_states=token_states,
        token_state_indices=token_state_indices, conv=conv, norm=norm, state_scales=state_scales,
        rounding_seed=rounding_seed,
    )  # fmt: skip
    run_decode(inputs, out, final_state, kernel_name, op=Op.STEP if fused else Op.DECODE)


@torch.library.custom_op(
    "kda::prefill",
    mutates_args=("out", "state", "final_state", "checkpoint_states", "workspace", "state_scales"),
)
def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    out: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    state_indices: Tensor | None,
    cu_seqlens: Tensor | None,
    final_state: Tensor | None,
    checkpoint_states: Tensor | None,
    workspace: Tensor | None,
    state_scales: Tensor | None,
    has_initial_state: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    checkpoint_rows: Tensor | None = None,
    checkpoint_offsets: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    state_v_first: bool = True,
    null_slot: int | None = None,
    checkpoint_every: int | None = None,
    batch_invariant: bool = False,
    use_gate_in_kernel: bool = True,
    lower_bound: float | None = None,
    use_beta_sigmoid_in_kernel: bool = True,
    allow_neg_eigval: bool = False,
    use_qk_l2norm_in_kernel: bool = True,
    scale: float | None = None,
    promise: float | None = None,
    kernel_name: str | None = None,
    rounding_seed: Tensor | None = None,
) -> None:
    """`kda_kernels.api.kda_prefill` into `out`, and without a pool the final states into `final_state`."""
    options = options_of(
        use_gate_in_kernel, lower_bound, use_beta_sigmoid_in_kernel, allow_neg_eigval, use_qk_l2norm_in_kernel, scale,
        promise,
    )  # fmt: skip
    kept = None
    if checkpoint_states is not None and checkpoint_rows is not None:
        kept = Checkpoints(checkpoint_states, checkpoint_rows, checkpoint_offsets, checkpoint_every)
    inputs = Inputs(
        q, k, v, g, beta, options, A_log, dt_bias, state, state_indices, cu_seqlens, state_v_first,
        final_state is not None, null_slot=null_slot, has_initial_state=has_initial_state, checkpoints=kept,
        batch_invariant=batch_invariant, workspace=workspace, cu_seqlens_cpu=cu_seqlens_cpu,
        state_scales=state_scales, rounding_seed=rounding_seed,
    )  # fmt: skip
    run_prefill(inputs, out, chunk_indices, kernel_name, final_state=final_state)


@torch.library.custom_op("kda::conv", mutates_args=("out", "states"))
def conv(
    mixed_qkv: Tensor,
    out: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: Tensor,
    indices: Tensor | None,
    cu_seqlens: Tensor | None,
    has_initial_state: Tensor | None = None,
    null_slot: int | None = None,
    tokens_first: bool = False,
) -> None:
    """`kda_kernels.api.kda_conv` into `out`."""
    convolution = Convolution(weight, bias, states, indices, tokens_first)
    run_conv(mixed_qkv, convolution, cu_seqlens, has_initial_state, null_slot, out)


@conv.register_fake
@decode.register_fake
@prefill.register_fake
def _(*args, **kwargs) -> None:
    return None


@torch.library.custom_op("kda::no_backward", mutates_args=())
def no_backward(o: Tensor, inputs: list[Tensor]) -> Tensor:
    """`o` once more, as a result of `inputs` through which nobody can differentiate."""
    return o.clone()


@no_backward.register_fake
def _(o: Tensor, inputs: list[Tensor]) -> Tensor:
    return torch.empty_like(o)


def _refuse(ctx, grad):
    raise KdaError("kda has no backward: use FLA's function of the same name for training")


no_backward.register_autograd(_refuse)
