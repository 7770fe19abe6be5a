"""The serving forms: a V-first state pool, updated in place; and `chunk_kda_fwd`, the prefill with every switch.

For engines; `api` is where they are imported from.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from kda_kernels import checks, ops, registry  # noqa: F401  `ops` registers torch.ops.kda
from kda_kernels.boundary import (
    forward_only,
    forward_only_traced,
    options_of,
    seed_of,
)
from kda_kernels.errors import InputError
from kda_kernels.problem import CHUNK
from kda_kernels.run import run_decode, run_prefill
from kda_kernels.tensors import Checkpoints, Inputs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from kda_kernels.parallel import ContextParallel


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
    """One or a few tokens of each sequence, on a state pool that is updated in place.

    Args:
        q, k: [B, T, H, K]; v: [B, T, HV, V]; g: [B, T, HV, K] or [B, T, HV * K]; beta: [B, T, HV]. Dense, [N, T, ..],
            or packed, [1, total tokens, ..], with cu_seqlens. Any strides with a contiguous last dimension: nothing is
            copied.
        state: pool [P, HV, V, K], fp32, bf16 or fp16, or int16 with state_scales; slots may lie apart, a slot is
            contiguous.
        state_indices: int32 or int64 [N] with any stride, the slot of each sequence, none twice; there may be more than
            N. A negative one is padding: nothing is read or written, and its rows of o are zero. One >= P touches
            nothing, and its rows of o are NaN; on a CPU it is an `InputError`.
        A_log, HV elements; dt_bias, HV * K; lower_bound, use_..., allow_neg_eigval, scale: as in `chunk_kda`.
        cu_seqlens: int32 or int64 [N + 1]. The tensors may hold more tokens than its last entry says, as those of a
            CUDA graph do: their rows of o are zero.
        out: [B, T, HV, V] in the dtype of v, where o goes; nothing is allocated then.
        token_states: [B, T, HV, V, K], fp32, bf16 or fp16, contiguous from HV on: the state after each token goes there
            too (to go back to the last accepted one of a draft); nothing is written for padding.
        token_state_indices: int32 or int64 [N]: token_states is [R, S, HV, V, K] instead, and the state after token t
            of sequence n goes to token_states[token_state_indices[n], t], or nowhere if that index is negative.
        null_slot: a slot that is padding too, and that any number of sequences may carry (vLLM: 0).
        has_initial_state: bool [N]; where false, the state starts at zero, and what the slot holds is not read.
        num_accepted_tokens: int32 or int64 [N], for speculative decoding: state_indices is [N, C], sequence n starts
            from the state in column num_accepted_tokens[n] - 1, and its state after token t goes to column t. Where the
            former is padding so is the sequence; where the latter is, nothing is written.
        update_state: False leaves the pool as it is, as an engine's verify needs it; see `token_states`.
        state_scales: fp32 [P, HV, V], slots may lie apart: of a pool in int16 what each row of K channels is multiplied
            by; updated in place, too. An int16 pool is V-first.
        state_rounding: "nearest", or "stochastic" for pools in bf16, fp16 and int16: each state that is stored is
            rounded up or down at random, so that updates smaller than half a last place are not lost on average. Bits
            depend on rounding_seed, the slot that the sequence loads from and the token's position in the call, and not
            on the batch: see `kda_kernels.reference.stored`. K is then a multiple of 8.
        rounding_seed: int64 [1] on the device, as a CUDA graph needs it, or an int, which costs a launch. It should be
            another one in each call.
        kernel: "cute-decode", "triton-decode" or "torch-decode"; `kda_kernels.registry` says which one is the default.

    Returns:
        o [B, T, HV, V].

    Raises:
        InputError: an argument is wrong, or no kernel here has what is asked for.
        UnavailableError: no GPU, and Triton's interpreter is not on; or `kernel` cannot run here.
    """
    if not use_gate_in_kernel:
        A_log = dt_bias = None
    if getattr(g, "ndim", 0) == 3:
        g = by_head(g, v)
    seed = None
    if rounding_seed is not None or state_rounding != "nearest":
        seed = seed_of(state_rounding, rounding_seed, q)
    if checks.is_traced(q):
        o = torch.empty_like(v, memory_format=torch.contiguous_format) if out is None else out
        torch.ops.kda.decode(
            q, k, v, g, beta, o, A_log, dt_bias, state, state_indices, cu_seqlens, None, token_states, state_scales,
            None, has_initial_state, num_accepted_tokens, token_state_indices, True, null_slot, update_state,
            use_gate_in_kernel, lower_bound, use_beta_sigmoid_in_kernel, allow_neg_eigval, use_qk_l2norm_in_kernel,
            scale, kernel, seed,
        )  # fmt: skip
        return forward_only_traced(o, (q, k, v, g, beta, A_log, dt_bias, state))
    options = options_of(
        use_gate_in_kernel, lower_bound, use_beta_sigmoid_in_kernel, allow_neg_eigval, use_qk_l2norm_in_kernel, scale
    )
    call = (
        q, k, v, g, beta, options, A_log, dt_bias, state, state_indices, cu_seqlens, True, True, null_slot,
        has_initial_state, num_accepted_tokens, update_state, token_states, token_state_indices, None, False, None,
        None, None, None, state_scales, seed,
    )  # fmt: skip
    if state is None or state_indices is None:
        raise _no_pool(state)
    plain = kernel is None and checks.CHECK_VALUES != "1" and not torch.is_grad_enabled()
    if plain and out is None:
        out = _room_for(v)
    if plain and out is not None and registry.decode_again(call, out):
        return out
    inputs = Inputs(*call)
    return forward_only(lambda: (run_decode(inputs, out, None, kernel).o,), inputs)[0]


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
    null_slot: int | None = None,
    has_initial_state: torch.Tensor | None = None,
    checkpoints: Checkpoints | None = None,
    batch_invariant: bool = False,
    workspace: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    group: "ContextParallel | ProcessGroup | None" = None,
    state_scales: torch.Tensor | None = None,
    state_rounding: str = "nearest",
    rounding_seed: torch.Tensor | int | None = None,
    kernel: str | None = None,
) -> torch.Tensor:
    """Whole prompts, on the same pool as `kda_decode`: a sequence is decoded from where its prefill left it.

    Args, Returns, Raises: as `kda_decode`, and
        chunk_indices: from `prepare_chunk_indices(cu_seqlens, total tokens)`; an engine makes them once per batch and
            passes them to every layer. Where triton-prefill runs, they are made here if not given; cute-prefill needs
            none.
        checkpoints: states inside the prompts that are to be kept, see `kda_kernels.tensors.Checkpoints`.
        batch_invariant: the bits of a sequence depend on itself alone, not on the batch that it is in, nor on a cached
            prefix that was cut at a multiple of `checkpoint_alignment` and left its state in fp32.
        workspace: uint8, at least `prefill_workspace_bytes` of it: the call allocates no other scratch memory.
        cu_seqlens_cpu: cu_seqlens on the host, where work can then be shared out by what each sequence costs.
        group: the packed tokens are spread over the ranks of a process group, each of which calls this: q, k, v, g and
            beta are this rank's, all else is the whole batch's, and each rank has a pool. A
            `kda_kernels.parallel.ContextParallel`, which an engine makes once per batch and passes to every layer, and
            which then holds cu_seqlens; of a plain group one is made here. An initial state is read on the rank of the
            sequence's first token, its final state written on that of its last, a checkpoint on that of the token
            before it. Cuts lie at multiples of 64 tokens of a sequence that has checkpoints. Not with batch_invariant,
            workspace, state_scales or rounding_seed.
        kernel: "cute-prefill", "triton-prefill" or "torch-prefill"; `kda_kernels.registry` says which one is the
            default.
    """
    if not use_gate_in_kernel:
        A_log = dt_bias = None
    if getattr(g, "ndim", 0) == 3:
        g = by_head(g, v)
    seed = None
    if rounding_seed is not None or state_rounding != "nearest":
        seed = seed_of(state_rounding, rounding_seed, q)
    if checks.is_traced(q):
        if group is not None:
            raise InputError("group", "is given", "it is not supported in a call that is traced")
        o = torch.empty_like(v, memory_format=torch.contiguous_format) if out is None else out
        c = checkpoints
        kept = (None, None, None, None) if c is None else (c.states, c.rows, c.offsets, c.every)
        torch.ops.kda.prefill(
            q, k, v, g, beta, o, A_log, dt_bias, state, state_indices, cu_seqlens, None, kept[0], workspace,
            state_scales, has_initial_state, chunk_indices, *kept[1:3], cu_seqlens_cpu, True, null_slot, kept[3],
            batch_invariant, use_gate_in_kernel, lower_bound, use_beta_sigmoid_in_kernel, allow_neg_eigval,
            use_qk_l2norm_in_kernel, scale, None, kernel, seed,
        )  # fmt: skip
        return forward_only_traced(o, (q, k, v, g, beta, A_log, dt_bias, state))
    options = options_of(
        use_gate_in_kernel, lower_bound, use_beta_sigmoid_in_kernel, allow_neg_eigval, use_qk_l2norm_in_kernel, scale
    )
    call = (
        q, k, v, g, beta, options, A_log, dt_bias, state, state_indices, cu_seqlens, True, True, null_slot,
        has_initial_state, None, True, None, None, checkpoints, batch_invariant, workspace, cu_seqlens_cpu, None, None,
        state_scales, seed,
    )  # fmt: skip
    if state is None or state_indices is None:
        raise _no_pool(state)
    if group is not None:
        return _over_ranks(Inputs(*call), out, group, kernel)
    plain = kernel is None and checks.CHECK_VALUES != "1" and not torch.is_grad_enabled()
    plain = plain and chunk_indices is None and seed is None and state_scales is None
    if plain and out is None:
        out = _room_for(v)
    if plain and out is not None and registry.prefill_again(call, out):
        return out
    inputs = Inputs(*call)
    return forward_only(lambda: (run_prefill(inputs, out, chunk_indices, kernel).o,), inputs)[0]


def _over_ranks(
    inputs: Inputs, out: torch.Tensor | None, group: "ContextParallel | ProcessGroup", kernel: str | None
) -> torch.Tensor:
    context_type, prefill = _parallel()
    context: Any = group
    if not isinstance(context, context_type):
        ends = inputs.cu_seqlens if inputs.cu_seqlens_cpu is None else inputs.cu_seqlens_cpu
        if ends is None:
            wanted = "it should be the whole batch's, where group is a process group"
            raise InputError("cu_seqlens", "is missing", wanted)
        context = context_type.of(ends, context, tokens=inputs.q.shape[1])
    return forward_only(lambda: (prefill(inputs, context, out, kernel),), inputs)[0]


@functools.cache
def _parallel() -> "tuple[type[ContextParallel], Callable[..., torch.Tensor]]":
    """What needs torch.distributed; an import takes 2 us even where it has been made."""
    from kda_kernels.parallel import ContextParallel
    from kda_kernels.parallel.prefill import prefill

    return ContextParallel, prefill


def prefill_workspace_bytes(
    tokens: int, heads: int, sequences: int, *, device: torch.device | str = "cuda", kernel: str | None = None
) -> int:
    """Bytes that are enough for the `workspace` of any `kda_prefill` on `device` up to these sizes.

    Args:
        tokens: of all sequences of a call together, at most.
        heads: value heads, of 128 channels.
        sequences: of a call, at most.
        kernel: "cute-prefill" or "triton-prefill", which needs far more; by default enough for either, where both can
            run.

    Raises:
        InputError: there is no such kernel.
    """
    device = torch.device(device)
    cute, triton = registry.get("cute-prefill"), registry.get("triton-prefill")
    if kernel not in (None, cute.name, triton.name):
        raise InputError("kernel", f"is {kernel}", f"it should be {cute.name} or {triton.name}")
    most = triton.code.workspace_bytes(tokens, heads, sequences) if kernel != cute.name else 0
    if kernel == cute.name or (kernel is None and device.type == "cuda" and cute.code.unsupported_here(device) is None):
        most = max(most, cute.code.most_workspace_bytes(tokens, heads, sequences, device))
    return most


def checkpoint_alignment() -> int:
    """The number of tokens that the positions of checkpoints are multiples of, with every prefill of ours."""
    return CHUNK


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
    cu_seqlens_cpu: torch.Tensor | None = None,
    chunk_indices: torch.Tensor | None = None,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    out: torch.Tensor | None = None,
    final_state: torch.Tensor | None = None,
    checkpoints: Checkpoints | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The chunk pipeline behind `chunk_kda` and `kda_prefill`.

    Args:
        A_log: given, g is raw, and the pipeline activates and sums it; not given, g is the log decay already and is
            only summed, and a lower_bound is then a promise that every g lies in [lower_bound, 0], which allows the
            faster of two ways.
        dt_bias: only with A_log.
        initial_state: [N, HV, V, K] ([N, HV, K, V] without state_v_first), fp32 or bf16, not modified; with
            state_indices a pool [P, ..] that is updated in place.
        final_state: without state_indices, where the final state goes, contiguous; made here if not given.
        The others: as in `kda_prefill`.

    Returns:
        o [B, T, HV, V] in the dtype of v, and the final state (the pool, if there is one) or None.

    Raises:
        InputError: an argument is wrong.
        UnavailableError: no GPU, and Triton's interpreter is not on.
    """
    raw = A_log is not None
    g = by_head(g, v)
    if checks.is_traced(q):
        return traced(
            torch.ops.kda.prefill, (q, k, v, g, beta), out, initial_state, state_indices, cu_seqlens,
            output_final_state=output_final_state, final_state=final_state, checkpoints=checkpoints, A_log=A_log,
            dt_bias=dt_bias, chunk_indices=chunk_indices, state_v_first=state_v_first, use_gate_in_kernel=raw,
            lower_bound=lower_bound if raw else None, promise=None if raw else lower_bound,
            use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, scale=scale,
        )  # fmt: skip
    options = options_of(
        raw, lower_bound, use_beta_sigmoid_in_kernel, allow_neg_eigval, use_qk_l2norm_in_kernel, scale, lower_bound
    )
    inputs = Inputs(
        q, k, v, g, beta, options, A_log, dt_bias, initial_state, state_indices, cu_seqlens, state_v_first,
        output_final_state, checkpoints=checkpoints, cu_seqlens_cpu=cu_seqlens_cpu,
    )  # fmt: skip

    def run() -> tuple[torch.Tensor, torch.Tensor | None]:
        names = {"state": "initial_state"}
        outputs = run_prefill(inputs, out, chunk_indices, names=names, final_state=final_state)
        return outputs.o, outputs.final_state

    return forward_only(run, inputs)


