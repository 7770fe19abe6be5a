"""The part of `kda compile` that runs in processes of its own, where Triton compiles instead of interpreting.

Nothing here imports triton at the top: `start` must come first.
"""

import contextlib
import importlib
import io
import os
import subprocess
import time
import warnings
from typing import TYPE_CHECKING, Any

from kda_kernels.errors import InputError
from kda_kernels.problem import Problem
from kda_kernels.registry import Kernel
from kdacli.compile import sass, toolchain

if TYPE_CHECKING:
    from kda_kernels.triton.variant import Variant


def start(cache: str) -> None:
    """Prepares a fresh process. Triton reads these variables when it is imported or when it compiles."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = cache  # an empty one: a cached binary has no log and no compile time
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    warnings.simplefilter("ignore")
    # LLVM writes to file descriptor 2 behind Python's back, up to hundreds of lines for an architecture it lacks
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def variant_names(kernel: Kernel, problem: Problem | None = None) -> list[str]:
    """What the kernel launches for `problem`, or its usual variants; empty if it has nothing to compile.

    Raises:
        InputError: the kernel cannot run `problem`, wherever it is.
    """
    names = [variant.name for variant in _variants(kernel, problem)]
    reason = problem and kernel.unsupported(problem)
    if names and reason and reason != kernel.unsupported():  # else the reason is this machine, which need not run it
        raise InputError(f"kernel {kernel.name} cannot run {problem.name}: {reason}")
    return names


def compile_variant(kernel: Kernel, problem: Problem | None, name: str, number: int) -> dict[str, Any]:
    """Compiles one of `variant_names` for one architecture.

    Returns:
        registers, stack_bytes, spill_bytes, spill_store_bytes, spill_load_bytes (a thread), shared_bytes (a block),
        num_warps, num_stages, binary_bytes, compile_s and sass (instruction counts). Where the disassembler is missing
        or fails, `sass` is None and `sass_error` says why. Where the compiler refuses, nothing but `error`: its reason
        in one line.
    """
    variant = next(v for v in _variants(kernel, problem) if v.name == name)
    log = io.StringIO()  # Triton prints the log of ptxas
    began = time.perf_counter()
    try:
        with contextlib.redirect_stdout(log):
            compiled = _compile(variant, number)
        out = sass.resources(log.getvalue())
    except Exception as error:  # whatever the compiler throws is its answer, and belongs in this variant's row
        return {"error": _reason(error)}
    cubin = compiled.asm["cubin"]
    return {
        **out,
        "shared_bytes": compiled.metadata.shared,
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "binary_bytes": len(cubin),
        "compile_s": round(time.perf_counter() - began, 3),
        **_sass(cubin),
    }


def _variants(kernel: Kernel, problem: Problem | None) -> list["Variant"]:
    module = importlib.import_module(kernel.module)
    return list(module.variants(problem)) if hasattr(module, "variants") else []


def _compile(variant: "Variant", number: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(variant.fn, variant.signature, variant.constexprs, variant.attrs)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    if variant.maxnreg is not None:
        options["maxnreg"] = variant.maxnreg
    return triton.compile(source, target=GPUTarget("cuda", number, 32), options=options)


def _sass(cubin: bytes) -> dict[str, Any]:
    try:
        return {"sass": sass.count(sass.disassemble(cubin, toolchain.nvdisasm()))}
    except (OSError, subprocess.CalledProcessError) as error:
        return {"sass": None, "sass_error": f"nvdisasm: {_reason(error)}"}


def _reason(error: Exception) -> str:
    """One line: the one in which ptxas says what is wrong, else the last that is not empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    fatal = [line for line in lines if "fatal" in line or "error   :" in line]
    return (fatal or lines[-1:] or [type(error).__name__])[0][:200]
