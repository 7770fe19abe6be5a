"""vLLM's fused decode step, `torch.ops._C.fused_kda_decode`: CUDA, one token per sequence, compiled for Kimi K3.

The library is vLLM's `_C_stable_libtorch.abi3.so` (written against 0.33.0): found in an installed vllm, which is not
imported for it, or where the environment variable KDA_VLLM_LIB says.
"""

import dataclasses

import torch

from kda_kernels.engines.derived import derived
from kda_kernels.problem import Problem
from kda_kernels.tensors import Inputs, Outputs
from kdacli.peers import here, sglang_step
from kdacli.peers.given import gate_parameters, parameter, side_by_side

LIBRARY = here.VllmLibrary("KDA_VLLM_LIB", "_C_stable_libtorch", ("_C.fused_kda_decode",))

# As SGLang's, but for what vLLM's is_fused_kda_decode_supported (models/kimi_k3/nvidia/kda.py) and its call say.
CONTRACT = dataclasses.replace(
    sglang_step.CONTRACT,
    heads=(12, 24, 48, 96),
    any_scale=False,
    padding=False,
)


def unsupported(problem: Problem | None = None) -> str | None:
    """Why this machine cannot run `problem` with this kernel; None if it can."""
    return (
        (CONTRACT.refusal(problem) if problem is not None else None)
        or LIBRARY.missing()
        or here.wrong_gpu("vLLM's fused decode", (9, 10, 12), "Hopper or Blackwell (sm_90, sm_10x, sm_12x)")
        or LIBRARY.not_loadable()
    )


def run(inputs: Inputs) -> Outputs:
    """Runs the kernel on checked inputs, as vLLM's layer does; both pools are updated in place.

    The convolution's weight is laid out anew once, as vLLM does when it loads a model. Strided gates are copied first.

    Raises:
        InputError: see `sglang_step.checked`.
    """
    (step,) = LIBRARY.load()
    conv, norm, N = sglang_step.checked(inputs), inputs.norm, inputs.N
    HV, V = inputs.v.shape[2:]
    with torch.no_grad(), torch.cuda.device_of(inputs.q):
        A_log, dt_bias = gate_parameters(inputs, torch.float32, torch.float32)
        o = torch.empty(inputs.v.shape, dtype=inputs.v.dtype, device=inputs.v.device)
        step(
            side_by_side(inputs.q, inputs.k, inputs.v),
            derived(conv.weight, sglang_step.by_tap),
            None if conv.bias is None else parameter(conv.bias, torch.float32),
            conv.by_channel,
            inputs.g.reshape(1, N, HV, -1).contiguous(),
            inputs.beta.reshape(1, N, HV).contiguous(),
            A_log,
            dt_bias.flatten(),
            inputs.pool[1].to(torch.int32),
            inputs.state,
            o.view(1, N, HV, V),
            inputs.options.lower_bound,
            None if norm is None else norm.gate.reshape(N, HV, V).contiguous(),
            None if norm is None else parameter(norm.weight, torch.float32),
            1e-5 if norm is None else norm.eps,
        )
    return Outputs(o, inputs.state if inputs.output_final_state else None, conv_states=conv.states)
