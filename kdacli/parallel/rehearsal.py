"""What `kda verify --cp` launches on a GPU: all ranks of each case, one after another, with no GPU and no group."""

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

from kda_kernels.api import kda_prefill
from kda_kernels.cute.prefill import host
from kda_kernels.parallel import context as of_contexts
from kda_kernels.parallel import prefill as of_prefill
from kda_kernels.variant import Variant
from kdacli.compile import pretend
from kdacli.compile.arch import Arch
from kdacli.compile.recorder import CuteFunction, caught
from kdacli.compile.specialised import Specialised
from kdacli.parallel.checks import alone, arguments, cases, equal_parts, part_of, through_chunk_kda


class Rehearsal(NamedTuple):
    """Of so many ranks; see `kdacli.verify.processes.ahead.Foreseen`."""

    ranks: int

    @property
    def name(self) -> str:
        return f"prefill over {self.ranks} ranks"

    def variants(self, arch: Arch) -> list[Variant | CuteFunction]:
        return _launched(self.ranks, arch)


@functools.cache
def _launched(ranks: int, arch: Arch) -> list[Variant | CuteFunction]:
    """By all ranks, and by the whole batch on one."""
    triton: dict[str, Specialised] = {}
    cute: dict[str, CuteFunction] = {}
    with pretend.gpu(arch), caught(triton, cute=cute), _rehearsing():
        for case in cases(ranks, "cuda").values():
            inputs = case.inputs()
            for rank in range(ranks):
                tokens = part_of(inputs, *case.cuts[rank : rank + 2])
                kda_prefill(**arguments(inputs.fresh(), **tokens), group=case.context(rank))
            alone(inputs)
        equal = equal_parts(ranks)
        for rank in range(ranks):
            through_chunk_kda(equal, equal.stateless("cpu"), equal.context(rank), rank)
    return [*triton.values(), *cute.values()]


@contextlib.contextmanager
def _rehearsing() -> Iterator[None]:
    """What a rank gets from others holds anything. And no call is like the last one, which compiled functions tell."""
    names = {of_contexts: ("agree", "start_send", "wait"), of_prefill: ("start_gather", "start_receive", "wait")}
    with contextlib.ExitStack() as stack:
        stack.enter_context(pretend.replaced(host, "again", lambda *call: False))
        for module, replaced in names.items():
            for name in replaced:
                stack.enter_context(pretend.replaced(module, name, lambda *given: None))
        yield
