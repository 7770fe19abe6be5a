"""Compiles ahead for some cases on a GPU that is not there; prints, as JSON, what is left to compile, before and after.

To be run without TRITON_INTERPRET, as `python compile_ahead.py ARCH KERNEL JOBS CASE...`, for `test_verify_ahead.py`.
"""

import json
import sys

from foresee_launches import launched

from kda_kernels import registry
from kdacli.compile import arch, pretend
from kdacli.verify import ahead
from kdacli.verify.runner import pairs
from kdacli.verify.suites import cases_for

if __name__ == "__main__":
    where, kernel, jobs = arch.parse(sys.argv[1]), registry.get(sys.argv[2]), int(sys.argv[3])
    cases = [case for case in cases_for("cuda", op=kernel.op) if case.name.split("/")[0] in sys.argv[4:]]
    ahead.here = lambda: where

    def left() -> dict[str, int]:
        keys = {key for case in cases for key in launched(kernel, case, where)}
        return {"named": len(ahead.plan(pairs([kernel], cases), where).named), "launches": len(keys - {None})}

    with pretend.gpu(where):
        before = left()
        ahead.compile_ahead(pairs([kernel], cases), jobs)
        print(json.dumps({"cases": len(cases), "before": before, "after": left()}))
