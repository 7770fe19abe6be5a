"""NVTX ranges of one domain, "kda": cases, kernels, and the stages inside a kernel. Free when no profiler listens."""

import contextlib
import functools
from contextlib import AbstractContextManager

DOMAIN = "kda"
# Ranges around what is not a kernel under test; reports leave them out.
INPUTS, WARM_UP, EVICT = "inputs", "warm-up", "evict"
SCAFFOLD = (INPUTS, WARM_UP, EVICT)


def open_range(name: str) -> AbstractContextManager:
    """A context manager: an NVTX range in the domain "kda".

    Without the package nvtx it is torch's, in the default domain, since torch needs no package for its own; without
    either it does nothing.
    """
    return _backend()(name)


@functools.cache
def _backend():
    with contextlib.suppress(ImportError):
        import nvtx

        return functools.partial(nvtx.annotate, domain=DOMAIN)
    with contextlib.suppress(ImportError):
        import torch

        if torch.cuda.is_available():
            return _torch_range
    return _nothing


@contextlib.contextmanager
def _torch_range(name: str):
    import torch

    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()


def _nothing(name: str) -> AbstractContextManager:
    return contextlib.nullcontext()
