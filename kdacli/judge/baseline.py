"""What results are measured with: the fp64 reference, and a plain torch implementation in the kernel's precision."""

import dataclasses
import math
from collections.abc import Sequence

import torch

from kda_kernels.checks import check_inputs, seq_lens
from kda_kernels.problem import CHUNK, Gate, Op
from kda_kernels.reference import oracle, plain_recurrent
from kda_kernels.reference.gate import log_decay
from kda_kernels.reference.rounding import OperandDtype
from kda_kernels.tensors import Inputs, Outputs

DRAWS = 8
UNITS = tuple(2 ** (i / DRAWS) for i in range(1, DRAWS))  # spread over what a mantissa can be
LONG = 1024  # tokens


@dataclasses.dataclass
class Cut(Outputs):
    """What a plain implementation makes that leaves it to tensor cores to make tf32 of fp32: they cut, towards zero.

    All roundings then go one way and add up instead of scattering: errors are up to four times those of rounding to
    nearest. A kernel may do so, and the judge counts that shift once, not times its factor: twice such an error is what
    products in bf16 make, which fp32 activations must not pass through.
    """


def expect(inputs: Inputs, op: Op | str) -> Outputs:
    """The fp64 reference for `op`: o (for the op `gate`: the chunk-local cumsum) and final_state, float64.

    final_state is there whether it was asked for or not; with a pool it is the whole pool after the call. `inputs` are
    not modified. Raises `InputError` (see `check_inputs`).
    """
    if Op(op) is Op.GATE:
        return Outputs(oracle.gate_cumsum(inputs))
    return oracle.recurrence(dataclasses.replace(inputs, output_final_state=True))


def plain(inputs: Inputs, op: Op | str) -> Outputs:
    """What a plain implementation makes of `inputs`, rounding where a kernel of `op` must round, and nowhere else.

    decode: the token recurrence in fp32; output and state rounded to their dtypes.
    prefill: the chunk form in fp32, the operands of its matrix products rounded to what tensor cores take; output and
        state rounded to their dtypes.
    gate: the activation and the cumulative sum in fp32, softplus by the logarithm that a GPU has.
    """
    op = Op(op)
    if op is Op.GATE:
        return Outputs(_gate_cumsum_fp32(inputs))
    inputs = dataclasses.replace(inputs, output_final_state=True)
    if op is Op.DECODE:
        return plain_recurrent.run(inputs.fresh())
    return oracle.chunk_form(inputs, operand_dtype=operand_dtype(inputs.q.dtype))


def draws(inputs: Inputs, op: Op | str, units: Sequence[float] = UNITS) -> tuple[Outputs, ...]:
    """`plain`, and the same with its operands rounded in other units: as good, with other rounding errors.

    One alone may be lucky: where a few tokens, or a nearly singular chunk, decide, its error is a third of another's as
    easily as three times it. decode and gate round nothing but results and fp32 sums: there one is all. So it is with a
    sequence over `LONG`, for its cost. Where products are in tf32, as many `Cut` ones follow.
    """
    first = plain(inputs, op)
    if Op(op) is not Op.PREFILL:
        return (first,)
    if max(seq_lens(inputs, check_inputs(inputs, values=True)), default=0) > LONG:
        units = ()
    inputs = dataclasses.replace(inputs, output_final_state=True)
    dtype = operand_dtype(inputs.q.dtype)
    found = [first, *(oracle.chunk_form(inputs, operand_dtype=dtype, unit=unit) for unit in units)]
    if dtype == "tf32":
        cut = (oracle.chunk_form(inputs, operand_dtype="tf32 cut", unit=unit) for unit in (1.0, *units))
        found += [Cut(one.o, one.final_state) for one in cut]
    return tuple(found)


def _by_a_gpus_logarithm(softplus: torch.Tensor) -> torch.Tensor:
    """What log(1 + exp(x)) is as ln(2) lg2(1 + exp(x)), by the one instruction for logarithms that a GPU has.

    Its largest absolute error is 2^-22 where its operand lies between 0.5 and 2 (CUDA C++ Programming Guide, intrinsic
    functions, __log2f), and there long memory lies. Here it is half of that on average, and goes one way, as it may in
    a real one.
    """
    small = (softplus / math.log(2) * 2.0**22).floor() * 2.0**-22 * math.log(2)
    return torch.where(softplus < math.log(2), small, softplus)


def operand_dtype(dtype: torch.dtype) -> OperandDtype:
    """What a chunk kernel multiplies in, for activations of `dtype`.

    bf16 for bf16. fp16 activations take tf32 too: intermediate results such as the inverse of a near-singular chunk
    leave fp16's range, and tf32 has fp16's ten bits of mantissa.
    """
    return torch.bfloat16 if dtype is torch.bfloat16 else "tf32"


def _gate_cumsum_fp32(inputs: Inputs) -> torch.Tensor:
    """float32 [B, T, HV, K]."""
    decay = log_decay(inputs.g, inputs.A_log, inputs.dt_bias, inputs.options, torch.float32)
    if inputs.options.gate is Gate.SOFTPLUS:
        rate = 1.0 if inputs.A_log is None else inputs.A_log.float().exp().unsqueeze(-1)
        decay = -rate * _by_a_gpus_logarithm(-decay / rate)
    lens = seq_lens(inputs, check_inputs(inputs, values=True))
    chunks = [min(CHUNK, n - first) for n in lens for first in range(0, n, CHUNK)]
    pieces = [piece.cumsum(0) for piece in decay.flatten(0, 1).split(chunks)] if chunks else []
    return torch.cat(pieces).view(decay.shape) if pieces else decay
