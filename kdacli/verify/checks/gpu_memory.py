"""Memory of the GPU: what checks give back, so that several runs can share one, and what is said where it is short."""

import torch

KEPT = 4 << 30  # bytes that torch may keep for the next case
_NOTICED = 4 << 30  # bytes in other hands that may be why there are too few


def give_back(least: int = KEPT) -> None:
    """Gives back what torch keeps but does not use, if that is more than `least` bytes."""
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() - torch.cuda.memory_allocated() > least:
        torch.cuda.empty_cache()


def others() -> str | None:
    """What other processes hold of the GPU's memory, in words; None where that is not worth a word."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    held = total - free - torch.cuda.memory_reserved()
    return f"other processes hold {held / 2**30:.0f} of {total / 2**30:.0f} GiB" if held > _NOTICED else None
