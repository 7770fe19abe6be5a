"""What a problem costs at least: the bytes that must move, and the arithmetic of the chunk form.

Bytes: each input is read once and each output written once, nothing else. Counted are the activations (q, k, v, g, beta
and o; for the op `gate` only g and the float32 sums), A_log and dt_bias, and the state in and out; of the op `step`
weights, states and gate of its parts too. A padding row reads nothing and touches no state; only its zeros are written.
cu_seqlens and state_indices (a few bytes per sequence) are left out. Divided by a bandwidth this gives the floor under
the time of any kernel.
"""

import dataclasses

from kda_kernels.dtypes import STATES
from kda_kernels.problem import CHUNK, Gate, Op, Problem

SIZEOF = {dtype.name: dtype.bytes for dtype in STATES.values()}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that must move, by what they belong to.

    Attributes:
        activations: q, k, v, g, beta and the gate of a norm in, o out.
        parameters: A_log and dt_bias; the weights of a convolution and a norm.
        state: the state in and the state out, and so of a convolution.
    """

    activations: int
    parameters: int
    state: int

    @property
    def total(self) -> int:
        return self.activations + self.parameters + self.state


def traffic(problem: Problem) -> Traffic:
    """The bytes of `problem`."""
    p = problem
    gate = SIZEOF[p.g_dtype] * p.HV * p.K
    parameters = 0 if p.options.gate is Gate.NONE else SIZEOF[p.param_dtype] * p.HV * (1 + p.K)
    if p.op is Op.GATE:
        return Traffic(p.T * (gate + SIZEOF["float32"] * p.HV * p.K), parameters, 0)
    read = SIZEOF[p.dtype] * (2 * p.H * p.K + p.HV * p.V) + gate + SIZEOF[p.beta_dtype] * p.HV
    written = SIZEOF[p.dtype] * p.HV * p.V
    passes = p.initial_state + (p.final_state or p.pool_slots is not None)  # a pool is always written back
    row = p.K * SIZEOF[p.state_dtype] + (4 if "state_scales" in p.features else 0)
    state = passes * (p.N - p.padding) * p.HV * p.V * row
    if (parts := p.parts) is not None:
        channels = 2 * p.H * p.K + p.HV * p.V
        if parts.width:
            parameters += channels * (parts.width + parts.bias) * SIZEOF[parts.weight_dtype]
            state += 2 * (p.N - p.padding) * channels * (parts.width - 1) * SIZEOF[parts.state_dtype]
        if parts.norm:
            parameters += p.V * SIZEOF[parts.norm_dtype]
            read += SIZEOF[p.dtype] * p.HV * p.V
    return Traffic(_live_tokens(p) * read + p.T * written, parameters, state)


def flops(problem: Problem) -> int:
    """Floating-point operations, a multiply-add counted as two; 0 for the op `gate`, which is all memory.

    Decode is the recurrence, per token and value head: K V for the decay, 2 K V each for S^T k, the update and S^T q.
    Prefill is the chunk form at chunk C = 64, whole tiles, per token and value head: 2 C K each for k k^T, q k^T and W,
    2 C V each for U and (q k^T) v', 2 K V each for W S, q S and k^T v', and C^2 / 3 for the triangular inverse.
    """
    p = problem
    if p.op is Op.GATE:
        return 0
    if p.op.decodes:
        return _live_tokens(p) * p.HV * 7 * p.K * p.V
    per_token = 6 * CHUNK * p.K + 4 * CHUNK * p.V + 6 * p.K * p.V + CHUNK * CHUNK // 3
    return _live_tokens(p) * p.HV * per_token


def floor_us(num_bytes: int, gbps: float) -> float:
    """Microseconds to move `num_bytes` at `gbps` (1e9 bytes a second)."""
    return num_bytes / (gbps * 1e3)


def gbps(num_bytes: int, us: float) -> float:
    """1e9 bytes a second, from bytes and microseconds."""
    return num_bytes / (us * 1e3)


def _live_tokens(p: Problem) -> int:
    """Tokens of sequences that are no padding: which ones are is not known here, so they count as of average length."""
    return p.T if not p.padding else p.T * (p.N - p.padding) // p.N
