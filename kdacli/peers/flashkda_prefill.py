"""FlashKDA's prefill as vLLM ships it: `torch.ops._flashkda_C.fwd`, CUTLASS, chunks of 16 tokens.

What it does not take: any gate but the safe one with a bound of -5 or more, head sizes but 128, grouped heads, K-first
states, betas that are no logits, allow_neg_eigval, padding rows, and addresses that are not multiples of 16 bytes.

The library is vLLM's `_flashkda_C.abi3.so` (written against 0.33.0): found in an installed vllm, which is not imported
for it, or where the environment variable KDA_FLASHKDA_LIB says.
"""

import torch

from kda_kernels.checks import check_inputs
from kda_kernels.contract import Contract
from kda_kernels.problem import SAFE_BOUND, Gate, Problem
from kda_kernels.tensors import Inputs, Outputs
from kdacli.peers import here
from kdacli.peers.given import gate_parameters, gathered_states, require_aligned, scattered_states

LIBRARY = here.VllmLibrary("KDA_FLASHKDA_LIB", "_flashkda_C", ("_flashkda_C.fwd", "_flashkda_C.get_workspace_size"))

# From FlashKDA's README ("Kernel API") and the checks in csrc/flash_kda.cpp. A_log and dt_bias go in as fp32, which
# narrower ones become without loss. It reads its tensors through TMA descriptors, which take addresses that are
# multiples of 16 bytes; it does not check, goes on without the descriptor, and ends with an illegal instruction.
CONTRACT = Contract(
    square=True,
    grouped_heads=False,
    gates=(Gate.SAFE,),
    least_bound=SAFE_BOUND,
    carried_state="bfloat16",  # docs/20260420-flashkda-v1-deep-dive.md, "Numerical Precision"
    aligned=("q", "k", "v", "g", "beta", "dt_bias", "state"),
    why=(("padding", "FlashKDA has no padding: vLLM takes the padding rows out of the batch before it"),),
)


def unsupported(problem: Problem | None = None) -> str | None:
    """Why this machine cannot run `problem` with this kernel; None if it can."""
    return (
        (CONTRACT.refusal(problem) if problem is not None else None)
        or LIBRARY.missing()
        or here.wrong_gpu("FlashKDA", (9, 10, 12), "Hopper or Blackwell (sm_90, sm_10x, sm_12x)")
        or LIBRARY.not_loadable()
    )


def run(inputs: Inputs) -> Outputs:
    """Runs the kernel on checked inputs, as vLLM's layer does.

    Strided q, k, v and g are copied first, for the kernel takes them as contiguous. It knows no state pool: the slots
    are gathered before the call and the final states scattered back after it, two copies of the states that are part
    of what is timed, as an engine has to make them too.

    Raises:
        InputError: a tensor that goes in as it is does not start at a multiple of 16 bytes.
    """
    fwd, get_workspace_size = LIBRARY.load()
    check_inputs(inputs)
    q, cu_seqlens, options = inputs.q, inputs.cu_seqlens, inputs.options
    pooled = inputs.state_indices is not None
    copied = {"dt_bias"} if inputs.dt_bias is not None and inputs.dt_bias.dtype is not torch.float32 else set()
    copied |= {"state"} if pooled else set()
    require_aligned(inputs, set(CONTRACT.aligned) - copied)
    B, T, H, K = q.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    with torch.no_grad(), torch.cuda.device_of(q):
        A_log, dt_bias = gate_parameters(inputs, torch.float32, torch.float32)
        initial = gathered_states(inputs)
        final = None
        if initial is not None and (pooled or inputs.output_final_state):
            final = torch.empty_like(initial, memory_format=torch.contiguous_format)
        elif inputs.output_final_state:
            final = torch.empty(N, H, K, K, dtype=torch.float32, device=q.device)
        o = torch.empty(inputs.v.shape, dtype=inputs.v.dtype, device=q.device)
        fwd(
            *(x.contiguous() for x in (q, inputs.k, inputs.v, inputs.g)),
            inputs.beta,
            inputs.scale,
            o,
            torch.empty(get_workspace_size(B * T, H, N), dtype=torch.uint8, device=q.device),
            A_log,
            dt_bias,
            options.lower_bound,
            None if initial is None else initial.contiguous(),
            final,
            cu_seqlens,
        )
        return scattered_states(inputs, o, final)
