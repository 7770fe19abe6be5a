"""The checks of `kda verify` in a process apart, so that a kernel which kills it, or its GPU context, ends one check.

An illegal address or instruction breaks a CUDA context for good: whatever the process does next fails too. So on a GPU
the command does its checks through an `IsolatedChecker`: one process that lives until something breaks it. The check
that did is a failure, and the next one gets a fresh process.
"""

import contextlib
import dataclasses
import inspect
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from kda_kernels.errors import KdaError
from kda_kernels.problem import Op
from kda_kernels.registry import Kernel
from kdacli import forked
from kdacli.verify.cases.case import Case
from kdacli.verify.checks.check import Result
from kdacli.verify.failures.explanation import Explanation
from kdacli.verify.processes.checker import CRASHED, Begun, Checker
from kdacli.verify.search import Found


class LostError(Exception):
    """The process is gone, or of no more use; the message says why."""


class InnerError(Exception):
    """An error of ours in the other process; its note holds the traceback there."""


class NoStartError(Exception):
    """No process to check in can be had, which is no kernel's doing; the message says why."""


class IsolatedChecker:
    """A `Checker` in another process. Close it, or use it in a `with`.

    Whatever asks it something raises `NoStartError` where its process ends, twice in a row, before it has begun.

    Args:
        device, seed: as of `Checker`.
        limit: seconds that one check may take before it counts as hung.
        config: of autotuned kernels, for `kdacli.autotuning.take`; None: they tune themselves.
    """

    def __init__(self, device: str, seed: int, limit: float, config: int | None = None) -> None:
        self.device, self.limit = device, limit
        self._made_with = (device, seed, config)
        self._ended_for_good = False
        self._given: tuple[Mapping[str, Any], Op] | None = None
        self._begun: list[Begun] = []  # checks that began since the last question
        self._open: Begun | None = None  # the one that has not ended
        self._asked = 0  # questions: what answers an earlier one, which nobody waits for any more, is passed over
        self._start()

    def __enter__(self) -> "IsolatedChecker":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def end(self) -> None:
        """Ends the process, whatever it is doing, from any thread: who waits for an answer gets `NoStartError`."""
        self._ended_for_good = True
        self._process.kill()
        self._process.join()

    def close(self) -> None:
        """Ends the process, whatever it is doing; the next question starts another."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _start(self) -> None:
        self._ready = False
        # Not forked from here: CUDA does not survive it. No daemon: a kernel may start processes of its own.
        context = forked.context()
        self._pipe, theirs = context.Pipe()
        serve = forked.Start.of(_serve, *self._made_with)
        process = context.Process(target=forked.begin, args=(serve, theirs), name="kda-verify-checks")
        with _without_ctrl_c():
            process.start()
        self._process = process  # now that it can be ended
        theirs.close()
        if self._ended_for_good:  # by another thread, which may have killed the one before
            self._process.kill()

    def _await_ready(self) -> None:
        """Waits until there is a process that has begun: one that ended before may have met a passing trouble, and the
        next one gets a chance.
        """
        for last in (False, True):
            if self._ended_for_good:
                raise NoStartError("the process that checks was ended")
            if self._pipe.closed:
                self._start()
            if self._ready or (why := self._begins()) is None:
                return
            self.close()
            if last:
                raise NoStartError(f"the process that checks cannot start: {why}")

    def _begins(self) -> str | None:
        """Why the process did not begin; None: it did."""
        try:
            _, kind, value = self._pipe.recv()
        except (EOFError, OSError):
            return f"it ended before it had begun ({self._ended()}); what it said stands above"
        self._ready = kind == "ready"
        return None if self._ready else str(value)

    def prepare(self, kernels: Sequence[Kernel]) -> None:
        """As `Checker.prepare`, without waiting for it."""
        with contextlib.suppress(OSError):  # it is gone already: the first question finds out
            self._pipe.send((0, "prepare", (kernels,)))

    def select(self, kernel: str, op: Op | None, names: Sequence[str], suite: str) -> tuple[Kernel, list[Case]]:
        """As `Checker.select`."""
        (found,) = self._ask("select", kernel, op, names, suite)
        return found

    def check_case(self, case: Case, kernels: Sequence[Kernel]) -> Iterator[Result]:
        """As `Checker.check_case`, but goes on with the other kernels after one that broke the process."""
        unnamed = Result(case.name, "", case.problem.op, "error")
        yield from self._checks(unnamed, kernels, "check_case", case)

    def give(self, params: Mapping[str, Any], op: Op) -> tuple[str, Op]:
        """As `Checker.give`."""
        self._given = None
        ((self._label, self._op),) = self._ask("give", params, op)
        self._given = (params, op)
        return self._label, self._op

    def check_given(self, kernels: Sequence[Kernel]) -> Iterator[Result]:
        """As `Checker.check_given`, but goes on as `check_case` does."""
        yield from self._checks(Result(self._label, "", self._op, "error"), kernels, "check_given")

    def search(self, kernel: Kernel, seconds: float, part: int = 1) -> Found:
        """As `Checker.search`; a case that broke the process is what was found."""
        began = time.monotonic()
        try:
            (found,) = self._ask("search", kernel, seconds, part)
            return found
        except LostError as lost:
            last = self._begun[-1] if self._begun else None
            if last is None or last.case is None:
                raise InnerError(f"the search with {kernel.name} {lost}") from lost
            failure = (last.case, last.lost(str(lost)))
            return Found(kernel.name, len(self._begun), 0, failure, time.monotonic() - began)

    def explain(
        self, kernel: Kernel, case: Case | None, result: Result, seconds: float, folder: Path | None, force: bool
    ) -> tuple[Explanation, Path | None]:
        """As `Checker.explain`; where a smaller case breaks the process, that is all it says."""
        asked = ("explain", kernel, case, dataclasses.replace(result, outputs=None), seconds, folder, force)
        try:
            (found,) = self._ask(*asked, limit=seconds + 2 * self.limit)
            return found
        except LostError as lost:
            said = (f"a simpler case, tried in search of the smallest, {lost}",)
            return Explanation((), said, (), None, False), None

    def _checks(self, unnamed: Result, kernels: Sequence[Kernel], method: str, *args: Any) -> Iterator[Result]:
        """The results of a method that checks `kernels`, and those of the checks that broke the process."""
        left = list(kernels)
        while left:
            before = len(left)
            try:
                for result in self._ask(method, *args, tuple(left)):
                    del left[0]
                    yield result
            except LostError as lost:
                if self._open is not None:
                    del left[0]
                    yield self._open.lost(str(lost))
                elif len(left) == before:  # no check had begun
                    result = dataclasses.replace(unnamed, kernel=left.pop(0).name)
                    yield Begun(result, None).lost(f"{lost}, while its inputs were made")

    def _ask(self, method: str, *args: Any, limit: float | None = None) -> Iterator[Any]:
        """What the other process's `Checker` returns, or yields, for this call.

        Args:
            limit: seconds to wait for the next answer; None: for a check's end `self.limit`, else for ever.

        Raises:
            LostError: what was asked broke the process, which is gone now.
            KdaError: as the method raised it. InnerError: it raised anything else.
            NoStartError: there is no process to ask.
        """
        anew = self._pipe.closed
        self._await_ready()
        if anew and self._given is not None:
            list(self._ask("give", *self._given))
        self._begun, self._open = [], None
        try:
            self._asked += 1
            asked = self._asked
            self._pipe.send((asked, method, args))
        except OSError:  # it died while nobody asked anything of it
            raise self._lost() from None
        while True:
            waits = self.limit if limit is None and self._open is not None else limit
            try:
                if not self._pipe.poll(waits):
                    raise self._lost(f"hung: there was no answer after {waits:g} seconds")
                number, kind, value = self._pipe.recv()
            except (EOFError, OSError):
                raise self._lost() from None
            if number != asked:
                continue
            if kind == "begun":
                self._begun.append(value)
                self._open = value
            elif kind == "item":
                self._open = None
                yield value
            elif kind == "lost":
                raise self._lost(value)
            elif kind == "raised":
                raise value
            else:
                return

    def _lost(self, why: str | None = None) -> LostError:
        """Ends the process. `why` None: it ended by itself."""
        if why is None:
            why = f"killed its process: {self._ended()}"
        self.close()
        return LostError(why)

    def _ended(self) -> str:
        """How the process ended, which it did by itself: SIGABRT, exit code 1."""
        self._process.join(5)  # its end of the pipe closes first
        code = self._process.exitcode
        return signal.Signals(-code).name if code and code < 0 else f"exit code {code}"


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """A process started inside ignores Ctrl-C from its first moment: it reaches all, and the one in front decides."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(device: str, seed: int, config: int | None, pipe: Connection) -> None:
    """The other process: answers until nobody asks any more, or its GPU context is broken."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(sys.stderr.fileno(), 1)  # stdout may be JSON
    from kdacli import autotuning
    from kdacli.device import pick_device

    number = 0
    checker = Checker(device, seed, announce=lambda begun: pipe.send((number, "begun", begun)))
    try:
        try:
            pick_device(device)
            if config is not None:
                autotuning.take(config)
        except KdaError as error:
            pipe.send((number, "raised", _portable(error)))
            os._exit(1)
        pipe.send((number, "ready", None))
        while True:
            number, method, args = pipe.recv()
            for kind, value in _answers(checker, method, args):
                pipe.send((number, kind, value))
            if (line := checker.lost_context()) is not None:
                pipe.send((number, "lost", CRASHED + line))
                break
    except (EOFError, OSError):
        pass
    os._exit(0)  # a broken context, or a peer's own tidying up, has nothing to say any more


def _answers(checker: Checker, method: str, args: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    """What answers one question: items, and then that it is done or what was raised."""
    try:
        found = getattr(checker, method)(*args)
        for item in found if inspect.isgenerator(found) else (found,):
            yield "item", _without_tensors(item)
        end: tuple[str, Any] = ("done", None)
    except Exception as error:
        end = ("raised", _portable(error))
    if checker.lost_context() is None:
        yield end


def _without_tensors(item: Any) -> Any:
    if isinstance(item, Result):
        return dataclasses.replace(item, outputs=None)
    if isinstance(item, Found) and item.failure is not None:
        case, result = item.failure
        return dataclasses.replace(item, failure=(case, _without_tensors(result)))
    return item


def _portable(error: Exception) -> Exception:
    """The error as it is if it is one of ours for users, else one that holds its words and its traceback."""
    if isinstance(error, KdaError):
        return type(error)(*error.args)
    inner = InnerError(f"{type(error).__name__}: {error}")
    inner.add_note("".join(traceback.format_exception(error)))
    return inner
