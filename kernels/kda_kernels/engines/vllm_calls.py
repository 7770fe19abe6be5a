"""What runs in place of vLLM's functions: their arguments, by their names, handed to ours.

They return and write what the functions do that they replace (vLLM 0.33.0); slot 0 is vLLM's null block. Where ours
lacks what is asked for, an `InputError` says so: nothing else runs instead.
"""

from collections.abc import Callable
from typing import Any

import torch

from kda_kernels.api import Checkpoints, Convolution, GatedNorm, chunk_kda_fwd, kda_conv, kda_decode, kda_step
from kda_kernels.api import checkpoint_alignment as our_alignment
from kda_kernels.engines.derived import counted, derived, joined
from kda_kernels.errors import InputError

NULL_SLOT = 0


def checkpoint_alignment(backend: str) -> int | None:
    """Positions of checkpoints are multiples of it: ours, where FlashKDA would take multiples of 16."""
    return our_alignment() if backend == "flashkda" else None


def k3_flashkda_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    lower_bound: float,
    initial_state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    out: torch.Tensor,
    final_state: torch.Tensor,
    workspace: torch.Tensor,
    checkpoint_state: torch.Tensor | None = None,
    checkpoint_offsets: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prefill of packed tokens [1, T, H, K] into `out` and `final_state` [N, H, V, K]; `workspace` is not used."""
    kept = None
    if checkpoint_state is not None and checkpoint_offsets is not None:
        rows = counted(checkpoint_state.shape[0], checkpoint_state.device)
        kept = Checkpoints(checkpoint_state, rows, checkpoint_offsets)
    chunk_kda_fwd(
        q, k, v, g, beta, initial_state=initial_state, A_log=A_log, dt_bias=dt_bias, lower_bound=lower_bound,
        use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True, cu_seqlens=cu_seqlens, out=out,
        final_state=final_state, checkpoints=kept,
    )  # fmt: skip
    return out, final_state


def k3_chunk_kda_with_fused_gate(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    raw_g: torch.Tensor,
    raw_beta: torch.Tensor,
    A_log: torch.Tensor,
    g_bias: torch.Tensor | None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    lower_bound: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Prefill with raw gates and betas, for layers without FlashKDA."""
    return chunk_kda_fwd(
        q, k, v, raw_g, raw_beta, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        cu_seqlens=cu_seqlens, A_log=A_log.view(-1), dt_bias=g_bias, lower_bound=lower_bound,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel=True, out=out,
    )  # fmt: skip


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_states: torch.Tensor,
    query_start_loc: torch.Tensor,
    cache_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    activation: str | bool | None = "silu",
    pad_slot_id: int = -1,
    null_block_id: int | None = NULL_SLOT,
    metadata: Any = None,
    validate_data: bool = False,
) -> torch.Tensor:
    """The convolution of packed prompts, x [D, T]; conv_states: a view [P, D, L].

    `metadata`, a plan for vLLM's own kernel, is not used.

    Raises:
        InputError: another activation is asked for, which the layers never do.
    """
    if activation not in ("silu", "swish", True):
        raise InputError("activation", f"is {activation}", "ours is SiLU")
    tokens_first = conv_states.stride(1) == 1
    states = conv_states.mT if tokens_first else conv_states
    return kda_conv(
        x.mT, Convolution(weight, bias, states, cache_indices, tokens_first), cu_seqlens=query_start_loc,
        has_initial_state=has_initial_state, null_slot=null_block_id,
    ).mT  # fmt: skip


