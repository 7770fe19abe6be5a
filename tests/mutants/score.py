"""How many mutants a suite kills, and in which case each died."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from kda_kernels.problem import Op
from kdacli.verify.cases.case import Case
from kdacli.verify.cases.suites import cases_for
from kdacli.verify.checks.check import Bench, check
from kdacli.verify.failures.explanation import wrong_lines
from tests.mutants import activations, blocks, memory, ranges, recurrence, serving, states, step  # noqa: F401  mutants
from tests.mutants.table import MUTANTS, Mutant

# By mutant, the case of the CPU's suites that killed it last. No result: only where to look first.
KILLERS = Path(__file__).with_name("killers.json")


@dataclasses.dataclass(frozen=True)
class Death:
    """A mutant's end: the case that killed it and what was said; both None for a survivor."""

    mutant: Mutant
    case: str | None = None
    said: str | None = None


def mutants(device: str) -> list[Mutant]:
    """Those that can be told from a good kernel on `device`."""
    return [m for m in MUTANTS.values() if device == "cuda" or not m.gpu_only]


def hunt(
    chosen: Iterable[Mutant],
    cases: Iterable[Case],
    device: str = "cpu",
    seed: int = 0,
    killers: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Death]:
    """Runs each case on the mutants that are still alive, and yields each as it dies; survivors at the end.

    Cases of quick come first, and small ones: most mutants die before the large ones.

    Args:
        killers: by mutant, the case that it meets before all others.
    """
    alive = [(mutant, mutant.kernel()) for mutant in chosen]
    quick = {case.name for case in cases_for(device)}
    cases = sorted(cases, key=lambda case: (case.name not in quick, _size(case)))
    for case, known in [*((case, True) for case in cases), *((case, False) for case in cases)]:
        facing = [
            (mutant, kernel)
            for mutant, kernel in alive
            if kernel.op is case.problem.op and (not known or killers.get(mutant.name) == case.name)
        ]
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


def score(suite: str, device: str = "cpu", seed: int = 0, *, anew: bool = False) -> list[Death]:
    """Every mutant's end under a suite, in the order of the table.

    Each meets the case in `KILLERS` first, which saves nine tenths of the time, but with `anew`.
    """
    cases = [case for op in Op for case in cases_for(device, suite, op)]
    killers = {} if anew else json.loads(KILLERS.read_text())
    deaths = {death.mutant.name: death for death in hunt(mutants(device), cases, device, seed, killers)}
    return [deaths[mutant.name] for mutant in mutants(device)]
