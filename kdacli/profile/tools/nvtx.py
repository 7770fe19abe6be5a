"""NVTX ranges of one domain, "kda": cases, calls, and the stages inside a call. Free when no profiler listens."""

import contextlib
import functools
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kda_kernels.problem import Problem

DOMAIN = "kda"
# Ranges around what is not a kernel under test; reports leave them out.
INPUTS, WARM_UP, EVICT = "inputs", "warm-up", "evict"
SCAFFOLD = (INPUTS, WARM_UP, EVICT)
FIELDS = ("N", "T", "H", "HV", "K", "V")


def open_range(name: str, payload: Any = None) -> AbstractContextManager:
    """A context manager: an NVTX range in the domain "kda".

    Without the package nvtx it is torch's, in the default domain and with no payload, since torch needs no package for
    its own; without either it does nothing.

    Args:
        name: what a profiler shows.
        payload: a `shape`, or None.
    """
    return _backend()(name, payload)


def shape(problem: "Problem") -> Any:
    """A payload with the fields N, T (tokens in all), H, HV, K, V, which Nsight Systems shows by name.

    T alone, as a number, where the package nvtx is too old for structures; None where no profiler listens.
    """
    nvtx = _nvtx()
    if nvtx is None or not _listening(nvtx):
        return None
    if not structured():
        return problem.T
    import numpy as np

    return np.array([tuple(getattr(problem, f) for f in FIELDS)], dtype=[(f, "<i8") for f in FIELDS])


def structured() -> bool:
    """Whether the package nvtx is here and takes structures as payloads."""
    return hasattr(_nvtx(), "numpy_dtype")  # which came with them


def _listening(nvtx: Any) -> bool:
    return type(nvtx.get_domain(DOMAIN)).__name__ != "DummyDomain"


@functools.cache
def _nvtx() -> Any:
    """The package nvtx, or None."""
    with contextlib.suppress(ImportError):
        import nvtx

        return nvtx
    return None


@functools.cache
def _backend():
    if (nvtx := _nvtx()) is not None:
        return lambda name, payload: nvtx.annotate(name, domain=DOMAIN, payload=payload)
    with contextlib.suppress(ImportError):
        import torch

        if torch.cuda.is_available():
            return _torch_range
    return lambda name, payload: contextlib.nullcontext()


@contextlib.contextmanager
def _torch_range(name: str, payload: Any):
    import torch

    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()
