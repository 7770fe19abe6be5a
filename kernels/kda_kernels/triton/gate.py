"""The gate, fused: activation + bias + optional lower bound + chunk-local cumulative sum in one pass over memory.

Floor: each gate is read once (bf16: 2 bytes) and each sum written once (4 bytes). T=8192, H=96, K=128: 604 MB. An
activation pass followed by a cumsum moves 14 bytes instead of 6, 2.33x as many.

A program owns `BLOCK` neighbouring channels of one chunk and walks down its tokens, keeping the sum in registers: every
access is a full-width coalesced row, and no lane ever needs another lane's value, unlike a scan over a 2-D tile.
"""

import torch
import triton
import triton.language as tl

from kda_kernels.checks import check_gate, check_inputs
from kda_kernels.ints import cdiv
from kda_kernels.problem import CHUNK, SAFE_BOUND, Gate, Op, Options, Problem
from kda_kernels.tensors import Inputs, Outputs
from kda_kernels.triton.chunk_indices import prepare_chunk_indices
from kda_kernels.triton.common import GATE_CODES, gate_parameters, log_decay
from kda_kernels.triton.runtime import on_device, require_device, unsupported_here

BLOCK = 512  # channels per program, 4 bf16 gates (8 bytes) a thread of 4 warps; 1024 was no faster
UNROLL = 8  # tokens whose loads are in flight together
# What `kda compile` builds where nothing is said.
_BOUNDS = {Gate.SOFTPLUS: None, Gate.SAFE: SAFE_BOUND, Gate.NONE: None}
USUAL = {
    str(gate): Problem(Op.GATE, (8192,), H=32, HV=32, options=Options(gate=gate, lower_bound=bound))
    for gate, bound in _BOUNDS.items()
}


