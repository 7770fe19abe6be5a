"""The part of `kda compile` that runs in processes of its own, where Triton compiles instead of interpreting.

Nothing here imports triton at the top: `start` must come first.
"""

import contextlib
import dataclasses
import functools
import importlib
import multiprocessing
import os
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kda_kernels.dtypes import FLOATS
from kda_kernels.errors import InputError, UnavailableError, one_line
from kda_kernels.problem import Op, Parts, Problem
from kda_kernels.registry import Kernel
from kda_kernels.tensors import Inputs
from kda_kernels.variant import Built, Variant
from kdacli.compile import amd, emit, occupancy, pretend, recorder, sass, toolchain
from kdacli.compile.arch import Arch
from kdacli.compile.specialised import Specialised
from kdacli.userkernels import UserKernel

_pretence = contextlib.ExitStack()  # what a process believes, it believes until its end


def start(cache: str | None, believed: Arch) -> None:
    """Prepares a fresh process.

    Args:
        cache: folder for Triton's cache instead of the one that launches use; CuTe's stays in memory.
        believed: architecture of a GPU that the process is to believe it has, before it imports any kernel.
    """
    os.environ.pop("TRITON_INTERPRET", None)  # Triton reads these when it is imported
    if cache is not None:
        os.environ |= {"TRITON_CACHE_DIR": cache, "KDA_CACHE_DIR": ""}
    warnings.simplefilter("ignore")
    # LLVM writes to file descriptor 2 behind Python's back, up to hundreds of lines for an architecture it lacks
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    _pretence.enter_context(pretend.gpu(believed))


def cache_folder(backend: str) -> str | None:
    """Where what is compiled is kept, and launches here look: CuTe's folder, or Triton's; None: nowhere."""
    if backend == "cute":
        from kda_kernels.cute import cache, runtime

        return str(folder) if runtime.missing_packages() is None and (folder := cache.directory()) else None
    import triton

    return triton.knobs.cache.dir


NOTHING = f"it launches no Triton kernel{recorder.HINT}"


def variant_names(kernel: Kernel, problem: Problem | None, arch: Arch) -> list[str]:
    """What the kernel launches for `problem` on such a GPU, or its usual variants.

    Raises:
        InputError: the kernel cannot run `problem`, wherever it is, or there is nothing to compile.
        UnavailableError: a package is missing.
    """
    names = [variant.name for variant in variants(kernel, problem, arch)]
    asked = problem if problem is None or problem.seq_lens else next(iter(serving(problem).values()))
    reason = kernel.unsupported(asked)
    if problem and reason and reason != kernel.unsupported():  # else the reason is this machine, which need not run it
        raise InputError(f"kernel {kernel.name} cannot run {problem.name}: {reason}")
    if not names:
        raise InputError(f"kernel {kernel.name} has nothing to compile: {reason or NOTHING}")
    return names


def compile_variant(
    kernel: Kernel, problem: Problem | None, name: str, arch: Arch, folder: str | None = None
) -> dict[str, Any]:
    """Compiles one of `variant_names`, or takes it from the cache, and leaves it there.

    Args:
        folder: where to write PTX, binary, disassembly and IR; None for nowhere.

    Returns:
        backend (that of what was compiled: a kernel of another may launch Triton's, too), registers, stack_bytes,
        spill_bytes, spill_store_bytes, spill_load_bytes (a thread), shared_bytes (a block), num_warps, tensor_memory
        (columns, where there are any), resident_blocks (a multiprocessor) and limited_by, binary_bytes, cached,
        compile_s (None if cached) and sass (instruction counts; AMD: isa). What the tools do not say is None; where the
        disassembler is missing or fails, `sass` is None and `sass_error` says why. Where the compiler refuses, nothing
        but `error`: its reason in one line; where the kernel is not meant for that architecture, nothing but
        `unsupported`.
    """
    began = time.perf_counter()
    try:
        variant = next(v for v in variants(kernel, problem, arch) if v.name == name)
        built = _aside(variant, arch.name) if arch.amd else variant.build(arch.name)
    except UnavailableError as error:
        return {"unsupported": str(error)}
    except Exception as error:  # whatever the compiler throws is its answer, and belongs in this variant's row
        return {"error": _reason(str(error) or type(error).__name__)}
    seconds = time.perf_counter() - began if built.compile_s is None else built.compile_s
    text, counts = (built.ir.get("amdgcn"), amd.read(built)) if arch.amd else _nvidia(built)
    row = counts | {
        "backend": "triton" if isinstance(variant, Specialised) else kernel.backend,
        "shared_bytes": built.shared_bytes,
        "num_warps": built.num_warps,
        "binary_bytes": len(built.cubin),
        "cached": built.cached,
        "compile_s": None if built.cached else round(seconds, 3),
    }
    if getattr(variant, "tuned", False):
        row["tuned"] = True
    if built.tensor_memory:
        row["tensor_memory"] = built.tensor_memory
    if row["registers"] is not None:
        row["resident_blocks"], row["limited_by"] = occupancy.resident(
            arch,
            registers=row["registers"],
            shared_bytes=built.shared_bytes,
            num_warps=built.num_warps,
            tensor_memory=built.tensor_memory,
        )
    if folder is not None:
        row["files"] = emit.write(Path(folder), f"{Path(kernel.name).name}.{name}.{arch.name}", built, text, arch.amd)
    return row


