"""A decode kernel in Triton: one program per sequence and head, the whole state in registers. Right, and not fast.

kda verify --kernel examples/triton_kernel.py:decode
kda profile --kernel examples/triton_kernel.py:decode --kernel triton-decode --op decode -N 32 -H 32
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _unit(x):
    return x * tl.rsqrt(tl.sum(x * x) + 1e-6)


@triton.jit
def _step(
    q, k, v, g, beta, A_log, dt_bias, state, slots, o, scale, slot_stride,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    n, h = tl.program_id(0), tl.program_id(1)
    channel, row = tl.arange(0, K), tl.arange(0, V)
    slot = tl.load(slots + n).to(tl.int64)
    if slot < 0:  # padding: nothing is read or written, and the output is zero
        tl.store(o + (n * H + h) * V + row, tl.zeros([V], o.dtype.element_ty))
        return
    key = _unit(tl.load(k + (n * H + h) * K + channel).to(tl.float32))
    query = _unit(tl.load(q + (n * H + h) * K + channel).to(tl.float32)) * scale
    raw = tl.load(g + (n * H + h) * K + channel).to(tl.float32) + tl.load(dt_bias + h * K + channel)
    softplus = tl.where(raw > 20.0, raw, tl.log(1.0 + tl.exp(raw)))
    decay = tl.exp(-tl.exp(tl.load(A_log + h)) * softplus)
    at = state + slot * slot_stride + h * V * K + row[:, None] * K + channel[None, :]
    S = tl.load(at) * decay[None, :]
    learn = tl.sigmoid(tl.load(beta + n * H + h).to(tl.float32))
    u = learn * (tl.load(v + (n * H + h) * V + row).to(tl.float32) - tl.sum(S * key[None, :], 1))
    S += u[:, None] * key[None, :]
    tl.store(at, S)
    tl.store(o + (n * H + h) * V + row, tl.sum(S * query[None, :], 1).to(o.dtype.element_ty))


def decode(q, k, v, g, beta, A_log, dt_bias, scale, initial_state, state_indices):
    """One token per sequence, [N, 1, H, ..], over a pool [P, H, V, K] that is updated in place."""
    N, _, H, K = q.shape
    q, k, v, g, beta = (x.contiguous() for x in (q, k, v, g, beta))  # they may be views of one projection
    o, pool = torch.empty_like(v), initial_state  # not contiguous() for the pool: that would update a copy
    _step[(N, H)](
        q, k, v, g, beta, A_log, dt_bias, pool, state_indices, o, scale, pool.stride(0), H, K, v.shape[3], num_warps=4
    )
    return o


def _supports(problem) -> str | None:
    """What this kernel leaves out, in the order that a reader would ask."""
    if problem.H != problem.HV:
        return f"HV is {problem.HV}: it should be H = {problem.H}"
    if any(n != 1 for n in problem.seq_lens) or problem.packed:
        return "sequences should have one token, in a dense batch"
    if problem.state_dtype != "float32":
        return f"the state is {problem.state_dtype}: it should be float32"
    if any(size & (size - 1) for size in (problem.K, problem.V)):
        return f"K is {problem.K} and V is {problem.V}: they should be powers of two"
    return None


decode.supports = _supports
