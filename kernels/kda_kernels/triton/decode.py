"""The fused recurrent update: one launch for any number of sequences. Host half; `decode_kernel` is the device half.

Floor: the states of all sequences read and written once, 2 * N * HV * K * V elements. H=96, N=32, fp32: 403 MB, 133 us
at 3.0 TB/s. The activations are under 2% of that.
"""

import dataclasses
import functools

import torch

from kda_kernels.checks import check_inputs, require_features, require_no_tail
from kda_kernels.ints import cdiv, next_power_of_2
from kda_kernels.problem import MAX_HEAD, SAFE_BOUND, Gate, Op, Options, Problem
from kda_kernels.ranges import stage
from kda_kernels.tensors import Inputs, Outputs
from kda_kernels.triton.common import GATE_CODES
from kda_kernels.triton.decode_kernel import decode_kernel
from kda_kernels.triton.runtime import multiprocessors, on_device, require_device, unsupported_here

FEATURES = frozenset(("token_states",))
# What `kda compile` builds where nothing is said: a pool in place, one token a sequence.
_POOL = Problem(Op.DECODE, (1,) * 32, H=32, HV=32, packed=False, pool_slots=64)
USUAL = {
    "softplus": _POOL,
    "safe": dataclasses.replace(_POOL, options=Options(gate=Gate.SAFE, lower_bound=SAFE_BOUND)),
    "softplus bf16-state": dataclasses.replace(_POOL, state_dtype="bfloat16"),
    "softplus packed": dataclasses.replace(_POOL, packed=True),
}


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Tuning choices.

    Attributes:
        BV: rows (value channels) of the state a program owns: a power of 2. Few rows make many small programs, whose
            loads are all in flight together; many rows read q, k and g, which each program needs in full, less often.
        num_warps: of a program. With one warp every reduction over K and every change of layout stays inside it: no
            barrier, no shared memory.
    """

    BV: int = 16
    num_warps: int = 1

    @classmethod
    @functools.cache
    def choose(cls, heads: int, K: int, V: int, state_v_first: bool = True, sms: int = 132) -> "DecodeConfig":
        """For `heads` = N * HV states of V x K on a GPU of `sms` multiprocessors."""
        rows = next_power_of_2(V)
        if not state_v_first:  # V runs along memory: 32 channels fill a 128-byte line
            return cls(BV=min(32, rows), num_warps=4)
        # Half the rows a program when that is what it takes to give every multiprocessor eight programs.
        BV = 16 if heads * rows >= 16 * 8 * sms else 8
        return cls(BV=min(BV * 128 // max(128, next_power_of_2(K)), rows))


def decode(
    inputs: Inputs,
    out: torch.Tensor | None = None,
    config: DecodeConfig | None = None,
    *,
    final_state: torch.Tensor | None = None,
) -> Outputs:
    """Runs a checked problem: any number of tokens a sequence, though it is meant for one or a few.

    Args:
        inputs: see `Inputs`; call `checks.check_inputs` on it first. Tokens may have any strides with a contiguous last
            dimension; nothing is copied. A pool is updated in place, and only in the slots of sequences with tokens.
        out: [B, T, HV, V] in the dtype of v, last dimension contiguous; made here if not given.
        config: tuning choices; None lets `DecodeConfig.choose` decide.
        final_state: without a pool, where the final states go, shaped like a plain state, in fp32 or bf16; it may be
            `inputs.state` itself. None: a new tensor in the dtype of the state if `inputs.output_final_state`.

    Returns:
        Outputs. The arithmetic is fp32, and the state is rounded to its own dtype once, after the last token.

    Raises:
        UnavailableError: the tensors lie where Triton cannot work.
    """
    require_device(inputs.q)
    require_features(inputs, FEATURES, "triton-decode")
    require_no_tail(inputs, "triton-decode")
    q, k, v, g, beta, options = inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta, inputs.options
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    packed = inputs.cu_seqlens is not None
    N = inputs.N
    h0, token_states = inputs.state, inputs.token_states
    o = torch.empty((B, T, HV, V), dtype=v.dtype, device=v.device) if out is None else out
    if inputs.state_indices is not None:
        ht = h0
    elif final_state is not None or not inputs.output_final_state:
        ht = final_state
    else:
        ht = inputs.new_final_state()
    if config is None:
        config = DecodeConfig.choose(N * HV, K, V, inputs.state_v_first, multiprocessors(q.device))
    grid = cdiv(V, config.BV) * HV * N
    if not grid:
        return Outputs(o, ht if inputs.output_final_state else None)
    with stage("decode"), on_device(q):
        decode_kernel[(grid,)](
            q, k, v, g, beta, inputs.A_log, inputs.dt_bias, o, h0, ht, token_states, inputs.state_indices,
            inputs.cu_seqlens, options.scale_for(K),
            0.0 if options.lower_bound is None else options.lower_bound,
            T,
            *_strides(q, packed), *_strides(k, packed), *_strides(v, packed), *_strides(g, packed),
            *_strides(beta, packed), *_strides(o, packed),
            0 if h0 is None else h0.stride(0), 0 if ht is None else ht.stride(0),
            *((0, 0) if token_states is None else _strides(token_states, packed)[:2]),
            H=H, HV=HV, K=K, V=V, BK=next_power_of_2(K), BV=config.BV,
            STATE_V_FIRST=inputs.state_v_first, GATE=GATE_CODES[options.gate], BETA_LOGIT=options.beta_is_logit,
            NEG_EIGVAL=options.allow_neg_eigval, L2NORM=options.qk_l2norm, num_warps=config.num_warps, num_stages=1,
        )  # fmt: skip
    return Outputs(o, ht if inputs.output_final_state else None)


def _strides(x: torch.Tensor, packed: bool) -> tuple[int, int, int]:
    """Strides of what a sequence's start counts (tokens if packed, else batch rows), of tokens, and of heads."""
    batch, token, head = x.stride()[:3]
    return (token if packed else batch), token, head


def unsupported(problem: Problem | None = None) -> str | None:
    """Why this machine cannot run `problem` with this kernel; None if it can."""
    if problem is not None and max(problem.K, problem.V) > MAX_HEAD:
        return f"head size is {max(problem.K, problem.V)}: at most {MAX_HEAD}"
    return unsupported_here()


def run(inputs: Inputs) -> Outputs:
    """Checks the inputs and runs them; a pool in `inputs.state` is updated in place."""
    check_inputs(inputs)
    return decode(inputs)
