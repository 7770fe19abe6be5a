"""Random cases until the time is up or one fails: every option at once, lengths of any kind, numbers drawn anew."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from kda_kernels.errors import InputError, UnavailableError
from kda_kernels.problem import Op, Problem
from kda_kernels.registry import Kernel
from kdacli.verify.adapt import adapt
from kdacli.verify.cases import spec
from kdacli.verify.cases.case import Case
from kdacli.verify.cases.pairs import axes_of, case_of
from kdacli.verify.checks.check import NO_ROOM, Bench, Result, check
from kdacli.verify.transforms import LAYOUTS, SERVING

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

MAX_SEQUENCES = 5
# Tokens of a sequence at most: where a case should take milliseconds, and seconds on an interpreter.
MAX_TOKENS = {
    "cpu": {Op.PREFILL: 140, Op.DECODE: 6, Op.STEP: 6, Op.GATE: 140},
    "cuda": {Op.PREFILL: 700, Op.DECODE: 40, Op.STEP: 40, Op.GATE: 700},
}

# What engines pass, by op; those that need no pool, and the one that needs a packed batch.
_ON_POOLS = ("any-negative", "null-slot", "fresh-states", "strided-indices", "long-indices")
_SERVING: dict[Op, tuple[str, ...]] = {
    Op.PREFILL: (*_ON_POOLS, "checkpoint-of-each", "checkpoints-of-chunks", "checkpoints-every", "checkpoints-in-pool",
                 "bucket"),
    Op.DECODE: (*_ON_POOLS, "drafts", "read-only", "token-rows", "bucket"),
    Op.STEP: (*_ON_POOLS, "drafts", "read-only", "token-rows", "bucket", "own-conv-slots"),
    Op.GATE: (),
}  # fmt: skip
_WITHOUT_POOL = frozenset(("checkpoint-of-each", "checkpoints-of-chunks", "checkpoints-every", "token-rows", "bucket"))


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search came to: cases tried, those of them that the kernel refused, the first failure if any, and how long
    it took.
    """

    kernel: str
    tried: int
    refused: int
    failure: tuple[Case, Result] | None
    seconds: float = dataclasses.field(compare=False)


class _StopError(Exception):
    """Ends hypothesis' run."""


def require() -> None:
    """Raises `UnavailableError` where hypothesis is missing: call it before the work."""
    try:
        import hypothesis  # noqa: F401
    except ImportError:
        raise UnavailableError("the suite stress needs hypothesis: pip install hypothesis") from None


def search(
    kernel: Kernel,
    device: str,
    seconds: float,
    seed: int = 0,
    part: int = 1,
    examples: int = 1_000_000,
    before: Callable[[Case], None] = lambda case: None,
) -> Found:
    """Checks `kernel` on random cases of its op for `seconds`, or `examples` of them, or until one fails.

    Each is changed to what the kernel supports, as the cases of a suite are (`kdacli.verify.adapt`). The same seed and
    part draw the same cases; how many there is time for depends on the machine. `before` is called with each.
    """
    import hypothesis

    began = time.monotonic()
    tried = refused = 0
    failure: list[tuple[Case, Result]] = []

    @hypothesis.seed(f"{seed}, part {part}" if part > 1 else seed)
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
    )
    @hypothesis.given(drawn=cases(kernel.op, device))
    def one(drawn: Case) -> None:
        nonlocal tried, refused
        if failure or time.monotonic() - began > seconds:
            raise _StopError
        for case in _adapted(kernel, drawn):
            before(case)
            result = _check(kernel, case, seed, device, possible=case == drawn)
            if result is not None and result.status != "refused":
                break
        if result is None:
            return
        tried += 1
        refused += result.status == "refused"
        if not result.ok:
            failure.append((case, result))
            raise _StopError

    with contextlib.suppress(_StopError):
        one()
    return Found(kernel.name, tried, refused, failure[0] if failure else None, time.monotonic() - began)


def _adapted(kernel: Kernel, case: Case) -> Iterator[Case]:
    """The case changed to what the kernel supports; and, should it be refused, with its tensors laid out as usual, and
    then without what engines pass."""
    adapted_case = adapt(kernel, case)
    usual = dataclasses.replace(adapted_case, transforms=tuple(t for t in adapted_case.transforms if t not in LAYOUTS))
    plain = dataclasses.replace(usual, transforms=tuple(t for t in usual.transforms if t not in SERVING))
    for one in dict.fromkeys((adapted_case, usual, plain)):
        yield one if one == case else dataclasses.replace(one, name=spec.write(one))


def _check(kernel: Kernel, case: Case, seed: int, device: str, *, possible: bool) -> Result | None:
    """None: there is no such case, since a regime needs what the adapted_case took away; never if it is `possible`."""
    try:
        bench = Bench.where_it_fits(case, seed, device)
    except (InputError, RuntimeError, IndexError):
        if possible:
            raise
        return None
    if bench is None:
        return Result(case.name, kernel.name, kernel.op, "refused", notes=(NO_ROOM,))
    return check(kernel, bench)


def cases(op: Op, device: str) -> "SearchStrategy[Case]":
    """Any case of an op; its name is the word that describes it."""
    from hypothesis import strategies as st

    most = MAX_TOKENS[device][op]
    lens = st.lists(st.integers(0, most), min_size=1, max_size=MAX_SEQUENCES)
    rows = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in axes_of(op).items()})

    serving = st.sampled_from((None, *_SERVING[op]))

    def build(row: dict, lens: list[int], serving: str | None, seed: int) -> Case:
        case = case_of("", op, row, "a random case")
        if case.problem.packed:
            problem = case.problem
            padding = min(problem.padding, len(lens))
            pool = None if problem.pool_slots is None else len(lens) + 2
            problem = dataclasses.replace(problem, seq_lens=tuple(lens), padding=padding, pool_slots=pool)
            case = dataclasses.replace(case, problem=problem)
        if serving is not None and _possible(serving, case.problem):
            case = dataclasses.replace(case, transforms=(*case.transforms, serving))
        case = dataclasses.replace(case, seed=seed)
        return dataclasses.replace(case, name=spec.write(case))

    return st.builds(build, rows, lens, serving, st.integers(0, 1000))


def _possible(serving: str, problem: Problem) -> bool:
    return (problem.pool_slots is not None or serving in _WITHOUT_POOL) and (problem.packed or serving != "bucket")
