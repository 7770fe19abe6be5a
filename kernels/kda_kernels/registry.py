"""Every kernel by name: which op it serves, and for a given problem "yes" or the reason why not.

Nothing here falls back in silence: `choose` returns the kernel it chose, and a kernel asked for by name either runs or
raises `UnavailableError` with its reason. Registering costs no import of torch or triton: a kernel names its module,
which is imported when it is first asked or run.
"""

import dataclasses
import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kda_kernels.errors import InputError, UnavailableError
from kda_kernels.problem import Op, Problem

if TYPE_CHECKING:
    from kda_kernels.tensors import Inputs, Outputs


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes:
        name: unique, backend first: triton-decode, cute-decode, fla-chunk, ...
        op: the operation it serves.
        backend: triton, cute, torch, or the peer's package.
        module: import path of a module with
            `unsupported(problem) -> str | None`  the reason why this machine cannot run this problem with it
                (`problem` None: can it run anything here?), or None for yes;
            `run(inputs) -> Outputs`  the kernel itself; a pool in `inputs.state` is updated in place;
            optionally `variants(problem=None) -> Iterator[Variant]`, used by `kda compile`: what it launches for a
                problem, or its usual specialisations.
        summary: one line for `kda kernels`.
        ours: False for peers.
    """

    name: str
    op: Op
    backend: str
    module: str
    summary: str
    ours: bool = True

    def unsupported(self, problem: Problem | None = None) -> str | None:
        """Why this kernel cannot run `problem` here, or nothing at all if that is None; None if it can.

        A module that cannot be imported is a reason like any other: a peer's package may fail in any way at its import.
        """
        if problem is not None and problem.op is not self.op:
            return f"serves the op {self.op}, not {problem.op}"
        try:
            return importlib.import_module(self.module).unsupported(problem)
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())}"

    def run(self, inputs: "Inputs") -> "Outputs":
        return importlib.import_module(self.module).run(inputs)


_KERNELS: dict[str, Kernel] = {}


def register(kernel: Kernel) -> Kernel:
    """Adds a kernel. Raises `InputError` if the name is taken."""
    if kernel.name in _KERNELS:
        raise InputError(f"kernel {kernel.name} is registered already: choose another name")
    _KERNELS[kernel.name] = kernel
    return kernel


def kernels(op: Op | str | None = None) -> Iterator[Kernel]:
    """All kernels, in order of registration (ours and fastest first), or those of one op."""
    return (k for k in _KERNELS.values() if op is None or k.op == op)


def get(name: str) -> Kernel:
    """Raises `InputError` naming the kernels there are."""
    try:
        return _KERNELS[name]
    except KeyError:
        raise InputError(f"kernel {name} is unknown: there are {', '.join(_KERNELS)}") from None


def choose(problem: Problem) -> Kernel:
    """The first of our kernels that can run `problem` here.

    Raises:
        UnavailableError: none can; the message holds each one's reason.
    """
    reasons = {}
    for kernel in kernels(problem.op):
        if kernel.ours:
            if (reason := kernel.unsupported(problem)) is None:
                return kernel
            reasons[kernel.name] = reason
    raise UnavailableError(
        f"no kernel can run {problem.name} here: " + "; ".join(f"{name}: {why}" for name, why in reasons.items())
    )


_T = "kda_kernels.triton"
for _kernel in (
    # cute-decode, cute-prefill: their place is kda_kernels/cute, and they come before the Triton kernels here
    Kernel("triton-decode", Op.DECODE, "triton", f"{_T}.decode", "fused recurrent update, in place"),
    Kernel("triton-prefill", Op.PREFILL, "triton", f"{_T}.prefill", "chunk factors, their inverse, then the chain"),
    Kernel("triton-gate", Op.GATE, "triton", f"{_T}.gate", "kda_gate_chunk_cumsum, one kernel"),
    Kernel("triton-gate-unfused", Op.GATE, "triton", f"{_T}.gate_unfused", "activation, then cumsum: the baseline"),
    Kernel("torch-decode", Op.DECODE, "torch", "kda_kernels.reference.plain_recurrent", "plain torch, float32"),
    Kernel("torch-prefill", Op.PREFILL, "torch", "kda_kernels.reference.plain_chunk", "plain torch, chunked"),
    Kernel("fla-decode", Op.DECODE, "fla", "kda_kernels.peers.fla_decode", "FLA's fused_recurrent_kda_fwd", False),
    Kernel("fla-prefill", Op.PREFILL, "fla", "kda_kernels.peers.fla_prefill", "FLA's chunk_kda", False),
    Kernel("fla-gate", Op.GATE, "fla", "kda_kernels.peers.fla_gate", "FLA's kda_gate_chunk_cumsum", False),
):
    register(_kernel)
