"""What runs in SGLang's layers where the backend "kda" is chosen: the methods of its `LinearAttnKernelBase` (0.5.23).

Where ours lacks what a call asks for, it raises and says so: nothing else runs instead.
"""

import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch

from kda_kernels.api import Checkpoints, Convolution, GatedNorm, kda_conv, kda_decode, kda_prefill, kda_step
from kda_kernels.engines.derived import apart, counted
from kda_kernels.engines.sglang import NAME, STEP
from kda_kernels.engines.vllm_calls import convolution, split_packed
from kda_kernels.problem import CHUNK

log = logging.getLogger("sglang.kda")


def build_dispatcher(
    self: Any, decode_backend: Any, prefill_backend: Any, verify_backend: Any, *, original: Callable[..., None]
) -> None:
    """`KDAKernelDispatcher.__init__`: as SGLang does it, with ours for the phases whose backend is "kda"."""
    chosen = _names()
    given = {"decode": decode_backend, "prefill": prefill_backend, "verify": verify_backend}
    ours = [phase for phase, backend in given.items() if backend.is_custom() and chosen[phase] == NAME]
    triton = type(decode_backend)("triton")
    original(self, *(triton if phase in ours else backend for phase, backend in given.items()))
    if not ours:
        return
    base = importlib.import_module("sglang.srt.layers.attention.linear.kernels.kernel_backend").LinearAttnKernelBase
    kernel = type("KdaKernel", (KdaKernel, base), {})()
    if "decode" in ours:
        self.decode_kernel = kernel
        self.supports_packed_decode = self.supports_packed_decode_safe_gate = True
        module, _, name = STEP.partition(":")  # which Kimi K3's layer prefers to any backend where it has the shapes
        setattr(importlib.import_module(module), name, kda_fused_decode)
    if "prefill" in ours:
        self.extend_kernel, self.prefill_backend = kernel, prefill_backend
    if "verify" in ours:
        self.verify_kernel, self.verify_backend = kernel, verify_backend
    log.info("kda: %s run with kda's kernels", ", ".join(ours))


