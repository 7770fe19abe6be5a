"""The public functions.

`chunk_kda`, `fused_recurrent_kda` and `fused_recurrent_kda_fwd` have the names and signatures of FLA 0.6.0, so that an
import is all that changes; `kda_prefill` and `kda_decode` are the serving forms: a V-first state pool, in place;
`kda_conv` is what an engine calls before the former;
`chunk_kda_fwd` is the pipeline behind the prefills, with every switch.

All of them check their tensors once and then call a kernel directly, the one that `kda_kernels.registry` gives for
these tensors; where a call is traced (torch.compile, torch.export, FakeTensorMode) they are the operators of
`kda_kernels.ops` instead. Nothing else is tried when it fails. Everything wrong with an argument is an `InputError`
(a ValueError). There is no backward: results of tensors that require grad can be used, but not differentiated.
"""

import dataclasses
import warnings
from typing import Any

import torch

from kda_kernels.boundary import check, forward_only, options_of
from kda_kernels.checks import is_traced
from kda_kernels.convolution import kda_conv
from kda_kernels.errors import InputError
from kda_kernels.problem import CHUNK, SAFE_BOUND
from kda_kernels.registry import prefill_with_states
from kda_kernels.run import run_decode, run_prefill
from kda_kernels.serving import (
    by_head,
    checkpoint_alignment,
    chunk_kda_fwd,
    kda_decode,
    kda_prefill,
    prefill_workspace_bytes,
    traced,
)
from kda_kernels.step import kda_step
from kda_kernels.tensors import Checkpoints, Convolution, GatedNorm, Inputs

__all__ = [
    "Checkpoints",
    "Convolution",
    "GatedNorm",
    "checkpoint_alignment",
    "chunk_kda",
    "chunk_kda_fwd",
    "fused_recurrent_kda",
    "fused_recurrent_kda_fwd",
    "kda_conv",
    "kda_decode",
    "kda_prefill",
    "kda_step",
    "prefill_workspace_bytes",
]

FLA_NAMES = {"state": "initial_state", "state_indices": "ssm_state_indices"}


