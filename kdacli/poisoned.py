"""Memory that is NaN where nothing was put."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, `torch.empty` and its kin hand out NaN (and the largest integers), so that an element that a kernel does
    not write, or reads before it is written, cannot pass for a result.
    """
    # `torch.use_deterministic_algorithms` would set the same, and import torch's compiler, which takes seconds.
    mode = torch.get_deterministic_debug_mode()
    flags: Any = torch.utils.deterministic  # a module whose flag is a property
    fill = flags.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.set_deterministic_debug_mode("warn")
            flags.fill_uninitialized_memory = True
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)
            flags.fill_uninitialized_memory = fill
