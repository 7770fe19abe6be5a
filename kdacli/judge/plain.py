"""Plain implementations: they round where a kernel of their op must round, and nowhere else.

What they are off by on the same inputs is what rounding costs there: the judge's tolerance is made of it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch

from kda_kernels.problem import CHUNK, Gate, Op
from kda_kernels.reference.batch import Batch
from kda_kernels.reference.chunked import chunk_recurrence
from kda_kernels.reference.gate import gate_rate, log_decay
from kda_kernels.reference.recurrent import After, token_recurrence
from kda_kernels.reference.rounding import OperandDtype, operand_rounding
from kda_kernels.reference.stored import stored
from kda_kernels.reference.targets import Recurrence
from kda_kernels.tensors import Inputs

DRAWS = 8
UNITS = tuple(2 ** (i / DRAWS) for i in range(DRAWS))  # spread over what a mantissa can be
LONG = 1024  # tokens


@dataclasses.dataclass(frozen=True)
class Plain:
    """One plain implementation, which rounds where a kernel of its op must round, and nowhere else.

    decode: the token recurrence in fp32; output and state rounded to their dtypes.
    prefill: the chunk form in fp32, the operands of its matrix products rounded to what tensor cores take; output and
        state rounded to their dtypes.
    gate: the activation and the cumulative sum in fp32, softplus by the logarithm that a GPU has.

    Attributes:
        run: how it goes through the tokens of a batch.
        cut: it leaves it to tensor cores to make tf32 of fp32, which they do by cutting, towards zero. All roundings
            then go one way and add up instead of scattering: errors are up to four times those of rounding to nearest.
            A kernel may do so, and the judge counts that shift once, not times its factor: twice such an error is what
            products in bf16 make, which fp32 activations must not pass through.
    """

    run: Recurrence
    cut: bool = False


def plains(op: Op, dtype: torch.dtype, longest: int, steps: Recurrence | None = None) -> list[Plain]:
    """The plain implementation of `op`, and the same with operands rounded in other units: as good, other errors.

    One alone may be lucky: where a few tokens, or a nearly singular chunk, decide, its error is a third of another's as
    easily as three times it. decode and gate round nothing but results and fp32 sums: there one is all. So it is with a
    sequence over `LONG`, for its cost. Where products are in tf32, as many follow that cut.

    Args:
        dtype: of the activations. longest: tokens of the longest sequence.
        steps: what runs instead, see `rounding_steps`.
    """
    if steps is not None:
        return [Plain(steps)]
    if op is not Op.PREFILL:
        return [Plain(token_recurrence)]
    operands = operand_dtype(dtype)
    kinds: list[tuple[OperandDtype, bool]] = [(operands, False)]
    if operands == "tf32":
        kinds.append(("tf32 cut", True))

    def chunks(rounded: Callable[[torch.Tensor], torch.Tensor]) -> Recurrence:
        return lambda batch, states, after: chunk_recurrence(batch, states, CHUNK, rounded, after)

    units = UNITS if longest <= LONG else UNITS[:1]
    return [Plain(chunks(operand_rounding(kind, unit)), cut) for kind, cut in kinds for unit in units]


def rounding_steps(dtype: torch.dtype, seed: int | None) -> Recurrence:
    """The token recurrence where each token is a call of its own: states are stored in `dtype` after each.

    Args:
        seed: of the first call; each other has one more. None: states are rounded to nearest.
    """

    def run(batch: Batch, states: torch.Tensor, after: After) -> torch.Tensor:
        def rounded(tokens: int, running: torch.Tensor) -> None:
            for row, state in enumerate(running):
                held = stored(state, dtype, None if seed is None else seed + tokens - 1, slot=row)
                state.copy_(held.values(state.dtype))
            after(tokens, running)

        return token_recurrence(batch, states, rounded)

    return run


def operand_dtype(dtype: torch.dtype) -> OperandDtype:
    """What a chunk kernel multiplies in, for activations of `dtype`.

    bf16 for bf16. fp16 activations take tf32 too: intermediate results such as the inverse of a near-singular chunk
    leave fp16's range, and tf32 has fp16's ten bits of mantissa.
    """
    return torch.bfloat16 if dtype is torch.bfloat16 else "tf32"


def by_a_gpu(inputs: Inputs, batch: Batch) -> Batch:
    """The batch with its decays as a GPU makes them: exp2 of their logarithm, which is so rounded once more; and of the
    softplus gate by its logarithm, where a series is no better.
    """
    g = batch.g
    if inputs.options.gate is Gate.SOFTPLUS and inputs.A_log is not None:
        rate = gate_rate(inputs.A_log, torch.float32).reshape(-1, 1)
        g = -rate * _by_a_gpus_logarithm(-g / rate, least=2.0**-5)
    return dataclasses.replace(batch, g=g * math.log2(math.e) * math.log(2))


def gate_cumsum_fp32(inputs: Inputs, lens: Sequence[int]) -> torch.Tensor:
    """float32 [B, T, HV, K]."""
    decay = log_decay(inputs.g, inputs.A_log, inputs.dt_bias, inputs.options, torch.float32)
    if inputs.options.gate is Gate.SOFTPLUS and inputs.A_log is not None:
        rate = gate_rate(inputs.A_log, torch.float32).reshape(-1, 1)
        decay = -rate * _by_a_gpus_logarithm(-decay / rate)
    chunks = [min(CHUNK, n - first) for n in lens for first in range(0, n, CHUNK)]
    pieces = [piece.cumsum(0) for piece in decay.flatten(0, 1).split(chunks)] if chunks else []
    return torch.cat(pieces).view(decay.shape) if pieces else decay


def _by_a_gpus_logarithm(softplus: torch.Tensor, least: float = 0.0) -> torch.Tensor:
    """What log(1 + exp(x)) is as ln(2) lg2(1 + exp(x)), by the one instruction for logarithms that a GPU has.

    Its largest absolute error is 2^-22 where its operand lies between 0.5 and 2 (CUDA C++ Programming Guide, intrinsic
    functions, __log2f), and there long memory lies. Here it is half of that on average, and goes one way, as it may in
    a real one. Results under `least` stay as they are.
    """
    small = (softplus / math.log(2) * 2.0**22).floor() * 2.0**-22 * math.log(2)
    return torch.where((softplus < math.log(2)) & (softplus >= least), small, softplus)
