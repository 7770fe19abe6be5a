"""Prints, as JSON, the keys under which Triton's cache would hold each launch of a kernel, and each of its `variants`.

Needs no GPU: the launches are recorded by `kdacli.compile.recorder`, in which Triton's own binder of arguments makes
the specialisation. To be run without TRITON_INTERPRET, as `python record_launches.py ARCH PROBLEM...`, problems as
JSON; `test_compile.py` compares.
"""

import hashlib
import importlib
import json
import sys
from typing import Any

from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.compiler import make_backend
from triton.runtime.cache import _base32, get_cache_key

from kda_kernels import registry
from kda_kernels.problem import Problem
from kda_kernels.triton.variant import Variant, target_of
from kdacli.compile import arch, recorder


def row(variant: Variant, name: str) -> dict[str, Any]:
    """What is specialised, for a message that can be read, and the name of the folder in the cache."""
    target = target_of(name)
    backend = make_backend(target)
    source, options = variant.source(target.backend), backend.parse_options(dict(variant.options))
    key = get_cache_key(source, backend, options, get_cache_invalidating_env_vars())
    return {
        "kernel": variant.fn.__name__,
        "signature": source.signature,
        "constexprs": {variant.fn.arg_names[i]: value for (i,), value in source.constants.items()},
        "multiples": sorted(variant.fn.arg_names[i] for (i,), said in source.attrs.items() if said),
        "options": {x: getattr(options, x) for x in ("num_warps", "num_stages", "num_ctas", "debug")},
        "folder": _base32(hashlib.sha256(key.encode()).hexdigest()),
    }


if __name__ == "__main__":
    where = arch.parse(sys.argv[1])
    found = []
    for problem in (Problem.from_dict(json.loads(text)) for text in sys.argv[2:]):
        kernel = registry.get(f"triton-{problem.op}")
        offered = importlib.import_module(kernel.module).variants(problem, where.gpu)
        both = {"launched": recorder.record(kernel, problem, where), "offered": offered}
        found.append({name: [row(v, where.name) for v in variants] for name, variants in both.items()})
    print(json.dumps(found))
