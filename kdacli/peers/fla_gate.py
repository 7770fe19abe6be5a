"""FLA's first prefill stage, `kda_gate_chunk_cumsum`; `chunk_local_cumsum` for gates that are activated already."""

import torch

from kda_kernels.checks import check_inputs
from kda_kernels.problem import CHUNK, Gate, Problem
from kda_kernels.tensors import Inputs, Outputs
from kdacli.peers import fla


def unsupported(problem: Problem | None = None) -> str | None:
    """Why this machine cannot run `problem` with this kernel; None if it can."""
    if problem is not None and problem.T == 0:
        return "there are no tokens: FLA has no chunk to launch"
    return fla.unsupported_here()


def run(inputs: Inputs) -> Outputs:
    """The stage on the g, A_log and dt_bias of checked inputs: fp32 sums in natural log, as FLA gives without a scale.

    FLA copies a strided g first; the chunk indices of a packed batch it remembers from call to call.
    """
    from fla.ops.kda.gate import kda_gate_chunk_cumsum
    from fla.ops.utils import chunk_local_cumsum

    check_inputs(inputs)
    with torch.no_grad():
        if inputs.options.gate is Gate.NONE:
            return Outputs(chunk_local_cumsum(inputs.g, chunk_size=CHUNK, cu_seqlens=inputs.cu_seqlens))
        o = kda_gate_chunk_cumsum(
            inputs.g,
            A_log=inputs.A_log,
            chunk_size=CHUNK,
            dt_bias=inputs.dt_bias,
            cu_seqlens=inputs.cu_seqlens,
            lower_bound=inputs.options.lower_bound,
        )
    return Outputs(o)
