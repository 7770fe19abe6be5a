"""Prints, as JSON, what Triton would specialise in each launch of a kernel, and what `variants` says of it.

Needs no GPU: the launches are caught, and Triton's own binder of arguments is asked instead. To be run without
TRITON_INTERPRET, as `python record_launches.py KERNEL PROBLEM...`, problems as JSON; `test_compile.py` compares.
"""

import contextlib
import importlib
import json
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from kda_kernels import registry
from kda_kernels.problem import Problem
from kda_kernels.registry import Kernel
from kda_kernels.triton.variant import Variant
from kdacli.synthetic import make_inputs

H100 = {
    "require_device": lambda tensor: None,
    "on_device": lambda tensor: contextlib.nullcontext(),
    "multiprocessors": lambda device: 132,
    "shared_memory": lambda device: 232448,
    "prepare_chunk_indices": lambda cu_seqlens, T, *size: torch.zeros(
        (T // 64 + len(cu_seqlens) - 1, 2), dtype=torch.int32
    ),
}


def launched(kernel: Kernel, problem: Problem) -> list[dict[str, Any]]:
    """The launches of `kernel.run`, as Triton's binder sees them."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    found = []

    def catch(fn: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        bound, specialization, options = create_function_from_signature(fn.signature, fn.params, backend)(
            *args, **kwargs
        )
        chosen, signature, constexprs, attrs = fn._pack_args(backend, kwargs, bound, specialization, options)
        found.append(_row(fn, signature, {fn.arg_names[i]: c for (i,), c in constexprs.items()}, attrs, chosen))

    module = importlib.import_module(kernel.module)
    for name in H100.keys() & vars(module).keys():
        setattr(module, name, H100[name])
    JITFunction.run = catch
    module.run(make_inputs(problem))
    return found


def offered(kernel: Kernel, problem: Problem) -> list[dict[str, Any]]:
    """The same of `variants`."""
    variants: list[Variant] = list(importlib.import_module(kernel.module).variants(problem))
    return [_row(v.fn, v.signature, v.constexprs, v.attrs, v) for v in variants]


def _row(fn: JITFunction, signature: dict, constexprs: dict, attrs: dict, options: Any) -> dict[str, Any]:
    return {
        "kernel": fn.__name__,
        "signature": signature,
        "constexprs": constexprs,
        "multiples": sorted(fn.arg_names[i] for (i,), said in attrs.items() if said),
        "options": [options.num_warps, options.num_stages],
    }


if __name__ == "__main__":
    asked = registry.get(sys.argv[1])
    problems = [Problem.from_dict(json.loads(text)) for text in sys.argv[2:]]
    print(json.dumps([{"launched": launched(asked, p), "offered": offered(asked, p)} for p in problems]))
