"""Which variants to compile for which architectures, spread over processes."""

import contextlib
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from kda_kernels.errors import InputError
from kda_kernels.problem import Problem
from kda_kernels.registry import Kernel
from kdacli.compile import worker
from kdacli.compile.arch import Arch


class Target(NamedTuple):
    """One thing to compile."""

    kernel: Kernel
    problem: Problem | None
    variant: str
    arch: Arch


@contextlib.contextmanager
def workers(jobs: int | None = None) -> Iterator[ProcessPoolExecutor]:
    """Processes that compile: `jobs` of them, by default one a core. Fresh ones, since this one may interpret."""
    with (
        tempfile.TemporaryDirectory(prefix="kda-compile-") as cache,
        ProcessPoolExecutor(
            jobs or os.cpu_count() or 1,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=worker.start,
            initargs=(cache,),
        ) as pool,
    ):
        yield pool


def plan(
    pool: ProcessPoolExecutor, wanted: Sequence[tuple[Kernel, Problem | None]], archs: Sequence[Arch], named: bool
) -> list[Target]:
    """What each kernel launches for its problem (None: its usual variants), for every architecture.

    Raises:
        InputError: a kernel cannot run its problem on any machine, or has nothing to compile though it was `named`.
    """
    targets = []
    names = pool.map(worker.variant_names, *zip(*wanted, strict=True))
    for (kernel, problem), variants in zip(wanted, names, strict=True):
        if named and not variants:
            raise InputError(f"kernel {kernel.name} has nothing to compile: its backend is {kernel.backend}")
        targets += [Target(kernel, problem, variant, arch) for variant in variants for arch in archs]
    return targets


def compile_targets(
    pool: ProcessPoolExecutor, targets: Sequence[Target], done: Callable[[str], None] = lambda label: None
) -> list[dict[str, Any]]:
    """One row for each target, in order: kernel, problem, variant, arch, and what `worker.compile_variant` returns.

    A row whose binary compiled but wants more shared memory than a block has there holds a `note`.

    Args:
        done: called with the kernel's name whenever a target is through.
    """
    futures = {pool.submit(worker.compile_variant, t.kernel, t.problem, t.variant, t.arch.number): t for t in targets}
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
        "problem": target.problem and target.problem.to_dict(),
        "variant": target.variant,
        "arch": target.arch.name,
        **result,
    }
    if note := target.arch.why_no_launch(result.get("shared_bytes", 0)):
        row["note"] = note
    return row
