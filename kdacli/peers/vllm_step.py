"""vLLM's fused decode step, `torch.ops._C.fused_kda_decode`: CUDA, one token per sequence, compiled for Kimi K3.

The library is vLLM's `_C_stable_libtorch.abi3.so` (written against 0.33.0): found in an installed vllm, which is not
imported for it, or where the environment variable KDA_VLLM_LIB says.
"""

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from kda_kernels.checks import check_inputs
from kda_kernels.contract import Contract
from kda_kernels.problem import Gate, Problem
from kda_kernels.tensors import Convolution, Inputs, Outputs
from kdacli.peers import here
from kdacli.peers.given import gate_parameters, parameter

LIBRARY = here.VllmLibrary("KDA_VLLM_LIB", "_C_stable_libtorch", ("_C.fused_kda_decode",))

# From vLLM's is_fused_kda_decode_supported (models/kimi_k3/nvidia/kda.py) and the call beside it. A_log, dt_bias and
# the norm's weight go in as fp32, which narrower ones become without loss.
CONTRACT = Contract(
    state_dtypes=("float32",),
    square=True,
    grouped_heads=False,
    heads=(12, 24, 48, 96),
    gates=(Gate.SOFTPLUS, Gate.SAFE),
    any_scale=False,
    one_token=True,
    plain_state=False,
    features=frozenset(("conv", "norm")),
    conv_widths=(4,),
    conv_dtypes=("bfloat16",),
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

    The convolution's weight is laid out anew once, as vLLM does when it loads a model.
    """
    (step,) = LIBRARY.load()
    check_inputs(inputs)
    conv, norm, N = inputs.conv, inputs.norm, inputs.N
    assert conv is not None, "its contract asks for a convolution"
    HV, V = inputs.v.shape[2:]
    with torch.no_grad(), torch.cuda.device_of(inputs.q):
        A_log, dt_bias = gate_parameters(inputs, torch.float32, torch.float32)
        o = torch.empty(inputs.v.shape, dtype=inputs.v.dtype, device=inputs.v.device)
        step(
            _projection(inputs),
            _by_tap(conv),
            conv.bias,
            conv.by_channel,
            inputs.g.reshape(1, N, HV, -1),
            inputs.beta.reshape(1, N, HV),
            A_log,
            dt_bias.flatten(),
            inputs.pool[1].to(torch.int32),
            inputs.state,
            o.view(1, N, HV, V),
            inputs.options.lower_bound,
            None if norm is None else norm.gate.reshape(N, HV, V),
            None if norm is None else parameter(norm.weight, torch.float32),
            1e-5 if norm is None else norm.eps,
        )
    return Outputs(o, inputs.state if inputs.output_final_state else None, conv_states=conv.states)


def _projection(inputs: Inputs) -> torch.Tensor:
    """q, k and v as the rows [N, D] that they are views of, or a copy."""
    parts = [x.flatten(0, 1).flatten(1) for x in (inputs.q, inputs.k, inputs.v)]
    row, at = parts[0].stride(0), parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != at or part.stride() != (row, 1):
            return torch.cat(parts, 1)
        at += part.shape[1] * part.element_size()
    return parts[0].as_strided((len(parts[0]), sum(part.shape[1] for part in parts)), (row, 1))


_staged: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # weight -> (its version, laid out anew)


def _by_tap(conv: Convolution) -> torch.Tensor:
    """[3, W, D / 3]: the weights of q, k and v, tap by tap."""
    version, value = _staged.get(conv.weight, (None, None))
    if version != conv.weight._version:
        value = conv.weight.unflatten(0, (3, -1)).transpose(1, 2).contiguous()
        _staged[conv.weight] = (conv.weight._version, value)
    return value
