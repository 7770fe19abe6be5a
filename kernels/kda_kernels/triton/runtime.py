"""Can Triton run here, and on what: a GPU, or its interpreter on the CPU."""

import contextlib
import functools
import importlib.util
import os
from contextlib import AbstractContextManager

import torch

from kda_kernels import environment
from kda_kernels.errors import InputError, UnavailableError
from kda_kernels.problem import CHUNK
from kda_kernels.tensors import Inputs
from kda_kernels.variant import SHARED_KIB

MIN_CAPABILITY = (8, 0)  # bf16 and tf32 tensor cores
MAX_TOKEN_STRIDE = 2**31 // CHUNK  # elements; no tile has more rows


def interpreted() -> bool:
    """True when Triton was told to interpret its kernels on the CPU (the variable is read at its import)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unsupported_here(device: torch.device | None = None) -> str | None:
    """Why no Triton kernel can run on this machine, and what to do about it; None if one can.

    Args:
        device: the GPU that is meant; None: the current one.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if interpreted():
        return _interpreter_fails()
    if not torch.cuda.is_available():
        return "no CUDA GPU: set TRITON_INTERPRET=1 before Python starts to run it, slowly, on the CPU"
    if torch.version.cuda and (have := torch.cuda.get_device_capability(device)) < MIN_CAPABILITY:
        return f"the GPU is sm_{have[0]}{have[1]}: sm_80 or newer is needed"
    return None


@functools.cache
def _interpreter_fails() -> str | None:
    """Triton's interpreter before 3.7 converts arrays of one element in a way that NumPy 2.4 took away."""
    import numpy
    import triton

    found = [tuple(map(int, package.__version__.split(".")[:2])) for package in (triton, numpy)]
    if found[0] < (3, 7) and found[1] >= (2, 4):
        return "Triton before 3.7 cannot interpret with NumPy 2.4 or newer: pip install 'numpy<2.4' or 'triton>=3.7'"
    return None


def require_device(tensor: torch.Tensor) -> None:
    """Raises `UnavailableError` unless Triton can work on `tensor` where it lies."""
    if tensor.is_cuda:
        reason = _unsupported_gpu(tensor.device)
    else:
        move = "move them to a CUDA GPU, or set TRITON_INTERPRET=1 before Python starts"
        reason = None if interpreted() else f"the tensors lie on {tensor.device}: {move}"
    if reason is not None:
        raise UnavailableError(reason)


_unsupported_gpu = functools.cache(unsupported_here)  # of one GPU, on the way of every call


def require_token_strides(inputs: Inputs, out: torch.Tensor | None) -> None:
    """Raises `InputError` where 32 bits do not hold the offsets of a chunk's tokens."""
    for name, t in (("q", inputs.q), ("k", inputs.k), ("v", inputs.v), ("g", inputs.g), ("out", out)):
        if t is not None and (stride := t.stride(1)) >= MAX_TOKEN_STRIDE and t.shape[1] > 1:
            raise InputError(name, f"has stride {stride} between tokens", f"it should be under {MAX_TOKEN_STRIDE}")


def on_device(tensor: torch.Tensor) -> AbstractContextManager:
    """Makes the tensor's GPU the current one: Triton launches there, wherever the pointers lead."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def register_limit(registers: int | None) -> dict[str, int]:
    """The launch option for at most so many registers per thread, where the compiler has it (NVIDIA's)."""
    return {} if registers is None or interpreted() or torch.version.cuda is None else {"maxnreg": registers}


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; 1 for the interpreter on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def tuned_for() -> str | None:
    """The architecture whose launch configurations KDA_TRITON_ARCH asks for, whatever the GPU; None: the GPU's own.

    Raises:
        InputError: there is none of that name.
    """
    return environment.read("KDA_TRITON_ARCH")


@functools.cache
def has_wgmma(device: torch.device | None = None) -> bool:
    """Whether Triton compiles products for Hopper's own instructions; not where TRITON_OVERRIDE_ARCH is sm80.

    Args:
        device: the GPU that is meant; None: the current one.
    """
    if interpreted() or torch.version.cuda is None or not torch.cuda.is_available():
        return False
    compiled_for = environment.read("TRITON_OVERRIDE_ARCH")
    return (int(compiled_for[2:]) // 10 if compiled_for else torch.cuda.get_device_capability(device)[0]) == 9


@functools.cache
def generation(device: torch.device) -> int:
    """Of the GPU's matrix units: 8 for NVIDIA's sm_80 and sm_89, 9, 10, 12; 0 for AMD's; 9 for the interpreter."""
    if name := tuned_for():
        return 0 if name.startswith("gfx") else int(name.strip("sm_a")) // 10
    if device.type != "cuda":
        return 9
    return 0 if torch.version.hip else torch.cuda.get_device_capability(device)[0]


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have: H100 232448, RTX 4090 101376. The interpreter has no limit."""
    if name := tuned_for():
        return SHARED_KIB[name] * 1024
    if device.type != "cuda":
        return 1 << 30
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 101376)
