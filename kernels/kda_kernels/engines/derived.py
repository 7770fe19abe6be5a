"""What is made of an engine's tensors once: the weight of a convolution, which they keep tap by tap, as ours [D, W]."""

import functools
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary

_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensor -> {what: (the tensor's version, made of it)}
_T = TypeVar("_T")


def derived(
    tensor: torch.Tensor, make: Callable[[torch.Tensor], _T], what: Hashable = None, *, constant: bool = False
) -> _T:
    """`make(tensor)`, called once for as long as the tensor lives and is not modified.

    What is made while a CUDA graph is captured is not kept, as its memory is the graph's.

    Args:
        make: what stays is known by it, and by `what` where it is not one function for all calls.
        constant: kept of a tensor of inference mode too, which does not tell when it is modified.
    """
    if tensor.is_inference() and not constant:
        return make(tensor)
    what, now = what or make, None if tensor.is_inference() else tensor._version
    known = _made.setdefault(tensor, {})
    if what in known and known[what][0] == now:
        return known[what][1]
    value = make(tensor)
    if not capturing(tensor.device):
        known[what] = (now, value)
    return value


def capturing(device: torch.device) -> bool:
    """Whether what is made on `device` now belongs to a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def counted(count: int, device: torch.device, step: int = 1) -> torch.Tensor:
    """int32, 0, step, 2 step, ..: `count` numbers, made once for each of the last 64 arguments."""
    return (_counted.__wrapped__ if capturing(device) else _counted)(count, device, step)


@functools.lru_cache(maxsize=64)
def _counted(count: int, device: torch.device, step: int) -> torch.Tensor:
    return torch.arange(0, count * step, step, dtype=torch.int32, device=device)


def joined(weight: torch.Tensor) -> torch.Tensor:
    """Of vLLM's and FlashInfer's [3, W, D / 3]: q, k and v, whose channels are as many."""
    return weight.mT.flatten(0, 1)


def apart(*weights: torch.Tensor) -> torch.Tensor:
    """Of SGLang's [W, channels] each of q, k and v."""
    return torch.cat([weight.mT for weight in weights])
