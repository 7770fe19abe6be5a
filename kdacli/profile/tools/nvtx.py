"""NVTX ranges of one domain, "kda": cases, calls, and the stages inside a call. Free when no profiler listens.

Where the package nvtx is not installed there are none, and only what needs a profiler of NVIDIA's asks for it.
"""

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kda_kernels.errors import UnavailableError

if TYPE_CHECKING:
    from kda_kernels.problem import Problem

DOMAIN = "kda"
# Ranges around what is not a kernel under test; reports leave them out.
INPUTS, WARM_UP, EVICT = "inputs", "warm-up", "evict"
SCAFFOLD = (INPUTS, WARM_UP, EVICT)
FIELDS = ("N", "T", "H", "HV", "K", "V")


def open_range(name: str, payload: Any = None) -> AbstractContextManager:
    """A context manager: an NVTX range in the domain "kda" that a profiler shows by `name`; `payload` is a `shape`."""
    nvtx = _package()
    return nullcontext() if nvtx is None else nvtx.annotate(name, domain=DOMAIN, payload=payload)


def require() -> None:
    """Raises `UnavailableError` where ranges cannot be shown."""
    if _package() is None:
        raise UnavailableError("nvtx, which names what a profiler sees, is not installed: pip install nvtx")


def shape(problem: "Problem") -> Any:
    """A payload with the fields N, T (tokens in all), H, HV, K, V, which Nsight Systems shows by name.

    T alone, as a number, where the package nvtx is too old for structures; None where no profiler listens.
    """
    if not listening():
        return None
    if not structured():
        return problem.T
    import numpy as np

    return np.array([tuple(getattr(problem, f) for f in FIELDS)], dtype=[(f, "<i8") for f in FIELDS])


def structured() -> bool:
    """Whether the package nvtx takes structures as payloads."""
    return hasattr(_package(), "numpy_dtype")  # which came with them


def listening() -> bool:
    """Whether a profiler does."""
    nvtx = _package()
    return nvtx is not None and type(nvtx.get_domain(DOMAIN)).__name__ != "DummyDomain"


def _package() -> ModuleType | None:
    try:
        import nvtx
    except ImportError:
        return None
    return nvtx
