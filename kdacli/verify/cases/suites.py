"""The suites of `kda verify`: tables of cases, from the commit's to the evening's."""

import dataclasses
import functools

from kda_kernels.errors import InputError
from kda_kernels.problem import Op
from kdacli.verify.cases.case import Case

NAMES = ("quick", "full", "stress")
_STRESS_SEEDS = (1, 2, 3)
_NARROW, _MODEL = 64, 128  # head sizes


@functools.cache
def suite(name: str) -> tuple[Case, ...]:
    """The cases of a suite: quick is part of full, and full of stress, which draws its numbers anew three times more.

    Raises:
        InputError: there is no such suite.
    """
    if name == "quick":
        from kdacli.verify.cases.quick import QUICK

        return QUICK
    if name in ("full", "stress"):
        from kdacli.verify.cases.full import FULL

        return FULL if name == "full" else FULL + tuple(_again(case, seed) for seed in _STRESS_SEEDS for case in FULL)
    raise InputError(f"suite {name} is unknown: there are {', '.join(NAMES)}")


def cases_for(device: str, name: str = "quick", op: Op | None = None) -> list[Case]:
    """The cases of a suite that suit `device`, of one op if it is given.

    On a GPU, cases that are narrow for the interpreter's sake come with K = V = 128, which is what models have, and all
    that many kernels take; their names say so.
    """
    found = [case for case in suite(name) if op is None or case.problem.op is op]
    if device != "cuda":
        return [case for case in found if not case.gpu_only]
    return [_wide(case) if case.problem.K == case.problem.V <= _NARROW else case for case in found]


def _wide(case: Case) -> Case:
    problem = dataclasses.replace(case.problem, K=_MODEL, V=_MODEL)
    return dataclasses.replace(case, name=f"{case.name}/K={_MODEL}/V={_MODEL}", problem=problem)


def _again(case: Case, seed: int) -> Case:
    return dataclasses.replace(case, name=f"{case.name}/seed={seed}", seed=seed)
