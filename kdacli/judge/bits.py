"""Tensors bit for bit."""

import torch


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers of its element size, so that NaN equals the same NaN, and 0.0 is not -0.0."""
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype is b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
