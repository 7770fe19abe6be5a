"""The fused prefill. Host half: workspace and launches.

Three kernels: `chunk_factors` (or `chunk_factors_bounded` where the gate is known to be bounded, in half the time),
then `chunk_inverse`, then `chunk_chain`. Raw gates go in: activation, bias and sums happen inside the first. The stage
`kda_gate_chunk_cumsum` of `gate.py` is there for others; as a pass of its own it would add 225 us to 1.6 ms at P1.
"""

import dataclasses
import functools
from collections.abc import Hashable

import torch

from kda_kernels.checks import CAUSAL, check_inputs, require_features
from kda_kernels.errors import InputError, UnavailableError
from kda_kernels.ints import cdiv, next_power_of_2
from kda_kernels.problem import CHUNK, MAX_HEAD, SAFE_BOUND, Gate, Op, Options, Parts, Problem
from kda_kernels.ranges import stage
from kda_kernels.tensors import Inputs, Outputs, hand_on
from kda_kernels.triton.chunk_chain import chunk_chain_kernel
from kda_kernels.triton.chunk_factors import chunk_factors_kernel, chunk_sums
from kda_kernels.triton.chunk_factors_bounded import chunk_factors_bounded_kernel
from kda_kernels.triton.chunk_indices import fill_chunk_indices, in_order, max_chunks
from kda_kernels.triton.chunk_inverse import chunk_inverse_kernel
from kda_kernels.triton.common import GATE_CODES
from kda_kernels.triton.launch import dtype_of, launch, usual
from kda_kernels.triton.prefill_config import PrefillConfig
from kda_kernels.triton.runtime import (
    generation,
    has_wgmma,
    interpreted,
    multiprocessors,
    on_device,
    register_limit,
    require_device,
    require_token_strides,
    shared_memory,
    tuned_for,
    unsupported_here,
)

CAUSAL_IN_BITS = CAUSAL
FEATURES = frozenset(
    (
        *("null_slot", "has_initial_state", "checkpoints", "batch_invariant", "workspace", "strided_indices", "tail"),
        *("rounding_seed", "state_scales"),
    )
)
# What `kda compile` builds where nothing is said: packed prompts on a pool, and one, of narrow slices.
_POOL = Problem(Op.PREFILL, (2048,) * 4, H=32, HV=32, pool_slots=8)
USUAL = {
    "safe": dataclasses.replace(_POOL, options=Options(gate=Gate.SAFE, lower_bound=SAFE_BOUND)),
    "softplus": dataclasses.replace(_POOL, seq_lens=(8192,)),
    "convolved": dataclasses.replace(_POOL, seq_lens=(8192,), parts=Parts(norm=False)),
}
MAX_WGMMA_WARPS = 4  # of the chain
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
    """What one kernel hands to the next, [HV, slots, ...], in one piece of memory, which must live as long as they."""

    memory: torch.Tensor
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
            return cls(memory, **{name: Piece(base + begin, dtype) for name, (begin, _, dtype) in parts.items()})
        return cls(memory, **{name: memory[begin:end].view(dtype) for name, (begin, end, dtype) in parts.items()})


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
    """Whether decays over half a chunk may be split at its middle: yes for a lower_bound of -5, the models' own.

    No where bits must not depend on later tokens: decays measured from the middle leave rounding in what is before it.
    """
    return not CAUSAL and options.lower_bound is not None and -options.lower_bound * CHUNK / 4 <= MAX_EXPONENT