@functools.cache  # recording runs a kernel's host half: once is enough
def variants(
    kernel: Kernel, problem: Problem | None, arch: Arch, change: Callable[[Inputs], Inputs] = recorder.unchanged
) -> list[Variant]:
    """What there is to compile: what the kernel's own `variants` say, and its Triton launches, recorded.

    A user's function that has `variants` is not called. For `change` see `recorder.record`.

    Raises:
        InputError: the user's `variants` raised, or launches cannot be recorded.
        UnavailableError: the kernel's module cannot be imported.
    """
    usual: dict[str, Problem] = {}
    offered: list[Variant] = []
    if isinstance(kernel, UserKernel):
        if hasattr(kernel.function, "variants"):
            return _users(kernel, problem)
    else:
        try:
            module = importlib.import_module(kernel.module)
        except ImportError as error:
            raise UnavailableError(one_line(error)) from error
        usual = {name: one for name, one in getattr(module, "USUAL", {}).items() if one.op is kernel.op}
        if hasattr(module, "variants"):
            served = {"": problem} if problem is None or problem.seq_lens else serving(problem)
            found: dict[str, Variant] = {}  # by label: the same for several of them is one
            for name, one in served.items():
                for variant in module.variants(one, arch.gpu):
                    full_name = f"{variant.name} {name}".strip()
                    found.setdefault(variant.label(arch.name), dataclasses.replace(variant, name=full_name))
            offered = list(found.values())
    if problem is None:
        problems = usual or {"": USUAL[kernel.op]}
    else:
        problems = {"": problem} if problem.seq_lens else serving(problem)
    if offered:
        with pretend.gpu(arch):
            if kernel.unsupported() is not None:  # `build` says why, of each
                return offered
    return offered + recorder.record(kernel, problems, arch, change)


def serving(problem: Problem) -> dict[str, Problem]:
    """Of a problem without sequences, by name: all that decide what an engine launches for it."""
    asked: dict[str, set[str]] = {}
    drafts = 4  # tokens of a sequence
    if problem.op.decodes:
        sizes = tuple((count, 1) for count in _BATCHES)
        asked = {"drafts": {"num_accepted_tokens"}, "verify": _VERIFY}
    elif problem.op is Op.GATE:
        sizes = ((1, 512),)
    else:
        sizes = _PROMPTS
        asked = {"resumed": {"has_initial_state"}, "checkpoints": {"checkpoints"}}
        asked["resumed checkpoints"] = asked["resumed"] | asked["checkpoints"]
    found = {
        " ".join(filter(None, (f"N={count}", "packed" if packed else "dense", name))): dataclasses.replace(
            problem,
            seq_lens=(drafts if name and problem.op.decodes else tokens,) * count,
            packed=packed,
            pool_slots=2 * max(sizes)[0],
            features=frozenset(features),
        )
        for name, features in {"": set(), **asked}.items()
        for packed in (True, False)
        for count, tokens in sizes
    }
    if problem.op is Op.PREFILL and problem.parts is None:  # what engines call before it, the same for all batches
        for dtype in CONV_WEIGHTS:
            parts = Parts(norm=False, weight_dtype=dtype)
            found[f"{FLOATS[dtype].short} weight"] = dataclasses.replace(found["N=1 packed resumed"], parts=parts)
    return found


