"""A GPU that is not there: torch and Triton say that it is, and its tensors lie in this machine's memory.

It lets a kernel's host half run where nothing can be launched, so that `recorder` sees what it would launch. Tensors
stay on the CPU; asked for their device they answer cuda:0, and what is put on a GPU stays where it is.
"""

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from kdacli.compile.arch import REGISTERS, Arch

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
_DEVICE, _IS_CUDA = (vars(torch._C.TensorBase)[name].__get__ for name in ("device", "is_cuda"))


class _OnGpu(TorchFunctionMode):
    """Every tensor says that it is on the GPU; what is asked for there is made here."""

    def __torch_function__(self, func: Any, kinds: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func == _DEVICE:
            return CUDA
        if func == _IS_CUDA:
            return True
        if func is torch.Tensor.get_device:
            return 0
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.device:  # a name, nothing is there yet
            return func(*args, **(kwargs or {}))
        kwargs = {name: _here(value) if name == "device" else value for name, value in (kwargs or {}).items()}
        kwargs.pop("pin_memory", None)
        return func(*map(_here, args), **kwargs)


def _here(value: Any) -> Any:
    """CPU for anything that names a GPU."""
    if isinstance(value, torch.device) and value.type == "cuda":
        return CPU
    if isinstance(value, str) and (value == "cuda" or value.startswith("cuda:")):
        return CPU
    return value


class _Driver:
    """What Triton asks of its driver before it launches."""

    def __init__(self, arch: Arch) -> None:
        from kdacli.compile.specialised import target_of

        self.target = target_of(arch.name)
        limits = {"multiprocessor_count": arch.gpu.sms, "max_shared_mem": arch.gpu.shared}
        limits |= {"max_num_regs": REGISTERS, "warpSize": self.target.warp_size}
        self.utils = types.SimpleNamespace(get_device_properties=lambda device: limits)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return self.target.arch  # Triton keeps what it knows of a kernel by device: each architecture is one of its own

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CUDA

    def get_device_interface(self) -> Any:
        return torch.cuda


@contextlib.contextmanager
def gpu(arch: Arch) -> Iterator[None]:
    """Inside it, torch and Triton find one GPU of that architecture. Nothing can be launched on it."""
    from triton.runtime import driver

    answers = _torch_cuda(arch)
    versions = {"hip": torch.version.hip or "6.4", "cuda": None} if arch.amd else {"cuda": torch.version.cuda or "12.8"}
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(replaced(torch.cuda, name, answer))
        for name, version in versions.items():
            stack.enter_context(replaced(torch.version, name, version))
        stack.enter_context(replaced(driver, "_active", _Driver(arch)))
        stack.enter_context(_OnGpu())
        yield


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute has another value inside."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _torch_cuda(arch: Arch) -> dict[str, Any]:
    """What torch.cuda says of the GPU."""
    properties = types.SimpleNamespace(
        name=arch.product,
        major=arch.capability[0],
        minor=arch.capability[1],
        multi_processor_count=arch.gpu.sms,
        shared_memory_per_block_optin=arch.gpu.shared,
        shared_memory_per_multiprocessor=arch.shared_sm,
        regs_per_multiprocessor=REGISTERS,
        max_threads_per_multi_processor=arch.max_warps * arch.warp,
        warp_size=arch.warp,
        gcnArchName=arch.name,
    )
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: arch.capability,
        "get_device_name": lambda device=None: arch.product,
        "synchronize": lambda device=None: None,
        "device": lambda device: contextlib.nullcontext(),
        "device_of": lambda tensor: contextlib.nullcontext(),
        "current_stream": lambda device=None: types.SimpleNamespace(cuda_stream=0, synchronize=lambda: None),
        "is_current_stream_capturing": lambda: False,
    }
