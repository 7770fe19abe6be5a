"""Copies in a CUDA graph that a replay makes only if it was switched on beforehand; else each launch ends at once.

A launch makes all copies of one moment. What they are stands in a table, which is written when the capture is over: a
cell that was there before the capture holds its address, and the switch.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

COLUMNS, PARTS, BLOCK, WARPS = 16, 128, 1024, 4  # of the table; programs of a copy; units of a program at a time


class Copy(NamedTuple):
    """`source` into `target`; with `indices` those rows of it that they name, each brought inside of it first."""

    target: torch.Tensor
    source: torch.Tensor
    indices: torch.Tensor | None = None

    def now(self) -> None:
        """Makes it, whatever a switch says."""
        if self.indices is None:
            self.target.copy_(self.source)
        else:
            inside = self.indices.clamp(0, self.source.shape[0] - 1)
            torch.index_select(self.source, 0, inside, out=self.target)


class Switch:
    """The copies of one graph. To be made before its capture begins, with the kernel compiled and loaded."""

    def __init__(self) -> None:
        self.cell = torch.zeros(2, dtype=torch.int64, device="cuda")
        self.aside = torch.cuda.Stream()
        self.rows: list[list[int]] = []
        self.table: torch.Tensor | None = None
        launch(self.cell, 0, 1)

    def copy(self, copies: Sequence[Copy]) -> None:
        """Makes them part of the graph under capture; those that the kernel does not make run in every replay."""
        first = len(self.rows)
        for one in copies:
            if (row := row_of(one)) is not None:
                self.rows.append(row)
            else:
                one.now()
        if len(self.rows) > first:
            launch(self.cell, first, len(self.rows) - first)

    def ready(self) -> None:
        """The capture is over."""
        self.table = torch.tensor(self.rows, dtype=torch.int64, device=self.cell.device)
        self.cell[1].fill_(self.table.data_ptr())

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """A replay inside, on the current stream, makes the copies."""
        torch.cuda.current_stream().wait_stream(self.aside)
        self.cell[0].fill_(1)
        try:
            yield
        finally:
            self.cell[0].fill_(0)

    @contextlib.contextmanager
    def sending(self) -> Iterator[None]:
        """What is made inside comes behind the replay, and beside all that follows but the next one that is `on`."""
        self.aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.aside):
            yield


def launch(cell: torch.Tensor, first: int, copies: int) -> None:
    """The kernel, on `copies` rows of the table from `first` on."""
    from kdacli.capture.copy_kernel import copy_kernel

    copy_kernel[(PARTS, copies)](cell, first, COLUMNS, BLOCK, num_warps=WARPS)


class _Dim(NamedTuple):
    """A dimension of a copy: its size, and the strides in the source and in the target."""

    size: int
    source: int
    target: int


def row_of(copy: Copy) -> list[int] | None:
    """A copy as the kernel reads it; None if it has too many dimensions that lie apart, or is too large.

    Addresses; three outer sizes and the inner one; the outer strides in both; indices: address, step, whether they have
    64 bits, and rows of the source; bytes of the unit that sizes and strides are counted in.
    """
    target, source, indices = copy
    dims = [_Dim(*of) for of in zip(target.shape, source.stride(), target.stride(), strict=True)]
    outer = dims[:1] if indices is not None else []
    inner = _joined(dims[len(outer) :])
    if not inner or (inner[-1].source, inner[-1].target) != (1, 1):
        inner.append(_Dim(1, 1, 1))
    size = source.element_size()
    *middle, last = (_Dim(d.size, d.source * size, d.target * size) for d in (*outer, *inner))
    last = last._replace(size=last.size * size)
    if indices is None:
        middle = [_Dim(1, 0, 0)] * (3 - len(middle)) + middle
    else:
        middle[1:1] = [_Dim(1, 0, 0)] * (3 - len(middle))
    steps = (last.size, *(stride for d in middle for stride in d[1:]), source.data_ptr(), target.data_ptr())
    unit = 4 if all(step % 4 == 0 for step in steps) else 1
    if len(middle) != 3 or target.numel() * size // unit >= 1 << 31:
        return None
    gathered = [0, 0, 0, 0]
    if indices is not None:
        gathered = [indices.data_ptr(), indices.stride(0), int(indices.dtype is torch.int64), source.shape[0]]
    strides = [stride // unit for of in (1, 2) for stride in (d[of] for d in middle)]
    return [
        source.data_ptr(), target.data_ptr(), *(d.size for d in middle), last.size // unit, *strides[:3], *strides[3:],
        *gathered[:1], gathered[1], gathered[2] | unit << 1, gathered[3],
    ]  # fmt: skip


def _joined(dims: Sequence[_Dim]) -> list[_Dim]:
    """The same elements in as few dimensions as can be, the longest strides first."""
    made: list[_Dim] = []
    for d in sorted((d for d in dims if d.size != 1), key=lambda d: (d.target, d.source), reverse=True):
        if made and (made[-1].source, made[-1].target) == (d.size * d.source, d.size * d.target):
            made[-1] = _Dim(made[-1].size * d.size, d.source, d.target)
        else:
            made.append(d)
    return made
