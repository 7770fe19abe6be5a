"""FlashInfer's prefill, `flashinfer.kda.recurrent_kda`, whose kernels are for Blackwell.

Written from FlashInfer's sources of 2026-08-22. It has not been run by us: the GPUs at hand are Hopper. In a CUDA graph
it wants a workspace of the caller's, which is not made here: `kda profile` has to time it with --eager.
"""

import torch

from kda_kernels.checks import check_inputs
from kda_kernels.contract import Contract
from kda_kernels.problem import Gate, Problem
from kda_kernels.tensors import Inputs, Outputs
from kdacli.peers import here
from kdacli.peers.given import gate_parameters, offsets

MODULES = ("flashinfer.kda",)

# From docs/api/kda_prefill.rst, "Optimized Blackwell prefill subset". A_log and dt_bias go in as fp32, which narrower
# ones become without loss.
CONTRACT = Contract(state_dtypes=("bfloat16",), square=True, grouped_heads=False, gates=(Gate.SAFE,))


def unsupported(problem: Problem | None = None) -> str | None:
    """Why this machine cannot run `problem` with this kernel; None if it can."""
    if problem is not None and problem.T <= problem.N:
        return "it takes more tokens than sequences: anything else it decodes"
    return (
        (CONTRACT.refusal(problem) if problem is not None else None)
        or here.missing_package(("flashinfer",), "pip install flashinfer-python")
        or here.wrong_gpu("FlashInfer's KDA prefill", (10,), "Blackwell (sm_100, sm_103)")
        or here.not_loadable(MODULES)
    )


def run(inputs: Inputs) -> Outputs:
    """Runs the kernel on checked inputs.

    It updates states in place: a pool as it is, a plain state in a copy. A dense batch goes in as a packed one with
    equal lengths; strided tokens are copied first, for it takes contiguous ones.
    """
    recurrent_kda = here.load(MODULES).recurrent_kda
    check_inputs(inputs)
    options, indices = inputs.options, inputs.state_indices
    with torch.no_grad(), torch.cuda.device_of(inputs.q):
        A_log, dt_bias = gate_parameters(inputs, torch.float32, torch.float32)
        state = inputs.state if inputs.state is None or indices is not None else inputs.state.clone()
        o, _ = recurrent_kda(
            *(x.flatten(0, 1).unsqueeze(0).contiguous() for x in (inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta)),
            A_log=A_log,
            dt_bias=dt_bias,
            scale=options.scale,
            initial_state=state,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            lower_bound=options.lower_bound,
            cu_seqlens=offsets(inputs).long(),
            ssm_state_indices=None if indices is None else indices.to(torch.int32),
            beta_is_logit=True,
        )
    return Outputs(o.view(inputs.v.shape), state if inputs.output_final_state else None)
