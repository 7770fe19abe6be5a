"""The fused recurrent update: one launch for any number of sequences. Host half; `decode_kernel` is the device half.

Floor: the states of all sequences read and written once, 2 * N * HV * K * V elements. H=96, N=32, fp32: 403 MB, 133 us
at 3.0 TB/s. The activations are under 2% of that.
"""

import dataclasses
import functools
from typing import Any

import torch

from kda_kernels.checks import check_inputs, require_features
from kda_kernels.ints import cdiv, next_power_of_2
from kda_kernels.problem import MAX_HEAD, SAFE_BOUND, Gate, Op, Options, Problem
from kda_kernels.ranges import stage
from kda_kernels.tensors import Inputs, Outputs
from kda_kernels.triton.common import GATE_CODES
from kda_kernels.triton.decode_kernel import decode_kernel
from kda_kernels.triton.launch import dtype_of, launch, usual
from kda_kernels.triton.runtime import (
    generation,
    multiprocessors,
    on_device,
    register_limit,
    require_device,
    unsupported_here,
)

FEATURES = frozenset(
    (
        *("null_slot", "has_initial_state", "num_accepted_tokens", "update_state", "token_states"),
        *("token_state_indices", "batch_invariant", "strided_indices", "tail", "conv", "norm"),
        *("rounding_seed", "state_scales"),
    )
)
# What `kda compile` builds where nothing is said: a pool in place, one token per sequence.
_POOL = Problem(Op.DECODE, (1,) * 32, H=32, HV=32, packed=False, pool_slots=64)
USUAL = {
    "softplus": _POOL,
    "safe": dataclasses.replace(_POOL, options=Options(gate=Gate.SAFE, lower_bound=SAFE_BOUND)),
    "softplus bf16-state": dataclasses.replace(_POOL, state_dtype="bfloat16"),
    "softplus bf16-state stochastic": dataclasses.replace(_POOL, state_dtype="bfloat16", state_rounding="stochastic"),
    "softplus int16-state": dataclasses.replace(_POOL, state_dtype="int16"),
    "softplus packed": dataclasses.replace(_POOL, packed=True),
    "step softplus": (_STEP := dataclasses.replace(_POOL, op=Op.STEP)),
    "step safe": dataclasses.replace(_STEP, options=Options(gate=Gate.SAFE, lower_bound=SAFE_BOUND)),
    "step softplus bf16-state": dataclasses.replace(_STEP, state_dtype="bfloat16"),
}


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Tuning choices.

    Attributes:
        BV: rows (value channels) of the state a program owns: a power of 2. Few rows make many small programs, whose
            loads are all in flight together; many rows read q, k and g, which each program needs in full, less often.
            With a convolution or a norm it is all of them.
        num_warps: of a program. With one warp every reduction over K and every change of layout stays inside it: no
            barrier, no shared memory.
        piece: of its rows a program takes so many at a time, while the next are on their way; 0: all at once, and so it
            is, too, where `_streamed` says no.
        registers: a limit per thread. On sm_86 ptxas spills to get down to 128, with which 16 programs of a warp share
            a multiprocessor; with 168, or with the 140 that it takes on sm_80, 12 do. None: ptxas chooses.
    """

    BV: int = 16
    num_warps: int = 1
    registers: int | None = None
    piece: int = 0

    @classmethod
    @functools.cache
    def choose(
        cls,
        heads: int,
        K: int,
        V: int,
        state_v_first: bool = True,
        sms: int = 132,
        generation: int = 9,
        rounded: bool = False,
        streamed: bool = False,
    ) -> "DecodeConfig":
        """For `heads` = N * HV states of V x K on a GPU of `sms` multiprocessors.

        `generation` is `kda_kernels.triton.runtime.generation`. `rounded`: states are int16, or rounded stochastically.
        `streamed`: see `_streamed`.
        """
        rows = next_power_of_2(V)
        if not state_v_first:  # V runs along memory: 32 channels fill a 128-byte line
            return cls(BV=min(32, rows), num_warps=4)
        # Half the rows per program when that is what it takes to give every multiprocessor eight programs.
        BV = 16 if heads * rows >= 16 * 8 * sms else 8
        BV = min(BV * 128 // max(128, next_power_of_2(K)), rows)
        if streamed and BV == 16 and rows >= 64 and generation == 9:
            return cls(BV=64 if heads >= 4 * sms else 32, piece=8)
        if rounded and BV == 16 and rows >= 32 and generation == 9:  # two warps share the channels' work
            return cls(BV=32, num_warps=2)
        return cls(BV=BV, registers=168 if generation == 8 else None)

    @classmethod
    @functools.cache
    def whole(
        cls, heads: int, K: int, V: int, sms: int = 132, generation: int = 9, streamed: bool = False
    ) -> "DecodeConfig":
        """As `choose`, for programs that have all of a head.

        At once: 128 numbers of its state per thread, as few threads as channels. In pieces from one state per
        multiprocessor on, and by fewer threads from four on, as then other programs work while one waits.
        """
        rows = next_power_of_2(V)
        if streamed and rows >= 64 and generation == 9 and heads >= sms:
            return cls(BV=rows, num_warps=2, piece=16) if heads >= 4 * sms else cls(BV=rows, num_warps=4, piece=32)
        return cls(BV=rows, num_warps=min(max(rows * next_power_of_2(K) // (128 * 32), 1), 16))


def decode(
    inputs: Inputs,
    out: torch.Tensor | None = None,
    config: DecodeConfig | None = None,
    *,
    final_state: torch.Tensor | None = None,
) -> Outputs:
    """Runs a checked problem: any number of tokens per sequence, though it is meant for one or a few.

    Args:
        inputs: see `Inputs`; call `checks.check_inputs` on it first. Tokens may have any strides with a contiguous last
            dimension; nothing is copied. A pool is updated in place, and only in the slots of sequences with tokens.
        out: [B, T, HV, V] in the dtype of v, last dimension contiguous; made here if not given.
        config: tuning choices; None lets `DecodeConfig.choose` decide.
        final_state: without a pool, where the final states go, shaped like a plain state, in fp32 or bf16; it may be
            `inputs.state` itself. None: a new tensor in the dtype of the state if `inputs.output_final_state`.

    Returns:
        Outputs. The arithmetic is fp32, and the state is rounded to its own dtype once, after the last token. States of
        a convolution are shifted in place.

    Raises:
        UnavailableError: the tensors lie where Triton cannot work.
    """
    require_device(inputs.q)
    require_features(inputs, FEATURES, "triton-decode")
    h0, indices = inputs.state, inputs.state_indices
    o = torch.empty_like(inputs.v, memory_format=torch.contiguous_format) if out is None else out
    if indices is not None:
        ht = h0 if inputs.update_state else None
    elif final_state is not None or not inputs.output_final_state:
        ht = final_state
    else:
        ht = inputs.new_final_state()
    if inputs.N:
        _launch(inputs, o, ht, config)
    else:
        o.zero_()
    final = h0 if indices is not None else ht
    shifted = None if inputs.conv is None else inputs.conv.states
    return Outputs(
        o, final if inputs.output_final_state else None, conv_states=shifted, state_scales=inputs.state_scales
    )


def _launch(inputs: Inputs, o: torch.Tensor, ht: torch.Tensor | None, config: DecodeConfig | None) -> None:
    """The kernel on one sequence or more; `ht`: where states go."""
    q, k, v, g, beta, options = inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta, inputs.options
    h0, kept, indices = inputs.state, inputs.token_states, inputs.state_indices
    scales, seed, conv, norm = inputs.state_scales, inputs.rounding_seed, inputs.conv, inputs.norm
    _, T, N, H, HV, K, V = inputs.dims
    packed, whole, streamed = inputs.cu_seqlens is not None, conv is not None or norm is not None, _streamed(inputs)
    if config is None:
        config = _chosen(inputs, whole, streamed)
    steps = (*_strides(q, packed), *_strides(k, packed), *_strides(v, packed), *_strides(g, packed))
    others = (*_strides(beta, packed), *_strides(o, packed))
    slots = (
        0 if h0 is None else h0.stride(0), 0 if ht is None else ht.stride(0),
        *((0, 0) if kept is None else _strides(kept, packed and inputs.token_state_indices is None)[:2]),
    )  # fmt: skip
    params = (inputs.A_log, inputs.dt_bias)
    tables = (inputs.cu_seqlens, inputs.has_initial_state, inputs.num_accepted_tokens, inputs.token_state_indices)
    together = 1 if conv is None else HV // H  # value heads of a program
    constants = (
        H, HV, K, V, next_power_of_2(K), config.BV, config.piece if streamed else 0, inputs.state_v_first,
        GATE_CODES[options.gate], options.beta_is_logit, options.allow_neg_eigval, options.qk_l2norm, together,
        0 if conv is None else conv.width, conv is not None and conv.tokens_first, inputs.update_state,
    )  # fmt: skip
    parts = _parts(inputs, packed) if whole else _NO_PARTS
    kind = None
    if usual(
        (q, k, v, g, *params, o, h0, ht, kept, *parts[:3], *parts[4:6], scales),
        (*steps, *slots, *(parts[-4:] if whole else ())),
        others,
    ):
        typed = (q, v, g, beta, *params, o, h0, ht, kept, indices, *tables, *parts[:6], scales, seed)
        kind = (q.device, config.num_warps, config.registers, constants, tuple(map(dtype_of, typed)))
    with stage("decode"), on_device(q):
        launch(
            decode_kernel, (cdiv(V, config.BV) * (HV // together) * N,), kind,
            (
                q, k, v, g, beta, *params, o, h0, ht, kept, indices, *tables,
                float(options.scale_for(K)), float(options.lower_bound or 0),
                N, T, 0 if h0 is None else h0.shape[0], -1 if inputs.null_slot is None else inputs.null_slot,
                *((1, 0, 0) if indices is None else _index_layout(indices)),
                *((0, 0) if kept is None else kept.shape[:2]), *steps, *others, *slots, *parts,
                scales, 0 if scales is None else scales.stride(0), seed, *constants,
            ),
            num_warps=config.num_warps, num_stages=1, **register_limit(config.registers),
        )  # fmt: skip


def _chosen(inputs: Inputs, whole: bool, streamed: bool) -> DecodeConfig:
    """For these tensors on their GPU. `whole`: there is a convolution or a norm."""
    _, _, N, _, HV, K, V = inputs.dims
    heads = HV if inputs.batch_invariant else N * HV
    gpu = multiprocessors(inputs.q.device), generation(inputs.q.device)
    if whole:
        return DecodeConfig.whole(heads, K, V, *gpu, streamed)
    rounded = inputs.state_scales is not None or inputs.rounding_seed is not None
    return DecodeConfig.choose(heads, K, V, inputs.state_v_first, *gpu, rounded, streamed)


_NO_PARTS = (*((None,) * 7), *((0,) * 7))  # a number that is declared int64 cannot be None


def _parts(inputs: Inputs, packed: bool) -> tuple[Any, ...]:
    """The arguments of the kernel that a convolution and a norm are, from conv_weight to stride_gate_h."""
    conv, norm, indices = inputs.conv, inputs.norm, None
    if conv is not None:
        indices = conv.indices
        if indices is None and inputs.state_indices is not None and inputs.state_indices.ndim == 2:
            indices = inputs.state_indices[:, 0]
    return (
        *((None,) * 3 if conv is None else (conv.weight, conv.bias, conv.states)), indices,
        *((None,) * 3 if norm is None else (norm.gate, norm.weight, norm.eps)),
        1 if indices is None else indices.stride(0),
        *((0, 0, 0) if conv is None else (conv.states.shape[0], conv.by_channel.shape[2], conv.states.stride(0))),
        *((0, 0, 0) if norm is None else _strides(norm.gate, packed)),
    )  # fmt: skip


def _streamed(inputs: Inputs) -> bool:
    """Whether states can be taken in pieces: of two bytes, V-first, their sizes powers of two; one token each, whose
    state goes nowhere but to where it came from."""
    state, (K, V) = inputs.state, (inputs.q.shape[3], inputs.v.shape[3])
    plain = inputs.cu_seqlens is None and inputs.q.shape[1] == 1 and inputs.has_initial_state is None
    single = plain and inputs.num_accepted_tokens is None and inputs.token_states is None
    return (
        single and state is not None and state.element_size() == 2 and inputs.state_v_first
        and (K, V) == (next_power_of_2(K), next_power_of_2(V))
    )  # fmt: skip


def _strides(x: torch.Tensor, packed: bool) -> tuple[int, int, int]:
    """Strides of what a sequence's start counts (tokens if packed, else batch rows), of tokens, and of heads."""
    batch, token, head = x.stride()[:3]
    return (token if packed else batch), token, head


def _index_layout(indices: torch.Tensor) -> tuple[int, int, int]:
    """Columns, and the strides of rows and columns."""
    return (1, indices.stride(0), 0) if indices.ndim == 1 else (indices.shape[1], indices.stride(0), indices.stride(1))


def unsupported(problem: Problem | None = None) -> str | None:
    """Why this machine cannot run `problem` with this kernel; None if it can."""
    if problem is not None and max(problem.K, problem.V) > MAX_HEAD:
        return f"head size is {max(problem.K, problem.V)}: at most {MAX_HEAD}"
    return unsupported_here()


def run(inputs: Inputs) -> Outputs:
    """Checks the inputs and runs them; a pool in `inputs.state` is updated in place."""
    check_inputs(inputs)
    return decode(inputs)
