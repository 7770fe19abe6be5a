"""Compiles ahead for some cases on a GPU that is not there; prints, as JSON, what is left to compile, before and after.

The cases run as `kda verify` runs them, properties included, up to each launch. To be run without TRITON_INTERPRET, as
`python compile_ahead.py ARCH KERNEL JOBS CASE...`, for `test_verify_ahead.py`.
"""

import contextlib
import json
import sys

from kda_kernels import registry
from kda_kernels.errors import InputError
from kdacli.compile import arch, pretend, recorder
from kdacli.verify.cases.case import Case
from kdacli.verify.cases.suites import cases_for
from kdacli.verify.checks.call import call
from kdacli.verify.checks.check import inputs_of, pairs
from kdacli.verify.checks.continuity import PrefillThenDecode
from kdacli.verify.processes import ahead
from kdacli.verify.properties import PROPERTIES, NotApplicableError, Subject, subject


def launched(kernel: registry.Kernel, case: Case, where: arch.Arch) -> set[str | None]:
    """A key of Triton's cache for each function that the case launches; None for what lies there."""
    found = {}
    with recorder.caught(found):
        runner = PrefillThenDecode.of(kernel, case.decode_steps) if case.decode_steps else kernel
        inputs = inputs_of(case, 0, "cpu")
        try:
            out = call(runner, inputs).outputs
        except InputError:  # it may refuse a layout
            return set()
        for name in case.properties:
            if not PROPERTIES[name].gpu_only and name != "threads":  # those launch the case itself
                with contextlib.suppress(NotApplicableError):
                    list(PROPERTIES[name].check(Subject(runner, case.problem, inputs, out, out, (out,), True, False)))
    return {variant.missing(where.name) for variant in found.values()}


if __name__ == "__main__":
    where, kernel, jobs = arch.parse(sys.argv[1]), registry.get(sys.argv[2]), int(sys.argv[3])
    cases = [case for case in cases_for("cuda", op=kernel.op) if case.name.split("/")[0] in sys.argv[4:]]
    ahead.here, ahead.FEW = lambda: where, 1
    subject.judge = lambda *arguments, **more: []  # nothing was computed

    def left() -> int:
        return len(set().union(*(launched(kernel, case, where) for case in cases)) - {None})

    with pretend.gpu(where):
        before = left()
        ahead.compile_ahead(pairs([kernel], cases), jobs)
        print(json.dumps({"cases": len(cases), "before": before, "after": left()}))