CONV_WEIGHTS = ("float32", "bfloat16")  # as engines keep them, and as models do


_VERIFY = {"update_state", "token_states", "token_state_indices"}
# Sequences of a prefill and their tokens: cut into segments or not, and short ones of which there are many.
_PROMPTS = ((1, 512), (2, 512), (4, 512), (8, 512), (32, 1024), (256, 64))
# Sequences of a decode: close enough that each configuration that a kernel chooses by their number is met.
_BATCHES = tuple(sorted({n << k for n in (2, 3) for k in range(9)} | {1}))  # 1, 2, 3, 4, 6, .., 512, 768


def _users(kernel: UserKernel, problem: Problem | None) -> list[Variant]:
    try:
        return kernel.variants(problem)
    except Exception as error:  # anything that the user's code raises
        said = one_line(str(error), 200)
        raise InputError(f"kernel {kernel.name}: its variants() raised {type(error).__name__}: {said}") from error


# What a kernel that names no usual problems of its own is recorded on where no flag says anything.
USUAL = {
    Op.DECODE: Problem(Op.DECODE, (1,) * 32, H=32, HV=32, packed=False, pool_slots=64),
    Op.STEP: Problem(Op.STEP, (1,) * 32, H=32, HV=32, packed=False, pool_slots=64),
    Op.PREFILL: Problem(Op.PREFILL, (8192,), H=32, HV=32),
    Op.GATE: Problem(Op.GATE, (8192,), H=32, HV=32),
}


def _nvidia(built: Built) -> tuple[str | None, dict[str, Any]]:
    """The disassembly, and what it and the log of ptxas say."""
    out: dict[str, Any] = {"sass": None}
    text = None
    try:
        text = sass.disassemble(built.cubin, toolchain.tool("nvdisasm"))
        out["sass"] = sass.count(text)
    except (OSError, subprocess.CalledProcessError) as error:
        out["sass_error"] = f"nvdisasm: {_reason(str(error))}"
    if built.log is not None:
        return text, sass.resources(built.log) | out
    try:
        return text, sass.resources_of_binary(built.cubin, toolchain.tool("cuobjdump"), out["sass"]) | out
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        return text, dict.fromkeys(sass.RESOURCES) | {"sass_error": f"cuobjdump: {_reason(str(error))}"} | out


def _aside(variant: Variant, arch: str) -> Built:
    """Builds it in a process of its own: LLVM's AMD backend ends the process where it meets NVIDIA's inline assembly.

    That of Triton 3.9 prints what is wrong, leaves the assembly out and goes on.

    Raises:
        UnavailableError: the kernel is not meant for that architecture.
        RuntimeError: what the compiler said, on its way out or as an exception.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryFile("w+") as said:
        child = context.Process(target=_send, args=(variant, arch, theirs, said.fileno()), daemon=True)
        child.start()
        theirs.close()
        try:
            result = ours.recv()
        except EOFError:
            result = None
        child.join()
        said.seek(0)
        text = said.read()
    if isinstance(result, Built) and any(line.startswith("error:") for line in text.splitlines()):
        raise RuntimeError(_reason(text))
    if isinstance(result, Built):
        return result
    if isinstance(result, UnavailableError):
        raise result
    raise RuntimeError(result or f"the compiler died: {_reason(text)}")


def _send(variant: Variant, arch: str, pipe: Any, stderr: int) -> None:
    os.dup2(stderr, 2)
    try:
        pipe.send(variant.build(arch))
    except UnavailableError as error:
        pipe.send(error)
    except Exception as error:  # the parent's answer
        pipe.send(_reason(str(error) or type(error).__name__))
    pipe.close()


def _reason(text: str) -> str:
    """One line: the one in which a compiler says what is wrong, else the last that is not empty."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    fatal = [line for line in lines if "fatal" in line or "error   :" in line or line.startswith("error:")]
    return (fatal or lines[-1:] or ["it said nothing"])[0][:200]