def prefill(
    inputs: Inputs,
    *,
    chunk_indices: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    final_state: torch.Tensor | None = None,
    return_intermediate_states: bool = False,
    config: PrefillConfig | None = None,
) -> Outputs | tuple[Outputs, torch.Tensor]:
    """Runs a checked problem.

    Args:
        inputs: see `Inputs`; call `checks.check_inputs` on it first.
        chunk_indices: from `prepare_chunk_indices(cu_seqlens, T)`; made here if not given (engines make it once per
            batch and pass it to every layer).
        out: [B, T, HV, V] in the dtype of v.
        final_state: without a pool, where the final states go; made here if not given.
        return_intermediate_states: also return the state at the start of each chunk, [B, NT, HV, K, V] in the dtype of
            k (NT over all sequences for packed batches; this reads cu_seqlens on the host).
        config: tuning choices; None lets `PrefillConfig.choose` decide.

    Returns:
        Outputs, with the pool itself as final_state when there is one; and h if asked for.
    """
    require_device(inputs.q)
    require_features(inputs, FEATURES, "triton-prefill")
    require_token_strides(inputs, out)
    q, v, dims = inputs.q, inputs.v, inputs.dims
    if config is None:
        chains = dims.HV * (1 if inputs.batch_invariant else dims.N)
        itemsize = operand_dtype(q.dtype).itemsize
        config = PrefillConfig.choose(
            chains, dims.K, dims.V, itemsize, multiprocessors(q.device), shared_memory(q.device), generation(q.device)
        )
    if config.chain_warps > MAX_WGMMA_WARPS and has_wgmma(q.device):
        raise UnavailableError(wrong_products(config))
    slots = dims.N * cdiv(dims.T, CHUNK) if inputs.cu_seqlens is None else max_chunks(dims.T, dims.N)
    work = Workspace.of(inputs, slots)
    table: torch.Tensor | Piece | None = chunk_indices
    chunks = slots if chunk_indices is None else chunk_indices.shape[0]
    if inputs.cu_seqlens is not None and chunk_indices is None and dims.N:
        table = work.chunk_indices
        fill_chunk_indices(table, inputs.cu_seqlens, slots)
    o = torch.empty_like(v, memory_format=torch.contiguous_format) if out is None else out
    ht = _final_state(inputs) if final_state is None else final_state
    h = inputs.k.new_empty((slots, dims.HV, dims.K, dims.V)) if return_intermediate_states else None
    if not dims.N or not chunks:
        hand_on(inputs, o, ht if inputs.state_indices is None else None)
    else:
        call = _Call(inputs, work, slots, table, o, ht, h, config)
        with on_device(q):
            call.factors(chunks)
            call.inverse(chunks)
            call.chain()
    outputs = Outputs(o, ht if inputs.output_final_state else None, state_scales=inputs.state_scales)
    return (outputs, in_order(h, inputs.cu_seqlens, dims.B)) if h is not None else outputs


