"""Activation, then chunk-local cumsum: two passes over memory. The baseline that `triton-gate` is measured against."""

from kda_kernels.checks import check_inputs
from kda_kernels.problem import Gate, Problem
from kda_kernels.tensors import Inputs, Outputs
from kda_kernels.triton.gate import chunk_local_cumsum, kda_gate
from kda_kernels.triton.runtime import unsupported_here


def unsupported(problem: Problem | None = None) -> str | None:
    """Why this machine cannot run `problem` with this kernel; None if it can."""
    if problem is not None and problem.options.gate is Gate.NONE:
        return "the gate is activated already: there is nothing to unfuse"
    return unsupported_here()


def run(inputs: Inputs) -> Outputs:
    """Both passes; the activated gate makes a round trip through memory as fp32."""
    check_inputs(inputs)
    activated = kda_gate(inputs.g, inputs.A_log, inputs.dt_bias, lower_bound=inputs.options.lower_bound)
    return Outputs(chunk_local_cumsum(activated, cu_seqlens=inputs.cu_seqlens))
