"""The smallest case that still fails: fewer sequences, tokens, heads and options, one step at a time."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

from kda_kernels.errors import InputError
from kda_kernels.problem import CHUNK, Gate, Problem
from kda_kernels.registry import Kernel
from kdacli.verify.cases import spec
from kdacli.verify.cases.case import Case
from kdacli.verify.checks.check import Bench, Result, check

SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Failure:
    """A case that fails, made ready, and how.

    Attributes:
        case: its name is the word that `kda verify --case` takes.
        complete: nothing simpler that was thought of fails; False: the time was up.
    """

    case: Case
    bench: Bench
    result: Result
    complete: bool


def shrink(kernel: Kernel, case: Case, result: Result, seed: int, device: str, seconds: float = SECONDS) -> Failure:
    """The simplest failing case that is found from `case`, which failed with `result`.

    Each step is taken if the kernel still fails in the same way: wrong values, a property, or by raising. Stops when
    no step is left or after `seconds`; a single try may take longer.
    """
    deadline = time.monotonic() + seconds
    case = _only_what_failed(case, result)
    best = _try(kernel, case, seed, device) or _try(kernel, case, seed, device)
    if best is None or _kind(best.result) != _kind(result):  # it does not fail every time, as a race
        named = dataclasses.replace(case, name=spec.write(case))
        return Failure(named, Bench.of_case(named, seed, device), result, False)
    kind, tried = _kind(result), {best.case}
    progress = True
    while progress:
        progress = False
        for simpler in steps(best.case):
            if time.monotonic() > deadline:
                return dataclasses.replace(best, complete=False)
            if simpler in tried:
                continue
            tried.add(simpler)
            found = _try(kernel, simpler, seed, device)
            if found is not None and _kind(found.result) == kind:
                best, progress = found, True
                break
    return best


def steps(case: Case) -> Iterator[Case]:
    """Cases that are one step simpler, the greatest steps first; all of them possible."""
    seen = {case}
    for made in (*_fewer(case), *_plainer(case)):
        try:
            simpler = made()
        except InputError:
            continue  # what is left does not fit together
        if simpler is not None and simpler not in seen:
            seen.add(simpler)
            yield simpler


Step = Callable[[], Case | None]
Changes = dict[str, Any]


def _fewer(case: Case) -> Iterator[Step]:
    """Fewer sequences, tokens, heads, channels."""
    problem = case.problem
    lens, least = problem.seq_lens, case.decode_steps + 1 if case.decode_steps else 0
    if len(lens) > 2:
        yield lambda: _with_lens(case, lens[: len(lens) // 2])
        yield lambda: _with_lens(case, lens[len(lens) // 2 :])
    if len(lens) > 1:
        for n in range(min(len(lens), 8)):
            yield functools.partial(_with_lens, case, lens[:n] + lens[n + 1 :])
    for n, length in enumerate(lens[:8]):
        shorter = {length // 2, CHUNK + 1, CHUNK, 17, 16, 2, 1, 0, length - length // 8, length - 1}
        for m in sorted(m for m in shorter if least <= m < length):
            if problem.packed:
                yield functools.partial(_with_lens, case, (*lens[:n], m, *lens[n + 1 :]))
            elif n == 0:
                yield functools.partial(_with_lens, case, (m,) * len(lens))
    if problem.HV > 1:
        yield lambda: _problem(case, H=1, HV=1)
        yield lambda: _problem(case, H=1, HV=2)
        yield lambda: _problem(case, H=problem.HV)
        yield lambda: _problem(case, HV=min(2 * problem.H, problem.HV))
        if problem.H % 2 == 0:
            yield lambda: _problem(case, H=problem.H // 2, HV=problem.HV // 2)
    for size in (16, 32, 64):
        yield functools.partial(_problem, case, K=min(size, problem.K), V=min(size, problem.V))
    yield lambda: _problem(case, K=min(problem.K, problem.V), V=min(problem.K, problem.V))


def _plainer(case: Case) -> Iterator[Step]:
    """Fewer options: each back to its default."""
    problem, options = case.problem, case.problem.options
    for i in range(len(case.transforms)):
        yield functools.partial(dataclasses.replace, case, transforms=case.transforms[:i] + case.transforms[i + 1 :])
    for i in range(len(case.properties)):
        yield functools.partial(dataclasses.replace, case, properties=case.properties[:i] + case.properties[i + 1 :])
    plainer: tuple[Changes, ...] = ({"decode_steps": 0}, {"decode_steps": 1}, {"keys": "random"}, {"gates": "bench"})
    for changes in plainer:
        if case.decode_steps or "decode_steps" not in changes:
            yield functools.partial(dataclasses.replace, case, **changes)
    if problem.padding:
        yield lambda: _problem(case, padding=problem.padding - 1)
    if problem.pool_slots is not None and not (problem.padding or case.decode_steps):
        yield lambda: _problem(case, pool_slots=None)
    if problem.pool_slots is not None:
        yield lambda: _problem(case, pool_slots=max(2, problem.N - problem.padding))
    yield lambda: _problem(case, initial_state=False)
    plain = Problem(problem.op, (1,), H=1, HV=1)
    names = (
        "packed",
        "state_v_first",
        "final_state",
        "dtype",
        "g_dtype",
        "beta_dtype",
        "param_dtype",
        "state_rounding",
    )
    for name in (*names, "state_dtype"):
        yield functools.partial(_problem, case, **{name: getattr(plain, name)})
    plain_options: tuple[Changes, ...] = (
        {"gate": Gate.NONE, "lower_bound": None},
        {"lower_bound": None if options.gate is Gate.NONE else options.lower_bound},
        {"allow_neg_eigval": False},
        {"qk_l2norm": True},
        {"scale": None},
        {"beta_is_logit": True},
    )
    for changes in plain_options:
        yield functools.partial(_options, case, changes)


def _with_lens(case: Case, lens: tuple[int, ...]) -> Case | None:
    """Other sequences; the pool and its padding shrink along. None if nothing is left."""
    problem = case.problem
    if not lens:
        return None
    padding = min(problem.padding, len(lens) - 1) if len(lens) < problem.N else problem.padding
    spare = 0 if problem.pool_slots is None else problem.pool_slots - problem.N
    pool = None if problem.pool_slots is None else max(len(lens) + spare, len(lens) - padding, 1)
    return _problem(case, seq_lens=lens, padding=padding, pool_slots=pool)


def _problem(case: Case, **changes) -> Case:
    return dataclasses.replace(case, problem=dataclasses.replace(case.problem, **changes))


def _options(case: Case, changes: Changes) -> Case:
    return _problem(case, options=dataclasses.replace(case.problem.options, **changes))


def _only_what_failed(case: Case, result: Result) -> Case:
    """Without the properties that hold."""
    failed = tuple(held.name for held in result.properties if held.status in ("fail", "error"))
    return dataclasses.replace(case, properties=failed)


def _kind(result: Result) -> tuple:
    """In which way it failed; None for a result that is none."""
    if result.ok:
        return ("none",)
    if result.status == "error":
        return ("error", result.notes[0].split(":")[0])
    failed = tuple(held.name for held in result.properties if held.status in ("fail", "error"))
    return ("property", failed[0]) if failed else ("values",) if result.wrong_values else ("beside", _words(result))


def _words(result: Result) -> str:
    """What is wrong beside the values, without the numbers in it."""
    return "".join(c for c in result.notes[0] if not c.isdigit())[:24]


def _try(kernel: Kernel, case: Case, seed: int, device: str) -> Failure | None:
    """The case made ready and run, if it fails."""
    try:
        named = dataclasses.replace(case, name=spec.write(case))
        bench = Bench.of_case(named, seed, device)
    except (InputError, RuntimeError, IndexError):  # a regime that needs what is no longer there
        return None
    result = check(kernel, bench)
    return None if result.ok else Failure(named, bench, result, True)
