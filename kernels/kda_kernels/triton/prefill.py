"""The fused prefill. Host half: workspace and launches.

Three kernels: `chunk_factors` (or `chunk_factors_bounded` where the gate is known to be bounded, in half the time),
then `chunk_inverse`, then `chunk_chain`. Raw gates go in: activation, bias and sums happen inside the first. The stage
`kda_gate_chunk_cumsum` of `gate.py` is there for others; as a pass of its own it would add 225 us to 1.6 ms at P1.
"""

import dataclasses
import functools

import torch

from kda_kernels.checks import check_inputs, require_features
from kda_kernels.errors import InputError
from kda_kernels.ints import cdiv, next_power_of_2
from kda_kernels.problem import CHUNK, MAX_HEAD, SAFE_BOUND, Gate, Op, Options, Problem
from kda_kernels.ranges import stage
from kda_kernels.tensors import Inputs, Outputs
from kda_kernels.triton.chunk_chain import chunk_chain_kernel
from kda_kernels.triton.chunk_factors import chunk_factors_kernel, chunk_sums
from kda_kernels.triton.chunk_factors_bounded import chunk_factors_bounded_kernel
from kda_kernels.triton.chunk_indices import fill_chunk_indices, in_order, max_chunks
from kda_kernels.triton.chunk_inverse import chunk_inverse_kernel
from kda_kernels.triton.common import GATE_CODES
from kda_kernels.triton.prefill_config import PrefillConfig
from kda_kernels.triton.runtime import (
    interpreted,
    multiprocessors,
    on_device,
    register_limit,
    require_device,
    require_token_strides,
    shared_memory,
    unsupported_here,
)

FEATURES = frozenset(
    ("null_slot", "has_initial_state", "checkpoints", "batch_invariant", "workspace", "strided_indices", "tail")
)
# What `kda compile` builds where nothing is said: packed prompts on a pool, and one, of narrow slices.
_POOL = Problem(Op.PREFILL, (2048,) * 4, H=32, HV=32, pool_slots=8)
USUAL = {
    "safe": dataclasses.replace(_POOL, options=Options(gate=Gate.SAFE, lower_bound=SAFE_BOUND)),
    "softplus": dataclasses.replace(_POOL, seq_lens=(8192,)),
}
MAX_EXPONENT = 80.0  # exp of it, times a key, stays inside bf16 and fp32


class Piece:
    """A part of the workspace, as a launch takes it: an address and a dtype. A view of a tensor would cost 3 us."""

    __slots__ = ("address", "dtype")

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


@dataclasses.dataclass(frozen=True)
class Workspace:
    """What one kernel hands to the next, [HV, slots, ...], in one piece of memory."""

    qg: Piece | torch.Tensor
    kg: Piece | torch.Tensor
    kd: Piece | torch.Tensor
    G: Piece | torch.Tensor  # of `chunk_factors_bounded` alone
    L: Piece | torch.Tensor
    Z: Piece | torch.Tensor
    Aqk: Piece | torch.Tensor
    decay: Piece | torch.Tensor
    rate: Piece | torch.Tensor
    chunk_indices: Piece | torch.Tensor

    @classmethod
    def of(cls, inputs: Inputs, slots: int) -> "Workspace":
        """In `inputs.workspace`, or in memory of its own.

        Raises:
            InputError: `inputs.workspace` is too small, or lies where 16-byte accesses cannot begin.
        """
        parts, size = _layout(inputs.v.shape[2], slots, inputs.q.shape[3], operand_dtype(inputs.q.dtype))
        memory = inputs.workspace
        if memory is None:
            memory = torch.empty(size, dtype=torch.uint8, device=inputs.q.device)
        elif memory.numel() < size or memory.data_ptr() % 16:
            wanted = f"it should be at least {size}, from a multiple of 16 on"
            raise InputError("workspace", f"has {memory.numel()} bytes at {memory.data_ptr()}", wanted)
        if memory.is_cuda and not interpreted():
            base = memory.data_ptr()
            return cls(**{name: Piece(base + begin, dtype) for name, (begin, _, dtype) in parts.items()})
        return cls(**{name: memory[begin:end].view(dtype) for name, (begin, end, dtype) in parts.items()})


@functools.lru_cache(maxsize=1024)
def _layout(HV: int, slots: int, K: int, dtype: torch.dtype) -> tuple[dict[str, tuple[int, int, torch.dtype]], int]:
    """First byte, last byte and dtype of each part of the workspace; and bytes of all together."""
    BK = max(16, next_power_of_2(K))
    elements = {"qg": CHUNK * BK, "kg": CHUNK * BK, "kd": CHUNK * BK, "G": CHUNK * BK, "L": CHUNK * CHUNK}
    elements |= {"Z": CHUNK * CHUNK, "Aqk": CHUNK * CHUNK, "decay": BK, "rate": CHUNK}
    parts, begin = {}, 0
    for name, count in elements.items():
        kind = torch.float32 if name in ("G", "L", "decay", "rate") else dtype
        end = begin + HV * slots * count * kind.itemsize
        parts[name] = (begin, end, kind)
        begin = end
    end = begin + 8 * slots
    return parts | {"chunk_indices": (begin, end, torch.int32)}, end


