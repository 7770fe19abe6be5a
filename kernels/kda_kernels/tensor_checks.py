"""What the checks of a call's tensors are made of. Every error says what a tensor is and what it should be."""

from collections.abc import Sequence

import torch

from kda_kernels.dtypes import FLOATS, INDICES, STATES, name_of, torch_dtypes
from kda_kernels.errors import InputError
from kda_kernels.tensors import Inputs

FLOAT_DTYPES = torch_dtypes(FLOATS)
POOL_DTYPES = torch_dtypes(STATES)
INDEX_DTYPES = torch_dtypes(INDICES)


def check_tensor(name: str, t: torch.Tensor, dtypes: frozenset[torch.dtype], owner: torch.Tensor, who: str) -> None:
    """Type, dtype, layout, and that `t` is on the device of `owner`, the argument called `who`."""
    if not isinstance(t, torch.Tensor):
        raise InputError(name, f"is of type {type(t).__name__}", "it should be a torch.Tensor")
    if t.dtype not in dtypes:
        wanted = " or ".join(sorted(map(name_of, dtypes)))
        raise InputError(name, f"is {name_of(t.dtype)}", f"it should be {wanted}")
    if t.layout is not torch.strided:
        raise InputError(name, f"has layout {t.layout}", "it should be an ordinary (strided) tensor")
    if t is not owner and t.device != owner.device:
        raise InputError(name, f"is on {t.device}", f"it should be on {owner.device}, as {who}")


def check_contiguous(name: str, t: torch.Tensor) -> None:
    if not t.is_contiguous():
        raise InputError(name, f"has strides {list(t.stride())}", "it should be contiguous; call .contiguous() on it")


def check_last_stride(name: str, t: torch.Tensor) -> None:
    """Of a tensor of four dimensions."""
    if t.stride(3) != 1 and t.shape[3] != 1:
        found = f"has stride {t.stride(3)} in its last dimension"
        raise InputError(name, found, "it should be 1; call .contiguous() on it")


def check_states(name: str, states: torch.Tensor, inputs: Inputs, slots: str, *, written: bool) -> None:
    """States of the heads of `inputs`, each contiguous.

    Args:
        slots: what their number is called.
        written: so no two of them may share memory.
    """
    pool = inputs.state_indices is not None and states is inputs.state
    check_tensor(name, states, POOL_DTYPES if pool else FLOAT_DTYPES, inputs.q, "q")
    inner = inputs.state_shape(1)[1:]
    if states.ndim != 4 or states.shape[1:] != inner:
        raise shape_error(name, states, f"{layout(inputs, slots)} = [{slots}, {', '.join(map(str, inner))}]")
    stride = states.stride()
    if not _inner_contiguous(inner, stride):
        wanted = "its last three dimensions should be contiguous; only the stride between slots is free"
        raise InputError(name, f"has strides {list(stride)}", wanted)
    size = inner[0] * inner[1] * inner[2]
    if written and states.shape[0] > 1 and stride[0] < size:
        wanted = f"it should be at least HV * V * K = {size}, so that no two slots of the pool share memory"
        raise InputError(name, f"has stride {stride[0]} between slots", wanted)


def layout(inputs: Inputs, slots: str) -> str:
    """Of the states of `inputs`, in letters."""
    return f"[{slots}, HV, V, K]" if inputs.state_v_first else f"[{slots}, HV, K, V]"


def _inner_contiguous(inner: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether [HV, V, K] lies in memory without gaps; the stride of a dimension of size 1 means nothing."""
    expected = (inner[1] * inner[2], inner[2], 1)
    return stride[1:] == expected or all(
        size == 1 or have == want for size, have, want in zip(inner, stride[1:], expected, strict=True)
    )


def shape_error(name: str, t: torch.Tensor, expected: str) -> InputError:
    return InputError(name, f"has shape {list(t.shape)}", f"it should be {expected}")
