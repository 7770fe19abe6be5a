"""SGLang's default decode, `fused_recurrent_kda_packed_decode` of `sglang.kernels.ops.attention.fla.fused_recurrent`.

Written against SGLang 0.5.23: a Triton kernel, or a CUDA kernel from 8 sequences on and with the types that it has.
"""

import torch

from kda_kernels.checks import check_inputs
from kda_kernels.contract import Contract
from kda_kernels.problem import Gate, Problem
from kda_kernels.tensors import Inputs, Outputs
from kdacli.peers import here
from kdacli.peers.given import gate_parameters, rows_of, side_by_side

MODULES = ("sglang.kernels.ops.attention.fla.fused_recurrent",)

# From its docstring and checks, and what `TritonKDAKernel.packed_decode` calls it with.
CONTRACT = Contract(
    g_dtypes=("bfloat16", "float32"),
    beta_dtypes=("bfloat16", "float32"),
    K=(64, 128),
    V_multiple=32,
    gates=(Gate.SOFTPLUS, Gate.SAFE),
    l2norm=(True, False),
    one_token=True,
    plain_state=False,
    padding=True,
)


def unsupported(problem: Problem | None = None) -> str | None:
    """Why this machine cannot run `problem` with this kernel; None if it can."""
    return (CONTRACT.refusal(problem) if problem is not None else None) or here.without_sglang(MODULES)


def run(inputs: Inputs) -> Outputs:
    """Runs the kernel on checked inputs; the pool is updated in place.

    It takes q, k and v of a token side by side in one row, as a layer's convolution leaves them. Tensors that lie
    elsewhere are put together first, and strided gates copied, which is part of what is timed.

    Raises:
        InputError: a raw gate comes without its parameters.
    """
    packed_decode = here.load(MODULES).fused_recurrent_kda_packed_decode
    check_inputs(inputs)
    pool, indices = inputs.pool
    N, (HV, V) = len(indices), inputs.v.shape[2:]
    A_log, dt_bias = gate_parameters(inputs)
    with torch.no_grad(), torch.cuda.device_of(inputs.q):
        o = torch.empty(N, 1, HV, V, dtype=inputs.v.dtype, device=inputs.v.device)
        packed_decode(
            side_by_side(inputs.q, inputs.k, inputs.v),
            a=rows_of(inputs.g).contiguous(),
            b=inputs.beta.reshape(N, HV).contiguous(),
            A_log=A_log,
            dt_bias=dt_bias.flatten(),
            scale=inputs.scale,
            initial_state=pool,
            out=o,
            ssm_state_indices=indices,
            use_qk_l2norm_in_kernel=inputs.options.qk_l2norm,
            lower_bound=inputs.options.lower_bound,
        )
    return Outputs(o.view(inputs.v.shape), inputs.state if inputs.output_final_state else None)