def workspace_bytes(tokens: int, heads: int, sequences: int, K: int = 128, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of workspace of any prefill of up to so many tokens and sequences, with `heads` value heads."""
    return _layout(heads, max_chunks(tokens, sequences), K, operand_dtype(dtype))[1]


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
    require_token_strides(inputs)
    q, v, dims = inputs.q, inputs.v, inputs.dims
    if config is None:
        alone = dims._replace(N=1) if inputs.batch_invariant else dims
        itemsize = operand_dtype(q.dtype).itemsize
        config = PrefillConfig.choose(alone, itemsize, multiprocessors(q.device), shared_memory(q.device))
    slots = dims.N * cdiv(dims.T, CHUNK) if inputs.cu_seqlens is None else max_chunks(dims.T, dims.N)
    work = Workspace.of(inputs, slots)
    chunks = slots if chunk_indices is None else chunk_indices.shape[0]
    if inputs.cu_seqlens is not None and chunk_indices is None and dims.N:
        chunk_indices = work.chunk_indices
        fill_chunk_indices(chunk_indices, inputs.cu_seqlens, slots)
    o = torch.empty_like(v, memory_format=torch.contiguous_format) if out is None else out
    ht = _final_state(inputs)
    h = inputs.k.new_empty((slots, dims.HV, dims.K, dims.V)) if return_intermediate_states else None
    if not dims.N:
        o.zero_()
    elif chunks:
        with on_device(q):
            _factors(inputs, work, chunks, slots, chunk_indices, config)
            with stage("chunk_inverse"):
                chunk_inverse_kernel[(dims.HV * chunks,)](
                    work.L, work.Z, chunk_indices, inputs.cu_seqlens, slots, HV=dims.HV, C=CHUNK, num_warps=1,
                    **register_limit(config.inverse_registers),
                )  # fmt: skip
            with stage("chain"):
                _chain(inputs, work, slots, o, ht, h, config)
    outputs = Outputs(o, ht if inputs.output_final_state else None)
    return (outputs, in_order(h, inputs.cu_seqlens, dims.B)) if h is not None else outputs


def _factors(
    inputs: Inputs,
    work: Workspace,
    chunks: int,
    slots: int,
    chunk_indices: torch.Tensor | Piece | None,
    config: PrefillConfig,
) -> None:
    """Fills the workspace, except Z, by the way that the gate allows."""
    q, k, g, beta, options = inputs.q, inputs.k, inputs.g, inputs.beta, inputs.options
    T, H, K = q.shape[1:]
    HV, BK = g.shape[2], max(16, next_power_of_2(K))
    lower_bound = 0.0 if options.lower_bound is None else options.lower_bound
    kernel, constant = chunk_factors_kernel, None
    if bounded(options):
        kernel, constant = chunk_factors_bounded_kernel, work.G
    with stage("chunk_factors"):
        kernel[(HV * chunks,)](
            q, k, g, beta, inputs.A_log, inputs.dt_bias,
            work.qg, work.kg, work.kd, work.L, work.Aqk, work.decay, work.rate,
            chunk_sums(q.device) if constant is None else constant, inputs.cu_seqlens, chunk_indices,
            lower_bound, options.scale_for(K), T, slots,
            *q.stride()[:3], *k.stride()[:3], *g.stride()[:3], *beta.stride(),
            HV=HV, GROUP=HV // H, K=K, BK=BK, KB=min(config.KB, BK), C=CHUNK, GATE=GATE_CODES[options.gate],
            BETA_LOGIT=options.beta_is_logit, NEG_EIGVAL=options.allow_neg_eigval, L2NORM=options.qk_l2norm,
            num_warps=config.factor_warps, num_stages=1,
        )  # fmt: skip


def _chain(
    inputs: Inputs,
    work: Workspace,
    slots: int,
    o: torch.Tensor,
    ht: torch.Tensor | None,
    h: torch.Tensor | None,
    config: PrefillConfig,
) -> None:
    """The recurrence over chunks, from the workspace and v: fills o, ht, h and checkpoints."""
    _, T, N, _, HV, K, V = inputs.dims
    v, h0, indices, marks = inputs.v, inputs.state, inputs.state_indices, inputs.checkpoints
    vk = (3, 2) if inputs.state_v_first else (2, 3)  # positions of the K and V dimensions in a state
    kept, rows, offsets, every, columns = None, None, None, 1, 1
    if marks is not None:
        kept, rows, offsets, every = marks.states, marks.rows, marks.offsets, marks.every or 1
        columns = rows.shape[1] if rows.ndim == 2 else 1
    chunk_chain_kernel[(cdiv(V, config.BV) * HV * N,)](
        v, work.qg, work.kg, work.kd, work.Z, work.Aqk, work.decay, work.rate, o, h0, ht, h, kept,
        indices, inputs.cu_seqlens, inputs.has_initial_state, rows, offsets,
        N, T, slots, 0 if h0 is None else h0.shape[0], -1 if inputs.null_slot is None else inputs.null_slot,
        0 if kept is None else kept.shape[0], columns, every, 0 if indices is None else indices.stride(0),
        *v.stride()[:3], *o.stride()[:3], *_strides(h0, vk), *_strides(ht, vk), *_strides(kept, vk),
        HV=HV, K=K, V=V, BK=max(16, next_power_of_2(K)), BV=config.BV, C=CHUNK,
        COLUMNS=1 if offsets is None else next_power_of_2(columns), STAGES=config.chain_stages,
        num_warps=config.chain_warps,
    )  # fmt: skip


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
