"""SGLang's decode step where its fused kernel does not run: a convolution, packed decode and a gated norm.

Written against SGLang 0.5.23, `KimiDeltaAttention` and `kda_backend.py`. What the fusion of a step saves is the
distance to this chain of three kernels.
"""

import dataclasses

import torch

from kda_kernels.problem import Problem
from kda_kernels.tensors import Inputs, Outputs
from kdacli.peers import here, sglang_packed_decode, sglang_step
from kdacli.peers.given import side_by_side

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
        or sglang_packed_decode.unsupported()
        or here.not_loadable(CONVOLUTION)
        or here.not_loadable(NORM)
    )


def run(inputs: Inputs) -> Outputs:
    """Runs the three kernels on checked inputs; both pools are updated in place.

    Raises:
        InputError: see `sglang_step.checked`.
    """
    conv, norm, (_, indices) = sglang_step.checked(inputs), inputs.norm, inputs.pool
    tokens, V = (inputs.q, inputs.k, inputs.v), inputs.v.shape[3]
    with torch.no_grad(), torch.cuda.device_of(inputs.q):
        convolved = here.load(CONVOLUTION).causal_conv1d_update(
            side_by_side(*tokens),
            conv.by_channel,
            conv.weight,
            conv.bias,
            "silu",
            conv_state_indices=indices,
        )
        parts = convolved.split([x.shape[2] * x.shape[3] for x in tokens], dim=1)
        q, k, v = (part.view(x.shape) for part, x in zip(parts, tokens, strict=True))
        outputs = sglang_packed_decode.run(dataclasses.replace(inputs, q=q, k=k, v=v, conv=None, norm=None))
        if norm is not None:
            o = here.load(NORM).rms_norm_gated(
                outputs.o.view(-1, V), norm.gate.reshape(-1, V), norm.weight, None, activation="sigmoid", eps=norm.eps
            )
            outputs = dataclasses.replace(outputs, o=o.view(inputs.v.shape))
    return dataclasses.replace(outputs, conv_states=conv.states)
