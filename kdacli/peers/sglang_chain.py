"""SGLang's decode step where its fused kernel does not run: a convolution, packed decode and a gated norm.

Written against SGLang 0.5.23, `KimiDeltaAttention` and `kda_backend.py`. What the fusion of a step saves is the
distance to this chain of three kernels.
"""

import dataclasses

import torch

from kda_kernels.problem import Problem
from kda_kernels.tensors import Inputs, Outputs
from kdacli.peers import here, sglang_packed_decode, sglang_step
from kdacli.peers.given import gate_parameters
from kdacli.peers.sglang_packed_decode import rows_of, side_by_side

CONVOLUTION = ("sglang.kernels.ops.mamba.causal_conv1d_triton",)
NORM = ("sglang.kernels.ops.attention.fla.fused_norm_gate",)

# The recurrence is packed decode's; the convolution is asked for, the norm may be left out.
CONTRACT = dataclasses.replace(
    sglang_packed_decode.CONTRACT,
    features=frozenset(("conv", "norm")),
    rounded_convolution=True,
    conv_widths=(2, 3, 4),
    grouped_heads=False,
)


def unsupported(problem: Problem | None = None) -> str | None:
    """Why this machine cannot run `problem` with these kernels; None if it can."""
    return (
        (CONTRACT.refusal(problem) if problem is not None else None)
        or here.missing_package(("sglang",), "pip install sglang")
        or here.no_gpu("SGLang's kernels")
        or next(filter(None, map(here.not_loadable, (sglang_packed_decode.MODULES, CONVOLUTION, NORM))), None)
    )


def run(inputs: Inputs) -> Outputs:
    """Runs the three kernels on checked inputs; both pools are updated in place.

    Raises:
        InputError: see `sglang_step.checked`.
    """
    conv, norm, (pool, indices) = sglang_step.checked(inputs), inputs.norm, inputs.pool
    N, (HV, V) = len(indices), inputs.v.shape[2:]
    A_log, dt_bias = gate_parameters(inputs)
    with torch.no_grad(), torch.cuda.device_of(inputs.q):
        convolved = here.load(CONVOLUTION).causal_conv1d_update(
            side_by_side(*(rows_of(x) for x in (inputs.q, inputs.k, inputs.v))),
            conv.by_channel,
            conv.weight,
            conv.bias,
            "silu",
            conv_state_indices=indices,
        )
        o = torch.empty(N, 1, HV, V, dtype=inputs.v.dtype, device=inputs.v.device)
        here.load(sglang_packed_decode.MODULES).fused_recurrent_kda_packed_decode(
            convolved,
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
        if norm is not None:
            o = here.load(NORM).rms_norm_gated(
                o.view(-1, V), norm.gate.reshape(-1, V), norm.weight, None, activation="sigmoid", eps=norm.eps
            )
    final = inputs.state if inputs.output_final_state else None
    return Outputs(o.view(inputs.v.shape), final, conv_states=conv.states)
