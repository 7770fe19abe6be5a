"""One run of `kda verify`: which cases, in which order, and what came out of them."""

import contextlib
import dataclasses
import time
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

from kda_kernels.errors import InputError
from kda_kernels.problem import Op
from kda_kernels.registry import Kernel
from kdacli.output import progress
from kdacli.verify import search
from kdacli.verify.cases.case import Case
from kdacli.verify.checks.check import Result
from kdacli.verify.failures.explanation import Explanation
from kdacli.verify.processes import workers
from kdacli.verify.processes.ahead import compile_ahead
from kdacli.verify.processes.checker import Checker, ContextLostError
from kdacli.verify.processes.isolated import IsolatedChecker, NoStartError
from kdacli.verify.selection import select_kernels, select_table

EXPLAINED = 3  # failures of a kernel that are shrunk and explained
Key = tuple[str, str]  # case, kernel


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is to be checked.

    Attributes:
        kernels: their names; empty: all of ours that can run here.
        suite: its name. case_names: of cases to check instead. shard: (I, N), the I-th of N parts of the suite.
        one_problem: whether `params`, flags or a dump, describe the one problem to check instead of either.
        params: as `kdacli.options.inputs_from` takes them.
        seconds: of random search after the suite stress.
        triton_config: see `kdacli.autotuning.take`.
        workers: processes that check a suite side by side; None: as many as is usual. limit: as of `IsolatedChecker`.
    """

    kernels: tuple[str, ...]
    suite: str
    case_names: tuple[str, ...]
    shard: tuple[int, int]
    one_problem: bool
    params: Mapping[str, Any]
    device: str
    seconds: float
    triton_config: int | None
    workers: int | None
    limit: float

    @property
    def op(self) -> Op | None:
        return self.params["op"] and Op(self.params["op"])

    @property
    def seed(self) -> int:
        return self.params["seed"] or 0

    @property
    def searching(self) -> bool:
        return self.suite == "stress" and not self.one_problem and not self.case_names


@dataclasses.dataclass
class Outcome:
    """What came out, as far as the run came.

    Attributes:
        kernels: those that are checked. not_run: (kernel, reason) of the others.
        cases: by name. total: checks that the run consists of.
        results: of checks. searched: a line for each kernel whose random search ended.
        explained, saved: of the first failures of each kernel: what they mean, and the file of their tensors.
        complete: everything that was asked for was checked. interrupted: by Ctrl-C.
        stopped: why no further check could be made, where that is no kernel's doing.
        took: seconds of each part of the run.
    """

    wanted: Wanted
    kernels: list[Kernel]
    not_run: list[tuple[str, str]]
    cases: dict[str, Case]
    total: int
    results: list[Result] = dataclasses.field(default_factory=list)
    searched: list[str] = dataclasses.field(default_factory=list)
    explained: dict[Key, Explanation] = dataclasses.field(default_factory=dict)
    saved: dict[Key, Path] = dataclasses.field(default_factory=dict)
    complete: bool = False
    interrupted: bool = False
    stopped: str = ""
    took: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def failures(self) -> list[Result]:
        return [result for result in self.results if not result.ok]


class Verification:
    """Checks what is wanted; `outcome` grows as it does.

    Raises:
        InputError, UnavailableError: see `select_kernels` and `select_table`; there are fewer cases than shards.
    """

    def __init__(self, wanted: Wanted, checker: Checker | IsolatedChecker) -> None:
        if wanted.searching:
            search.require()
        self.wanted, self.checker = wanted, checker
        kernels, not_run = select_kernels(wanted.kernels, wanted.op)
        checker.prepare(kernels)
        self.table = [] if wanted.one_problem else self._part(kernels)
        total = len(kernels) if wanted.one_problem else sum(len(served) for _, served in self.table)
        self.outcome = Outcome(wanted, kernels, not_run, {case.name: case for case, _ in self.table}, total)

    def _part(self, kernels: list[Kernel]) -> list[tuple[Case, list[Kernel]]]:
        """The cases, each with its kernels: every N-th, so that parts take alike."""
        table = select_table(self.wanted.case_names, kernels, self.wanted.device, self.wanted.suite)
        part, parts = self.wanted.shard
        if len(table) < parts:
            raise InputError(f"--shard {part}/{parts}: there are {len(table)} cases to share out")
        return table[part - 1 :: parts]

    def go(self, jobs: int | None, fail_fast: bool, shrink: float, folder: Path | None, force: bool) -> None:
        """Compiles, checks, explains, as far as neither Ctrl-C nor a kernel ends it.

        Args:
            jobs: processes that compile ahead, see `compile_ahead`; 0: none do.
            shrink: seconds to look for the smallest case of a failure.
            folder: for the tensors of failures; None: they are not saved. force: over files that are there.
        """
        try:
            if jobs != 0:
                with self._timed("compiling"):
                    self.compile(jobs)
            self.outcome.complete = self.check(fail_fast)
            with self._timed("explaining"):
                self.explain(shrink, folder, force)
        except KeyboardInterrupt:
            self.outcome.interrupted = True
        except ContextLostError:
            pass  # which check it was, the results say
        except NoStartError as error:
            self.outcome.stopped = str(error)

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.outcome.took[part] = round(time.monotonic() - began, 2)

    def compile(self, jobs: int | None) -> None:
        """On a GPU: in parallel, what the cases would compile one after the other."""
        if self.wanted.device == "cuda" and self.table:
            compile_ahead(self.table, jobs)

    def check(self, fail_fast: bool) -> bool:
        """Everything that was asked for; False: it ended before, at a failure."""
        results = self._given() if self.wanted.one_problem else self._suite()
        with (
            self._timed("checking"),
            progress("verifying", self.outcome.total) as advance,
            contextlib.closing(results),
        ):
            for result in results:
                self.outcome.results.append(result)
                advance(f"{result.case}, {result.kernel}")
                if fail_fast and not result.ok:
                    return False
        if not self.wanted.searching:
            return True
        with self._timed("searching"):
            return self._search(fail_fast)

    def _suite(self) -> Generator[Result, None, None]:
        wanted = self.wanted
        count = wanted.workers or workers.usual(wanted.device, self.outcome.total)
        if count > 1 and len(self.table) > 1:
            how = count, wanted.device, wanted.seed, wanted.limit, wanted.triton_config
            yield from workers.check(self.table, self.outcome.kernels, *how)
            return
        for case, kernels in self.table:
            yield from self.checker.check_case(case, kernels)

    def _given(self) -> Generator[Result, None, None]:
        """The problem that the flags or the dump hold, for those of the kernels that serve its op."""
        kernels = self.outcome.kernels
        ops = {kernel.op for kernel in kernels}
        label, op = self.checker.give(self.wanted.params, ops.pop() if len(ops) == 1 else Op.PREFILL)
        served = [kernel for kernel in kernels if kernel.op is op]
        if not served:
            raise InputError(f"{label}: no kernel chosen serves {op}; --op chooses what to do with it")
        self.outcome.total = len(served)
        yield from self.checker.check_given(served)

    def _search(self, fail_fast: bool) -> bool:
        """Random cases, the time shared out among the kernels; False: it ended before, at a failure."""
        kernels = self.outcome.kernels
        with progress("searching", len(kernels)) as advance:
            for kernel in kernels:
                advance(kernel.name)
                found = self.checker.search(kernel, self.wanted.seconds / len(kernels), self.wanted.shard[0])
                said = "one failed" if found.failure else "none failed"
                refused = f", {found.refused} refused" if found.refused else ""
                took = f"in {found.seconds:.0f} s"
                line = f"searched: {kernel.name}: {found.tried} random cases {took}, {said}{refused}"
                self.outcome.searched.append(line)
                if found.failure:
                    case, result = found.failure
                    self.outcome.cases[case.name] = case
                    self.outcome.results.append(result)
                    if fail_fast:
                        return False
        return True

    def explain(self, shrink: float, folder: Path | None, force: bool) -> None:
        """Looks closely at the first failures of each kernel that can be had again, and saves their tensors."""
        by_name = {kernel.name: kernel for kernel in self.outcome.kernels}
        again = [result for result in self.outcome.failures if not result.crashed]
        first = [result for name in by_name for result in [r for r in again if kernel_of(r) == name][:EXPLAINED]]
        if folder is not None and first:
            folder.mkdir(parents=True, exist_ok=True)
        with progress("explaining", len(first)) as advance:
            for result in first:
                key, case = (result.case, result.kernel), self.outcome.cases.get(result.case)
                kernel = by_name[kernel_of(result)]
                found, path = self.checker.explain(kernel, case, result, shrink, folder, force)
                self.outcome.explained[key] = found
                if path is not None:
                    self.outcome.saved[key] = path
                advance(result.case)


def kernel_of(result: Result) -> str:
    """The kernel's own name; that of a prefill followed by a decode says both."""
    return result.kernel.removesuffix("+decode")
