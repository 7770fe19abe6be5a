"""SGLang's default prefill, the Triton `chunk_kda` of `sglang.kernels.ops.attention.fla.kda`.

Written against SGLang 0.5.23.
"""

import torch

from kda_kernels.checks import check_inputs
from kda_kernels.contract import Contract
from kda_kernels.problem import SAFE_BOUND, Gate, Problem
from kda_kernels.tensors import Inputs, Outputs
from kdacli.peers import here
from kdacli.peers.given import gate_parameters, offsets

MODULES = ("sglang.kernels.ops.attention.fla.kda",)

# From the docstrings and checks of its functions, and what `TritonKDAKernel.extend` calls it with. A lower_bound makes
# it take the gates as bounded by what FLA's safe_gate promises, whatever the bound is.
CONTRACT = Contract(
    g_dtypes=("bfloat16", "float32"),
    beta_dtypes=("bfloat16", "float32"),
    K=(64, 128),
    square=True,
    grouped_heads=False,
    least_bound=SAFE_BOUND,
    beta_values=True,
    l2norm=(True, False),
    why=(("padding", "a padding row (index -1) gets the output of a zero state, where zeros are asked for"),),
)


def unsupported(problem: Problem | None = None) -> str | None:
    """Why this machine cannot run `problem` with this kernel; None if it can."""
    return (CONTRACT.refusal(problem) if problem is not None else None) or here.without_sglang(MODULES)


def run(inputs: Inputs) -> Outputs:
    """Runs `chunk_kda` on checked inputs; a pool is updated in place.

    It writes its output over a contiguous v, so v is copied first; the layer's v is strided, and the function copies it
    itself. So it does strided q and k, but only to normalise them, which the layer always asks for: they are copied
    here. It knows pools only: a plain state is copied and used as one.

    Raises:
        InputError: a raw gate comes without its parameters.
    """
    chunk_kda = here.load(MODULES).chunk_kda
    check_inputs(inputs)
    options = inputs.options
    raw, packed = options.gate is not Gate.NONE, inputs.cu_seqlens is not None or inputs.q.shape[0] > 1
    A_log, dt_bias = gate_parameters(inputs) if raw else (None, None)
    pool, indices = _pool(inputs)
    with torch.no_grad(), torch.cuda.device_of(inputs.q):
        o = chunk_kda(
            *(x.flatten(0, 1).unsqueeze(0).contiguous() for x in (inputs.q, inputs.k)),
            inputs.v.flatten(0, 1).unsqueeze(0).clone(memory_format=torch.contiguous_format),
            *(x.flatten(0, 1).unsqueeze(0) for x in (inputs.g, inputs.beta)),
            scale=inputs.scale,
            initial_state=pool,
            initial_state_indices=indices,
            use_qk_l2norm_in_kernel=options.qk_l2norm,
            cu_seqlens=offsets(inputs) if packed else None,
            A_log=A_log,
            dt_bias=None if dt_bias is None else dt_bias.flatten(),
            lower_bound=options.lower_bound if raw else None,
            beta_is_raw=options.beta_is_logit,
        )
    return Outputs(o.view(inputs.v.shape), pool if inputs.output_final_state else None)


def _pool(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    if inputs.state_indices is not None:
        return inputs.pool
    N, device = inputs.N, inputs.q.device
    plain = torch.zeros(inputs.state_shape(N), device=device) if inputs.state is None else inputs.state.clone()
    return plain, torch.arange(N, dtype=torch.int32, device=device)
