"""cuDNN frontend's Hopper prefill, the engine `kda_hopper_cuda` of `cudnn.linear_attention.kimi_delta_attention`.

Written against nvidia-cudnn-frontend 1.32.0. The engine is named in every call, so that no other one stands in for it.
It compiles with NVRTC when it first runs.

What it does not take: the softplus gate, head sizes but 128, K-first states, allow_neg_eigval, padding rows, and
addresses that are not multiples of 16 bytes.
"""

import importlib
import importlib.util

import torch

from kda_kernels.checks import check_inputs
from kda_kernels.contract import Contract
from kda_kernels.dtypes import FLOATS
from kda_kernels.errors import one_line
from kda_kernels.problem import Gate, Problem
from kda_kernels.tensors import Inputs, Outputs
from kdacli.peers import here
from kdacli.peers.given import gate_parameters, gathered_states, offsets, require_aligned, scattered_states

ENGINE = "kda_hopper_cuda"
OP = "cudnn.linear_attention.ops"

# From the engine's check_support and the op's docstring. Gates and beta in 16 bits it converts to fp32 itself, which is
# part of its time. Of addresses the package says, beside its other Hopper engine, that all but cu_seqlens are multiples
# of 16 bytes; this one copies 16 bytes at a time and does not check ("misaligned address").
CONTRACT = Contract(
    g_dtypes=tuple(FLOATS),
    beta_dtypes=("float32", "bfloat16"),
    square=True,
    gates=(Gate.SAFE, Gate.NONE),
    beta_values=True,
    l2norm=(True, False),
    aligned=("q", "k", "v", "g", "beta", "A_log", "dt_bias", "state"),
    why=(
        ("neg_eigval", "it declines allow_neg_eigval: where it drops a forgotten state it counts on beta < 1"),
        ("padding", "the Hopper engine has no padding: index -1 would gather the last slot of the pool"),
    ),
)


def unsupported(problem: Problem | None = None) -> str | None:
    """Why this machine cannot run `problem` with this kernel; None if it can."""
    return (
        (CONTRACT.refusal(problem) if problem is not None else None)
        or here.missing_package(("cudnn",), "pip install 'nvidia-cudnn-frontend>=1.32'")
        or here.wrong_gpu("the engine kda_hopper_cuda", (9,), "Hopper (sm_90)")
        or here.not_loadable((OP,))
        or _no_engine()
    )


def _no_engine() -> str | None:
    """Why the engine would decline whatever it is asked: not there, or nothing to compile with (its own question)."""
    if importlib.util.find_spec("cudnn.linear_attention.hopper.cuda_engine") is None:
        return f"cudnn has no {ENGINE}: nvidia-cudnn-frontend 1.32 or newer is needed"
    try:
        importlib.import_module("cudnn.linear_attention.cake.compiler").cuda_include_dirs()
    except Exception as error:
        return f"cudnn finds no NVRTC or no CUDA headers: {one_line(error)}"
    return None


def run(inputs: Inputs) -> Outputs:
    """Runs the op on checked inputs.

    It takes packed tokens: a dense batch is passed as one with equal lengths. Strided tokens the engine packs itself.
    It knows no state pool: the slots are gathered before the call and the final states scattered back after it, two
    copies of the states that are part of what is timed, as an engine has to make them too.

    Raises:
        InputError: a tensor that goes in as it is does not start at a multiple of 16 bytes.
    """
    op = here.load((OP,)).kimi_delta_attention
    check_inputs(inputs)
    options, safe = inputs.options, inputs.options.gate is Gate.SAFE
    require_aligned(inputs, _in_place(inputs))
    A_log, dt_bias = gate_parameters(inputs) if safe else (None, None)
    with torch.no_grad(), torch.cuda.device_of(inputs.q):
        o, final = op(
            *(x.flatten(0, 1) for x in (inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta)),
            offsets(inputs),
            scale=options.scale,
            initial_state=gathered_states(inputs),
            output_final_state=inputs.state_indices is not None or inputs.output_final_state,
            use_qk_l2norm_in_kernel=options.qk_l2norm,
            use_beta_sigmoid_in_kernel=options.beta_is_logit,
            safe_gate=safe,
            gate_lower_bound=options.lower_bound if safe else None,
            a_log=A_log,
            dt_bias=dt_bias,
            plan_name=ENGINE,
        )
        return scattered_states(inputs, o.view(inputs.v.shape), final)


def _in_place(inputs: Inputs) -> set[str]:
    """The tensors that it reads where they are: it converts narrower ones, and a pool's slots are gathered."""
    wide = {name for name, tensor in inputs.tensors().items() if tensor.dtype is torch.float32}
    kept = wide - ({"state"} if inputs.state_indices is not None else set())
    return set(CONTRACT.aligned) & ({"q", "k", "v"} | kept)
