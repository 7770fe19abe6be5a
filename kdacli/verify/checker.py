"""What one process does in a run of `kda verify`: checks, searches and explanations, each asked for by a call.

`Checker` is asked directly, or through `kdacli.verify.isolated` in a process of its own, which is why what it yields is
small and can be pickled.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kda_kernels.errors import InputError
from kda_kernels.problem import Op
from kda_kernels.registry import Kernel
from kdacli.verify import runner, verdict
from kdacli.verify.case import Case
from kdacli.verify.runner import Bench, Result
from kdacli.verify.search import Found, search
from kdacli.verify.verdict import Explanation

CRASHED = "crashed the GPU context: "


class ContextLostError(Exception):
    """A kernel broke the GPU's context: nothing more can run in this process. The message is CUDA's."""


@dataclasses.dataclass(frozen=True)
class Started:
    """A check that begins now, so that whoever waits knows what a crash is due to."""

    kernel: Kernel
    case: Case | None  # None: flags or a dump
    result: Result  # what is known of it: names, and no more


@dataclasses.dataclass(frozen=True)
class Given:
    """A problem of flags or a dump, made ready."""

    label: str
    op: Op


class Checker:
    """Checks in this process.

    Args:
        device: "cpu" or "cuda". seed: of synthetic inputs.
    """

    def __init__(self, device: str, seed: int) -> None:
        self.device, self.seed = device, seed
        self._given: Bench | None = None

    def prepare(self, kernels: Sequence[Kernel]) -> Iterator[None]:
        """Imports what the kernels will need, and wakes the GPU."""
        with contextlib.suppress(RuntimeError):  # the first check meets it too
            torch.zeros(1, device=self.device)
        for kernel in kernels:
            kernel.unsupported()
        yield from ()

    def check_case(self, case: Case, kernels: Sequence[Kernel]) -> Iterator[Started | Result]:
        """One case, by each kernel: its start, then its result.

        Raises:
            ContextLostError: after the result of the kernel that did it.
        """
        try:
            bench = Bench.of_case(case, self.seed, self.device)
        except torch.OutOfMemoryError:
            why = ("the GPU has too little memory free for this case",)
            yield from (Result(case.name, kernel.name, case.problem.op, "refused", notes=why) for kernel in kernels)
            return
        yield from self._check(bench, case, kernels)

    def give(self, params: dict[str, Any], op: Op) -> Iterator[Given]:
        """Makes ready what flags or a dump say, for `check_given`.

        Args:
            params: as `kdacli.options.inputs_from` takes them. op: where they do not say it.

        Raises:
            InputError, UnavailableError: see there.
        """
        from kdacli import options

        problem, inputs, _, label = options.inputs_from(params, self.device, op)
        self._given = Bench.of_inputs(label, problem, inputs)
        yield Given(label, problem.op)

    def check_given(self, kernels: Sequence[Kernel]) -> Iterator[Started | Result]:
        """As `check_case`, of what was given."""
        yield from self._check(self._given, None, kernels)

    def _check(self, bench: Bench, case: Case | None, kernels: Sequence[Kernel]) -> Iterator[Started | Result]:
        for kernel in kernels:
            begun = Result(bench.name, runner.runner_of(kernel, bench).name, bench.problem.op, "error")
            yield Started(kernel, case, begun)
            try:
                result = runner.check(kernel, bench)
            except Exception:  # not the kernel's own, which are results: of ours, or late news of a lost context
                if (line := lost_context(self.device)) is None:
                    raise
                result = begun
            else:
                line = lost_context(self.device)
            if line is None:
                yield result
                continue
            yield dataclasses.replace(result, status="error", notes=(CRASHED + line,), outputs=None)
            raise ContextLostError(line)

    def search(self, kernel: Kernel, seconds: float) -> Iterator[Started | Found]:
        """Random cases for a while: each one's start, and what came of it all.

        Raises:
            ContextLostError: after what was found by then, the case that did it included.
        """
        begun: list[Started] = []

        def starts(case: Case) -> None:
            begun[:] = [Started(kernel, case, Result(case.name, kernel.name, case.problem.op, "error"))]

        for found in search(kernel, self.device, seconds, self.seed, before=starts):
            if found is None:
                yield begun[0]
            elif (line := lost_context(self.device)) is None:
                yield found
            else:
                case = begun[0].case
                yield dataclasses.replace(found, failure=(case, crash(begun[0].result, CRASHED + line)))
                raise ContextLostError(line)

    def explain(
        self, kernel: Kernel, case: Case | None, result: Result, seconds: float, folder: Path | None, force: bool
    ) -> Iterator[tuple[Explanation, Path | None]]:
        """Looks closely at a failure, and saves its tensors in `folder`.

        Args:
            case: that failed; None: what was given. seconds: for the smallest case.
        """
        if case is None:
            if result.outputs is None:  # of another process
                again = runner.check(kernel, self._given)
                result = result if again.ok else again
            found = verdict.explain_bench(self._given, result)
        else:
            found = verdict.explain_case(kernel, case, result, self.seed, self.device, seconds)
        path = None
        if folder is not None:
            path = verdict.save(folder, kernel.name, result.case, result.op, found, force)
        yield dataclasses.replace(found, bench=None, outputs=None), path


Ask = Callable[..., Iterator[Any]]


def crash(begun: Result, note: str) -> Result:
    """The result of a check that did not come back."""
    return dataclasses.replace(begun, notes=(note,))


def is_crash(result: Result) -> bool:
    """Whether a failure took its process or the GPU's context along, so that it is not to be run again here."""
    return result.status == "error" and result.notes[0].startswith((CRASHED, *CRASHES))


CRASHES = ("killed its process: ", "hung: ")


def lost_context(device: str) -> str | None:
    """The first line of what the GPU's driver says where a kernel broke the context; None where all is well."""
    if device != "cuda":
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None