def k3_packed_decode(
    mixed_qkv: torch.Tensor,
    raw_g: torch.Tensor,
    raw_beta: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    lower_bound: float | None,
    initial_state: torch.Tensor,
    state_indices: torch.Tensor,
    scale: float | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of each sequence: rows of q, k and v side by side, raw_g [1, N, H, K], raw_beta [1, N, H]."""
    tokens = split_packed(mixed_qkv, initial_state)
    if out is None:
        out = mixed_qkv.new_empty((1, *tokens[2].shape[::2], tokens[2].shape[3]))
    kda_decode(
        *tokens, raw_g.transpose(0, 1), raw_beta.transpose(0, 1), state=initial_state, state_indices=state_indices,
        A_log=A_log, dt_bias=dt_bias, scale=scale, lower_bound=lower_bound, out=out.transpose(0, 1),
        null_slot=NULL_SLOT,
    )  # fmt: skip
    return out, initial_state


def k3_fused_recurrent_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    raw_g: torch.Tensor,
    raw_beta: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor | None,
    lower_bound: float | None,
    initial_state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    ssm_state_indices: torch.Tensor,
    num_accepted_tokens: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    fuse_gate: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence over drafts: a slot for the state after each token. `fuse_gate` is about speed only."""
    return glm_fused_recurrent_kda(
        q, k, v, raw_g, raw_beta, initial_state=initial_state, cu_seqlens=cu_seqlens, out=out, sigmoid_beta=True,
        ssm_state_indices=ssm_state_indices, num_accepted_tokens=num_accepted_tokens, a_log=A_log, g_bias=dt_bias,
        compute_gate=True, lower_bound=lower_bound,
    )  # fmt: skip


def fused_kda_decode(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_state: torch.Tensor,
    raw_g: torch.Tensor,
    raw_beta: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    state_indices: torch.Tensor,
    state: torch.Tensor,
    out: torch.Tensor | None = None,
    lower_bound: float | None = None,
    output_gate: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-5,
) -> torch.Tensor:
    """Convolution, recurrence and gated norm of one token of each sequence.

    Args:
        x: rows of q, k and v before the convolution. weight: [3, W, H K]; conv_state: a view [P, D, L], of which tokens
            or channels lie first in memory.
        raw_g, raw_beta, out: [1, N, H, ..]; output_gate [N, H, V].
    """
    norm = None
    if output_gate is not None and norm_weight is not None:
        norm = GatedNorm(output_gate, norm_weight, norm_eps)
    if out is None:
        out = x.new_empty((1, len(x), *state.shape[1:3]))
    kda_step(
        x, raw_g[0], raw_beta[0], state=state, state_indices=state_indices, norm=norm, A_log=A_log, dt_bias=dt_bias,
        conv=convolution(weight, lambda: joined(weight), bias, conv_state), lower_bound=lower_bound,
        out=out[0], null_slot=NULL_SLOT,
    )  # fmt: skip
    return out


def convolution(
    key: torch.Tensor, weight: Callable[[], torch.Tensor], bias: torch.Tensor | None, states: torch.Tensor
) -> Convolution:
    """The convolution over `states`, seen as [P, D, L].

    Args:
        key: the parameter that `weight` makes our [D, W] of, once.
    """
    made = derived(key, lambda _: weight().contiguous(), "convolution", constant=True)
    tokens_first = states.stride(1) == 1
    return Convolution(made, bias, states.mT if tokens_first else states, None, tokens_first)


def glm_flashkda_prefill(
    self: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    out: torch.Tensor | None,
    checkpoint: Any = None,
    raw_qkv: torch.Tensor | None = None,
    conv_state: torch.Tensor | None = None,
    recurrent_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The method of GLM's layer: its buffers come from vLLM's workspace, and it exports its own checkpoints."""
    from vllm.v1.worker.workspace import current_workspace_manager

    buffers = current_workspace_manager().get_simultaneous(*self._flashkda_buffer_specs)
    final_state, checkpoint_state, workspace, spare = buffers
    N = initial_state.shape[0]
    out = spare[:, : q.shape[1]] if out is None else out
    kept = None if checkpoint is None else checkpoint_state[:N]
    _, final_state = k3_flashkda_prefill(
        q, k, v, g, beta, self.A_log, self.dt_bias, self.kda_lower_bound, initial_state, cu_seqlens, out,
        final_state[:N], workspace, kept, None if checkpoint is None else checkpoint.checkpoint_offsets,
    )  # fmt: skip
    if checkpoint is not None:
        self._checkpoint_exporter.export(
            checkpoint, raw_qkv=raw_qkv, conv_state=conv_state, recurrent_checkpoint=kept,
            recurrent_state=recurrent_state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    return out, final_state


def glm_chunk_kda_with_fused_gate(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    raw_g: torch.Tensor,
    beta: torch.Tensor,
    A_log: torch.Tensor,
    g_bias: torch.Tensor | None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    safe_gate: bool = False,
    lower_bound: float = -5.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Prefill with raw gates and activated betas; `lower_bound` counts beside `safe_gate` only."""
    return chunk_kda_fwd(
        q, k, v, raw_g, beta, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        cu_seqlens=cu_seqlens, A_log=A_log.view(-1), dt_bias=g_bias, lower_bound=lower_bound if safe_gate else None,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
    )  # fmt: skip


def glm_fused_recurrent_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    inplace_final_state: bool = True,
    use_qk_l2norm_in_kernel: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    ssm_state_indices: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    sigmoid_beta: bool = False,
    a_log: torch.Tensor | None = None,
    g_bias: torch.Tensor | None = None,
    compute_gate: bool = False,
    lower_bound: float | None = -5.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode and drafts; without `compute_gate`, g is the log decay.

    Raises:
        InputError: there is no pool, or the states are to go elsewhere, which the layer never asks for.
    """
    if initial_state is None or ssm_state_indices is None or not inplace_final_state:
        raise InputError("inplace_final_state", "is not what is asked for", "ours updates a pool in place here")
    indices, accepted = _speculative(ssm_state_indices, num_accepted_tokens, cu_seqlens)
    N, T = len(indices), q.shape[1]
    # With a slot for each sequence and no more, theirs has no room for a second token's state: there is one token each,
    # and a kernel that need not look up where it lies is faster.
    if one_each := cu_seqlens is not None and ssm_state_indices.ndim == 1 and T >= N:
        out = (v.new_empty if T == N else v.new_zeros)(v.shape) if out is None else out
        cu_seqlens, made = None, out
        q, k, v, g, beta, out = (x[:, :N].transpose(0, 1) for x in (q, k, v, g, beta, out))
    o = kda_decode(
        q, k, v, g, beta, state=initial_state, state_indices=indices, A_log=None if a_log is None else a_log.view(-1),
        dt_bias=None if g_bias is None else g_bias.view(-1), scale=scale,
        lower_bound=lower_bound if compute_gate else None, use_gate_in_kernel=compute_gate,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel=sigmoid_beta,
        cu_seqlens=cu_seqlens, out=out, null_slot=NULL_SLOT, num_accepted_tokens=accepted,
    )  # fmt: skip
    return made if one_each else o, initial_state


def ling_chunk_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Prefill with log decays, which with `safe_gate` are not below `lower_bound`, and activated betas."""
    return chunk_kda_fwd(
        q, k, v, g, beta, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, cu_seqlens=cu_seqlens,
        lower_bound=lower_bound if safe_gate else None,
    )  # fmt: skip


def ling_fused_recurrent_kda_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor,
    inplace_final_state: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    ssm_state_indices: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Drafts with log decays and activated betas; see `glm_fused_recurrent_kda`, which is also Ling's decode."""
    return glm_fused_recurrent_kda(
        q, k, v, g, beta, scale, initial_state, inplace_final_state, use_qk_l2norm_in_kernel, cu_seqlens,
        ssm_state_indices, num_accepted_tokens,
    )  # fmt: skip


def split_packed(mixed_qkv: torch.Tensor, pool: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k [N, 1, H, K] and v [N, 1, HV, V] of rows [N, 2 H K + HV V], as views; sizes from the pool [P, HV, V, K]."""
    HV, V, K = pool.shape[1:]
    keys = (mixed_qkv.shape[1] - HV * V) // 2
    q, k, v = mixed_qkv.split((keys, keys, HV * V), dim=1)
    q, k, v = (x.unflatten(1, (-1, size)).unsqueeze(1) for x, size in ((q, K), (k, K), (v, V)))
    return q, k, v


def _speculative(
    indices: torch.Tensor, accepted: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The slots of the sequences that there are, [N, C] with the tokens accepted, or [N]; the buffers may be longer."""
    N = len(indices) if cu_seqlens is None else len(cu_seqlens) - 1
    if accepted is None:
        return (indices[:N, 0] if indices.ndim == 2 else indices[:N]), None
    return indices[:N], accepted[:N]
