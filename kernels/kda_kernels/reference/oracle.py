"""What every kernel is judged against: the token recurrence in fp64, its chunk form, and the gate's cumulative sum.

Nothing here modifies its inputs; everything runs on the device where they lie.
"""

import torch

from kda_kernels.checks import check_inputs, seq_lens
from kda_kernels.problem import CHUNK
from kda_kernels.reference.batch import Batch
from kda_kernels.reference.chunked import chunk_recurrence
from kda_kernels.reference.gate import log_decay
from kda_kernels.reference.recurrent import After, token_recurrence
from kda_kernels.reference.rounding import OperandDtype, operand_rounding
from kda_kernels.reference.targets import run_batch
from kda_kernels.tensors import Inputs, Outputs


@torch.no_grad()
def recurrence(inputs: Inputs) -> Outputs:
    """The fp64 token recurrence.

    Returns:
        o: float64 [B, T, HV, V]; zero for sequences with state index -1.
        final_state: float64; [N, HV, V, K] ([N, HV, K, V] unless state_v_first), or the whole pool as it is after the
            update, in the shape of the pool. A sequence with no tokens keeps its state. None if not asked for.
        token_states, checkpoints: float64 copies of those of `inputs`, after the call.
        conv_states: a copy of those of `inputs.conv` after the call, in their own dtype: they are no sums.

    Raises:
        InputError: see `check_inputs`.
    """
    return run_batch(inputs, torch.float64, token_recurrence, exact=True)


@torch.no_grad()
def chunk_form(
    inputs: Inputs, *, chunk: int = CHUNK, operand_dtype: OperandDtype | None = None, unit: float = 1.0
) -> Outputs:
    """The chunk form; the same result as `recurrence`, or the error a chunk kernel cannot avoid.

    Args:
        inputs: the call.
        chunk: tokens per chunk.
        operand_dtype: None: fp64 throughout, output and state too. A dtype (or "tf32", see `operand_rounding`): the
            plain implementation in that precision, which tolerances are built on. Activations, norms, cumulative
            gates, decays, accumulation, the triangular solve and the state are fp32; rounded to `operand_dtype` are,
            in the names of `chunked`,
              * the scaled operands kg, qg, kd, and both factors of Akk and Aqk with their decays (Akk itself stays
                fp32),
              * the inverse A, and v, before they are multiplied,
              * W = A kg, the new values v', and Aqk,
              * the state S where it is an operand, not where it is carried on.
            Then o is rounded to the dtype of v, and the final state to the dtype of the state (fp32 without one).
        unit: see `operand_rounding`.

    Returns:
        Shapes as from `recurrence`; a pool comes back as an updated copy.

    Raises:
        InputError: see `check_inputs`.
    """
    dtype = torch.float64 if operand_dtype is None else torch.float32

    def chunks(batch: Batch, states: torch.Tensor, after: After) -> torch.Tensor:
        return chunk_recurrence(batch, states, chunk, operand_rounding(operand_dtype, unit), after)

    return run_batch(inputs.fresh(), dtype, chunks, exact=operand_dtype is None)


@torch.no_grad()
def gate_cumsum(inputs: Inputs, chunk: int = CHUNK) -> torch.Tensor:
    """The log decay (natural log) summed within each chunk of each sequence, float64 [B, T, HV, K].

    Raises:
        InputError: see `check_inputs`.
    """
    dims = check_inputs(inputs, values=True)
    out = log_decay(inputs.g, inputs.A_log, inputs.dt_bias, inputs.options, torch.float64)
    sums = out.reshape(dims.B * dims.T, dims.HV, dims.K).clone()
    lens = torch.tensor(seq_lens(inputs, dims), dtype=torch.int64)
    starts = (lens.cumsum(0) - lens).repeat_interleave(lens)
    position = ((torch.arange(sums.shape[0]) - starts) % chunk).to(sums.device)
    for i in range(1, chunk):
        rows = (position == i).nonzero().squeeze(1)
        sums[rows] += sums[rows - 1]
    return sums.view(out.shape)
