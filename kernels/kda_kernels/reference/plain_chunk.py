"""The kernel `torch-prefill`: the chunk form in plain torch, fp32, wherever torch runs."""

import torch

from kda_kernels.problem import CHUNK, Problem
from kda_kernels.reference.batch import Batch
from kda_kernels.reference.chunked import chunk_recurrence
from kda_kernels.reference.recurrent import After
from kda_kernels.reference.rounding import operand_rounding
from kda_kernels.reference.targets import run_batch
from kda_kernels.tensors import Inputs, Outputs

CAUSAL_IN_BITS = True
FEATURES = frozenset(
    (
        *("null_slot", "has_initial_state", "checkpoints", "workspace", "strided_indices", "tail"),
        *("rounding_seed", "state_scales", "conv"),
    )
)


def unsupported(problem: Problem | None) -> str | None:
    """Always None: it runs every problem, slowly."""
    return None


@torch.no_grad()
def run(inputs: Inputs) -> Outputs:
    """Arithmetic and operands in fp32; the output rounded to the dtype of v, the state once, to its own.

    A pool is updated in place. Raises `InputError` (see `check_inputs`).
    """

    def chunks(batch: Batch, states: torch.Tensor, after: After) -> torch.Tensor:
        return chunk_recurrence(batch, states, CHUNK, operand_rounding(torch.float32), after)

    return run_batch(inputs, torch.float32, chunks)
