"""`kda verify`: kernels against the fp64 oracle, case by case."""

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from kda_kernels.errors import CheckFailedError, InputError, UnavailableError
from kda_kernels.problem import Op
from kdacli import options
from kdacli.values import Part

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from kda_kernels.registry import Kernel
    from kdacli.verify.case import Case
    from kdacli.verify.checker import Checker
    from kdacli.verify.isolated import IsolatedChecker
    from kdacli.verify.runner import Result
    from kdacli.verify.verdict import Explanation

EXPLAINED = 3  # failures of a kernel that are shrunk and explained
STRESS_SECONDS = 60.0
HUNG_SECONDS = 300.0  # more than any check takes whose kernels compile and tune themselves meanwhile


@click.command("verify", cls=options.SectionedCommand)
@options.kernel_option
@click.option("--suite", "suite_name", type=click.Choice(["quick", "full", "stress"]), help="Default: quick.")
@click.option("--case", "case_names", multiple=True, metavar="NAME", help="A case by name; may be repeated.")
@click.option(
    "--seconds",
    type=click.FloatRange(0, 86400),
    help="Of random search, which follows the cases of --suite stress; all kernels together. Default: 60.",
)
@click.option(
    "--shard",
    type=Part(),
    metavar="I/N",
    help="Only the I-th of N parts of the suite, for N runs that share it: on N GPUs, or side by side on one.",
)
@click.option("--list", "list_only", is_flag=True, help="List the cases and why each is there; check nothing.")
@click.option("--verbose", is_flag=True, help="A line for every check, however many.")
@click.option("--fail-fast", is_flag=True, help="Stop at the first failure.")
@click.option(
    "--shrink",
    type=click.FloatRange(0, 3600),
    default=10.0,
    metavar="SECONDS",
    help="How long to look for the smallest case of a failure. Default: 10; 0: not at all.",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=0),
    metavar="COUNT",
    help="Processes that compile ahead of the cases, on a GPU. Default: one a core; 0: none.",
)
@click.option(
    "--isolate/--no-isolate",
    default=None,
    help="Check in a process apart, which a kernel may crash or hang without ending the run. Default: on a GPU.",
)
@click.option(
    "--limit",
    type=click.FloatRange(0.1, 86400),
    default=HUNG_SECONDS,
    metavar="SECONDS",
    help="A check that takes longer, in a process apart, counts as hung. Default: 300.",
)
@click.option(
    "--triton-config",
    type=click.IntRange(min=0),
    metavar="NUMBER",
    help="Autotuned Triton kernels take this configuration of theirs, from 0, round again where there are fewer, and"
    " tune nothing. Default: on a GPU they tune themselves; without one, 0.",
)
@click.option("--save", "save_dir", metavar="DIR", help="Save the tensors of failures as dumps in DIR.")
@click.option("--junit", metavar="FILE", help="Write a JUnit XML report to FILE.")
@options.problem_options
@options.device_option
@options.json_option
@options.force_option
def command(
    kernels: tuple[str, ...],
    suite_name: str | None,
    case_names: tuple[str, ...],
    seconds: float | None,
    shard: tuple[int, int] | None,
    list_only: bool,
    verbose: bool,
    fail_fast: bool,
    shrink: float,
    jobs: int | None,
    isolate: bool | None,
    limit: float,
    triton_config: int | None,
    save_dir: str | None,
    junit: str | None,
    device: str,
    json_dest: str | None,
    force: bool,
    **params: Any,
) -> None:
    """Check kernels against the fp64 oracle, case by case.

    Without arguments, every kernel of ours that can run here over the suite quick (on a CPU, Triton kernels in Triton's
    interpreter). full adds every two options together and more edges. stress adds the same with three other seeds,
    however long that takes, and after it random cases for --seconds. A shape flag or a dump takes the place of a suite;
    --op then says what to do with it.

    A kernel passes when its error against the fp64 token recurrence is within twice that of a plain implementation that
    rounds where the kernel must round (of prefill the largest of eight, rounded in different units; where products are
    in tf32, and once what cutting operands adds), plus one output rounding: over each output, each (sequence, head),
    and for each element. NaN, Inf and unwritten elements never pass. It must not touch its inputs, the unused slots of
    a pool, nor memory around any tensor, and (but for the interpreter) a second call must give the same bits. Cases
    name more that must hold, such as that neighbours in a batch, threads or an earlier call change nothing.

    The first failures of a kernel are shrunk to the smallest case that fails, with the place, what it looks like, and
    a command that shows it again. What a kernel says beforehand that it cannot do is reported, and is no failure. In a
    suite, a case is first changed, in what it is not about, to what a kernel supports, as its name then shows.

    On a GPU, kernels that a suite launches and the caches of Triton and CuTe lack are compiled first, in --jobs
    processes; and the checks run in a process apart, so that a kernel which crashes it, breaks the GPU's context, or
    hangs, fails its case, and the next case runs. Ctrl-C ends a run early: what was checked is reported.

    A kernel that tunes itself is checked in the configuration that was fastest, and no other: --triton-config checks it
    in another, and saves the time of tuning for every new shape.

    A case may be changed where it is named: --case prefill-pool/lens=3,17/HV=2 (--list has the names).

    \b
    Examples:
      kda verify                                      everything that can run here
      kda verify --kernel mine.py:prefill --suite full --junit report.xml
      kda verify --op decode --fail-fast
      kda verify --kernel triton-prefill --case prefill-lengths
      kda verify --kernel triton-prefill --lens 65,0,130 -H 2 --gates weak --seed 7
      kda verify --suite stress --seconds 3600 --save failures
      kda verify --dump dump.pt
    """
    from kdacli.output import check_dest

    check_dest(json_dest, force)
    check_dest(junit, force)
    if junit == "-":
        raise InputError("--junit is -: it should be a file")
    _check_flags(params, suite_name, case_names, seconds, shard)
    if list_only:
        if shard:
            raise InputError("--shard is given with --list, which lists whole suites: leave one out")
        _list(params, suite_name or "quick", case_names, json_dest, force)
        return
    if junit:
        from kdacli.verify.junit import require

        require()
    folder = _folder(save_dir)
    from kdacli.device import pick_device

    device = pick_device(device)
    with _checker(device, params["seed"] or 0, isolate, limit, triton_config) as checker:
        suite = _Suite(suite_name or "quick", case_names, shard or (1, 1), seconds)
        run = _Run(kernels, suite, device, shrink, triton_config, params, checker)
        run.go(jobs, fail_fast, folder, force)
    run.report(json_dest, junit, verbose, force)
    run.conclude()