class _Call:
    """The launches of one prefill.

    Attributes:
        kind: see `kda_kernels.triton.launch.launch`; the same for all of them.
    """

    def __init__(
        self,
        inputs: Inputs,
        work: Workspace,
        slots: int,
        chunk_indices: torch.Tensor | Piece | None,
        o: torch.Tensor,
        ht: torch.Tensor | None,
        h: torch.Tensor | None,
        config: PrefillConfig,
    ) -> None:
        self.inputs, self.work, self.slots, self.chunk_indices, self.config = inputs, work, slots, chunk_indices, config
        self.o, self.ht, self.h, self.dims = o, ht, h, inputs.dims
        self.BK = max(16, next_power_of_2(self.dims.K))
        vk = (3, 2) if inputs.state_v_first else (2, 3)  # positions of the K and V dimensions in a state
        kept = None if inputs.checkpoints is None else inputs.checkpoints.states
        self.states = [_strides(state, vk) for state in (inputs.state, ht, kept)]
        self.kind = self._kind(kept)

    def _kind(self, kept: torch.Tensor | None) -> Hashable:
        i, o, marks = self.inputs, self.o, self.inputs.checkpoints
        steps = (*i.q.stride()[:3], *i.k.stride()[:3], *i.v.stride()[:3], *i.g.stride()[:3], *o.stride()[:3])
        slots = (state[0] for state in self.states)
        tensors = (i.q, i.k, i.v, i.g, i.A_log, i.dt_bias, o, i.state, self.ht, kept, i.state_scales)
        if not usual(tensors, (*steps, *slots), i.beta.stride()):
            return None
        marked = () if marks is None else (marks.rows, marks.offsets)
        tables = (
            self.h,
            i.state_indices,
            i.cu_seqlens,
            self.chunk_indices,
            i.has_initial_state,
            i.rounding_seed,
            *marked,
        )
        dtypes = tuple(map(dtype_of, (*tensors, i.beta, *tables)))
        inner = tuple(state[1:] for state in self.states)
        return (i.q.device, i.options, self.config, self.dims[3:], inner, dtypes, self._columns)

    @property
    def _columns(self) -> int:
        """Of the table of checkpoints, up to the next power of two."""
        marks = self.inputs.checkpoints
        return 1 if marks is None or marks.offsets is None else next_power_of_2(marks.offsets[0].numel())

    def factors(self, chunks: int) -> None:
        """Fills the workspace, except Z, by the way that the gate allows."""
        i, work, options = self.inputs, self.work, self.inputs.options
        _, T, _, H, HV, K, _ = self.dims
        kernel, constant, KB = chunk_factors_kernel, None, self.config.KH
        if bounded(options) and not self.config.halve_always:
            kernel, constant, KB = chunk_factors_bounded_kernel, work.G, self.config.KB
        arguments = (
            i.q, i.k, i.g, i.beta, i.A_log, i.dt_bias,
            work.qg, work.kg, work.kd, work.L, work.Aqk, work.decay, work.rate,
            chunk_sums(i.q.device) if constant is None else constant, i.cu_seqlens, self.chunk_indices,
            float(options.lower_bound or 0), float(options.scale_for(K)), T, self.slots,
            *i.q.stride()[:3], *i.k.stride()[:3], *i.g.stride()[:3], *i.beta.stride(),
            HV, HV // H, K, self.BK, min(KB, self.BK), CHUNK, GATE_CODES[options.gate],
            options.beta_is_logit, options.allow_neg_eigval, options.qk_l2norm,
        )  # fmt: skip
        with stage("chunk_factors"):
            launch(kernel, (HV * chunks,), self.kind, arguments, num_warps=self.config.factor_warps, num_stages=1)

    def inverse(self, chunks: int) -> None:
        """Fills Z."""
        limit = register_limit(self.config.inverse_registers)
        HV = self.dims.HV
        arguments = (self.work.L, self.work.Z, self.chunk_indices, self.inputs.cu_seqlens, self.slots, HV, CHUNK)
        with stage("chunk_inverse"):
            launch(chunk_inverse_kernel, (HV * chunks,), self.kind, arguments, num_warps=1, **limit)

    def chain(self) -> None:
        """The recurrence over chunks, from the workspace and v: fills o, ht, h and checkpoints."""
        i, work, config = self.inputs, self.work, self.config
        _, T, N, _, HV, K, V = self.dims
        h0, indices, marks = i.state, i.state_indices, i.checkpoints
        kept, rows, offsets, every, columns = None, None, None, 1, 1
        if marks is not None:
            kept, rows, offsets, every = marks.states, marks.rows, marks.offsets, marks.every or 1
            columns = rows.shape[1] if rows.ndim == 2 else 1
        arguments = (
            i.v, work.qg, work.kg, work.kd, work.Z, work.Aqk, work.decay, work.rate, self.o, h0, self.ht, self.h, kept,
            indices, i.cu_seqlens, i.has_initial_state, rows, offsets, i.state_scales, i.rounding_seed,
            N, T, self.slots, 0 if h0 is None else h0.shape[0], -1 if i.null_slot is None else i.null_slot,
            0 if kept is None else kept.shape[0], columns, every, 0 if indices is None else indices.stride(0),
            0 if i.state_scales is None else i.state_scales.stride(0),
            *i.v.stride()[:3], *self.o.stride()[:3], *(step for steps in self.states for step in steps),
            HV, K, V, self.BK, config.BV, CHUNK, self._columns, config.chain_stages,
        )  # fmt: skip
        with stage("chain"):
            grid = (cdiv(V, config.BV) * HV * N,)
            launch(chunk_chain_kernel, grid, self.kind, arguments, num_warps=config.chain_warps)


def _final_state(inputs: Inputs) -> torch.Tensor | None:
    if inputs.state_indices is not None:
        return inputs.state
    return inputs.new_final_state() if inputs.output_final_state else None


def _strides(state: torch.Tensor | None, vk: tuple[int, int]) -> tuple[int, int, int, int]:
    """(sequence or slot, head, K, V) strides."""
    if state is None:
        return (0, 0, 0, 0)
    slot, head = state.stride()[:2]
    return slot, head, state.stride(vk[0]), state.stride(vk[1])


def unsupported(problem: Problem | None = None) -> str | None:
    """Why this machine cannot run `problem` with this kernel; None if it can."""
    if problem is not None and max(problem.K, problem.V) > MAX_HEAD:
        return f"head size is {max(problem.K, problem.V)}: at most {MAX_HEAD}"
    if (reason := unsupported_here()) is not None or tuned_for() is None or not has_wgmma():
        return reason
    forced = PrefillConfig.choose(1, MAX_HEAD, MAX_HEAD, generation=generation(torch.device("cuda")))
    return wrong_products(forced) if forced.chain_warps > MAX_WGMMA_WARPS else None


def wrong_products(config: PrefillConfig) -> str:
    """Why Hopper's own products must not have that many warps: what was seen is in docs/versions.md."""
    return f"the chain with {config.chain_warps} warps is wrong with wgmma: set TRITON_OVERRIDE_ARCH=sm80"


def run(inputs: Inputs) -> Outputs:
    """Checks the inputs and runs them; a pool in `inputs.state` is updated in place."""
    check_inputs(inputs)
    outputs = prefill(inputs)
    assert isinstance(outputs, Outputs)
    return outputs
