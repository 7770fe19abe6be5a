"""Prints, as JSON, what `kdacli.verify.ahead` foresees of the quick suite on a GPU, beside what its launches compile.

Needs no GPU: the cases run as `kda verify` runs them, properties included, up to each launch, on a GPU that is not
there (`kdacli.compile.pretend`). To be run without TRITON_INTERPRET and with empty caches, as `python
foresee_launches.py ARCH KERNEL...`; `test_verify_ahead.py` compares.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator

from kda_kernels import registry
from kda_kernels.cute import decode, prefill
from kda_kernels.errors import InputError
from kdacli.compile import arch, pretend, recorder
from kdacli.verify import ahead
from kdacli.verify.call import call
from kdacli.verify.case import Case
from kdacli.verify.continuity import PrefillThenDecode
from kdacli.verify.properties import PROPERTIES, NotApplicableError, Subject, subject
from kdacli.verify.runner import inputs_of, pairs
from kdacli.verify.suites import cases_for


class _Asked:
    """In place of CuTe's cache: writes down what it is asked for."""

    def __init__(self) -> None:
        self.labels: list[str] = []

    def get(self, key: tuple) -> None:
        return None

    def make(self, key: tuple, label: str, build: Callable[[], object]) -> Callable[..., None]:
        self.labels.append(label)
        return lambda *arguments: None


def launched(kernel: registry.Kernel, case: Case, where: arch.Arch) -> list[str | None]:
    """A key of the caches for each kernel that the case launches; None for what lies in Triton's cache."""
    variants, asked = {}, _Asked()
    with contextlib.ExitStack() as stack:
        stack.enter_context(recorder._caught(variants))
        for module in (decode, prefill):
            stack.enter_context(pretend.replaced(module, "CACHE", asked))
        stack.enter_context(pretend.replaced(decode, "again", lambda *arguments: False))
        runner = PrefillThenDecode.of(kernel, case.decode_steps) if case.decode_steps else kernel
        inputs = inputs_of(case, 0, "cpu")
        try:
            out = call(runner, inputs).outputs
        except InputError:  # it may refuse a layout
            return []
        for name in case.properties:
            if not PROPERTIES[name].gpu_only and name != "threads":  # those launch the case itself
                with contextlib.suppress(NotApplicableError):
                    list(PROPERTIES[name].check(Subject(runner, case.problem, inputs, out, out, (out,), True, False)))
    return asked.labels + [variant.missing(where.name) for variant in variants.values()]


def foreseen(plan: ahead.Plan, where: arch.Arch) -> Iterator[str]:
    """Keys of what the plan would compile."""
    yield from plan.named
    for one in plan.unnamed:
        change = ahead.laid_out(one.layouts)
        yield from (v.missing(where.name) for v in recorder.record(one.kernel, one.problem, where, change))


if __name__ == "__main__":
    where = arch.parse(sys.argv[1])
    subject.judge = lambda *arguments, **more: []  # nothing was computed
    found = {}
    with pretend.gpu(where):
        for kernel in map(registry.get, sys.argv[2:]):
            cases = [
                case
                for case in cases_for("cuda", op=kernel.op)
                if "far-pool" not in case.transforms and kernel.unsupported(case.problem) is None
            ]
            plan = ahead.plan(pairs([kernel], cases), where)
            found[kernel.name] = {
                "named": len(plan.named),
                "foreseen": sorted(set(foreseen(plan, where))),
                "launched": {case.name: launched(kernel, case, where) for case in cases},
            }
    print(json.dumps(found))