def chunk_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    cp_context: Any = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None] | tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Prefill, with FLA's signature.

    Args:
        q, k: [B, T, H, K]; v: [B, T, HV, V]; g: [B, T, HV, K]; beta: [B, T, HV]. fp32, fp16 or bf16; any strides with a
            contiguous last dimension. HV is a multiple of H.
        scale: factor on q; K ** -0.5 if not given.
        initial_state: fp32 [N, HV, K, V] ([N, HV, V, K] with state_v_first), not modified.
        output_final_state: return the final state.
        use_qk_l2norm_in_kernel: normalise q and k.
        use_gate_in_kernel: g is raw, and becomes -exp(A_log) * softplus(g + dt_bias), or with a lower_bound
            lower_bound * sigmoid(exp(A_log) * (g + dt_bias)). Otherwise g is the log decay, and A_log, dt_bias and
            lower_bound are not looked at.
        use_beta_sigmoid_in_kernel: beta is a logit; allow_neg_eigval: 2 * sigmoid.
        safe_gate: with use_gate_in_kernel it needs a lower_bound; without, it promises that every g lies in [-5, 0].
        return_intermediate_states: also return h.
        state_v_first: states are [.., V, K].
        cu_seqlens: int32 or int64 [N + 1], for a packed batch with B = 1.
        cu_seqlens_cpu: cu_seqlens on the host, where work can then be shared out by what each sequence costs.
        disable_recompute, max_num_seqs: accepted; they change nothing here.
        cp_context: tokens are spread over the ranks of a process group, each of which calls this with its own: what
            `fla.ops.cp.build_cp_context` makes, or a `kda_kernels.parallel.ContextParallel`. cu_seqlens then comes from
            it; without initial_state, output_final_state and return_intermediate_states, as in FLA (`kda_prefill`
            has a pool).
        use_graph: not supported; leave it out.
        **kwargs: A_log, HV elements in any shape; dt_bias [HV * K] or [HV, K]; chunk_size, 32 or 64: the kernels work
            in chunks of 64 in both cases, which changes no result beyond rounding; transpose_state_layout, the
            deprecated name of state_v_first.

    Returns:
        o [B, T, HV, V] in the dtype of v; the final state, fp32 in the layout of the initial state, or None; and if
        asked for h [B, NT, HV, K, V] ([.., V, K] with state_v_first) in the dtype of k, the state at the start of each
        chunk, NT counting the chunks of all sequences of a packed batch.

    Raises:
        InputError: an argument is wrong, or not supported.
        UnavailableError: no GPU, and Triton's interpreter is not on.
    """
    state_v_first = _state_v_first(state_v_first, kwargs)
    if use_graph:
        raise InputError("use_graph", "is given", "it is not supported; leave it out")
    A_log, dt_bias, chunk_size = kwargs.pop("A_log", None), kwargs.pop("dt_bias", None), kwargs.pop("chunk_size", CHUNK)
    _refuse("chunk_kda", kwargs)
    if chunk_size not in (32, 64):
        raise InputError("chunk_size", f"is {chunk_size}", "`chunk_size` must be either 32 or 64 for KDA")
    if return_intermediate_states and chunk_size != CHUNK:
        wanted = f"it should be {CHUNK} with return_intermediate_states"
        raise InputError("chunk_size", f"is {chunk_size}", wanted)
    if safe_gate and use_gate_in_kernel and lower_bound is None:
        wanted = "safe_gate with use_gate_in_kernel needs a negative number, such as -5.0"
        raise InputError("lower_bound", "is missing", wanted)
    if initial_state is not None and initial_state.dtype != torch.float32:
        raise InputError("initial_state", f"is {initial_state.dtype}", "it should be float32")
    promise = SAFE_BOUND if safe_gate else None
    g = by_head(g, v)
    if not use_gate_in_kernel:
        A_log = dt_bias = None
    if cp_context is not None:
        lacking = {
            "initial_state": initial_state is not None, "output_final_state": output_final_state,
            "return_intermediate_states": return_intermediate_states, "a call that is traced": is_traced(q),
        }  # fmt: skip
        for name, given in lacking.items():
            if given:
                raise InputError("cp_context", f"is given with {name}", "one of them should be left out")
    elif is_traced(q):
        if return_intermediate_states:
            raise InputError("return_intermediate_states", "is set", "it is not supported in a call that is traced")
        return traced(
            torch.ops.kda.prefill, (q, k, v, g, beta), None, initial_state, None, cu_seqlens,
            output_final_state=output_final_state, A_log=A_log, dt_bias=dt_bias, state_v_first=state_v_first,
            cu_seqlens_cpu=cu_seqlens_cpu, use_gate_in_kernel=use_gate_in_kernel, lower_bound=lower_bound,
            use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, scale=scale, promise=promise,
        )  # fmt: skip
    options = options_of(
        use_gate_in_kernel, lower_bound, use_beta_sigmoid_in_kernel, allow_neg_eigval, use_qk_l2norm_in_kernel, scale,
        promise,
    )  # fmt: skip
    inputs = Inputs(
        q, k, v, g, beta, options, A_log, dt_bias, initial_state, None, cu_seqlens, state_v_first, output_final_state,
        cu_seqlens_cpu=cu_seqlens_cpu,
    )  # fmt: skip

    def run() -> tuple[Any, ...]:
        if cp_context is not None:
            from kda_kernels.parallel import ContextParallel
            from kda_kernels.parallel.prefill import prefill as parallel_prefill

            alone = dataclasses.replace(inputs, cu_seqlens=None, cu_seqlens_cpu=None, state_v_first=True)
            return parallel_prefill(alone, ContextParallel.of_fla(cp_context)), None
        if not return_intermediate_states:
            outputs = run_prefill(inputs, names=FLA_NAMES)
            return outputs.o, outputs.final_state
        check(inputs, FLA_NAMES)
        outputs, h = prefill_with_states(inputs)
        return outputs.o, outputs.final_state, h.mT if state_v_first else h

    return forward_only(run, inputs)


def fused_recurrent_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The recurrence token by token, with FLA's signature: for one or a few tokens per sequence.

    Args, Returns, Raises: as `chunk_kda`, except that initial_state may be bf16 too; of the keyword arguments there is
    transpose_state_layout only.
    """
    state_v_first = _state_v_first(state_v_first, kwargs)
    _refuse("fused_recurrent_kda", kwargs)
    return fused_recurrent_kda_fwd(
        q, k, v, g, beta, A_log, dt_bias, initial_state, scale, output_final_state, False, state_v_first, cu_seqlens,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval,
        lower_bound=lower_bound,
    )  # fmt: skip


