"""A named compile variant of a CuTe kernel, as `kda compile` asks for it (`kda_kernels.variant.Variant`)."""

import dataclasses
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kda_kernels.cute import cache
from kda_kernels.cute.runtime import missing_packages
from kda_kernels.dtypes import name_of, torch_dtype
from kda_kernels.errors import UnavailableError
from kda_kernels.problem import Gate, Problem
from kda_kernels.tensors import Checkpoints, Inputs
from kda_kernels.variant import Built, step_arguments, stored_arguments


@dataclasses.dataclass(frozen=True)
class CuteVariant:
    """One specialisation of a kernel.

    Attributes:
        name: unique within its module.
        compile: (architecture, options of the DSL's compiler) -> what `cute.compile` returns.
        label: architecture -> what the compile cache knows the result by.
        num_warps: of a CTA. shared_bytes: of a CTA; None: what the compiled launch says.
        only: the one architecture that it is for; None: sm_90a and newer.
    """

    name: str
    compile: Callable[[str, str], Any]
    label: Callable[[str], str]
    num_warps: int
    shared_bytes: int | None
    only: str | None = None

    def missing(self, arch: str) -> str | None:
        """Its label, if a launch on that architecture would have to compile it though there is a cache on disk."""
        label = self.label(arch)
        return label if cache.lacks(label) else None

    def build(self, arch: str) -> Built:
        """Compiles it, and leaves it where a launch on that architecture looks first.

        Raises:
            UnavailableError: it is not meant for that architecture, or the DSL is missing.
        """
        if (reason := missing_packages()) is not None:
            raise UnavailableError(reason)
        if not arch.startswith("sm_") or int(arch[3:].rstrip("af")) < 90:
            raise UnavailableError(f"CuTe DSL kernels are for sm_90a and newer, not {arch}")
        if arch != (self.only or arch):
            raise UnavailableError(f"this kernel is for {self.only} only, not {arch}")
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="kda-cute-") as folder:
            compiled = cache.compiled(lambda: self.compile(arch, f"--keep-cubin --keep-ptx --dump-dir {folder}"))
        seconds = time.perf_counter() - began
        cache.keep(compiled, self.label(arch))
        mlir = str(compiled.ir_module)
        return Built(
            cubin=compiled.__cubin__,
            ptx=compiled.__ptx__,
            ir={"mlir": mlir},
            shared_bytes=launched_shared_bytes(mlir) if self.shared_bytes is None else self.shared_bytes,
            num_warps=self.num_warps,
            compile_s=seconds,
        )


def named(kind: tuple) -> Iterator[Any]:
    """The same with names in place of dtypes: the fields of a spec."""
    return (name_of(x) if isinstance(x, torch.dtype) else x for x in kind)


def pretended(problem: Problem) -> Inputs:
    """Tensors of a problem that have no memory: int32 indices, parameters of one dtype."""

    def tensor(*shape: int, dtype: str) -> torch.Tensor:
        return torch.empty(shape, dtype=torch_dtype(dtype), device="meta")

    H, HV, K, V, N = problem.H, problem.HV, problem.K, problem.V, problem.N
    tokens = (1, problem.T) if problem.packed else (N, problem.T // max(N, 1))
    raw, pool = problem.options.gate is not Gate.NONE, problem.pool_slots
    square = (V, K) if problem.state_v_first else (K, V)
    has_state = pool is not None or problem.initial_state
    features = _features(problem, tensor)
    features.setdefault("state_indices", tensor(N, dtype="int32") if pool is not None else None)
    inputs = Inputs(
        q=tensor(*tokens, H, K, dtype=problem.dtype),
        k=tensor(*tokens, H, K, dtype=problem.dtype),
        v=tensor(*tokens, HV, V, dtype=problem.dtype),
        g=tensor(*tokens, HV, K, dtype=problem.g_dtype),
        beta=tensor(*tokens, HV, dtype=problem.beta_dtype),
        options=problem.options,
        A_log=tensor(HV, dtype=problem.param_dtype) if raw else None,
        dt_bias=tensor(HV * K, dtype=problem.param_dtype) if raw else None,
        state=tensor(pool or N, HV, *square, dtype=problem.state_dtype) if has_state else None,
        cu_seqlens=tensor(N + 1, dtype="int32") if problem.packed else None,
        state_v_first=problem.state_v_first,
        output_final_state=problem.final_state,
        **features,
    )
    return dataclasses.replace(inputs, **step_arguments(problem, tensor), **stored_arguments(problem, tensor))


def _features(problem: Problem, tensor: Callable[..., torch.Tensor]) -> dict[str, Any]:
    """Arguments of `Inputs`: what the problem uses of `kda_kernels.problem.FEATURES`, as engines pass it."""
    N, square = problem.N, (problem.HV, problem.V, problem.K)
    used: dict[str, Any] = {
        "null_slot": 0,
        "has_initial_state": tensor(N, dtype="bool"),
        "num_accepted_tokens": tensor(N, dtype="int32"),
        "update_state": False,
        "token_states": tensor(N, max(problem.seq_lens, default=1), *square, dtype=problem.state_dtype),
        "token_state_indices": tensor(N, dtype="int32"),
        "checkpoints": Checkpoints(
            tensor(N, *square, dtype=problem.state_dtype), tensor(N, dtype="int32"), tensor(N, dtype="int32")
        ),
        "batch_invariant": True,
    }
    used = {name: value for name, value in used.items() if name in problem.features}
    if "num_accepted_tokens" in used:
        used["state_indices"] = tensor(N, max(problem.seq_lens, default=1), dtype="int32")
    elif "strided_indices" in problem.features:
        used["state_indices"] = tensor(N, 2, dtype="int32")[:, 0]
    return used


def launched_shared_bytes(mlir: str) -> int:
    """The dynamic shared memory of the one launch in a compiled module: the third field of CUDA's launch configuration.

    Raises:
        ValueError: there is no such launch.
    """
    config = r"!llvm\.struct<\(array<3 x i32>, array<3 x i32>, i64, ptr, ptr, i32\)>"
    field = rf"(%\d+) = llvm\.getelementptr %\d+\[0, 2\] : .*{config}\n"
    stored = re.search(rf"{field}\s*llvm\.store (%\d+), \1 : i64", mlir)
    made = stored and re.findall(rf"{stored[2]} = llvm\.mlir\.constant\((\d+) : i64\)", mlir[: stored.start()])
    if not made:
        raise ValueError("the compiled module does not say how much shared memory its launch takes")
    return int(made[-1])
