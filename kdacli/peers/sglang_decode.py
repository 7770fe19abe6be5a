"""SGLang's CuTe DSL decode, `cutedsl_fused_sigmoid_gating_kda_update`.

Written against SGLang 0.5.23; its file alone, as a module `sglang_cutedsl_kda` on the path, does too.
"""

import torch

from kda_kernels.checks import check_inputs
from kda_kernels.contract import Contract
from kda_kernels.problem import Gate, Problem
from kda_kernels.tensors import Inputs, Outputs
from kdacli.peers import here
from kdacli.peers.given import gate_parameters, require_aligned

MODULES = (
    "sglang.kernels.ops.attention.cutedsl_kda",
    "sglang.jit_kernel.cutedsl_kda",
    "sglang_cutedsl_kda",
)

# Its docstring, and what it is compiled with: types, scale and the norm are built in, and what is passed instead is not
# looked at. dt_bias is read as bf16 whatever it is; A_log as fp32, which a narrower one becomes without loss.
CONTRACT = Contract(
    param_dtypes=("bfloat16",),
    state_dtypes=("float32",),
    V_multiple=128,
    gates=(Gate.SOFTPLUS,),
    any_scale=False,
    one_token=True,
    plain_state=False,
    aligned=("q", "k", "v", "g", "beta", "A_log", "dt_bias", "state", "state_indices"),
    why=(
        ("param_dtypes", "dt_bias would be rounded: it takes bf16 (--param-dtype bf16)"),
        ("padding", "it leaves the output of padding rows (index -1) unwritten, where zeros are asked for"),
    ),
)


def unsupported(problem: Problem | None = None) -> str | None:
    """Why this machine cannot run `problem` with this kernel; None if it can."""
    return (
        (CONTRACT.refusal(problem) if problem is not None else None)
        or here.missing_package(("sglang", "sglang_cutedsl_kda"), "pip install sglang")
        or here.wrong_gpu("SGLang's CuTe DSL decode", (9, 10, 11, 12), "Hopper or newer (sm_90)")
        or here.not_loadable(MODULES)
    )


def run(inputs: Inputs) -> Outputs:
    """Runs the kernel on checked inputs; the pool is updated in place, its slots may lie apart.

    It copies strided tokens itself. It compiles for each number of sequences and each pool.
    """
    update = here.load(MODULES).cutedsl_fused_sigmoid_gating_kda_update
    check_inputs(inputs)
    require_aligned(inputs, CONTRACT.aligned)
    with torch.no_grad(), torch.cuda.device_of(inputs.q):
        A_log, dt_bias = gate_parameters(inputs, torch.float32, torch.bfloat16)
        o = update(
            A_log=A_log,
            dt_bias=dt_bias,
            q=inputs.q,
            k=inputs.k,
            v=inputs.v,
            a=inputs.g,
            b=inputs.beta,
            initial_state_source=inputs.state,
            initial_state_indices=inputs.pool[1].to(torch.int32),
        )
    return Outputs(o, inputs.state if inputs.output_final_state else None)