def traced(
    op: Callable[..., None],
    tokens: tuple[torch.Tensor, ...],
    out: torch.Tensor | None,
    state: torch.Tensor | None,
    state_indices: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    *,
    output_final_state: bool,
    final_state: torch.Tensor | None = None,
    checkpoints: Checkpoints | None = None,
    token_states: torch.Tensor | None = None,
    **given: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """o and the final state of a call that is traced: an operator of `kda_kernels.ops`, on buffers made for it."""
    q, v = tokens[0], tokens[2]
    o = torch.empty_like(v, memory_format=torch.contiguous_format) if out is None else out
    if output_final_state and state_indices is None and final_state is None:
        N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        sizes = (v.shape[3], q.shape[3]) if given["state_v_first"] else (q.shape[3], v.shape[3])
        dtype = torch.float32 if state is None else state.dtype
        final_state = q.new_empty((N, v.shape[2], *sizes), dtype=dtype)
    A_log, dt_bias = given.pop("A_log"), given.pop("dt_bias")
    kept = token_states
    if checkpoints is not None:
        c, kept = checkpoints, checkpoints.states
        given |= {"checkpoint_rows": c.rows, "checkpoint_offsets": c.offsets, "checkpoint_every": c.every}
    op(*tokens, o, A_log, dt_bias, state, state_indices, cu_seqlens, final_state, kept, None, None, **given)
    o = forward_only_traced(o, (*tokens, A_log, dt_bias, state))
    return o, (final_state if state_indices is None else state) if output_final_state else None


def by_head(g: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """g [B, T, HV * K] as [B, T, HV, K]; anything else as it is."""
    if getattr(g, "ndim", 0) != 3 or v.ndim != 4 or g.shape[2] % max(v.shape[2], 1):
        return g
    return g.unflatten(2, (v.shape[2], -1))


def _room_for(v: torch.Tensor) -> torch.Tensor | None:
    """Where o goes; None: v is no tensor, which a check will say."""
    return torch.empty_like(v, memory_format=torch.contiguous_format) if isinstance(v, torch.Tensor) else None


def _no_pool(state: torch.Tensor | None) -> InputError:
    return InputError("state" if state is None else "state_indices", "is missing", "it should be a tensor")
