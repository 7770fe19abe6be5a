"""Can CuTe DSL kernels run here, and if not, why."""

import functools
import importlib.metadata
import importlib.util
import re

import torch

OLDEST_DSL = (4, 6, 3)  # 4.5 asks the driver of a GPU while it compiles
MIN_CAPABILITY = (9, 0)
HOW = 'pip install "kdacli[cute]"'


def unsupported_here(device: torch.device | None = None) -> str | None:
    """Why no CuTe kernel can run on this machine's current GPU, or on `device`, and what to do; None if one can."""
    if (reason := missing_packages()) is not None:
        return reason
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "no CUDA GPU: CuTe DSL kernels need one of sm_90a or newer"
    if (have := torch.cuda.get_device_capability(device)) < MIN_CAPABILITY:
        return f"the GPU is sm_{have[0]}{have[1]}: CuTe DSL kernels need sm_90a or newer"
    return None


@functools.cache
def missing_packages() -> str | None:
    """Why nothing can be compiled; None if everything is there."""
    for name, module in (("nvidia-cutlass-dsl", "cutlass"), ("apache-tvm-ffi", "tvm_ffi")):
        if importlib.util.find_spec(module) is None:
            return f"{name} is not installed: {HOW}"
    try:
        have = importlib.metadata.version("nvidia-cutlass-dsl")
    except importlib.metadata.PackageNotFoundError:
        return f"nvidia-cutlass-dsl has no metadata, so its version is unknown: {HOW}"
    if tuple(map(int, re.findall(r"\d+", have)[:3])) < OLDEST_DSL:
        return f"nvidia-cutlass-dsl is {have}: {'.'.join(map(str, OLDEST_DSL))} or newer is needed, {HOW}"
    return None


@functools.cache
def architecture(device: torch.device) -> str:
    """The DSL's name for the GPU's architecture: sm_90a."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}a"
