"""The compiler and the tools that come with Triton's wheel."""

import importlib.util
from pathlib import Path

from kda_kernels.errors import UnavailableError


def require_triton() -> None:
    """Raises `UnavailableError` where triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        raise UnavailableError("triton is not installed: pip install triton")


def tool(name: str) -> Path:
    """NVIDIA's nvdisasm or cuobjdump. The file is not there if Triton was built without it."""
    require_triton()
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