def _checker(
    device: str, seed: int, isolate: bool | None, limit: float, config: int | None
) -> "AbstractContextManager[Checker | IsolatedChecker]":
    """What does the checks: here, or, on a GPU by default, in a process that may crash."""
    if isolate or (isolate is None and device == "cuda"):
        from kdacli.verify.isolated import IsolatedChecker

        return IsolatedChecker(device, seed, limit, config)
    from contextlib import nullcontext

    from kdacli import autotuning
    from kdacli.verify.checker import Checker

    if config is not None:
        autotuning.take(config)
    return nullcontext(Checker(device, seed))


def _check_flags(
    params: options.Params,
    suite_name: str | None,
    case_names: tuple[str, ...],
    seconds: float | None,
    shard: tuple[int, int] | None,
) -> None:
    """Raises `InputError` where flags contradict each other."""
    one_problem = _one_problem(params)
    if one_problem and case_names:
        raise InputError(f"--case is given with {one_problem[0]}, which describes a problem of its own: leave one out")
    if suite_name and (other := [*one_problem, *["--case"] * bool(case_names)]):
        raise InputError(f"--suite is given with {other[0]}, which says what to check already: leave one out")
    if shard and (other := [*one_problem, *["--case"] * bool(case_names)]):
        raise InputError(f"--shard is given with {other[0]}: it takes a part of a suite")
    if seconds is not None and suite_name != "stress":
        raise InputError("--seconds is given without --suite stress: only its random search takes a time")


