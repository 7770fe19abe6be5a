"""Guard zones: memory before and after every tensor of a call, its inputs and what it allocates, that nobody may touch.

Their bytes are all ones: NaN in every floating dtype, -1 in every integer, so that a read out there shows as well.
"""

import dataclasses
import functools
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ZONE = 1024  # bytes on either side; a multiple of every alignment that a kernel may ask for
FILL = 0xFF

_aten = torch.ops.aten
_EMPTY = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
_FILLED = {
    _aten.zeros.default,
    _aten.zeros_like.default,
    _aten.new_zeros.default,
    _aten.full.default,
    _aten.full_like.default,
    _aten.new_full.default,
}


@dataclasses.dataclass(frozen=True)
class Guarded:
    """A block of memory with a zone on each side. `block`: all of its bytes, zones included."""

    what: str
    block: torch.Tensor

    @classmethod
    def allocate(cls, what: str, size: int, device: torch.device) -> "Guarded":
        """`size` bytes between two zones; they are filled like the zones."""
        return cls(what, torch.full((size + 2 * ZONE,), FILL, dtype=torch.uint8, device=device))

    @property
    def inside(self) -> torch.Tensor:
        return self.block[ZONE:-ZONE]

    def view(self, like: torch.Tensor, offset: int = 0) -> torch.Tensor:
        """A tensor with the dtype, shape and strides of `like`, `offset` elements into the inside."""
        start = ZONE // like.element_size() + offset
        return torch.empty(0, dtype=like.dtype, device=like.device).set_(
            self.block.untyped_storage(), start, like.shape, like.stride()
        )

    def broken(self) -> str | None:
        """What was overwritten, in words; None if nothing was."""
        sides, untouched = (("before", self.block[:ZONE]), ("after", self.block[-ZONE:])), _untouched(self.block.device)
        hit = [(side, int((zone != FILL).sum())) for side, zone in sides if not torch.equal(zone, untouched)]
        return f"{' and '.join(f'{count} bytes {side}' for side, count in hit)} {self.what}" if hit else None


@functools.cache
def _untouched(device: torch.device) -> torch.Tensor:
    return torch.full((ZONE,), FILL, dtype=torch.uint8, device=device)


class GuardedAllocations(TorchDispatchMode):
    """Inside, tensors that torch allocates without values, or with one value, get guard zones; the former hold NaN.

    It sees what goes through torch's dispatcher in this thread, from Python or from C++; memory that a library takes
    elsewhere it does not. Pinned memory is left alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Guarded] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch's hook, True by default: then the first call imports torch's compiler, which takes seconds, to keep it
        away from here. Inside such a mode it compiles nothing anyway.
        """
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in _EMPTY and func not in _FILLED:
            return out
        if not out.numel() or out.layout is not torch.strided or out.device.type == "meta" or out.is_pinned():
            return out
        with torch.no_grad():
            guarded = Guarded.allocate(f"a {_said(out)} that it allocated", out.untyped_storage().nbytes(), out.device)
            housed = guarded.view(out)
            if func in _FILLED:
                housed.copy_(out)
            elif out.dtype is torch.bool:
                housed.fill_(True)
        self.made.append(guarded)
        return housed

    def broken(self) -> list[str]:
        """What was written beside the tensors allocated inside, in words."""
        return [f"it wrote {found}" for guarded in self.made if (found := guarded.broken())]


def _said(tensor: torch.Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} tensor {list(tensor.shape)}"
