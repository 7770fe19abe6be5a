"""What a property is asked of: a kernel, a problem with its inputs, and what the kernel made of them when alone."""

import dataclasses
from collections.abc import Iterator

from kda_kernels.problem import Problem
from kda_kernels.tensors import Inputs, Outputs
from kdacli.judge import Reference, judge
from kdacli.judge.bits import same_bits
from kdacli.verify.checks.call import Runner, call


class NotApplicableError(Exception):
    """A property cannot be checked here; the message says why."""


class Remark(str):
    """What a property found worth saying, though it is no fault."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A kernel under test.

    Attributes:
        kernel: what is run. problem, inputs: the case.
        outputs: of a call on `inputs`, with nothing else going on.
        reference: what it should give.
        ours: whether the kernel is one of this package.
        interpreted: it runs in Triton's interpreter.
    """

    kernel: Runner
    problem: Problem
    inputs: Inputs
    outputs: Outputs
    reference: Reference
    ours: bool
    interpreted: bool

    def run(self, inputs: Inputs | None = None) -> Outputs:
        """One more call, on a copy of `inputs` (None: those of the case)."""
        return call(self.kernel, self.inputs if inputs is None else inputs).outputs

    def require(self, problem: Problem) -> None:
        """Raises `NotApplicableError` where the kernel does not support `problem`."""
        if (reason := self.kernel.unsupported(problem)) is not None:
            raise NotApplicableError(reason)

    def wrong(self, outputs: Outputs, inputs: Inputs | None = None) -> Iterator[str]:
        """What the judge says against `outputs`, where they are not as good as those of one plain call must be.

        Args:
            inputs: of a call that means the same; None: those of the case.
        """
        reference = self.reference if inputs is None else self.reference.on(inputs)
        reference = reference.granted(self.kernel.rounded_convolution)
        found = judge(reference, outputs, carried_state=self.kernel.carried_state)
        return (f"{verdict.tensor}: {verdict.note}" for verdict in found if not verdict.passed)


def differing(first: Outputs, second: Outputs) -> list[str]:
    """Names of outputs that are not the same to the bit."""
    others = second.tensors()
    return [name for name, t in first.tensors().items() if name not in others or not same_bits(t, others[name])]