def _one_problem(params: options.Params) -> list[str]:
    """The flags that describe a problem of their own."""
    return [flag for flag in options.given(params) if flag != "--seed"] + ["--dump"] * bool(params["dump"])


def _folder(save_dir: str | None) -> Path | None:
    if save_dir is None:
        return None
    folder = Path(save_dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{save_dir} is a file: --save takes a directory")
    return folder


def _list(params: options.Params, suite_name: str, names: tuple[str, ...], json_dest: str | None, force: bool) -> None:
    """The cases of a suite, those of one op with --op, or those named."""
    from kdacli.output import write_json
    from kdacli.provenance import collect
    from kdacli.verify import spec
    from kdacli.verify.report import json_case, print_cases
    from kdacli.verify.suites import suite

    cases = [spec.parse(name) for name in names] if names else suite(suite_name)
    cases = [case for case in cases if params["op"] in (None, case.problem.op)]
    if json_dest:
        rows = [json_case(case) for case in cases]
        write_json({"schema": "kda.verify-cases/1", "provenance": collect(), "rows": rows}, json_dest, force)
    if json_dest != "-":
        print_cases(cases)


class _Suite(NamedTuple):
    """Which cases: those of a suite, or those named instead; and how long random ones after the suite stress."""

    name: str
    case_names: tuple[str, ...]
    shard: tuple[int, int]
    seconds: float | None


class _Run:
    """One run of the command: what is checked, what came out, and what is said of it."""

    def __init__(
        self,
        names: tuple[str, ...],
        suite: _Suite,
        device: str,
        shrink: float,
        config: int | None,
        params: options.Params,
        checker: "Checker | IsolatedChecker",
    ) -> None:
        from kdacli.verify.selection import select_kernels, select_table

        self.params, self.shrink, self.config, self.device, self.checker = params, shrink, config, device, checker
        self.seed = params["seed"] or 0
        self.part, parts = suite.shard
        self.shard = f"{self.part}/{parts}" if parts > 1 else None
        self.one_problem = bool(_one_problem(params))
        self.searching = suite.name == "stress" and not self.one_problem and not suite.case_names
        self.seconds = STRESS_SECONDS if suite.seconds is None else suite.seconds
        if self.searching:
            from kdacli.verify.search import require

            require()
        self.kernels, self.not_run = select_kernels(names, params["op"] and Op(params["op"]))
        checker.prepare(self.kernels)
        self.table: list[tuple[Case, list[Kernel]]] = []
        if not self.one_problem:
            table = select_table(suite.case_names, self.kernels, device, suite.name)
            if len(table) < parts:
                raise InputError(f"--shard {self.part}/{parts}: there are {len(table)} cases to share out")
            self.table = table[self.part - 1 :: parts]
        self.cases = {case.name: case for case, _ in self.table}
        self.total = len(self.kernels) if self.one_problem else sum(len(served) for _, served in self.table)
        self.results: list[Result] = []
        self.explained: dict[tuple[str, str], Explanation] = {}
        self.saved: dict[tuple[str, str], Path] = {}
        self.searched: list[str] = []
        self.complete = False  # everything that was asked for was checked
        self.interrupted = False
        self.stopped = ""  # why no further check could be made, where that is no kernel's doing
        self.took: dict[str, float] = {}  # seconds of each part of the run

    def go(self, jobs: int | None, fail_fast: bool, folder: Path | None, force: bool) -> None:
        """Compiles, checks, explains, as far as neither Ctrl-C nor a kernel ends it."""
        from kdacli.verify.checker import ContextLostError
        from kdacli.verify.isolated import NoStartError

        try:
            if jobs != 0:
                with self._timed("compiling"):
                    self.compile_ahead(jobs)
            self.complete = self.check(fail_fast)
            with self._timed("explaining"):
                self.explain(folder, force)
        except KeyboardInterrupt:
            self.interrupted = True
        except ContextLostError:
            pass  # which check it was, the results say
        except NoStartError as error:
            self.stopped = str(error)

    @contextlib.contextmanager
    def _timed(self, part: str) -> "Iterator[None]":
        began = time.monotonic()
        try:
            yield
        finally:
            self.took[part] = round(time.monotonic() - began, 2)

    def compile_ahead(self, jobs: int | None) -> None:
        """On a GPU: in parallel, what the cases would compile one after the other."""
        if self.device == "cuda" and self.table:
            from kdacli.verify.ahead import compile_ahead

            compile_ahead(self.table, jobs)

    def check(self, fail_fast: bool) -> bool:
        """Everything that was asked for; False: it ended before, at a failure."""
        from kdacli.output import progress

        with self._timed("checking"), progress("verifying", self.total) as advance:
            for result in self._given() if self.one_problem else self._suite():
                self.results.append(result)
                advance(f"{result.case}, {result.kernel}")
                if fail_fast and not result.ok:
                    return False
        if not self.searching:
            return True
        with self._timed("searching"):
            return self._search(fail_fast)

    def _suite(self) -> "Iterator[Result]":
        for case, kernels in self.table:
            yield from self.checker.check_case(case, kernels)

    def _given(self) -> "Iterator[Result]":
        """The problem that the flags or the dump hold, for those of the kernels that serve its op."""
        ops = {kernel.op for kernel in self.kernels}
        label, op = self.checker.give(self.params, ops.pop() if len(ops) == 1 else Op.PREFILL)
        served = [kernel for kernel in self.kernels if kernel.op is op]
        if not served:
            raise InputError(f"{label}: no kernel chosen serves {op}; --op chooses what to do with it")
        self.total = len(served)
        yield from self.checker.check_given(served)

    def _search(self, fail_fast: bool) -> bool:
        """Random cases, the time shared out among the kernels; False: it ended before, at a failure."""
        from kdacli.output import progress

        with progress("searching", len(self.kernels)) as advance:
            for kernel in self.kernels:
                advance(kernel.name)
                found = self.checker.search(kernel, self.seconds / len(self.kernels), self.part)
                said = "one failed" if found.failure else "none failed"
                refused = f", {found.refused} refused" if found.refused else ""
                took = f"in {found.seconds:.0f} s"
                self.searched.append(f"searched: {kernel.name}: {found.tried} random cases {took}, {said}{refused}")
                if found.failure:
                    case, result = found.failure
                    self.cases[case.name] = case
                    self.results.append(result)
                    if fail_fast:
                        return False
        return True

    def failures(self) -> "list[Result]":
        return [result for result in self.results if not result.ok]

    def explain(self, folder: Path | None, force: bool) -> None:
        """Looks closely at the first failures of each kernel that can be had again, and saves their tensors."""
        from kdacli.output import progress

        by_name = {kernel.name: kernel for kernel in self.kernels}
        again = [result for result in self.failures() if not result.crashed]
        first = [result for name in by_name for result in [r for r in again if _kernel_name(r) == name][:EXPLAINED]]
        if folder is not None and first:
            folder.mkdir(parents=True, exist_ok=True)
        with progress("explaining", len(first)) as advance:
            for result in first:
                key, case = (result.case, result.kernel), self.cases.get(result.case)
                kernel = by_name[_kernel_name(result)]
                found, path = self.checker.explain(kernel, case, result, self.shrink, folder, force)
                self.explained[key] = found
                if path is not None:
                    self.saved[key] = path
                advance(result.case)

    def reproduce(self, result: "Result") -> str:
        """The command that shows a failure again, and nothing else."""
        from kdacli.provenance import command_line
        from kdacli.verify.verdict import command_for

        kernel = _kernel_name(result)
        if self.one_problem:
            typed = command_line()
            return typed if "--kernel" in typed else f"{typed} --kernel {kernel}"
        found = self.explained.get((result.case, result.kernel))
        case = found.smallest if found is not None and found.smallest else result.case
        return command_for(case, kernel, self.seed, self.device, self.config)

    def report(self, json_dest: str | None, junit: str | None, verbose: bool, force: bool) -> None:
        """Prints and writes what came out."""
        from kdacli.device import describe
        from kdacli.output import say
        from kdacli.verify import report

        again = {(r.case, r.kernel): self.reproduce(r) for r in self.failures()}
        if junit:
            from kdacli.verify.junit import write

            details = {
                (r.case, r.kernel): "\n".join(
                    [*report.failure_lines(r, self.explained.get((r.case, r.kernel))), again[r.case, r.kernel]]
                )
                for r in self.failures()
            }
            write(junit, self.results, details, self.complete)
        if json_dest:
            self._write_json(json_dest, again, force)
        if json_dest == "-" or (self.stopped and not self.results):
            return
        title = f"Relative errors against the fp64 oracle, on {describe(self.device)}"
        title = title if self.params["dump"] else f"{title}, seed {self.seed}"
        report.print_results(self.results, self.not_run, title, verbose)
        for line in self.searched:
            say(line)
        why = {case.name: case.why for case in self.cases.values()}
        report.print_failures(self.results, why, self.explained, again, self.saved)
        say(("\n" if again else "") + self._summary())

    def _summary(self) -> str:
        from kdacli.verify import report

        said = report.summary(self.results, self.not_run)
        if self.complete:
            return said
        left, unsearched = self.total - len(self.results), len(self.kernels) - len(self.searched)
        if left > 0:
            said += f"; ended early, {left} of {self.total} were not made"
        elif self.searching and unsearched:
            said += f"; ended early, {unsearched} of {len(self.kernels)} kernels were not searched to the end"
        return said

    def _write_json(self, dest: str, again: dict[tuple[str, str], str], force: bool) -> None:
        from kdacli.device import describe
        from kdacli.output import write_json
        from kdacli.provenance import collect
        from kdacli.verify import report

        keys = [(r.case, r.kernel) for r in self.results]
        write_json(
            {
                "schema": "kda.verify/1",
                "provenance": collect(None if self.params["dump"] else self.seed),
                "device": describe(self.device),
                "triton_config": self.config,
                "shard": self.shard,
                "cases": [report.json_case(case) for case in self.cases.values()],
                "rows": [
                    report.json_row(r, self.explained.get(key), again.get(key), self.saved.get(key))
                    for r, key in zip(self.results, keys, strict=True)
                ],
                "not_run": [{"kernel": kernel, "reason": reason} for kernel, reason in self.not_run],
                "searched": self.searched,
                "seconds": self.took,
                "complete": self.complete,
                "summary": self._summary(),
            },
            dest,
            force,
        )

    def conclude(self) -> None:
        """Raises `CheckFailedError` for failures, `UnavailableError` where nothing ran or nothing more could, and
        `Abort` after Ctrl-C.
        """
        if self.interrupted:
            raise click.Abort
        if self.stopped:
            raise UnavailableError(f"{self.stopped}; --no-isolate checks without it")
        if failed := self.failures():
            more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            raise CheckFailedError(f"{failed[0].kernel} failed {failed[0].case}{more}")
        if all(result.status == "refused" for result in self.results):
            raise UnavailableError("nothing could run: every kernel refused every case")


def _kernel_name(result: "Result") -> str:
    """The kernel's own name; that of a prefill followed by a decode says both."""
    return result.kernel.removesuffix("+decode")
