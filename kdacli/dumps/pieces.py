"""Questions about tensors that may be larger than memory: they are read from the file a piece at a time."""

from collections.abc import Callable, Iterator

import torch

PIECE = 1 << 22  # elements


def pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """`tensor` [B, T, ...] in consecutive views [1, t, ...] of about `PIECE` elements."""
    if tensor.numel() <= PIECE or tensor.ndim < 2:
        yield tensor
        return
    rows = max(1, PIECE // max(1, tensor[0, 0].numel()))
    for row in tensor.split(1):
        yield from row.split(rows, dim=1)


def anywhere(tensor: torch.Tensor, holds: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Whether `holds`, given pieces, is true of any element."""
    return any(bool(holds(piece).any()) for piece in pieces(tensor))
