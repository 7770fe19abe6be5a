"""cuLA's CuTe DSL decode, `kda_decode`.

Written against inclusionAI/cuLA of 2026-04-24; its file cula/ops/kda_decode.py alone, as a module `cula_kda_decode` on
the path, does too.
"""

import torch

from kda_kernels.checks import check_inputs
from kda_kernels.contract import Contract
from kda_kernels.errors import InputError
from kda_kernels.problem import Gate, Problem
from kda_kernels.tensors import Inputs, Outputs
from kdacli.peers import here
from kdacli.peers.given import gate_parameters, require_aligned

MODULES = ("cula.ops.kda_decode", "cula_kda_decode")

# Its docstrings, its checks, and the types it is compiled with, which it checks. A_log and dt_bias go in as fp32, which
# narrower ones become without loss.
CONTRACT = Contract(
    state_dtypes=("float32",),
    V_multiple=64,
    gates=(Gate.SOFTPLUS,),
    l2norm=(True, False),
    k_first=True,
    one_token=True,
    plain_state=False,
    aligned=("q", "k", "v", "g", "beta", "A_log", "dt_bias", "state", "state_indices"),
    why=(("padding", "it leaves the output of padding rows (index -1) unwritten, where zeros are asked for"),),
)


def unsupported(problem: Problem | None = None) -> str | None:
    """Why this machine cannot run `problem` with this kernel; None if it can."""
    if problem is not None and problem.scale <= 0:
        return f"scale is {problem.scale}: it takes positive ones"
    return (
        (CONTRACT.refusal(problem) if problem is not None else None)
        or here.missing_package(("cula", "cula_kda_decode"), "pip install git+https://github.com/inclusionAI/cuLA")
        or here.wrong_gpu("cuLA", (9, 10), "Hopper or Blackwell (sm_90, sm_10x)")
        or here.not_loadable(MODULES)
    )


def run(inputs: Inputs) -> Outputs:
    """Runs the kernel on checked inputs; the pool is updated in place.

    It copies strided tokens itself. It compiles for each number of sequences and of slots.

    Raises:
        InputError: the slots of the pool lie apart: it is compiled for pools without gaps.
    """
    kda_decode = here.load(MODULES).kda_decode
    check_inputs(inputs)
    require_aligned(inputs, CONTRACT.aligned)
    pool, indices = inputs.pool
    if not pool.is_contiguous():
        found = f"has strides {list(pool.stride())}"
        raise InputError("state", found, "cuLA takes a pool without gaps between slots")
    with torch.no_grad(), torch.cuda.device_of(inputs.q):
        A_log, dt_bias = gate_parameters(inputs, torch.float32, torch.float32)
        o = kda_decode(
            A_log=A_log,
            dt_bias=dt_bias,
            q=inputs.q,
            k=inputs.k,
            v=inputs.v,
            a=inputs.g,
            b=inputs.beta,
            initial_state_source=pool,
            initial_state_indices=indices.to(torch.int32),
            scale=inputs.options.scale,
            use_qk_l2norm_in_kernel=inputs.options.qk_l2norm,
            state_layout="vk" if inputs.state_v_first else "kv",
        )
    return Outputs(o, inputs.state if inputs.output_final_state else None)
