"""Copies that lie in memory as what they are of: views with their strides, in a file and on another device too."""

from collections.abc import Hashable, Mapping
from typing import TypeVar

import torch

from kda_kernels.tensors import Inputs

_ALIGNED = 64  # bytes: where allocators, and torch.save, begin a storage
Name = TypeVar("Name", bound=Hashable)


def copies(tensors: Mapping[Name, torch.Tensor], device: torch.device | str = "cpu") -> dict[Name, torch.Tensor]:
    """A copy of each tensor on `device`: with its strides, as far from 64 bytes, and sharing memory with whom it did.

    Tensors of one storage that lie in each other's range, such as q, k and v of one projection, get one storage, no
    larger than they need. What lies between and before elements is NaN (0 for integers), which a kernel that reads
    there will show. Where the elements of a tensor share memory (a broadcast dimension), its copy is contiguous.
    """
    made = room_for(tensors, device)
    for name, tensor in tensors.items():
        made[name].copy_(tensor)
    return made


def room_for(
    tensors: Mapping[Name, torch.Tensor], device: torch.device | str = "cpu", *, fill: bool = True
) -> dict[Name, torch.Tensor]:
    """What `copies` copies to, with what lies between elements filled, or left as it is."""
    made: dict[Name, torch.Tensor] = {}
    places: dict[tuple[int, torch.dtype], list[tuple[int, int, Name]]] = {}
    for name, tensor in tensors.items():
        if span := _span(tensor) if tensor.numel() else 0:
            start = int(tensor.storage_offset())
            at = (tensor.untyped_storage().data_ptr(), tensor.dtype)
            places.setdefault(at, []).append((start, start + span, name))
        else:
            made[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    for found in places.values():
        together: list[tuple[int, int, Name]] = []
        for start, end, name in sorted(found, key=lambda place: place[:2]):
            if together and start >= max(place[1] for place in together):
                made |= _side_by_side(tensors, together, device, fill)
                together = []
            together.append((start, end, name))
        made |= _side_by_side(tensors, together, device, fill)
    return {name: made[name] for name in tensors}


def copy_with_strides(tensor: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """`copies` of one tensor."""
    return copies({"": tensor}, device)[""]


def copy_of(inputs: Inputs, device: torch.device | str) -> Inputs:
    """`copies` of all tensors of a call."""
    found: dict[int, torch.Tensor] = {}
    inputs.map(lambda tensor: found.setdefault(id(tensor), tensor))
    made = copies(found, device)
    return inputs.map(lambda tensor: made[id(tensor)])


def _side_by_side(
    tensors: Mapping[Name, torch.Tensor], places: list[tuple[int, int, Name]], device: torch.device | str, fill: bool
) -> dict[Name, torch.Tensor]:
    """Room in one storage of tensors at (first element, behind the last, name) of another."""
    first, end = places[0][0], max(place[1] for place in places)
    one = tensors[places[0][2]]
    head = one.data_ptr() % _ALIGNED // one.element_size()
    length = head + end - first
    storage = torch.empty(length, dtype=one.dtype, device=device)
    if fill and length != one.numel():
        storage.fill_(float("nan") if one.is_floating_point() else 0)
    return {
        name: storage.as_strided(tensors[name].shape, tensors[name].stride(), head + start - first)
        for start, _, name in places
    }


def layout(tensor: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    """Elements in the storage of `copy_with_strides(tensor)`, gaps included, and its strides."""
    elements = _span(tensor)
    if tensor.is_contiguous() or not elements:
        return tensor.numel(), torch.empty(tensor.shape, device="meta").stride()
    return elements, tensor.stride()


def _span(tensor: torch.Tensor) -> int:
    """Elements from the first to the last of `tensor` in memory; 0 where elements share memory."""
    span = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride < span:
            return 0
        span += (size - 1) * stride
    return span
