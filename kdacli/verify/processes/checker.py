"""What a process does in a run of `kda verify`: checks, random search, explanations, each asked for by one call.

The command asks a `Checker` of its own, or one in a process apart (`isolated`). What it returns holds names, numbers
and words, and can be pickled, but for the `outputs` of results.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kda_kernels.problem import Op
from kda_kernels.registry import Kernel
from kdacli.verify import selection
from kdacli.verify.cases.case import Case
from kdacli.verify.checks import gpu_memory
from kdacli.verify.checks.check import NO_ROOM, Bench, Result, check, runner_of
from kdacli.verify.failures import explanation
from kdacli.verify.failures.explanation import Explanation
from kdacli.verify.search import Found, search

CRASHED = "crashed the GPU context: "


class ContextLostError(Exception):
    """A kernel broke the GPU's context: nothing more can run in its process. The message is the driver's."""


@dataclasses.dataclass(frozen=True)
class Begun:
    """A check that begins: what its result will be called, and the case that is checked, unless it was given."""

    result: Result
    case: Case | None

    def lost(self, note: str) -> Result:
        """The result of a check that did not end."""
        return dataclasses.replace(self.result, notes=(note,), crashed=True)


class Checker:
    """Checks in this process.

    Args:
        device: "cpu" or "cuda". seed: of synthetic inputs.
        announce: called before each check, so that a crash can be laid at somebody's door.
    """

    def __init__(self, device: str, seed: int, announce: Callable[[Begun], None] = lambda begun: None) -> None:
        self.device, self.seed, self._announce = device, seed, announce
        self._given: Bench | None = None

    def prepare(self, kernels: Sequence[Kernel]) -> None:
        """Wakes the GPU and imports what the kernels need, while the caller does something else."""
        with contextlib.suppress(RuntimeError):  # the first case meets it too, and says so
            torch.zeros(1, device=self.device)
        for kernel in kernels:
            kernel.unsupported()

    def select(self, kernel: str, op: Op | None, names: Sequence[str], suite: str) -> tuple[Kernel, list[Case]]:
        """A kernel by its name, and its cases: those named, or those of a suite."""
        found = selection.get_kernel(kernel, op)
        return found, [case for case, _ in selection.select_table(names, [found], self.device, suite)]

    def check_case(self, case: Case, kernels: Sequence[Kernel]) -> Iterator[Result]:
        """Each kernel in one case of their op.

        Raises:
            ContextLostError: once the result of the kernel that did it is out.
        """
        self._require_context()
        bench = Bench.where_it_fits(case, self.seed, self.device)
        if bench is None:
            why = (NO_ROOM,)
            yield from (Result(case.name, kernel.name, case.problem.op, "refused", notes=why) for kernel in kernels)
            return
        yield from self._check(bench, case, kernels)
        del bench
        gpu_memory.give_back()

    def give(self, params: Mapping[str, Any], op: Op) -> tuple[str, Op]:
        """Makes ready what flags or a dump say, for `check_given`; returns its label and op.

        Args:
            params: as `kdacli.options.inputs_from` takes them, and raises for them. op: where they name none.
        """
        from kdacli import options

        problem, inputs, _, label = options.inputs_from(params, self.device, op)
        self._given = Bench.of_inputs(label, problem, inputs)
        return label, problem.op

    def check_given(self, kernels: Sequence[Kernel]) -> Iterator[Result]:
        """As `check_case`, on what was given."""
        self._require_context()
        yield from self._check(self._bench(), None, kernels)

    def search(self, kernel: Kernel, seconds: float, part: int = 1) -> Found:
        """Random cases until the time is up or one fails; other ones in each part of a run that is shared out."""
        self._require_context()
        begun: list[tuple[Case, Begun]] = []

        def before(case: Case) -> None:
            begun[:] = [(case, Begun(Result(case.name, kernel.name, case.problem.op, "error"), case))]
            self._announce(begun[0][1])

        found = search(kernel, self.device, seconds, self.seed, part, before=before)
        if begun and (line := self.lost_context()) is not None:
            case, last = begun[0]
            return dataclasses.replace(found, failure=(case, last.lost(CRASHED + line)))
        return found

    def explain(
        self, kernel: Kernel, case: Case | None, result: Result, seconds: float, folder: Path | None, force: bool
    ) -> tuple[Explanation, Path | None]:
        """A failure looked at closely, and the file in `folder` (None: nowhere) where its tensors are.

        Args:
            case: which failed; None: what was given.
            seconds: to look for the smallest case that fails.
        """
        self._require_context()
        try:
            if case is not None:
                found = explanation.explain_case(kernel, case, result, self.seed, self.device, seconds)
            else:
                again = result if result.outputs is not None else check(kernel, self._bench())
                found = explanation.explain_bench(self._bench(), result if again.ok else again)
        except torch.OutOfMemoryError:
            said = "the GPU has too little memory free to look closer"
            return Explanation((), (said,), (), None, False), None
        path = None
        if folder is not None:
            path = explanation.save(folder, kernel.name, result.case, result.op, found, force)
        return dataclasses.replace(found, bench=None, outputs=None), path

    def lost_context(self) -> str | None:
        """What the driver says, in one line, where the GPU's context is broken; None where all is well."""
        if self.device != "cuda":
            return None
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            return (str(error).splitlines() or [type(error).__name__])[0]
        return None

    def _bench(self) -> Bench:
        assert self._given is not None, "give comes first"
        return self._given

    def _require_context(self) -> None:
        if (line := self.lost_context()) is not None:
            raise ContextLostError(line)

    def _check(self, bench: Bench, case: Case | None, kernels: Sequence[Kernel]) -> Iterator[Result]:
        for kernel in kernels:
            name = runner_of(kernel, bench.decode_steps).name
            begun = Begun(Result(bench.name, name, bench.problem.op, "error"), case)
            self._announce(begun)
            try:
                result = check(kernel, bench)
            except Exception:  # what a kernel raises is a result; this is ours, or late news of a broken context
                if (line := self.lost_context()) is None:
                    raise
            else:
                if (line := self.lost_context()) is None:
                    yield result
                    continue
            yield begun.lost(CRASHED + line)
            raise ContextLostError(line)
