"""SGLang's fused decode step, `kda_fused_decode` of `sglang.kernels.ops.attention.kda_fused_decode`: CUDA, for Kimi K3.

Written against SGLang 0.5.23, which builds it with nvcc and ninja when it is first called.
"""

import torch

from kda_kernels.checks import check_inputs
from kda_kernels.contract import Contract
from kda_kernels.engines.derived import derived
from kda_kernels.errors import InputError
from kda_kernels.problem import Gate, Problem
from kda_kernels.tensors import Convolution, Inputs, Outputs
from kdacli.peers import here
from kdacli.peers.given import gate_parameters, parameter, require_aligned, rows_of, side_by_side

MODULES = ("sglang.kernels.ops.attention.kda_fused_decode",)

# From its docstring and `covered`, and what `kda_backend.py` calls it with. A_log, dt_bias and the weights go in as
# fp32, which narrower ones become without loss.
CONTRACT = Contract(
    state_dtypes=("float32",),
    square=True,
    grouped_heads=False,
    heads=(3, 6, 12),
    gates=(Gate.SOFTPLUS, Gate.SAFE),
    one_token=True,
    plain_state=False,
    padding=True,
    features=frozenset(("conv", "norm")),
    conv_widths=(4,),
    conv_state_dtypes=("bfloat16",),
    aligned=("q", "k", "v", "g", "beta", "state"),
)


def unsupported(problem: Problem | None = None) -> str | None:
    """Why this machine cannot run `problem` with this kernel; None if it can."""
    return (_refusal(problem) if problem is not None else None) or here.without_sglang(MODULES)


def _refusal(problem: Problem) -> str | None:
    parts = problem.parts
    if parts is not None and not parts.norm:
        return "it has no step without a norm"
    if parts is not None and not parts.tokens_first:
        return "the states of the convolution have channels first: it takes them with tokens first"
    return CONTRACT.refusal(problem)


def run(inputs: Inputs) -> Outputs:
    """Runs the kernel on checked inputs, as SGLang's backend does; both pools are updated in place.

    The weights are laid out anew once, as SGLang does when it loads a model. Strided gates are copied first.

    Raises:
        InputError: see `checked`.
    """
    step = here.load(MODULES).kda_fused_decode
    conv, norm, (pool, indices) = checked(inputs), inputs.norm, inputs.pool
    assert norm is not None, "its contract asks for a norm"
    with torch.no_grad(), torch.cuda.device_of(inputs.q):
        A_log, dt_bias = gate_parameters(inputs, torch.float32, torch.float32)
        o = step(
            side_by_side(inputs.q, inputs.k, inputs.v),
            rows_of(inputs.g).contiguous(),
            inputs.beta.flatten(0, 1).contiguous(),
            conv.states,
            *derived(conv.weight, _apart),
            derived(conv.weight, _zeros) if conv.bias is None else parameter(conv.bias, torch.float32),
            A_log,
            dt_bias.flatten(),
            rows_of(norm.gate),
            parameter(norm.weight, torch.float32),
            pool,
            indices.to(torch.int32),
            inputs.scale,
            norm.eps,
            inputs.options.lower_bound,
        )
    final = inputs.state if inputs.output_final_state else None
    return Outputs(o.view(inputs.v.shape), final, conv_states=conv.states)


def checked(inputs: Inputs) -> Convolution:
    """The convolution of inputs that are checked.

    Raises:
        InputError: its states have slots of their own, or a tensor that is read in place does not start at a multiple
            of 16 bytes, which neither SGLang's nor vLLM's step takes.
    """
    check_inputs(inputs)
    require_aligned(inputs, CONTRACT.aligned)
    assert inputs.conv is not None, "its contract asks for a convolution"
    if inputs.conv.indices is not None:
        raise InputError("conv_state_indices", "is given", "this kernel takes state_indices for both pools")
    return inputs.conv


def by_tap(weight: torch.Tensor) -> torch.Tensor:
    """fp32 [3, W, D / 3]: the weights of q, k and v, tap by tap."""
    return weight.unflatten(0, (3, -1)).mT.float().contiguous()


def _apart(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return by_tap(weight).unbind()


def _zeros(weight: torch.Tensor) -> torch.Tensor:
    return weight.new_zeros(weight.shape[0], dtype=torch.float32)
