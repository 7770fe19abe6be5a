"""FLA's recurrent kernel, `fused_recurrent_kda_fwd`: the one that vLLM's KDA decode comes from."""

import torch

from kda_kernels.checks import check_inputs
from kda_kernels.problem import Problem
from kda_kernels.tensors import Inputs, Outputs
from kdacli.peers import fla


def unsupported(problem: Problem | None = None) -> str | None:
    """Why this machine cannot run `problem` with this kernel; None if it can."""
    if problem is not None and problem.pool_slots is not None:
        if problem.padding:
            return "FLA has no padding: it would read and write the slot before the pool for index -1"
        if max(problem.seq_lens, default=0) > 1:
            return "with a pool FLA takes a state index for each token: one token per sequence at most"
    return fla.unsupported_here()


def run(inputs: Inputs) -> Outputs:
    """Runs FLA's kernel on checked inputs; a pool is updated in place.

    The kernel addresses tokens, and a state that is no pool, as contiguous, so strided ones are copied first, as FLA's
    public function does. The output buffer is handed in: without one FLA fills a new one with zeros first.
    """
    from fla.ops.kda.fused_recurrent import fused_recurrent_kda_fwd

    check_inputs(inputs)
    pooled = inputs.state_indices is not None
    state = inputs.state if pooled or inputs.state is None else inputs.state.contiguous()
    with torch.no_grad(), torch.cuda.device(inputs.q.device):
        o, final_state = fused_recurrent_kda_fwd(
            *(x.contiguous() for x in (inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta)),
            initial_state=state,
            output_final_state=inputs.output_final_state,
            inplace_final_state=pooled,
            ssm_state_indices=inputs.state_indices,
            out=torch.empty(inputs.v.shape, dtype=inputs.v.dtype, device=inputs.v.device),
            **fla.options_of(inputs),
        )
    return Outputs(o, final_state if inputs.output_final_state else None)