@triton.jit(do_not_specialize=["T", "stride_b", "cu_seqlens", "chunk_indices"])
def gate_cumsum_kernel(
    g,  # [B, T, HV, K], row strides given
    A_log,  # [HV] or None
    dt_bias,  # [HV * K] or None
    out,  # fp32 [B, T, HV, K], contiguous
    cu_seqlens,
    chunk_indices,
    lower_bound,
    scale,
    T,
    stride_b: tl.int64,
    stride_t,
    stride_h,
    HV: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    GATE: tl.constexpr,
    CUMSUM: tl.constexpr,
):
    BLOCKS: tl.constexpr = (HV * K + BLOCK - 1) // BLOCK
    i_c = (tl.program_id(0) // BLOCKS).to(tl.int64)
    if cu_seqlens is not None:
        i_b = tl.load(chunk_indices + 2 * i_c)
        if i_b < 0:
            return
        first = tl.load(cu_seqlens + i_b).to(tl.int64)
        length = tl.load(cu_seqlens + i_b + 1).to(tl.int64) - first
        start = tl.load(chunk_indices + 2 * i_c + 1).to(tl.int64) * C
        base = g + (first + start) * stride_t
    else:
        chunks = tl.cdiv(T, C)
        i_b = i_c // chunks
        first = i_b * T
        length = T
        start = (i_c % chunks) * C
        base = g + i_b * stride_b + start * stride_t
    rows = tl.minimum(length - start, C).to(tl.int32)
    channel = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    live = channel < HV * K
    head = channel // K
    p_g = base + head.to(tl.int64) * stride_h + channel % K
    p_o = out + (first + start) * (HV * K) + channel
    bias = tl.zeros([BLOCK], tl.float32)
    if dt_bias is not None:
        bias = tl.load(dt_bias + channel, mask=live, other=0.0).to(tl.float32)
    A = 1.0
    if A_log is not None:
        A, bias = gate_parameters(tl.load(A_log + head, mask=live, other=0.0), bias, GATE)
    total = tl.zeros([BLOCK], tl.float32)
    for t0 in range(0, rows, UNROLL):
        for j in tl.static_range(UNROLL):
            ok = live & (t0 + j + tl.zeros_like(channel) < rows)
            raw = tl.load(p_g, mask=ok, other=0.0).to(tl.float32)
            step = log_decay(raw, A, bias, lower_bound, GATE) * scale
            total = total + step if CUMSUM else step
            tl.store(p_o, total, mask=ok)
            p_g += stride_t
            p_o += HV * K


def launch_gate(
    g: torch.Tensor,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    gate: Gate,
    lower_bound: float | None,
    scale: float | None,
    chunk_size: int,
    cu_seqlens: torch.Tensor | None,
    chunk_indices: torch.Tensor | None,
    cumsum: bool = True,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The kernel on checked tensors; for the arguments see `kda_gate_chunk_cumsum`."""
    require_device(g)
    B, T, HV, K = g.shape
    if out is None:
        out = torch.empty(g.shape, dtype=torch.float32, device=g.device)
    if cu_seqlens is None:
        chunks = B * cdiv(T, chunk_size)
    else:
        if chunk_indices is None:
            chunk_indices = prepare_chunk_indices(cu_seqlens, T, chunk_size)
        chunks = chunk_indices.shape[0]
    if out.numel() == 0 or chunks == 0:
        return out
    grid = (cdiv(HV * K, BLOCK) * chunks,)
    with on_device(g):
        gate_cumsum_kernel[grid](
            g, A_log, dt_bias, out, cu_seqlens, chunk_indices,
            0.0 if lower_bound is None else lower_bound, 1.0 if scale is None else scale, T, *g.stride()[:3],
            HV=HV, K=K, C=chunk_size, BLOCK=BLOCK, UNROLL=UNROLL, GATE=GATE_CODES[gate], CUMSUM=cumsum, num_warps=4,
        )  # fmt: skip
    return out


def kda_gate_chunk_cumsum(
    g: torch.Tensor,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    *,
    lower_bound: float | None = None,
    scale: float | None = None,
    chunk_size: int = CHUNK,
    cu_seqlens: torch.Tensor | None = None,
    chunk_indices: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log decays of raw gates, summed from the start of each chunk.

    Args:
        g: raw gates [B, T, HV, K], fp32, fp16 or bf16; any strides with a contiguous last dimension.
        A_log: [HV]; may be None with a lower_bound (factor 1). dt_bias: [HV * K] or None.
        lower_bound: None: -exp(A_log) * softplus(g + dt_bias); else lower_bound * sigmoid(exp(A_log) * (g + dt_bias)).
        scale: factor on the result (log2(e) for kernels that work with exp2).
        cu_seqlens: [N + 1] for packed batches; chunk_indices: from `prepare_chunk_indices`, made here if not given.
        out: fp32 [B, T, HV, K], contiguous.

    Returns:
        fp32 [B, T, HV, K], natural log (times scale).

    Raises:
        InputError: an argument of wrong shape, dtype, device or stride.
    """
    gate = Gate.SOFTPLUS if lower_bound is None else Gate.SAFE
    check_gate(g, A_log, dt_bias, gate=gate, lower_bound=lower_bound, cu_seqlens=cu_seqlens, out=out)
    return launch_gate(g, A_log, dt_bias, gate, lower_bound, scale, chunk_size, cu_seqlens, chunk_indices, out=out)


def chunk_local_cumsum(
    g: torch.Tensor,
    *,
    scale: float | None = None,
    chunk_size: int = CHUNK,
    cu_seqlens: torch.Tensor | None = None,
    chunk_indices: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `kda_gate_chunk_cumsum`, for gates that are log decays already: only the sum."""
    check_gate(g, None, None, gate=Gate.NONE, lower_bound=None, cu_seqlens=cu_seqlens, out=out)
    return launch_gate(g, None, None, Gate.NONE, None, scale, chunk_size, cu_seqlens, chunk_indices, out=out)


def kda_gate(
    g: torch.Tensor,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    *,
    lower_bound: float | None = None,
) -> torch.Tensor:
    """The activation alone, fp32 [B, T, HV, K]: the first half of the unfused baseline, and handy in tests."""
    gate = Gate.SOFTPLUS if lower_bound is None else Gate.SAFE
    check_gate(g, A_log, dt_bias, gate=gate, lower_bound=lower_bound)
    return launch_gate(g, A_log, dt_bias, gate, lower_bound, None, CHUNK, None, None, cumsum=False)


def unsupported(problem: Problem | None = None) -> str | None:
    """Why this machine cannot run `problem` with this kernel; None if it can."""
    return unsupported_here()


def run(inputs: Inputs) -> Outputs:
    """The stage on a problem's g, A_log and dt_bias."""
    check_inputs(inputs)
    gate, bound = inputs.options.gate, inputs.options.lower_bound
    params = (None, None) if gate is Gate.NONE else (inputs.A_log, inputs.dt_bias)
    return Outputs(launch_gate(inputs.g, *params, gate, bound, None, CHUNK, inputs.cu_seqlens, None))
