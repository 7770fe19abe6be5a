"""GPU architectures by name: what fits into a multiprocessor, and which GPU a kernel's tuning choices are made for."""

import dataclasses
import re

from kda_kernels.errors import InputError
from kda_kernels.variant import SHARED_KIB, Gpu

FALLBACK = "sm_90a"  # where there is no GPU to ask
HAVE_RUN = ("sm_90a",)  # where kernels of ours have run; for the others they are compiled only
REGISTERS = 65536  # 32-bit registers a multiprocessor, on every architecture here
TENSOR_MEMORY = 512  # columns a multiprocessor, where there is any (PTX ISA, tcgen05.alloc)
RESERVED_SHARED = 1024  # bytes that the system takes of each resident block


@dataclasses.dataclass(frozen=True)
class Arch:
    """One architecture.

    Attributes:
        name: as ptxas is told; from 90 on Triton builds for the architecture's own ("a") instruction set.
        product: a GPU that has it, and whose multiprocessors `gpu` counts.
        gpu: what tuning choices look at.
        max_warps, max_blocks: resident on a multiprocessor.
        shared_sm: bytes of shared memory of a multiprocessor; `gpu.shared` is what one block may have.
        warp: threads.
    """

    name: str
    product: str
    gpu: Gpu
    max_warps: int
    max_blocks: int
    shared_sm: int
    warp: int = 32

    @property
    def amd(self) -> bool:
        return self.name.startswith("gfx")

    @property
    def capability(self) -> tuple[int, int]:
        """(9, 0) for sm_90a, (9, 4) for gfx942: as torch says it."""
        digits = re.sub(r"\D", "", self.name)
        return (int(digits[0]), int(digits[1])) if self.amd else (int(digits[:-1]), int(digits[-1]))

    def on(self, product: str, sms: int) -> "Arch":
        """The same on a GPU of so many multiprocessors."""
        return dataclasses.replace(self, product=product, gpu=Gpu(sms, self.gpu.shared))

    def why_no_launch(self, shared_bytes: int, tensor_memory: int = 0) -> str | None:
        """Why a binary that needs so much a block cannot be launched here; None if it can."""
        if shared_bytes > self.gpu.shared:
            return (
                f"cannot be launched: needs {shared_bytes} bytes of shared memory, a block here has {self.gpu.shared}"
            )
        if tensor_memory > TENSOR_MEMORY:
            return f"cannot be launched: needs {tensor_memory} columns of tensor memory, there are {TENSOR_MEMORY}"
        return None


def _nvidia(number: int, product: str, sms: int, warps: int, blocks: int) -> Arch:
    """A block may have all of a multiprocessor's shared memory but the KiB that is reserved for it."""
    name = f"sm_{number}" + ("a" if number >= 90 else "")
    return Arch(name, product, Gpu(sms, SHARED_KIB[name] * 1024), warps, blocks, (SHARED_KIB[name] + 1) * 1024)


def _amd(name: str, product: str, units: int) -> Arch:
    """Compute units of 4 SIMDs of 8 waves."""
    return Arch(name, product, Gpu(units, SHARED_KIB[name] * 1024), 32, 32, SHARED_KIB[name] * 1024, warp=64)


# Warps and blocks a multiprocessor: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
# gfx942, gfx950: AMD's CDNA3 and CDNA4 ISA guides and LLVM's AMDGPU guide.
ARCHS = {
    arch.name: arch
    for arch in (
        _nvidia(80, "A100", 108, 64, 32),
        _nvidia(86, "A10", 72, 48, 16),
        _nvidia(87, "Jetson AGX Orin", 16, 48, 16),
        _nvidia(89, "L40S", 142, 48, 24),
        _nvidia(90, "H100 SXM", 132, 64, 32),
        _nvidia(100, "B200", 148, 64, 32),
        _nvidia(103, "B300", 148, 64, 32),
        _nvidia(120, "RTX PRO 6000", 188, 48, 24),
        _nvidia(121, "GB10", 48, 48, 24),
        _amd("gfx942", "MI300X", 304),
        _amd("gfx950", "MI350X", 256),
    )
}


def parse(name: str) -> Arch:
    """The architecture called `name`: sm_90a, sm_90, 90a, 90 or gfx942.

    Raises:
        InputError: there is none of that name.
    """
    if (name := name.strip().lower()).startswith("gfx") and name in ARCHS:
        return ARCHS[name]
    if match := re.fullmatch(r"(?:sm_?)?(\d+)(a?)", name):
        for suffix in ("a", "") if not match[2] else ("a",):
            if found := ARCHS.get(f"sm_{match[1]}{suffix}"):
                return found
    raise InputError(f"arch is {name}: it should be one of {', '.join(ARCHS)}")


def here() -> Arch | None:
    """The architecture of this machine's GPU, with its own number of multiprocessors; None where there is no GPU.

    Raises:
        InputError: it is none that is known here.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    if torch.version.hip:
        known = parse(properties.gcnArchName.partition(":")[0])
    else:
        known = parse(f"sm_{properties.major}{properties.minor}")
    return known.on(properties.name, properties.multi_processor_count)


def select(names: list[str], sms: int | None = None) -> list[Arch]:
    """The architectures named, in the order of `ARCHS`; none named: this machine's, or `FALLBACK`.

    One that is this machine's own counts its multiprocessors; `sms` sets their number for all.

    Raises:
        InputError: a name is unknown.
    """
    mine = here()
    wanted = {parse(name).name for name in names} or {mine.name if mine else FALLBACK}
    found = [mine if mine and mine.name == name else arch for name, arch in ARCHS.items() if name in wanted]
    return found if sms is None else [arch.on(f"{arch.name} GPU", sms) for arch in found]
