"""The fused prefill. Host half: workspace and launches.

Three kernels: `chunk_factors` (or `chunk_factors_bounded` where the gate is known to be bounded, in half the time),
then `chunk_inverse`, then `chunk_chain`. Raw gates go in: activation, bias and sums happen inside the first. The stage
`kda_gate_chunk_cumsum` of `gate.py` is there for others; as a pass of its own it would add 225 us to 1.6 ms at P1.
"""

import dataclasses

import torch

from kda_kernels.checks import check_inputs, require_features, require_no_tail
from kda_kernels.errors import InputError
from kda_kernels.ints import cdiv, next_power_of_2
from kda_kernels.problem import CHUNK, MAX_HEAD, SAFE_BOUND, Gate, Op, Options, Problem
from kda_kernels.ranges import stage
from kda_kernels.tensors import Dims, Inputs, Outputs
from kda_kernels.triton.chunk_chain import chunk_chain_kernel
from kda_kernels.triton.chunk_factors import chunk_factors_kernel, chunk_sums
from kda_kernels.triton.chunk_factors_bounded import chunk_factors_bounded_kernel
from kda_kernels.triton.chunk_indices import in_order, max_chunks, prepare_chunk_indices
from kda_kernels.triton.chunk_inverse import chunk_inverse_kernel
from kda_kernels.triton.common import GATE_CODES
from kda_kernels.triton.prefill_config import PrefillConfig
from kda_kernels.triton.runtime import (
    multiprocessors,
    on_device,
    register_limit,
    require_device,
    shared_memory,
    unsupported_here,
)

FEATURES: frozenset[str] = frozenset()
MAX_TOKEN_STRIDE = 2**25  # 64 of them fit 32-bit offsets
# What `kda compile` builds where nothing is said: packed prompts on a pool, and one, of narrow slices.
_POOL = Problem(Op.PREFILL, (2048,) * 4, H=32, HV=32, pool_slots=8)
USUAL = {
    "safe": dataclasses.replace(_POOL, options=Options(gate=Gate.SAFE, lower_bound=SAFE_BOUND)),
    "softplus": dataclasses.replace(_POOL, seq_lens=(8192,)),
}
MAX_EXPONENT = 80.0  # exp of it, times a key, stays inside bf16 and fp32


@dataclasses.dataclass(frozen=True)
class Workspace:
    """What one kernel hands to the next, [HV, slots, ...]."""

    qg: torch.Tensor
    kg: torch.Tensor
    kd: torch.Tensor
    L: torch.Tensor
    Z: torch.Tensor
    Aqk: torch.Tensor
    decay: torch.Tensor
    rate: torch.Tensor

    @classmethod
    def allocate(cls, dims: Dims, slots: int, dtype: torch.dtype, device: torch.device) -> "Workspace":
        BK = max(16, next_power_of_2(dims.K))

        def new(*shape, dtype=dtype):
            return torch.empty((dims.HV, slots, *shape), dtype=dtype, device=device)

        wide = {name: new(CHUNK, BK) for name in ("qg", "kg", "kd")}
        square = {name: new(CHUNK, CHUNK) for name in ("Z", "Aqk")}
        exact = {"L": (CHUNK, CHUNK), "decay": (BK,), "rate": (CHUNK,)}
        return cls(**wide, **square, **{name: new(*shape, dtype=torch.float32) for name, shape in exact.items()})


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the matrix products: bf16 for bf16 tensors; fp32 (as tf32) for fp16, whose range the states could leave."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def bounded(options: Options) -> bool:
    """Whether decays over half a chunk may be split at its middle: yes for a lower_bound of -5, the models' own."""
    return options.lower_bound is not None and -options.lower_bound * CHUNK / 4 <= MAX_EXPONENT