def convolve_prefill(
    self: Any,
    layer: Any,
    forward_batch: Any,
    mixed_qkv: torch.Tensor,
    conv_states: torch.Tensor,
    cache_indices: torch.Tensor,
    *,
    original: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """`KDAAttnBackend._convolve_prefill`: of packed prompts [T, D], with ours where ours is the kernel behind it.

    In the graphs of prefill it stays SGLang's, which reads a table that was made for it there.
    """
    if not isinstance(self.kernel_dispatcher.extend_kernel, KdaKernel):
        return original(self, layer, forward_batch, mixed_qkv, conv_states, cache_indices)
    conv = Convolution(layer.conv_weights, layer.bias, conv_states.mT, cache_indices, tokens_first=True)
    return kda_conv(
        mixed_qkv, conv, cu_seqlens=self.forward_metadata.query_start_loc,
        has_initial_state=forward_batch.extend_prefix_lens > 0,
    )  # fmt: skip


def _names() -> dict[str, str | None]:
    """The backend of each phase by the name that the user gave: to SGLang's enum, every unknown one is "custom"."""
    mamba = importlib.import_module("sglang.srt.runtime_context").get_exec().mamba
    return {
        "decode": mamba.linear_attn_decode_backend or mamba.linear_attn_backend,
        "prefill": mamba.linear_attn_prefill_backend or mamba.linear_attn_backend,
        "verify": mamba.linear_attn_verify_backend,
    }


class KdaKernel:
    """The methods; SGLang's base class is put below them where SGLang is there.

    Tokens are packed, [1, T, heads, size]; `ssm_states` is the pool [P, HV, V, K], updated in place, `cache_indices`
    [N] are its slots, a negative one padding; a and b are the raw gates and the logits of beta, in any shape.
    """

    uses_state_checkpoints = False
    supports_packed_decode = True
    supports_packed_decode_safe_gate = True
    supports_safe_gate_verify = True
    supports_fused_chain_verify = False
    supports_strided_target_verify_qkv = True
    supports_track_state_snapshot = True

    def decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        *,
        A_log: torch.Tensor,
        dt_bias: torch.Tensor,
        ssm_states: torch.Tensor,
        cache_indices: torch.Tensor,
        query_start_loc: torch.Tensor,
        lower_bound: float | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """One token of each sequence; returns o [1, T, HV, V]."""
        return kda_decode(
            q, k, v, *_gates(a, b, v, q.shape[3]), state=ssm_states, state_indices=cache_indices,
            A_log=A_log.view(-1), dt_bias=dt_bias.view(-1), lower_bound=lower_bound, cu_seqlens=query_start_loc,
        )  # fmt: skip

    def packed_decode(
        self,
        mixed_qkv: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        *,
        A_log: torch.Tensor,
        dt_bias: torch.Tensor,
        scale: float,
        ssm_states: torch.Tensor,
        cache_indices: torch.Tensor,
        num_v_heads: int,
        head_v_dim: int,
        lower_bound: float | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The same with q, k and v of a token side by side in a row of `mixed_qkv`; returns o [1, N, HV, V].

        Raises:
            NotImplementedError: states are to be kept as records (--enable-linear-replayssm).
        """
        _refuse("--enable-linear-replayssm", kwargs.get("replayssm_d"))
        tokens = split_packed(mixed_qkv, ssm_states)
        N, K = len(mixed_qkv), ssm_states.shape[3]
        out = mixed_qkv.new_empty(N, 1, num_v_heads, head_v_dim)
        kda_decode(
            *tokens, a.reshape(N, 1, num_v_heads, K), b.reshape(N, 1, num_v_heads), state=ssm_states,
            state_indices=cache_indices, A_log=A_log.view(-1), dt_bias=dt_bias.view(-1), scale=scale,
            lower_bound=lower_bound, out=out,
        )  # fmt: skip
        return out.transpose(0, 1)

    def extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        *,
        ssm_states: torch.Tensor,
        cache_indices: torch.Tensor,
        query_start_loc: torch.Tensor,
        A_log: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        lower_bound: float | None = None,
        beta_is_raw: bool = False,
        return_intermediate_states: bool = False,
        track_state: torch.Tensor | None = None,
        track_chunk_idx: torch.Tensor | None = None,
        track_ssm_h_src: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Prefill; returns o, or (o, None) where the states of all chunks are asked for beside `track_state`.

        Args:
            track_state: fp32 [N, HV, V, K], where the state before chunk track_chunk_idx[n] of sequence n goes; if that
                is negative, which nobody reads, the state that came in.
        Raises:
            NotImplementedError: states inside the prompts are to be read from anywhere else.
        """
        if return_intermediate_states and track_state is None:
            wanted = track_ssm_h_src is not None and len(track_ssm_h_src) > 0
            _refuse("the states of all chunks", wanted or None)
        kept = None
        if track_state is not None and track_chunk_idx is not None:
            track_state.copy_(ssm_states[cache_indices.clamp(min=0)])  # what comes before chunk 0
            rows = counted(len(track_state), track_state.device)
            kept = Checkpoints(track_state, rows, track_chunk_idx * CHUNK)
        raw = A_log is not None
        o = kda_prefill(
            q, k, v, *_gates(g, beta, v, q.shape[3]), state=ssm_states, state_indices=cache_indices,
            A_log=A_log.view(-1) if A_log is not None else None, dt_bias=None if dt_bias is None else dt_bias.view(-1),
            lower_bound=lower_bound if raw else None, use_gate_in_kernel=raw, use_beta_sigmoid_in_kernel=beta_is_raw,
            cu_seqlens=query_start_loc, checkpoints=kept,
        )  # fmt: skip
        return (o, None) if return_intermediate_states else o

    def target_verify(
        self,
        A_log: torch.Tensor,
        dt_bias: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        *,
        ssm_states: torch.Tensor,
        cache_indices: torch.Tensor,
        query_start_loc: torch.Tensor,
        intermediate_states_buffer: torch.Tensor,
        intermediate_state_indices: torch.Tensor,
        cache_steps: int,
        retrieve_parent_token: torch.Tensor | None,
        lower_bound: float | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """A chain of drafts: the pool stays as it is, and each token's state goes to `intermediate_states_buffer`.

        Raises:
            NotImplementedError: the drafts are a tree, or states are to be kept as records.
        """
        _refuse("a tree of drafts (speculative topk > 1)", retrieve_parent_token)
        _refuse("--enable-linear-replayssm-spec", kwargs.get("replayssm_rawv"))
        _refuse("states of the drafts' own buffer", kwargs.get("fused_accept_state_indices"))
        N = len(query_start_loc) - 1
        return kda_decode(
            q, k, v, *_gates(a, b, v, q.shape[3]), state=ssm_states, state_indices=cache_indices[:N],
            A_log=A_log.view(-1), dt_bias=dt_bias.view(-1), lower_bound=lower_bound, cu_seqlens=query_start_loc,
            token_states=intermediate_states_buffer, token_state_indices=intermediate_state_indices[:N],
            update_state=False,
        )  # fmt: skip


def kda_fused_decode(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    conv_states: torch.Tensor,
    w_q_t: torch.Tensor,
    w_k_t: torch.Tensor,
    w_v_t: torch.Tensor,
    conv_bias: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    onorm_g: torch.Tensor,
    onorm_weight: torch.Tensor,
    ssm_states: torch.Tensor,
    cache_indices: torch.Tensor,
    scale: float,
    onorm_eps: float,
    lower_bound: float | None = None,
) -> torch.Tensor:
    """Convolution, recurrence and gated norm of one token of each sequence, in place; returns o [1, N, HV, V].

    Args:
        mixed_qkv: rows of q, k and v before the convolution; a, b, onorm_g: [N, ..].
        conv_states: [P, L, D]. w_q_t, w_k_t, w_v_t: weights [W, channels].
    """
    conv = convolution(w_q_t, lambda: apart(w_q_t, w_k_t, w_v_t), conv_bias, conv_states.mT)
    return kda_step(
        mixed_qkv, a, b, state=ssm_states, state_indices=cache_indices, conv=conv,
        norm=GatedNorm(onorm_g, onorm_weight, onorm_eps), A_log=A_log, dt_bias=dt_bias, scale=scale,
        lower_bound=lower_bound,
    ).unsqueeze(0)  # fmt: skip


def _gates(g: torch.Tensor, beta: torch.Tensor, v: torch.Tensor, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """g [1, T, HV, K] and beta [1, T, HV] of tensors with these elements."""
    return g.reshape(*v.shape[:3], K), beta.reshape(v.shape[:3])


def _refuse(what: str, given: Any) -> None:
    if given is not None:
        raise NotImplementedError(f"kda's backend has no {what}: choose another --linear-attn-...-backend for it")
