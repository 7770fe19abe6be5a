"""What `kda compile` asks of a kernel: named variants, each of which builds itself for an architecture without a GPU.

Triton's launches need no description: `kda compile` records them. A kernel's module may have `USUAL`, problems by name:
what it is called on where nobody says anything. A module whose kernels are not Triton's has `variants(problem=None,
gpu=H100) -> Iterator[Variant]` beside it: what it launches for `problem` on `gpu`, or for its usual problems.

A variant may also have `missing(arch) -> str | None`: what the cache that launches use would know it by, if it is not
there; None if it is there, or if nothing is kept. `kda verify` builds beforehand what is missing.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from kda_kernels.problem import Problem

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What tuning choices may look at.

    Attributes:
        sms: multiprocessors (AMD: compute units).
        shared: bytes of shared memory that one block may have.
    """

    sms: int
    shared: int


H100 = Gpu(sms=132, shared=232448)

# KiB of shared memory that one block may have, by architecture. CUDA C++ Programming Guide, "Technical Specifications
# per Compute Capability"; LDS of AMD's CDNA3 and CDNA4 ISA guides.
SHARED_KIB = {
    "sm_80": 163, "sm_86": 99, "sm_87": 163, "sm_89": 99, "sm_90a": 227, "sm_100a": 227, "sm_103a": 227,
    "sm_120a": 99, "sm_121a": 99, "gfx942": 64, "gfx950": 160,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Built:
    """What a compiler made of one variant.

    Attributes:
        cubin: the binary; for an AMD architecture the code object (hsaco).
        shared_bytes: shared memory a block, static and dynamic together.
        num_warps: of a block.
        ptx: as ptxas got it, where there is any.
        ir: text by file name extension, what came before that: {"ttir": .., "ttgir": .., "llir": ..} or {"mlir": ..}.
        log: what `ptxas -v` said. None: registers are then read from the binary.
        compile_s: seconds that the compiler took; None if it took none, or does not say.
        cached: whether it lay in the cache that launches use.
        tensor_memory: columns of tensor memory a block allocates (sm_100).
    """

    cubin: bytes
    shared_bytes: int
    num_warps: int
    ptx: str | None = None
    ir: dict[str, str] = dataclasses.field(default_factory=dict)
    log: str | None = None
    compile_s: float | None = None
    cached: bool = False
    tensor_memory: int = 0


def step_arguments(problem: Problem, tensor: "Callable[..., torch.Tensor]") -> dict[str, Any]:
    """Of a problem with parts: q, k and v as views of one projection, `conv` and `norm`, as arguments of `Inputs`.

    Args:
        tensor: makes one, of a shape and `dtype`, a name.
    """
    from kda_kernels.tensors import Convolution, GatedNorm

    parts, p = problem.parts, problem
    if parts is None:
        return {}
    longest = max(p.seq_lens, default=1)
    tokens = (1, p.T) if p.packed else (p.N, longest)
    found: dict[str, Any] = {}
    if parts.width:
        sizes = [p.H * p.K, p.H * p.K, p.HV * p.V]
        kept = parts.width - 1 + (max(longest, 2) - 1 if "num_accepted_tokens" in p.features else 0)
        shape = (kept, sum(sizes)) if parts.tokens_first else (sum(sizes), kept)
        q, k, v = tensor(*tokens, sum(sizes), dtype=p.dtype).split(sizes, 2)
        found = {"q": q.unflatten(2, (p.H, p.K)), "k": k.unflatten(2, (p.H, p.K)), "v": v.unflatten(2, (p.HV, p.V))}
        found["conv"] = Convolution(
            weight=tensor(sum(sizes), parts.width, dtype=parts.weight_dtype),
            bias=tensor(sum(sizes), dtype=parts.weight_dtype) if parts.bias else None,
            states=tensor(p.N if p.pool_slots is None else p.pool_slots, *shape, dtype=parts.state_dtype),
            tokens_first=parts.tokens_first,
        )
    if parts.norm:
        found["norm"] = GatedNorm(tensor(*tokens, p.HV, p.V, dtype=p.dtype), tensor(p.V, dtype=parts.norm_dtype))
    return found


def stored_arguments(problem: Problem, tensor: "Callable[..., torch.Tensor]") -> dict[str, Any]:
    """What a pool in two bytes comes with, as arguments of `Inputs`; `tensor`: as in `step_arguments`."""
    has, slots = problem.features, problem.pool_slots
    return {
        "state_scales": tensor(slots, problem.HV, problem.V, dtype="float32") if "state_scales" in has else None,
        "rounding_seed": tensor(1, dtype="int64") if "rounding_seed" in has else None,
    }


class Variant(Protocol):
    """One specialisation of a kernel, as a launch would build it."""

    @property
    def name(self) -> str:
        """Unique within its module."""

    def build(self, arch: str) -> Built:
        """Compiles it for an architecture as `kda compile` names it (sm_90a, gfx942), or takes it from the cache.

        What it builds lies afterwards where a launch of the same looks first.

        Raises:
            UnavailableError: the kernel is not meant for that architecture, or a package is missing.
            Exception: the compiler's own, when it refuses; its last line becomes the answer.
        """
