"""FLA's prefill, `chunk_kda`."""

import importlib.util
import os

import torch

from kda_kernels.checks import check_inputs
from kda_kernels.problem import Problem
from kda_kernels.tensors import Inputs, Outputs
from kdacli.peers import fla
from kdacli.peers.given import gathered_states, scattered_states


def unsupported(problem: Problem | None = None) -> str | None:
    """Why this machine cannot run `problem` with this kernel; None if it can."""
    if problem is not None:
        if problem.padding:
            return "FLA has no padding: index -1 would gather the last slot of the pool"
        if problem.T == 0:
            return "there are no tokens: FLA has no chunk to launch"
    return fla.unsupported_here() or _other_backend()


def _other_backend() -> str | None:
    """FLA's chunk_kda calls FlashKDA without a word where that is installed, and FLA is not what would be measured."""
    if importlib.util.find_spec("flash_kda") is None or os.environ.get("FLA_DISABLE_BACKEND_DISPATCH") == "1":
        return None
    if os.environ.get("FLA_FLASH_KDA") == "0":
        return None
    return "flash_kda is installed, and FLA would call it instead: set FLA_FLASH_KDA=0 to run FLA's own kernels"


def run(inputs: Inputs) -> Outputs:
    """Runs `chunk_kda` on checked inputs.

    FLA knows no state pool and only fp32 states. For a pool, its slots are gathered into a new fp32 tensor before the
    call and the final states scattered back after it: two extra copies of the states, which are part of what is timed,
    as an engine that calls FLA has to make them too.
    """
    from fla.ops.kda import chunk_kda

    check_inputs(inputs)
    with torch.no_grad():
        state = gathered_states(inputs)
        o, final_state = chunk_kda(
            inputs.q,
            inputs.k,
            inputs.v,
            inputs.g,
            inputs.beta,
            initial_state=None if state is None else state.float(),
            output_final_state=inputs.state_indices is not None or inputs.output_final_state,
            safe_gate=fla.safe_gate(inputs),
            **fla.options_of(inputs),
        )
        return scattered_states(inputs, o, final_state)
