"""GPU architectures by name: what the compiler is told, and how much shared memory a block may have there."""

import dataclasses
import re

from kda_kernels.errors import InputError

# KiB of shared memory that one block can opt in to (CUDA programming guide, technical specifications).
SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
FALLBACK = "sm_90a"  # where there is no GPU to ask


@dataclasses.dataclass(frozen=True, order=True)
class Arch:
    """`number` is what Triton calls the architecture: 90 for sm_90a."""

    number: int

    @property
    def name(self) -> str:
        """As ptxas is told: from 90 on Triton builds for the architecture's own ("a") instruction set."""
        return f"sm_{self.number}" + ("a" if self.number >= 90 else "")

    @property
    def shared_limit(self) -> int:
        """Bytes of shared memory that one block may use."""
        return SHARED_KIB[self.number] * 1024

    def why_no_launch(self, shared_bytes: int) -> str | None:
        """Why a binary that needs so much shared memory a block cannot be launched here; None if it can."""
        if shared_bytes <= self.shared_limit:
            return None
        return f"cannot be launched: needs {shared_bytes} bytes of shared memory, a block here has {self.shared_limit}"


def parse(name: str) -> Arch:
    """The architecture called `name`: sm_90a, sm_90, 90a or 90.

    Raises:
        InputError: there is none of that name.
    """
    match = re.fullmatch(r"(?:sm_?)?(\d+)(a?)", name.strip().lower())
    if match is None or int(match[1]) not in SHARED_KIB or (match[2] and int(match[1]) < 90):
        known = ", ".join(Arch(number).name for number in SHARED_KIB)
        raise InputError(f"arch is {name}: it should be one of {known}")
    return Arch(int(match[1]))


def here() -> Arch:
    """The architecture of this machine's GPU, or sm_90a where there is none."""
    import torch

    if not torch.cuda.is_available():
        return parse(FALLBACK)
    major, minor = torch.cuda.get_device_capability()
    return parse(f"sm_{major}{minor}")
