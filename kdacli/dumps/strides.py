"""Copies that keep strides: a row-padded view or a strided pool stays one, in a file and on another device."""

import torch


def copy_with_strides(tensor: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """A copy of `tensor` on `device`, in a storage of its own that is no larger than its strides need.

    What lies between the elements is NaN (0 for integers), which a kernel that reads there will show. Where elements
    share memory (a broadcast dimension), the copy is contiguous.
    """
    elements, strides = layout(tensor)
    if elements == tensor.numel():
        return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=device).copy_(tensor)
    gap = float("nan") if tensor.is_floating_point() else 0
    storage = torch.full((elements,), gap, dtype=tensor.dtype, device=device)
    return storage.as_strided(tensor.shape, strides).copy_(tensor)


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
