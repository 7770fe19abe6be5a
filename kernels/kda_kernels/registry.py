"""Every kernel by name, which one a call gets, and for a given problem "yes" or the reason why not.

Which of ours runs a call of the public functions, and all there is to the rule:

Decode: `cute-decode` on a GPU of sm_90a or newer with the DSL installed, when K is a multiple of 32, V of 16, the state
is V-first and its slots are 16-byte aligned; `triton-decode` runs everything else.

Step: `cute-step` on such a GPU, under the same conditions, when the states of the value heads that share a key head fit
the CTAs of a cluster (K = V = 128: up to 8 heads); `triton-step` runs everything else.

Prefill: `cute-prefill` runs what it can (`kda_kernels.cute.prefill.host`: on sm_90a, with the DSL, bf16 or fp16,
K = V = 128, V-first pools, rows that are multiples of 16 bytes), as it was faster in every shape measured;
`triton-prefill` runs everything else.

Nothing falls back in silence: `kernel_for` and `choose` return the kernel they chose, and a kernel asked for by name
either runs or raises an error with its reason. Registering costs no import of torch or triton: a kernel names its
module, which is imported when it is first asked or run.
"""

import dataclasses
import functools
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

from kda_kernels.errors import InputError, UnavailableError, one_line
from kda_kernels.problem import Op, Problem

if TYPE_CHECKING:
    import torch

    from kda_kernels.contract import Contract
    from kda_kernels.tensors import Inputs, Outputs

_failed: dict[str, Exception] = {}  # peers, by name, whose own code raised when it was asked


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
            optionally CAUSAL_IN_BITS, see there;
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

    @property
    def code(self) -> ModuleType:
        """Its module."""
        return sys.modules.get(self.module) or importlib.import_module(self.module)

    def unsupported(self, problem: Problem | None = None) -> str | None:
        """Why this kernel cannot run `problem` here, or nothing at all if that is None; None if it can.

        A reason is what the kernel says, or that a package is missing. Other errors of our kernels are errors. Those of
        a peer are its failure: it is taken at its silence, and `run` raises the error.
        """
        if problem is not None and problem.op is not self.op:
            return f"serves the op {self.op}, not {problem.op}"
        try:
            code = self.code
            if problem is not None and (lacking := problem.features - self.features):
                return f"it does not support {', '.join(sorted(lacking))}"
            return code.unsupported(problem)
        except Exception as error:
            if isinstance(error, ImportError) and not (error.name or "").startswith(("kda_kernels", "kdacli")):
                return one_line(error)
            if self.ours:
                raise
            _failed[self.name] = error
            return None

    @property
    def failure(self) -> str | None:
        """Of a peer that was asked: what went wrong in its own code then."""
        return one_line(_failed[self.name]) if self.name in _failed else None

    @property
    def features(self) -> frozenset[str]:
        """What it has of `kda_kernels.problem.FEATURES`: its module's FEATURES, or those of its CONTRACT."""
        contract: Contract | None = getattr(self.code, "CONTRACT", None)
        declared: frozenset[str] | None = getattr(self.code, "FEATURES", None)
        found = declared or (contract.features if contract else frozenset())
        return found | {"conv"} if self.follows_conv else found

    @property
    def causal_in_bits(self) -> bool:
        """Whether it says, as CAUSAL_IN_BITS in its module, that no bit of its results depends on a later token."""
        return getattr(sys.modules.get(self.module), "CAUSAL_IN_BITS", False)

    @property
    def carried_state(self) -> str | None:
        """The dtype that it says it carries states in, where that is less than their own; None: it says nothing.

        Known once `unsupported` was asked.
        """
        return getattr(getattr(sys.modules.get(self.module), "CONTRACT", None), "carried_state", None)

    @property
    def rounded_convolution(self) -> bool:
        """Whether it says that its convolution rounds what it gives. Known as `carried_state` is."""
        contract = getattr(sys.modules.get(self.module), "CONTRACT", None)
        return self.follows_conv or getattr(contract, "rounded_convolution", False)

    @property
    def follows_conv(self) -> bool:
        """Whether `run` calls the kernel of `kda_conv` before it, where the call has a convolution."""
        return self.ours and self.op is Op.PREFILL and self.backend != "torch"

    def run(self, inputs: "Inputs") -> "Outputs":
        """Raises `InputError` where the call uses a feature that it does not have, or its tensors have no memory."""
        from kda_kernels.checks import require_features, require_memory

        if self.name in _failed:
            raise _failed[self.name]
        require_memory(inputs.q)
        require_features(inputs, self.features, self.name)
        inputs = inputs.without_spare_slots()
        if inputs.conv is not None and self.follows_conv:
            from kda_kernels.triton.convolution import convolve

            inputs = convolve(inputs)
        return self.code.run(inputs)


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


def kernel_for(op: Op, inputs: "Inputs", out: "torch.Tensor | None" = None) -> Kernel:
    """The kernel of ours that runs these checked tensors, with `out` as in `prefill`."""
    cute, triton = _FASTEST[op]
    if not (inputs.q.is_cuda and _runs_on(cute, inputs.q.device)):
        return triton
    return cute if cute.code.unsupported_tensors(inputs, out) is None else triton


@functools.cache
def _runs_on(kernel: Kernel, device: "torch.device") -> bool:
    return kernel.code.unsupported_here(device) is None


