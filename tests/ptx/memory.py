"""Memories of a simulated kernel, and what the bits in them and in registers mean as numbers.

A register holds the raw bits of 32 lanes: an array of 32 unsigned integers, or of bools for a predicate.
"""

import numpy as np
import torch

from ptx.errors import PtxError

PARAMETERS = 0x10000000  # address of the first parameter
PARAMETER_BYTES = 4096  # from one parameter to the next
GLOBAL = 1 << 40
LANE = np.arange(32, dtype=np.uint32)
ALL = np.ones(32, bool)  # lanes; compared by identity
ONES = 0xFF  # bytes of memory that nobody wrote: a NaN in each format


class GlobalMemory:
    """Memory of a device; tensors are placed in it, and hold what kernels wrote."""

    def __init__(self, size: int = 1 << 24):
        self.data = np.full(size, ONES, np.uint8)
        self.space = Space(self.data, GLOBAL)
        self._used = 0

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a CPU tensor that lies, contiguous, in this memory."""
        first = self._used
        self._used = -(-(first + tensor.nbytes) // 1024) * 1024 + 1024  # a gap that holds NaN
        if self._used > self.data.size:
            raise ValueError(f"{self.data.size} bytes of memory are too few")
        placed = torch.from_numpy(self.data[first : first + tensor.nbytes]).view(tensor.dtype).view(tensor.shape)
        return placed.copy_(tensor)

    def address(self, tensor: torch.Tensor) -> int:
        return GLOBAL + (tensor.data_ptr() - self.data.ctypes.data if tensor.numel() else 0)


class Space:
    """A state space of PTX: bytes, and the address of the first."""

    def __init__(self, data: np.ndarray, base: int = 0):
        self.data, self._base = data, base

    def elements(self, addresses: np.ndarray, dtype: type, count: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """The memory as elements, and the index of the first of `count` at each address.

        Raises:
            PtxError: an address is outside of the memory, or not aligned to all `count`.
        """
        size = np.dtype(dtype).itemsize
        offsets = addresses.astype(np.int64) - self._base
        if (offsets % (size * count)).any():
            raise PtxError(f"addresses that are not aligned to {size * count} bytes: {offsets}")
        if offsets.size and (offsets.min() < 0 or offsets.max() + size * count > self.data.size):
            raise PtxError(f"addresses outside of the memory: {offsets}")
        return self.data.view(dtype), offsets // size

    def bytes(self, address: int, count: int) -> np.ndarray:
        """A view of them."""
        self.elements(np.array([address, address + count - 1]), np.uint8)
        return self.data[address - self._base : address - self._base + count]


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """fp32 to the bits of bf16, rounded to nearest even; uint32."""
    wide = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (wide + 0x7FFF + ((wide >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(x), 0x7FFF, rounded & np.uint64(0xFFFF)).astype(np.uint32)


def bf16_values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def tf32_values(words: np.ndarray) -> np.ndarray:
    """What a product takes of fp32: the bits that tf32 lacks are cut off."""
    return (words & np.uint32(0xFFFFE000)).view(np.float32)


def f16_values(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)


def f16_bits(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).view(np.uint16).astype(np.uint32)


def halves(words: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The lower and the upper number in each word; `kind` is bf16 or f16."""
    values = {"bf16": bf16_values, "f16": f16_values}[kind]
    return values(words & np.uint32(0xFFFF)), values(words >> np.uint32(16))


def packed(low: np.ndarray, high: np.ndarray, kind: str) -> np.ndarray:
    """fp32 numbers rounded and put in pairs into words."""
    bits = {"bf16": bf16_bits, "f16": f16_bits}[kind]
    return bits(low) | bits(high) << np.uint32(16)
