"""The kernel `torch-decode`: the token recurrence in plain torch, fp32, wherever torch runs."""

import torch

from kda_kernels.problem import FEATURES as ALL
from kda_kernels.problem import Problem
from kda_kernels.reference.recurrent import token_recurrence
from kda_kernels.reference.targets import run_batch
from kda_kernels.tensors import Inputs, Outputs

CAUSAL_IN_BITS = True
FEATURES = ALL - {"checkpoints", "batch_invariant"}


def unsupported(problem: Problem | None) -> str | None:
    """Always None: it runs every problem, slowly."""
    return None


@torch.no_grad()
def run(inputs: Inputs) -> Outputs:
    """Arithmetic in fp32; the output rounded to the dtype of v, the state once, to its own (fp32 without one).

    A pool is updated in place. Raises `InputError` (see `check_inputs`).
    """
    return run_batch(inputs, torch.float32, token_recurrence)
