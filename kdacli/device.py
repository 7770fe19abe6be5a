"""Which device a command works on, and how much memory is free there."""

import ctypes
import os
import re
import sys
import uuid
import warnings
from pathlib import Path

from kda_kernels.errors import UnavailableError


def choose_device(name: str = "auto") -> str:
    """Returns "cuda" or "cpu" for "auto", "cpu" or "cuda", and changes nothing.

    Raises:
        UnavailableError: cuda is asked for and there is no CUDA GPU.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise UnavailableError("no CUDA GPU here: leave --device out or use --device cpu")
    return "cuda" if name == "cuda" or (name == "auto" and has_gpu) else "cpu"


def pick_device(name: str = "auto") -> str:
    """The device of `choose_device`, for all that this process runs.

    When the answer is "cpu", TRITON_INTERPRET=1 is set so that Triton kernels run in Triton's interpreter. Triton reads
    it when it is imported, so call this before importing any kernel; where Triton is there already, it is not set.
    Autotuned kernels, which there is no GPU to time on, then take their first configuration, and the interpreter is
    made quick.

    Raises:
        UnavailableError: cuda is asked for and there is no CUDA GPU.
    """
    if choose_device(name) == "cuda":
        return "cuda"
    if "triton" not in sys.modules:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    # Products of masked pairs may overflow, which is harmless; numpy, which the interpreter computes with, warns of it.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter")
    from kdacli import autotuning, interpreter

    autotuning.take_first()
    interpreter.quicken()
    return "cpu"


def describe(device: str) -> str:
    """The device as a person would name it: the GPU's name, or "CPU"."""
    if device != "cuda":
        return "CPU"
    import torch

    return torch.cuda.get_device_name()


def gpu_uuid() -> str | None:
    """UUID, as NVML and nvidia-smi know it, of the GPU that CUDA shows this process first; None where it shows none.

    The driver is asked, since only it knows what CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER come to. Makes no context.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, found = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0) or cuda.cuDeviceGetUuid_v2(found, device):
        return None
    return f"GPU-{uuid.UUID(bytes=bytes(found))}"


def free_memory(device: str) -> int | None:
    """Bytes free on `device`; None where the system does not say."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
