"""Compiling ahead, in parallel, what a run of `kda verify` on a GPU will launch, into the caches that launches use.

Launches compile one after the other, and a suite has a hundred different ones. This is no more than a head start: what
it does not foresee, or cannot compile, is compiled, and reported, at its launch.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from typing import NamedTuple

from kda_kernels.problem import Op, Problem
from kda_kernels.registry import Kernel
from kda_kernels.tensors import Inputs
from kdacli.compile import pool, worker
from kdacli.compile.arch import Arch, here
from kdacli.output import progress
from kdacli.verify.case import Case
from kdacli.verify.continuity import PrefillThenDecode
from kdacli.verify.properties import PROPERTIES
from kdacli.verify.runner import Table
from kdacli.verify.transforms import LAYOUTS, transformed

FEW = 4  # to compile so few, processes would take longer to start than they save
_TOO_LARGE = "far-pool"  # gigabytes; and to a compiler it is a pool like others


class Named(NamedTuple):
    """One of a kernel's `variants` for a problem."""

    kernel: Kernel
    problem: Problem
    variant: str


class Unnamed(NamedTuple):
    """Triton launches that nothing describes: on tensors of unusual layouts, or of a kernel without `variants`."""

    kernel: Kernel
    problem: Problem
    layouts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to compile. `named`: by the key of the cache that lacks it. `unnamed`: may lie in the cache or not."""

    named: dict[str, Named]
    unnamed: tuple[Unnamed, ...]

    @property
    def pays(self) -> bool:
        """Whether it is worth starting processes: not where a run like this one filled the cache before."""
        return len(self.named) >= FEW


def compile_ahead(table: Table, jobs: int | None = None) -> None:
    """Compiles for this machine's GPU what kernels will launch in cases, as far as it can be foreseen.

    Args:
        table: the cases, each with its kernels.
        jobs: processes; None: one a core.
    """
    with contextlib.suppress(Exception):  # whatever is wrong, the run meets it too, and says so
        if (arch := here()) is not None and (found := plan(table, arch)).pays:
            _carry_out(found, arch, jobs or pool.cores())


def plan(table: Table, arch: Arch) -> Plan:
    """What the cases launch on a GPU of that architecture, and the caches do not hold."""
    named: dict[str, Named] = {}
    unnamed: dict[Unnamed, None] = {}
    for case, served in table:
        layouts = tuple(name for name in case.transforms if name in LAYOUTS and name != _TOO_LARGE)
        for kernel, problem in [call for one in served for call in _calls(one, case)]:
            offered = worker.offers(kernel)
            if kernel.backend == "triton" and (layouts or not offered):
                unnamed[Unnamed(kernel, problem, layouts)] = None
            elif offered:
                for variant in worker.variants(kernel, problem, arch):
                    missing = getattr(variant, "missing", lambda name: None)
                    if (key := missing(arch.name)) is not None:
                        named.setdefault(key, Named(kernel, problem, variant.name))
    return Plan(named, tuple(unnamed))


def _calls(kernel: Kernel, case: Case) -> Iterator[tuple[Kernel, Problem]]:
    """The calls of a case that differ in what they launch, each with its kernel."""
    calls = [(kernel, case.problem)]
    if case.decode_steps and (decode := PrefillThenDecode.of(kernel, case.decode_steps).decode) is not None:
        calls.append((decode, dataclasses.replace(case.problem, op=Op.DECODE, seq_lens=(1,) * case.problem.N)))
    asked = [PROPERTIES[name].asked for name in case.properties]
    calls += [(kernel, change(case.problem)) for change in asked if change is not None]
    return ((runs, problem) for runs, problem in calls if runs.unsupported(problem) is None)


def _carry_out(found: Plan, arch: Arch, jobs: int) -> None:
    unnamed, total = len(found.unnamed), len(found.named) + len(found.unnamed)
    count = min(unnamed, -(-jobs * unnamed // total))
    shares = [found.unnamed[i::count] for i in range(count)]
    with pool.workers(jobs) as processes, progress("compiling", total) as advance:
        futures = {processes.believing(arch).submit(build_unnamed, share, arch): share for share in shares}
        futures |= {
            processes.believing().submit(worker.build, one.kernel, one.problem, one.variant, arch): (one,)
            for one in found.named.values()
        }
        try:
            for future in as_completed(futures):
                advance(futures[future][0].kernel.name, len(futures[future]))
        except KeyboardInterrupt:  # the processes would go on to the last of them
            for future in futures:
                future.cancel()
            raise


def laid_out(layouts: tuple[str, ...]) -> Callable[[Inputs], Inputs]:
    """What gives inputs these layouts."""
    return lambda inputs: transformed(inputs, layouts)


def build_unnamed(share: Sequence[Unnamed], arch: Arch) -> None:
    """In a process that believes in such a GPU: builds what these launch and Triton's cache lacks."""
    from kdacli.compile import recorder

    for one in share:
        with contextlib.suppress(Exception):  # a kernel may refuse a layout
            for variant in recorder.record(one.kernel, one.problem, arch, laid_out(one.layouts)):
                if variant.missing(arch.name) is not None:
                    variant.build(arch.name)