def ours(op: Op, name: str, inputs: "Inputs") -> Kernel:
    """The kernel of ours that is called `name`.

    Raises:
        InputError: there is no such kernel of the op.
        UnavailableError: it cannot run where the tensors lie.
    """
    found = {kernel.name: kernel for kernel in kernels(op) if kernel.ours}
    if name not in found:
        raise InputError("kernel", f"is {name}", f"it should be {' or '.join(found)}")
    kernel = found[name]
    if kernel.backend == "cute" and not inputs.q.is_cuda:
        raise UnavailableError(f"{name}: {kernel.code.unsupported_here() or 'the tensors lie on the CPU'}")
    return kernel


def decode(
    inputs: "Inputs",
    out: "torch.Tensor | None" = None,
    *,
    final_state: "torch.Tensor | None" = None,
    kernel: str | None = None,
    op: Op = Op.DECODE,
) -> "Outputs":
    """Runs a checked problem of `op`, decode or step, with `kernel`, or the one that `kernel_for` gives.

    Args, Returns: as `kda_kernels.triton.decode.decode`.

    Raises:
        InputError: there is no such decode kernel of ours, or it does not take these tensors.
        UnavailableError: it cannot run on this machine.
    """
    found = kernel_for(op, inputs) if kernel is None else ours(op, kernel, inputs)
    inputs = inputs.without_spare_slots()
    if found.backend == "torch":
        return _plain(found, inputs, out, final_state)
    return found.code.decode(inputs, out, final_state=final_state)


def decode_again(call: tuple, out: "torch.Tensor") -> bool:
    """`decode` in place, if this call is like the one before: an engine's every step. False: nothing was done.

    Features are not looked at: cute-decode has all that `kda_decode` can ask for.

    Args:
        call: the fields of `Inputs` in their order.
    """
    cute = sys.modules.get("kda_kernels.cute.decode.host")
    return cute is not None and cute.again(call, out)


def prefill_again(call: tuple, out: "torch.Tensor", final_state: "torch.Tensor | None" = None) -> bool:
    """`prefill`, if this call is like the one before but for its lengths; as `decode_again`.

    A seed and scales are not looked at: a call that has them is another one.
    """
    cute = sys.modules.get("kda_kernels.cute.prefill.host")
    return cute is not None and cute.again(call, out, final_state)


def prefill(
    inputs: "Inputs",
    out: "torch.Tensor | None" = None,
    *,
    final_state: "torch.Tensor | None" = None,
    chunk_indices: "torch.Tensor | None" = None,
    kernel: str | None = None,
) -> "Outputs":
    """Runs a checked problem with `kernel`, or the one that `kernel_for` gives.

    Args, Returns: as `kda_kernels.triton.prefill.prefill`; cute-prefill needs no `chunk_indices`.

    Raises:
        InputError: there is no such prefill kernel of ours, or it does not take these tensors.
        UnavailableError: it cannot run on this machine.
    """
    found = kernel_for(Op.PREFILL, inputs, out) if kernel is None else ours(Op.PREFILL, kernel, inputs)
    inputs = inputs.without_spare_slots()
    if found.backend == "torch":
        return _plain(found, inputs, out, final_state)
    table = {} if found.backend == "cute" else {"chunk_indices": chunk_indices}
    return found.code.prefill(inputs, out=out, final_state=final_state, **table)


def prefill_with_states(inputs: "Inputs") -> "tuple[Outputs, torch.Tensor]":
    """`prefill`, and the state at the start of each chunk: see return_intermediate_states there."""
    return kernel_for(Op.PREFILL, inputs).code.prefill(inputs, return_intermediate_states=True)


def _plain(
    kernel: Kernel, inputs: "Inputs", out: "torch.Tensor | None", final_state: "torch.Tensor | None" = None
) -> "Outputs":
    """A kernel that makes its own outputs, copied to where they are wanted."""
    outputs = kernel.run(inputs)
    if out is not None:
        outputs.o = out.copy_(outputs.o)
    if final_state is not None and outputs.final_state is not None:
        outputs.final_state = final_state.copy_(outputs.final_state)
    return outputs


_T, _C, _R = "kda_kernels.triton", "kda_kernels.cute", "kda_kernels.reference"
for _kernel in (
    Kernel("cute-decode", Op.DECODE, "cute", f"{_C}.decode.host", "fused recurrent update, in place, sm_90a"),
    Kernel("triton-decode", Op.DECODE, "triton", f"{_T}.decode", "fused recurrent update, in place"),
    Kernel("cute-prefill", Op.PREFILL, "cute", f"{_C}.prefill.host", "chunks and chain in one kernel, sm_90a"),
    Kernel("triton-prefill", Op.PREFILL, "triton", f"{_T}.prefill", "chunk factors, their inverse, then the chain"),
    Kernel("triton-gate", Op.GATE, "triton", f"{_T}.gate", "kda_gate_chunk_cumsum, one kernel"),
    Kernel("triton-gate-unfused", Op.GATE, "triton", f"{_T}.gate_unfused", "activation, then cumsum: the baseline"),
    Kernel("torch-decode", Op.DECODE, "torch", f"{_R}.plain_recurrent", "plain torch, float32"),
    Kernel("cute-step", Op.STEP, "cute", f"{_C}.decode.step", "decode with convolution and gated norm, fused, sm_90a"),
    Kernel("triton-step", Op.STEP, "triton", f"{_T}.decode", "decode with convolution and gated norm, fused"),
    Kernel("torch-step", Op.STEP, "torch", f"{_R}.plain_recurrent", "the same with convolution and gated norm"),
    Kernel("torch-prefill", Op.PREFILL, "torch", f"{_R}.plain_chunk", "plain torch, chunked"),
):
    register(_kernel)
_FASTEST = {
    Op.DECODE: (get("cute-decode"), get("triton-decode")),
    Op.STEP: (get("cute-step"), get("triton-step")),
    Op.PREFILL: (get("cute-prefill"), get("triton-prefill")),
}
