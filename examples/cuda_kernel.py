"""A decode kernel in CUDA C++, built by torch when it is first called. Needs a GPU and nvcc.

kda verify --kernel examples/cuda_kernel.py:decode
"""

import functools
from pathlib import Path


@functools.cache
def _library():
    from torch.utils.cpp_extension import load

    return load("kda_example", [str(Path(__file__).with_suffix(".cu"))])


def decode(q, k, v, g, beta, A_log, dt_bias, scale, initial_state, state_indices):
    """One token per sequence, [N, 1, H, ..], over a pool [P, H, V, K] that is updated in place."""
    q, k, v, g, beta = (x.contiguous() for x in (q, k, v, g, beta))
    return _library().decode(q, k, v, g, beta, A_log, dt_bias, initial_state, state_indices, scale)


def _supports(problem) -> str | None:
    if problem.H != problem.HV or problem.K != 128 or problem.V > 1024:
        return f"H is {problem.H}, HV {problem.HV}, K {problem.K}: it should be HV = H and K = 128"
    if any(n != 1 for n in problem.seq_lens) or problem.packed:
        return "sequences should have one token, in a dense batch"
    if problem.state_dtype != "float32" or problem.dtype != "bfloat16" or problem.param_dtype != "float32":
        return "q, k, v should be bf16, and the state, A_log and dt_bias fp32"
    if problem.g_dtype != "bfloat16" or problem.beta_dtype != "bfloat16":
        return "g and beta should be bf16"
    return None


decode.supports = _supports
