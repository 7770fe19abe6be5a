"""A user's function as a kernel."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kda_kernels.errors import KdaError
from kda_kernels.problem import FEATURES, Op, Problem
from kda_kernels.registry import Kernel
from kdacli.userkernels.signature import Signature

if TYPE_CHECKING:
    from kda_kernels.tensors import Inputs, Outputs
    from kda_kernels.variant import Variant


class ReturnedError(TypeError):
    """A function returned something that is not what the convention says: the kernel's fault, as any crash is."""


@dataclasses.dataclass(frozen=True)
class UserKernel(Kernel):
    """A kernel whose code is a function rather than a module of ours.

    Its name is the spec it was resolved from; it is not in the registry. It can be pickled: another process resolves
    the spec again.

    Attributes:
        function: what is called, by the convention in `kdacli.userkernels`.
        signature: what it takes.
    """

    function: Callable[..., Any] = dataclasses.field(kw_only=True)
    signature: Signature = dataclasses.field(kw_only=True, compare=False)

    def unsupported(self, problem: Problem | None = None) -> str | None:
        """As `Kernel.unsupported`: first what the signature rules out, then what the function's `supports` says."""
        if problem is None:
            return None
        if problem.op is not self.op:
            return f"serves the op {self.op}, not {problem.op}"
        if lacking := problem.features - self.features:
            return f"it does not support {', '.join(sorted(lacking))}"
        return self.signature.refusal(problem) or self._supports(problem)

    @property
    def features(self) -> frozenset[str]:
        """As `Kernel.features`: what the signature names, and what the function's attribute `features` says."""
        return self.signature.features | FEATURES.intersection(getattr(self.function, "features", ()))

    def _supports(self, problem: Problem) -> str | None:
        supports = getattr(self.function, "supports", None)
        if supports is None:
            return None
        try:
            answer = supports(problem)
        except KdaError as error:
            return str(error)
        if answer is None or answer is True:
            return None
        return "its supports() says no, and gives no reason" if answer is False else str(answer)

    @property
    def causal_in_bits(self) -> bool:
        """As `Kernel.causal_in_bits`: what the function's attribute of that name says."""
        return bool(getattr(self.function, "causal_in_bits", False))

    @property
    def carried_state(self) -> str | None:
        """As `Kernel.carried_state`: what the function's attribute of that name says."""
        return getattr(self.function, "carried_state", None)

    @property
    def rounded_convolution(self) -> bool:
        """As `Kernel.rounded_convolution`: a user's function runs no step, so it has none."""
        return False

    def run(self, inputs: "Inputs") -> "Outputs":
        """Calls the function on checked inputs.

        Raises:
            InputError: see `kda_kernels.checks.check_inputs`.
            ReturnedError: the function returned neither tensors nor None with an `out` to write to.
        """
        import torch

        from kda_kernels.checks import check_inputs, require_features

        check_inputs(inputs)
        require_features(inputs, self.features, self.name)
        inputs = inputs.without_spare_slots()
        passed = self.signature.arguments(inputs, self.op)
        with torch.no_grad(), torch.cuda.device_of(inputs.q):
            returned = self.signature.call(self.function, passed)
        return _outputs(returned, passed, inputs, self.op)

    def variants(self, problem: Problem | None = None) -> list["Variant"]:
        """What `kda compile` builds: what the function's attribute `variants` yields; nothing without one."""
        make = getattr(self.function, "variants", None)
        return [] if make is None else list(make(problem))

    def __reduce__(self) -> tuple[Callable[..., Kernel], tuple[str, str]]:
        from kdacli.userkernels.resolve import resolve

        return resolve, (self.name, str(self.op))


def _outputs(returned: Any, passed: dict[str, Any], inputs: "Inputs", op: Op) -> "Outputs":
    import torch

    from kda_kernels.tensors import Outputs

    many = returned if isinstance(returned, tuple | list) else (returned,)
    o: Any
    final_state: Any
    o, final_state = (*many, None, None)[:2]
    o = passed.get("out") if o is None else o
    final_state = passed.get("final_state") if final_state is None else final_state
    for what, value in (("o", o), ("final_state", final_state)):
        if not isinstance(value, torch.Tensor) and (what == "o" or value is not None):
            kinds = ", ".join(type(x).__name__ for x in many)
            raise ReturnedError(f"the function returned {kinds}: it should return o, or (o, final_state), as tensors")
    if op is Op.GATE:
        return Outputs(o)
    if inputs.state_indices is not None:
        final_state = inputs.state
    return Outputs(o, final_state if inputs.output_final_state else None)