def fused_recurrent_kda_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    scale: float | None = None,
    output_final_state: bool = False,
    inplace_final_state: bool = True,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    ssm_state_indices: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    out: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The recurrence as vLLM calls it, with FLA's signature.

    Args (where they differ from `fused_recurrent_kda`):
        initial_state: fp32 or bf16; a pool [P, HV, K, V] when ssm_state_indices is given.
        inplace_final_state: write the final states over the initial ones, and return that tensor. False with
            ssm_state_indices: the pool stays as it is, and the final state is that after each token, fp32
            [B * T, HV, K, V] in the order of the tokens; zeros where the slot is padding.
        ssm_state_indices: int32 or int64 [N], slots; a negative one is padding. [N, C] with a slot for each token:
            sequence n starts from the state in column num_accepted_tokens[n] - 1 (without them, from the first), and
            its state after token t goes to column t.
        num_accepted_tokens: int32 or int64 [N].
        out: [B, T, HV, V] in the dtype of v, where o goes.

    Raises:
        InputError: an argument is wrong, or not supported.
        UnavailableError: no GPU, and Triton's interpreter is not on.
    """
    _refuse("fused_recurrent_kda_fwd", kwargs)
    if inplace_final_state and initial_state is None:
        raise InputError("initial_state", "is missing", "inplace_final_state writes to it")
    if ssm_state_indices is not None and num_accepted_tokens is None and ssm_state_indices.ndim == 2:
        num_accepted_tokens = torch.ones_like(ssm_state_indices[:, 0])  # each sequence starts from its first column
    g = by_head(g, v)
    if not use_gate_in_kernel:
        A_log = dt_bias = None
    read_only = ssm_state_indices is not None and not inplace_final_state
    written = token_states = None
    if inplace_final_state and ssm_state_indices is None:
        written = initial_state
    elif not inplace_final_state and output_final_state and isinstance(initial_state, torch.Tensor):  # fp32, as FLA
        if read_only:
            token_states = initial_state.new_zeros((*q.shape[:2], *initial_state.shape[1:]), dtype=torch.float32)
        else:
            written = torch.empty_like(initial_state, dtype=torch.float32)
    wanted = output_final_state or inplace_final_state
    if is_traced(q):
        o, final_state = traced(
            torch.ops.kda.decode, (q, k, v, g, beta), out, initial_state, ssm_state_indices, cu_seqlens,
            output_final_state=wanted, final_state=written, token_states=token_states, A_log=A_log, dt_bias=dt_bias,
            state_v_first=state_v_first, num_accepted_tokens=num_accepted_tokens, update_state=not read_only,
            use_gate_in_kernel=use_gate_in_kernel, lower_bound=lower_bound,
            use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, scale=scale,
        )  # fmt: skip
        return o, final_state if token_states is None else token_states.flatten(0, 1)
    options = options_of(
        use_gate_in_kernel, lower_bound, use_beta_sigmoid_in_kernel, allow_neg_eigval, use_qk_l2norm_in_kernel, scale
    )
    inputs = Inputs(
        q, k, v, g, beta, options, A_log, dt_bias, initial_state, ssm_state_indices, cu_seqlens, state_v_first, wanted,
        num_accepted_tokens=num_accepted_tokens, update_state=not read_only, token_states=token_states,
    )  # fmt: skip

    def run() -> tuple[torch.Tensor, torch.Tensor | None]:
        outputs = run_decode(inputs, out, written, names=FLA_NAMES)
        final = outputs.final_state if token_states is None else token_states.flatten(0, 1)
        return outputs.o, None if inplace_final_state else final

    o, final_state = forward_only(run, inputs)
    return o, initial_state if inplace_final_state else final_state


def _state_v_first(state_v_first: bool, kwargs: dict[str, Any]) -> bool:
    """Takes the deprecated name out of `kwargs`."""
    if "transpose_state_layout" not in kwargs:
        return state_v_first
    if state_v_first:
        raise InputError("transpose_state_layout", "is given next to state_v_first", "leave it out, it is its old name")
    warnings.warn("transpose_state_layout is deprecated: use state_v_first", DeprecationWarning, stacklevel=3)
    return kwargs.pop("transpose_state_layout")


def _refuse(function: str, kwargs: dict[str, Any]) -> None:
    if kwargs:
        raise InputError(next(iter(kwargs)), f"is not an argument of {function}", "leave it out")
