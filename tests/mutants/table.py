"""The table of mutants, and how a class gets into it."""

import dataclasses
from collections.abc import Callable

from tests.mutants.victim import Victim, VictimKernel


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One deliberate fault in one kernel.

    Attributes:
        name: the fault and the op. fault: what is wrong, in a line.
        make: a fresh victim with the fault, since some keep things from call to call.
        gpu_only: only a GPU has room for the case that shows it.
    """

    name: str
    fault: str
    make: Callable[[], Victim]
    gpu_only: bool = False

    def kernel(self) -> VictimKernel:
        return VictimKernel.of(self.name, self.make(), self.fault)


MUTANTS: dict[str, Mutant] = {}


def mutant(*bases: type[Victim], gpu_only: bool = False) -> Callable[[type], type]:
    """Decorator: the class, mixed into each of `bases`, is a mutant; its docstring says what is wrong."""

    def add(fault: type) -> type:
        words = "".join(f"-{c.lower()}" if c.isupper() else c for c in fault.__name__).strip("-")
        for base in bases:
            made = type(fault.__name__, (fault, base), {"__doc__": fault.__doc__})
            name = f"{base.op}-{words}"
            assert fault.__doc__ and name not in MUTANTS
            MUTANTS[name] = Mutant(name, fault.__doc__.splitlines()[0], made, gpu_only)
        return fault

    return add