def prefill(
    inputs: Inputs,
    *,
    chunk_indices: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_intermediate_states: bool = False,
    config: PrefillConfig | None = None,
) -> Outputs | tuple[Outputs, torch.Tensor]:
    """Runs a checked problem.

    Args:
        inputs: see `Inputs`; call `checks.check_inputs` on it first.
        chunk_indices: from `prepare_chunk_indices(cu_seqlens, T)`; made here if not given (engines make it once a batch
            and pass it to every layer).
        out: [B, T, HV, V] in the dtype of v.
        return_intermediate_states: also return the state at the start of each chunk, [B, NT, HV, K, V] in the dtype of
            k (NT over all sequences for packed batches; this reads cu_seqlens on the host).
        config: tuning choices; None lets `PrefillConfig.choose` decide.

    Returns:
        Outputs, with the pool itself as final_state when there is one; and h if asked for.
    """
    require_device(inputs.q)
    require_features(inputs, FEATURES, "triton-prefill")
    require_no_tail(inputs, "triton-prefill")
    q, k, v = inputs.q, inputs.k, inputs.v
    for name in ("q", "k", "v", "g"):
        if (stride := getattr(inputs, name).stride(1)) >= MAX_TOKEN_STRIDE:
            raise InputError(name, f"has stride {stride} between tokens", f"it should be under {MAX_TOKEN_STRIDE}")
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    dims = inputs.dims
    N = dims.N
    if config is None:
        itemsize = operand_dtype(q.dtype).itemsize
        config = PrefillConfig.choose(dims, itemsize, multiprocessors(q.device), shared_memory(q.device))
    if inputs.cu_seqlens is None:
        slots = N * cdiv(T, CHUNK)
    else:
        slots = max_chunks(T, N)
        if chunk_indices is None:
            chunk_indices = prepare_chunk_indices(inputs.cu_seqlens, T)
    o = torch.empty((B, T, HV, V), dtype=v.dtype, device=v.device) if out is None else out
    h0, ht = inputs.state, _final_state(inputs)
    vk = (3, 2) if inputs.state_v_first else (2, 3)  # positions of the K and V dimensions in a state
    h = torch.empty((slots, HV, K, V), dtype=k.dtype, device=k.device) if return_intermediate_states else None
    work = Workspace.allocate(dims, slots, operand_dtype(q.dtype), q.device)
    BK = work.qg.shape[-1]
    chunks = (HV, slots if chunk_indices is None else chunk_indices.shape[0])
    if slots:
        _factors(inputs, work, chunks, slots, chunk_indices, config)
        with stage("chunk_inverse"), on_device(q):
            chunk_inverse_kernel[chunks](
                work.L, work.Z, chunk_indices, inputs.cu_seqlens, slots, C=CHUNK, num_warps=1,
                **register_limit(config.inverse_registers),
            )  # fmt: skip
    if N:
        with stage("chain"), on_device(q):
            chunk_chain_kernel[(cdiv(V, config.BV), N * HV)](
                v, work.qg, work.kg, work.kd, work.Z, work.Aqk, work.decay, work.rate, o, h0, ht, h,
                inputs.state_indices, inputs.cu_seqlens,
                T, slots, *v.stride()[:3], *o.stride()[:3], *_strides(h0, vk), *_strides(ht, vk),
                HV=HV, K=K, V=V, BK=BK, BV=config.BV, C=CHUNK, STAGES=config.chain_stages,
                num_warps=config.chain_warps,
            )  # fmt: skip
    outputs = Outputs(o, ht if inputs.output_final_state else None)
    return (outputs, in_order(h, inputs.cu_seqlens, B)) if return_intermediate_states else outputs


def _factors(
    inputs: Inputs,
    work: Workspace,
    grid: tuple[int, int],
    slots: int,
    chunk_indices: torch.Tensor | None,
    config: PrefillConfig,
) -> None:
    """Fills the workspace, except Z, by the way that the gate allows."""
    q, k, g, beta, options = inputs.q, inputs.k, inputs.g, inputs.beta, inputs.options
    T, H, K = q.shape[1:]
    HV = g.shape[2]
    scale = options.scale_for(K)
    lower_bound = 0.0 if options.lower_bound is None else options.lower_bound
    out = (work.qg, work.kg, work.kd, work.L, work.Aqk, work.decay, work.rate)
    seqs = (inputs.cu_seqlens, chunk_indices)
    flags = {
        "HV": HV, "GROUP": HV // H, "K": K, "BK": work.qg.shape[-1], "C": CHUNK, "L2NORM": options.qk_l2norm,
        "BETA_LOGIT": options.beta_is_logit, "NEG_EIGVAL": options.allow_neg_eigval, "GATE": GATE_CODES[options.gate],
        "KB": min(config.KB, work.qg.shape[-1]), "num_warps": config.factor_warps, "num_stages": 1,
    }  # fmt: skip
    tensors = (q, k, g, beta, inputs.A_log, inputs.dt_bias, *out)
    numbers = (lower_bound, scale, T, slots, *q.stride()[:3], *k.stride()[:3], *g.stride()[:3], *beta.stride())
    with stage("chunk_factors"), on_device(q):
        if bounded(options):
            scratch = torch.empty_like(work.qg, dtype=torch.float32)
            chunk_factors_bounded_kernel[grid](*tensors, scratch, *seqs, *numbers, **flags)
        else:
            chunk_factors_kernel[grid](*tensors, chunk_sums(q.device), *seqs, *numbers, **flags)


def _final_state(inputs: Inputs) -> torch.Tensor | None:
    if inputs.state_indices is not None:
        return inputs.state
    return inputs.new_final_state() if inputs.output_final_state else None


def _strides(state: torch.Tensor | None, vk: tuple[int, int]) -> tuple[int, int, int, int]:
    """(sequence or slot, head, K, V) strides."""
    return (0, 0, 0, 0) if state is None else (*state.stride()[:2], state.stride(vk[0]), state.stride(vk[1]))


def unsupported(problem: Problem | None = None) -> str | None:
    """Why this machine cannot run `problem` with this kernel; None if it can."""
    if problem is not None and max(problem.K, problem.V) > MAX_HEAD:
        return f"head size is {max(problem.K, problem.V)}: at most {MAX_HEAD}"
    return unsupported_here()


def run(inputs: Inputs) -> Outputs:
    """Checks the inputs and runs them; a pool in `inputs.state` is updated in place."""
    check_inputs(inputs)
    return prefill(inputs)
