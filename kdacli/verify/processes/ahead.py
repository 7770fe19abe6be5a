"""Compiling ahead, in parallel, what a run of `kda verify` on a GPU will launch, into the caches that launches use.

Launches compile one after the other, and a suite has a hundred different ones. This is no more than a head start: what
it does not foresee, or cannot compile, is compiled, and reported, at its launch.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from typing import NamedTuple, Protocol

from kda_kernels.problem import Op, Problem
from kda_kernels.registry import Kernel
from kda_kernels.tensors import Inputs
from kda_kernels.variant import Variant
from kdacli.compile import pool, worker
from kdacli.compile.arch import Arch, here
from kdacli.compile.recorder import CuteFunction
from kdacli.output import progress
from kdacli.verify.cases.case import Case
from kdacli.verify.checks.check import Table
from kdacli.verify.checks.continuity import PrefillThenDecode
from kdacli.verify.properties import PROPERTIES
from kdacli.verify.transforms import LAYOUTS, transformed

FEW = 8  # for so few calls, processes would take longer to start than they save
_TOO_LARGE = "far-pool"  # gigabytes; and to a compiler it is a pool like others


class Foreseen(Protocol):
    """What decides which functions are launched; another process gets it."""

    @property
    def name(self) -> str:
        """For people."""

    def variants(self, arch: Arch) -> Sequence[Variant | CuteFunction]:
        """What is launched on such a GPU, in a process that believes to have one; asked for many times."""


class Call(NamedTuple):
    """One of a kernel."""

    kernel: Kernel
    problem: Problem
    layouts: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.kernel.name

    def variants(self, arch: Arch) -> list[Variant]:
        return worker.variants(self.kernel, self.problem, arch, _laid_out(self.layouts))


def compile_ahead(table: Table, jobs: int | None = None) -> None:
    """Compiles for this machine's GPU what kernels will launch in cases, as far as it can be foreseen.

    Args:
        table: the cases, each with its kernels.
        jobs: processes; None: one a core.
    """
    with contextlib.suppress(Exception):  # whatever is wrong, the run meets it too, and says so
        if len(calls := calls_of(table)) >= FEW:
            compile_foreseen(calls, jobs)


def compile_foreseen(calls: Sequence[Foreseen], jobs: int | None = None) -> None:
    """What `calls` launch on this machine's GPU, in so many processes; None: one a core. Raises whatever is wrong."""
    if (arch := here()) is not None:
        with pool.workers(jobs) as processes:
            _build(processes, arch, lacking(processes, arch, calls))


def calls_of(table: Table) -> list[Call]:
    """The calls of all cases that differ in what they launch."""
    calls: dict[Call, None] = {}
    for case, served in table:
        layouts = tuple(name for name in case.transforms if name in LAYOUTS and name != _TOO_LARGE)
        calls |= {Call(runs, problem, layouts): None for one in served for runs, problem in _problems(one, case)}
    return list(calls)


def _problems(kernel: Kernel, case: Case) -> Iterator[tuple[Kernel, Problem]]:
    """What a case asks, properties included, each with the kernel that it asks."""
    calls = [(kernel, case.problem)]
    if case.decode_steps and (decode := PrefillThenDecode.of(kernel, case.decode_steps).decode) is not None:
        calls.append((decode, dataclasses.replace(case.problem, op=Op.DECODE, seq_lens=(1,) * case.problem.N)))
    asked = [PROPERTIES[name].asked for name in case.properties]
    calls += [(kernel, change(case.problem)) for change in asked if change is not None]
    return ((runs, problem) for runs, problem in calls if runs.unsupported(problem) is None)


def lacking(processes: pool.Workers, arch: Arch, calls: Sequence[Foreseen]) -> dict[str, tuple[Foreseen, str]]:
    """By the key of a cache that lacks it: a call that launches it, and its name there."""
    found: dict[str, tuple[Foreseen, str]] = {}
    futures = {processes.believing(arch).submit(missing, call, arch): call for call in calls}
    for future, call in futures.items():
        with contextlib.suppress(Exception):  # a kernel may refuse a layout
            found |= {key: (call, name) for key, name in future.result().items() if key not in found}
    return found


def _build(processes: pool.Workers, arch: Arch, wanted: Mapping[str, tuple[Foreseen, str]]) -> None:
    with progress("compiling", len(wanted)) as advance:
        futures = {processes.believing(arch).submit(build, call, name, arch): call for call, name in wanted.values()}
        try:
            for future in as_completed(futures):
                advance(futures[future].name)
        except KeyboardInterrupt:  # the processes would go on to the last of them
            for future in futures:
                future.cancel()
            raise


def missing(call: Foreseen, arch: Arch) -> dict[str, str]:
    """In a process that believes in such a GPU: by key, the names of what the call launches and the caches lack."""
    keys = {v.name: v.missing(arch.name) for v in call.variants(arch) if hasattr(v, "missing")}
    return {key: name for name, key in keys.items() if key is not None}


def build(call: Foreseen, name: str, arch: Arch) -> None:
    """In such a process: compiles one of `missing`."""
    next(v for v in call.variants(arch) if v.name == name).build(arch.name)


@functools.cache
def _laid_out(layouts: tuple[str, ...]) -> functools.partial[Inputs]:
    """What gives inputs these layouts; the same object for the same ones."""
    return functools.partial(transformed, names=layouts)
