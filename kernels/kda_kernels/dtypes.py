"""The one table of dtypes: what tensors of a call may be, by name, so that naming them needs no torch."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Float(NamedTuple):
    """A floating-point dtype.

    Attributes:
        name: torch's, "bfloat16"; and what `kda_kernels.problem.Problem` calls it.
        short: "bf16", as on the command line; Triton's name of it, too.
        bytes: of an element.
        digits: bits of the significand, the hidden one included: a rounding changes 1.0 by 2 ** -digits at most.
        smallest: the most that may be lost of any element: those under the smallest normal one are flushed to zero, or,
            in fp16, rounded to a subnormal.
    """

    name: str
    short: str
    bytes: int
    digits: int
    smallest: float


FLOATS = {
    dtype.name: dtype
    for dtype in (
        Float("float32", "fp32", 4, 24, 2.0**-126),
        Float("float16", "fp16", 2, 11, 2.0**-25),
        Float("bfloat16", "bf16", 2, 8, 2.0**-126),
    )
}
# What a pool of states may hold: the same, or integers with an fp32 scale for each row of K channels. Their digits and
# `smallest` are relative to, and of, the largest element of a row: see `kda_kernels.reference.stored`.
STATES = FLOATS | {"int16": Float("int16", "int16", 2, 16, 2.0**-110)}
INDICES = ("int32", "int64")


def name_of(dtype: "torch.dtype") -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> "torch.dtype":
    """ "bfloat16" -> torch.bfloat16."""
    import torch

    return getattr(torch, name)


def torch_dtypes(names: Iterable[str]) -> "frozenset[torch.dtype]":
    return frozenset(map(torch_dtype, names))
