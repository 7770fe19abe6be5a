"""Rounding of matmul operands, as tensor cores demand it: the error no kernel in that precision can avoid."""

from collections.abc import Callable
from typing import Literal

import torch

OperandDtype = torch.dtype | Literal["tf32", "tf32 cut"]
Rounding = Callable[[torch.Tensor], torch.Tensor]

_TF32_DROPPED_BITS = 13  # fp32 has 23 bits of mantissa, tf32 10


def operand_rounding(operand_dtype: OperandDtype | None, unit: float = 1.0) -> Rounding:
    """A function that rounds a tensor to what an operand of `operand_dtype` can hold and keeps the tensor's own dtype.

    None and torch.float32: no rounding. "tf32": 10 bits of mantissa with the exponent range of fp32, to nearest, as a
    kernel may round before it multiplies. "tf32 cut": the same, towards zero, as tensor cores themselves make of fp32.

    Args:
        unit: what numbers are measured in while they are rounded. Errors in another unit are as large, and others.
    """
    if operand_dtype is None or operand_dtype is torch.float32:
        return lambda x: x
    if unit != 1.0:
        rounded = operand_rounding(operand_dtype)
        return lambda x: rounded(x * unit) / unit
    if operand_dtype == "tf32":
        return round_to_tf32
    if operand_dtype == "tf32 cut":
        return cut_to_tf32
    return lambda x: x.to(operand_dtype).to(x.dtype)


def round_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """Rounds fp32 to 10 bits of mantissa, to nearest, ties to even. Inf and NaN stay."""
    bits = x.contiguous().view(torch.int32)
    half = (1 << (_TF32_DROPPED_BITS - 1)) - 1
    last = (bits >> _TF32_DROPPED_BITS) & 1
    rounded = (bits + half + last) & -(1 << _TF32_DROPPED_BITS)
    return torch.where(x == x, rounded.view(torch.float32), x)  # not where it is NaN


def cut_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """Cuts fp32 to 10 bits of mantissa, towards zero. Inf and NaN stay."""
    bits = x.contiguous().view(torch.int32) & -(1 << _TF32_DROPPED_BITS)
    return torch.where(x == x, bits.view(torch.float32), x)  # not where it is NaN
