"""Which variants to compile for which architectures, spread over processes."""

import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from kda_kernels.errors import InputError, UnavailableError
from kda_kernels.problem import Problem
from kda_kernels.registry import Kernel
from kdacli import forked
from kdacli.compile import worker
from kdacli.compile.arch import Arch

Wanted = tuple[Kernel, Problem | None]


class Target(NamedTuple):
    """One thing to compile."""

    kernel: Kernel
    problem: Problem | None
    variant: str
    arch: Arch


class Workers:
    """Processes that compile, fresh ones, since this one may interpret; made when they are first needed.

    They believe in a GPU of the architecture from their start: a kernel's module may look for one when it is imported.
    """

    def __init__(self, jobs: int | None, cache: str | None, stack: contextlib.ExitStack) -> None:
        self._jobs, self._cache, self._stack = jobs or cores(), cache, stack
        self._pools: dict[Arch, ProcessPoolExecutor] = {}

    def believing(self, arch: Arch) -> ProcessPoolExecutor:
        """Those that believe in such a GPU."""
        if arch not in self._pools:
            pool = ProcessPoolExecutor(
                self._jobs,
                mp_context=forked.context(),
                initializer=forked.begin,
                initargs=(forked.Start.of(worker.start, self._cache, arch),),
            )
            self._pools[arch] = self._stack.enter_context(pool)
        return self._pools[arch]

    def cache_folder(self, backend: str) -> str | None:
        """Where what was compiled for kernels of a backend lies; None: nowhere."""
        return next(iter(self._pools.values())).submit(worker.cache_folder, backend).result()


def cores() -> int:
    """How many processes this one may keep busy: a container may have fewer cores than the machine."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(count, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or no limit ("max")
        return count


@contextlib.contextmanager
def workers(jobs: int | None = None, use_cache: bool = True) -> Iterator[Workers]:
    """Processes that compile: `jobs` of them, by default one a core.

    Args:
        use_cache: take binaries from the cache that launches use, and put them there; else everything is compiled anew,
            in a folder that is gone afterwards.
    """
    with contextlib.ExitStack() as stack:
        cache = None if use_cache else stack.enter_context(tempfile.TemporaryDirectory(prefix="kda-compile-"))
        yield Workers(jobs, cache, stack)


def plan(
    processes: Workers, wanted: Sequence[Wanted], archs: Sequence[Arch], named: bool, patterns: Sequence[str] = ()
) -> tuple[list[Target], dict[str, str]]:
    """What each kernel launches for its problem (None: its usual variants), for every architecture.

    Args:
        named: the user asked for these kernels by name: one that cannot be compiled is an error; otherwise only if
            nothing can.
        patterns: only variants whose name is, or matches, one of these; empty for all.

    Returns:
        The targets, and why kernels that nobody named have none.

    Raises:
        InputError: a kernel that was named has nothing to compile, or cannot run its problem on any machine; or no
            variant matches a pattern.
        UnavailableError: a kernel that was named needs a package that is missing.
    """
    reasons: dict[str, str] = {}
    listed: list[tuple[Target, Future]] = []
    for kernel, problem in wanted:
        if kernel.backend == "torch":
            raise InputError(f"kernel {kernel.name} has nothing to compile: its backend is torch")
        for arch in archs:
            future = processes.believing(arch).submit(worker.variant_names, kernel, problem, arch)
            listed.append((Target(kernel, problem, "", arch), future))
    targets: list[Target] = []
    for target, future in listed:
        with _or_a_reason(target.kernel, None if named else reasons):
            targets += [target._replace(variant=name) for name in _names(target, future)]
    if not targets:
        raise InputError("; ".join(dict.fromkeys(reasons.values())))
    # each variant's architectures side by side
    kernels, variants = ([getattr(t, name) for t in targets] for name in ("kernel", "variant"))
    targets.sort(key=lambda t: (kernels.index(t.kernel), variants.index(t.variant)))
    return _matching(targets, patterns), reasons


@contextlib.contextmanager
def _or_a_reason(kernel: Kernel, reasons: dict[str, str] | None) -> Iterator[None]:
    """What is raised inside becomes the kernel's entry in `reasons`, if there is one."""
    try:
        yield
    except (UnavailableError, InputError) as error:
        if reasons is None:
            raise
        reasons[kernel.name] = str(error)


def _names(target: Target, future: Future) -> list[str]:
    try:
        return future.result()
    except BrokenProcessPool:
        raise InputError(f"kernel {target.kernel.name}: the process that asked it for its variants died") from None


def _matching(targets: list[Target], patterns: Sequence[str]) -> list[Target]:
    for pattern in patterns:
        if not any(fnmatchcase(target.variant, pattern) for target in targets):
            names = ", ".join(dict.fromkeys(target.variant for target in targets))
            raise InputError(f"variant {pattern} is unknown: there are {names}")
    return [t for t in targets if not patterns or any(fnmatchcase(t.variant, pattern) for pattern in patterns)]


def compile_targets(
    processes: Workers,
    targets: Sequence[Target],
    done: Callable[[str], None] = lambda label: None,
    folder: str | None = None,
) -> list[dict[str, Any]]:
    """One row for each target, in order: kernel, backend, problem, variant, arch, gpu (whose multiprocessors tuning
    choices were made for), and what `worker.compile_variant` returns.

    A row whose binary compiled but wants more shared or tensor memory than there is holds a `note`.

    Args:
        done: called with the kernel's name whenever a target is through.
        folder: where to write PTX, binaries, disassembly and IR.
    """
    futures = {
        processes.believing(t.arch).submit(worker.compile_variant, t.kernel, t.problem, t.variant, t.arch, folder): t
        for t in targets
    }
    for future in as_completed(futures):
        done(futures[future].kernel.name)
    return [_row(target, _result(future)) for future, target in futures.items()]


def _result(future: Future) -> dict[str, Any]:
    try:
        return future.result()
    except BrokenProcessPool:
        return {"error": "the compiler's process died, in this variant or in one beside it: try --jobs 1"}


def _row(target: Target, result: dict[str, Any]) -> dict[str, Any]:
    row = {
        "kernel": target.kernel.name,
        "backend": target.kernel.backend,
        "problem": target.problem and target.problem.to_dict(),
        "variant": target.variant,
        "arch": target.arch.name,
        "gpu": {"name": target.arch.product, "sms": target.arch.gpu.sms},
        **result,
    }
    if note := target.arch.why_no_launch(result.get("shared_bytes", 0), result.get("tensor_memory", 0)):
        row["note"] = note
    return row
