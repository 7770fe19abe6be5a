"""What goes on beside the warps: barriers in shared memory, TMA, bulk copies, and groups of what a warp has issued."""

import dataclasses
from collections import deque
from collections.abc import Callable

import numpy as np

from ptx.errors import PtxError


class Barrier:
    """A named barrier. Attributes: round: how often it was complete."""

    def __init__(self):
        self.threads, self.round = 0, 0

    def arrive(self, of: int) -> None:
        """A warp arrives, of so many threads."""
        self.threads += 32
        if self.threads > of:
            raise PtxError(f"{self.threads} threads at a barrier of {of}")
        if self.threads == of:
            self.threads, self.round = 0, self.round + 1


class Mbarrier:
    """Attributes: phase: parity of the current one. pending: arrivals that it waits for. bytes: the same of copies."""

    def __init__(self, count: int):
        self.count, self.pending, self.bytes, self.phase = count, count, 0, 0

    def arrive(self, count: int) -> None:
        if count > self.pending:
            raise PtxError("more arrivals at an mbarrier than it waits for")
        self.pending -= count
        self.complete(0)

    def complete(self, count: int) -> None:
        """So many bytes have come."""
        self.bytes -= count
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase ^ 1, self.count


class Groups:
    """Work that a warp has issued, in order, and the groups in which it waits for it."""

    def __init__(self):
        self._groups: deque[deque[Callable[[], None]]] = deque([deque()])  # the last is not committed

    def issue(self, work: Callable[[], None]) -> None:
        self._groups[-1].append(work)

    def commit(self) -> None:
        self._groups.append(deque())

    def wait(self, left: int) -> None:
        """Does all but the newest `left` groups."""
        while len(self._groups) - 1 > left:
            self._finish_oldest()

    def finish(self) -> None:
        self.wait(0)
        while self._groups[0]:
            self._groups[0].popleft()()

    def progress(self) -> None:
        """Does the oldest piece of work."""
        if (group := next(filter(None, self._groups), None)) is not None:
            group.popleft()()

    def _finish_oldest(self) -> None:
        for work in self._groups.popleft():
            work()


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """A TMA descriptor: boxes of rows of 128 bytes, in shared memory with a 128-byte swizzle.

    Attributes:
        address: of the tensor. strides: bytes, of each coordinate. rows: of a box, along the second coordinate.
        limit: rows of the tensor; those beyond it are read as zeros, and not written.
    """

    address: int
    strides: tuple[int, ...]
    limit: int
    rows: int = 32

    def load(self, cta, coordinates: list[int], shared: int, mbarrier: int) -> None:
        inside, sources, places = self._pieces(coordinates, shared)
        data, target = cta.spaces["shared"].elements(places, np.uint64, 2)
        memory, source = cta.spaces["global"].elements(sources[inside], np.uint64, 2)
        for half in range(2):
            data[target + half] = 0
            data[target[inside] + half] = memory[source + half]
        cta.mbarrier(mbarrier).complete(128 * self.rows)

    def store(self, cta, coordinates: list[int], shared: int) -> None:
        inside, targets, places = self._pieces(coordinates, shared)
        data, source = cta.spaces["shared"].elements(places[inside], np.uint64, 2)
        memory, target = cta.spaces["global"].elements(targets[inside], np.uint64, 2)
        for half in range(2):
            memory[target + half] = data[source + half]

    def _pieces(self, coordinates: list[int], shared: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which rows the tensor has; of each row the addresses of 8 pieces of 16 bytes, there and in shared memory."""
        row, piece = np.arange(self.rows), np.arange(8)
        first = self.address + sum(n * stride for n, stride in zip(coordinates, self.strides, strict=True))
        inside = (coordinates[1] + row >= 0) & (coordinates[1] + row < self.limit)
        there, line = first + row * self.strides[1], shared + 128 * row
        swizzled = piece ^ (line[:, None] >> 7) & 7
        return inside, there[:, None] + 16 * piece, line[:, None] + 16 * swizzled
