"""Every kernel by name: which op it serves, and for a given problem "yes" or the reason why not.

Nothing here falls back in silence: `choose` returns the kernel it chose, and a kernel asked for by name either runs or
raises `UnavailableError` with its reason. Registering costs no import of torch or triton: a kernel names its module,
which is imported when it is first asked or run.
"""

import dataclasses
import importlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kda_kernels.errors import InputError, UnavailableError, one_line
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
            optionally FEATURES, what it has of `kda_kernels.problem.FEATURES`: without it nothing;
            optionally `USUAL` and `variants`, used by `kda compile`: see `kda_kernels.variant`. The Triton launches of
                `run` are recorded.
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
            module = importlib.import_module(self.module)
            if problem is not None and (lacking := problem.features - self.features):
                return f"it does not support {', '.join(sorted(lacking))}"
            return module.unsupported(problem)
        except Exception as error:
            return one_line(error)

    @property
    def features(self) -> frozenset[str]:
        """What it has of `kda_kernels.problem.FEATURES`: its module's FEATURES, or those of its CONTRACT."""
        module = importlib.import_module(self.module)
        return getattr(module, "FEATURES", None) or getattr(getattr(module, "CONTRACT", None), "features", frozenset())

    @property
    def carried_state(self) -> str | None:
        """The dtype that it says it carries states in, where that is less than their own; None: it says nothing.

        Known once `unsupported` was asked.
        """
        return getattr(getattr(sys.modules.get(self.module), "CONTRACT", None), "carried_state", None)

    def run(self, inputs: "Inputs") -> "Outputs":
        """Raises `InputError` where the call uses a feature that it does not have."""
        from kda_kernels.checks import require_features

        require_features(inputs, self.features, self.name)
        return importlib.import_module(self.module).run(inputs.without_spare_slots())


_KERNELS: dict[str, Kernel] = {}


def register(kernel: Kernel) -> Kernel:
    """Adds a kernel. Raises `InputError` if the name is taken."""
    if kernel.name in _KERNELS:
        raise InputError("kernel", f"{kernel.name} is registered already", "choose another name")
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
        raise InputError("kernel", f"{name} is unknown", f"there are {', '.join(_KERNELS)}") from None


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
_P = "kda_kernels.peers"
for _kernel in (
    Kernel("cute-decode", Op.DECODE, "cute", "kda_kernels.cute.decode", "fused recurrent update, in place, sm_90a"),
    Kernel("triton-decode", Op.DECODE, "triton", f"{_T}.decode", "fused recurrent update, in place"),
    Kernel("cute-prefill", Op.PREFILL, "cute", "kda_kernels.cute.prefill", "chunks and chain in one kernel, sm_90a"),
    Kernel("triton-prefill", Op.PREFILL, "triton", f"{_T}.prefill", "chunk factors, their inverse, then the chain"),
    Kernel("triton-gate", Op.GATE, "triton", f"{_T}.gate", "kda_gate_chunk_cumsum, one kernel"),
    Kernel("triton-gate-unfused", Op.GATE, "triton", f"{_T}.gate_unfused", "activation, then cumsum: the baseline"),
    Kernel("torch-decode", Op.DECODE, "torch", "kda_kernels.reference.plain_recurrent", "plain torch, float32"),
    Kernel("torch-prefill", Op.PREFILL, "torch", "kda_kernels.reference.plain_chunk", "plain torch, chunked"),
    Kernel("fla-decode", Op.DECODE, "fla", f"{_P}.fla_decode", "FLA's fused_recurrent_kda_fwd", False),
    Kernel("fla-prefill", Op.PREFILL, "fla", f"{_P}.fla_prefill", "FLA's chunk_kda", False),
    Kernel("fla-gate", Op.GATE, "fla", f"{_P}.fla_gate", "FLA's kda_gate_chunk_cumsum", False),
    Kernel("flashkda-prefill", Op.PREFILL, "flashkda", f"{_P}.flashkda_prefill", "FlashKDA, as vLLM ships it", False),
    Kernel("cudnn-prefill", Op.PREFILL, "cudnn", f"{_P}.cudnn_prefill", "cuDNN frontend's kda_hopper_cuda", False),
    Kernel("sglang-decode", Op.DECODE, "sglang", f"{_P}.sglang_decode", "SGLang's CuTe DSL decode", False),
    Kernel("cula-decode", Op.DECODE, "cula", f"{_P}.cula_decode", "cuLA's CuTe DSL decode", False),
    Kernel(
        "flashinfer-decode", Op.DECODE, "flashinfer", f"{_P}.flashinfer_decode", "FlashInfer's recurrent_kda", False
    ),
    Kernel(
        "flashinfer-prefill", Op.PREFILL, "flashinfer", f"{_P}.flashinfer_prefill", "FlashInfer's recurrent_kda", False
    ),
):
    register(_kernel)
