"""FlashInfer's decode, `flashinfer.kda_decode.recurrent_kda` with its CuTe DSL kernels, which are for Blackwell.

Written from FlashInfer's sources of 2026-08-22. It has not been run by us: the GPUs at hand are Hopper.
"""

import torch

from kda_kernels.checks import check_inputs
from kda_kernels.contract import Contract
from kda_kernels.errors import InputError
from kda_kernels.problem import Gate, Problem
from kda_kernels.tensors import Inputs, Outputs
from kdacli.peers import here
from kdacli.peers.given import offsets, parameter

MODULES = ("flashinfer.kda_decode",)

# From the docstring and the checks of `run_recurrent_kda`. A_log and dt_bias go in as fp32, which narrower ones become
# without loss.
CONTRACT = Contract(
    state_dtypes=("bfloat16",),
    K=(64, 128),
    square=True,
    grouped_heads=False,
    beta_values=True,
    l2norm=(True, False),
    one_token=True,
    plain_state=False,
    padding=True,
    why=(("grouped_heads", "its A_log is [H]: HV should be H"),),
)


def unsupported(problem: Problem | None = None) -> str | None:
    """Why this machine cannot run `problem` with this kernel; None if it can."""
    return (
        (CONTRACT.refusal(problem) if problem is not None else None)
        or here.missing_package(("flashinfer",), "pip install flashinfer-python")
        or here.wrong_gpu("FlashInfer's KDA decode", (10,), "Blackwell (sm_100, sm_103)")
        or here.not_loadable(MODULES)
    )


def run(inputs: Inputs) -> Outputs:
    """Runs the kernel on checked inputs; the pool is updated in place.

    Tokens go in as a packed batch, the one form in which it indexes the pool itself (of a dense batch it gathers and
    scatters the slots). Strided ones are copied first: it does not say that it takes them.

    Raises:
        InputError: a raw gate comes without A_log.
    """
    recurrent_kda = here.load(MODULES).recurrent_kda
    check_inputs(inputs)
    options, raw = inputs.options, inputs.options.gate is not Gate.NONE
    rate, bias = inputs.A_log, inputs.dt_bias
    if raw and rate is None:
        raise InputError("A_log", "is missing", "this kernel should be given one")
    with torch.no_grad(), torch.cuda.device_of(inputs.q):
        o, _ = recurrent_kda(
            *(x.flatten(0, 1).unsqueeze(0).contiguous() for x in (inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta)),
            A_log=None if rate is None else parameter(rate, torch.float32),
            dt_bias=None if bias is None else parameter(bias, torch.float32).flatten(),
            scale=options.scale,
            initial_state=inputs.state,
            use_qk_l2norm_in_kernel=options.qk_l2norm,
            use_gate_in_kernel=raw,
            lower_bound=options.lower_bound if raw else None,
            cu_seqlens=offsets(inputs).to(torch.int32),
            ssm_state_indices=inputs.pool[1].to(torch.int32),
            beta_is_logit=options.beta_is_logit,
        )
    return Outputs(o.view(inputs.v.shape), inputs.state if inputs.output_final_state else None)
