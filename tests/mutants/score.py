"""How many mutants a suite kills, and in which case each died."""

import dataclasses
from collections.abc import Iterable, Iterator

from kda_kernels.problem import Op
from kdacli.verify.cases.case import Case
from kdacli.verify.cases.suites import cases_for
from kdacli.verify.checks.check import Bench, check
from kdacli.verify.failures.explanation import wrong_lines
from tests.mutants import activations, memory, ranges, recurrence, serving, step  # noqa: F401  they fill the table
from tests.mutants.table import MUTANTS, Mutant


@dataclasses.dataclass(frozen=True)
class Death:
    """A mutant's end: the case that killed it and what was said; both None for a survivor."""

    mutant: Mutant
    case: str | None = None
    said: str | None = None


def mutants(device: str) -> list[Mutant]:
    """Those that can be told from a good kernel on `device`."""
    return [m for m in MUTANTS.values() if device == "cuda" or not m.gpu_only]


def hunt(chosen: Iterable[Mutant], cases: Iterable[Case], device: str = "cpu", seed: int = 0) -> Iterator[Death]:
    """Runs each case on the mutants that are still alive, and yields each as it dies; survivors at the end.

    Small cases come first: most mutants die before the large ones.
    """
    alive = [(mutant, mutant.kernel()) for mutant in chosen]
    for case in sorted(cases, key=_size):
        facing = [(mutant, kernel) for mutant, kernel in alive if kernel.op is case.problem.op]
        if not facing:
            continue
        bench = Bench.of_case(case, seed, device)
        for mutant, kernel in facing:
            result = check(kernel, bench)
            if not result.ok:
                alive.remove((mutant, kernel))
                yield Death(mutant, case.name, wrong_lines(result)[0])
    yield from (Death(mutant) for mutant, _ in alive)


def _size(case: Case) -> int:
    """Multiplications of a recurrence, more or less."""
    problem = case.problem
    return (problem.T + problem.N) * problem.HV * problem.K * problem.V


def score(suite: str, device: str = "cpu", seed: int = 0) -> list[Death]:
    """Every mutant's end under a suite, in the order of the table."""
    cases = [case for op in Op for case in cases_for(device, suite, op)]
    deaths = {death.mutant.name: death for death in hunt(mutants(device), cases, device, seed)}
    return [deaths[mutant.name] for mutant in mutants(device)]
