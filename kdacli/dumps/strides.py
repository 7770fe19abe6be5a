"""Copies that keep strides: a row-padded view or a strided pool stays one, in a file and on another device."""

import torch


def copy_with_strides(tensor: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """A copy of `tensor` on `device`, in a storage of its own that is no larger than its strides need.

    What lies between the elements is NaN (0 for integers), which a kernel that reads there will show. Where elements
    share memory (a broadcast dimension), the copy is contiguous.
    """
    elements = _span(tensor)
    if tensor.is_contiguous() or not elements:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device).copy_(tensor)
    gap = float("nan") if tensor.is_floating_point() else 0
    storage = torch.full((elements,), gap, dtype=tensor.dtype, device=device)
    return storage.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def extent(tensor: torch.Tensor) -> int:
    """Elements in the storage of `copy_with_strides(tensor)`, gaps included."""
    return tensor.numel() if tensor.is_contiguous() else _span(tensor) or tensor.numel()


def _span(tensor: torch.Tensor) -> int:
    """Elements from the first to the last of `tensor` in memory; 0 where elements share memory."""
    span = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride < span:
            return 0
        span += (size - 1) * stride
    return span
