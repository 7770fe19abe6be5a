"""Named stages inside a kernel's host half, so that a profiler can tell them apart.

`with stage("chain"):` around a launch costs one comparison until somebody enables it. The library depends on no
profiler: whoever wants ranges says how one is opened (`kda profile --nsys` gives NVTX ranges).
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

Opener = Callable[[str], AbstractContextManager]

_NOTHING = contextlib.nullcontext()
_opener: Opener | None = None


def stage(name: str) -> AbstractContextManager:
    """A context manager around one stage; does nothing unless `enable` was called."""
    return _NOTHING if _opener is None else _opener(name)


def enabled() -> bool:
    """Whether stages do anything."""
    return _opener is not None


def enable(opener: Opener) -> None:
    """From now on, in every thread, `stage(name)` is `opener(name)`."""
    global _opener
    _opener = opener


def disable() -> None:
    """Back to stages that do nothing."""
    global _opener
    _opener = None
