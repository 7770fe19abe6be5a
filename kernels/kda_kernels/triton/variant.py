"""A named compile variant of a Triton kernel: all that `kda compile` needs to build it on a machine without a GPU."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import math
import re
from typing import TYPE_CHECKING, Any

from kda_kernels.errors import UnavailableError
from kda_kernels.problem import Problem
from kda_kernels.variant import Built

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, CompiledKernel
    from triton.runtime.jit import JITFunction

TRITON_TYPES = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "int32": "i32",
    "int64": "i64",
}
IR = ("ttir", "ttgir", "llir", "amdgcn")  # besides PTX, what Triton keeps on the way to a binary


def pointer(dtype: str) -> str:
    """Triton's name of a pointer to a dtype of `kda_kernels.problem`: "bfloat16" -> "*bf16"."""
    return "*" + TRITON_TYPES[dtype]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, as a launch would build it (see `kda_kernels.variant`).

    Attributes:
        name: unique within its module.
        fn: the function decorated with `triton.jit`.
        signature: Triton type of every parameter by name, in order: "*bf16", "i32", "fp32", or "constexpr". A pointer
            that is not given at the launch (None) is a constexpr too.
        constexprs: value of every parameter whose type is "constexpr", by name, or by path as Triton does.
        attrs: Triton's attributes by parameter position: {(0,): [["tt.divisibility", 16]]} for a pointer whose address,
            or an integer whose value, is a multiple of 16, and {(1,): []} for one that is not. See `aligned`.
        options: the launch's: num_warps, and num_stages, maxnreg and others where they are given.
        small: whether the tensors are taken to be under 2 GiB, which a launch on AMD's GPUs tells the compiler. False
            where `attrs` holds what a launch said.
    """

    name: str
    fn: "JITFunction"
    signature: dict[str, Any]
    constexprs: dict[Any, Any]
    attrs: dict[tuple[int, ...], list] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    small: bool = True

    @classmethod
    def of(
        cls,
        fn: "JITFunction",
        name: str,
        *,
        num_warps: int,
        num_stages: int | None = None,
        maxnreg: int | None = None,
        **args: Any,
    ) -> "Variant":
        """What a launch with these arguments builds: every parameter of `fn` by name.

        A pointer or a float is given as its Triton type (pointers are multiples of 16, as torch allocates), an integer
        as its value: as in a launch, a 1 is built in, and a multiple of 16 is known as one, unless `fn` says
        `do_not_specialize`. Everything else is a constexpr's value, or None. num_stages None is Triton's own choice.
        """
        fixed = getattr(fn, "do_not_specialize", ())  # the interpreter's functions specialise nothing
        types = {n: _type(args[n], n in fn.fn.__annotations__, n not in fixed) for n in fn.arg_names}
        multiples = [n for n, t in types.items() if t[0] in "*i" and n not in fixed and _is_multiple(args[n])]
        constexprs = {n: args[n] for n, t in types.items() if t == "constexpr"}
        options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
        options = {name: value for name, value in options.items() if value is not None}
        return cls(name, fn, types, constexprs, aligned(fn, types, fixed, multiples), options)

    def source(self, backend: str = "cuda") -> "ASTSource":
        """As Triton's compiler takes it; `backend` is cuda or hip."""
        from triton.compiler import ASTSource

        attrs = dict(self.attrs)
        if backend == "hip" and self.small:
            pointers = [(i,) for i, t in enumerate(self.signature.values()) if isinstance(t, str) and t[0] == "*"]
            attrs |= {path: [*attrs[path], ["tt.pointer_range", 32]] for path in pointers if path in attrs}
        return ASTSource(self.fn, self.signature, self.constexprs, attrs)

    def missing(self, arch: str) -> str | None:
        """The key that Triton's cache would know it by, if a launch would not find it there; None if it would."""
        from triton._C.libtriton import get_cache_invalidating_env_vars
        from triton.compiler import make_backend
        from triton.runtime.cache import get_cache_key, get_cache_manager

        target = target_of(arch)
        backend, source = make_backend(target), self.source(target.backend)
        said = get_cache_key(
            source, backend, backend.parse_options(dict(self.options)), get_cache_invalidating_env_vars()
        )
        key, name = hashlib.sha256(said.encode()).hexdigest(), f"{source.name[:150]}.json"
        return None if name in (get_cache_manager(key).get_group(name) or {}) else key

    def build(self, arch: str) -> Built:
        """Compiles it for sm_90a, gfx942, ..., by way of Triton's cache: a launch there of the same finds it.

        Raises:
            UnavailableError: `arch` is none that Triton knows.
            Exception: Triton's or ptxas's, when they refuse.
        """
        import triton

        said: list[tuple[bool, int]] = []  # was it in the cache, microseconds
        log = io.StringIO()
        with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
            triton.knobs.compilation.listener = lambda *, cache_hit, times, **_: said.append((cache_hit, times.total))
            triton.knobs.nvidia.dump_ptxas_log = True
            target = target_of(arch)
            compiled = triton.compile(self.source(target.backend), target=target, options=dict(self.options))
            ((cached, microseconds),) = said
            if cached and target.backend == "cuda" and "ptx" in compiled.asm:
                _assemble(compiled, target)  # for the log alone: the cache holds none
        return Built(
            cubin=compiled.asm["cubin" if target.backend == "cuda" else "hsaco"],
            shared_bytes=compiled.metadata.shared,
            num_warps=compiled.metadata.num_warps,
            ptx=compiled.asm.get("ptx"),
            ir={name: compiled.asm[name] for name in IR if name in compiled.asm},
            log=log.getvalue() or None,
            compile_s=None if cached else microseconds / 1e6,
            cached=cached,
            tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        )


def target_of(arch: str) -> "GPUTarget":
    """Triton's name of an architecture: what its driver would say of the GPU.

    Raises:
        UnavailableError: it is neither NVIDIA's nor AMD's.
    """
    from triton.backends.compiler import GPUTarget

    if match := re.fullmatch(r"sm_(\d+)a?", arch):
        return GPUTarget("cuda", int(match[1]), 32)
    if arch.startswith("gfx9"):
        return GPUTarget("hip", arch, 64)
    raise UnavailableError(f"Triton has no architecture {arch}")


def _assemble(compiled: "CompiledKernel", target: "GPUTarget") -> None:
    from triton.compiler import make_backend

    backend = make_backend(target)
    options = backend.parse_options(compiled.metadata._asdict())
    backend.make_cubin(compiled.asm["ptx"], {}, options, target.arch)


def _type(arg: Any, constexpr: bool, specialise: bool) -> str:
    """Triton's type of an argument; `constexpr` says that the parameter is annotated as one."""
    if constexpr or arg is None or (arg == 1 and specialise):
        return "constexpr"
    if isinstance(arg, str):
        return arg
    return "i32" if arg < 2**31 else "i64"


def _is_multiple(arg: str | int) -> bool:
    return isinstance(arg, str) or arg % 16 == 0


def aligned(fn: "JITFunction", types: dict[str, str], fixed: Any, multiples: list[str]) -> dict[tuple[int, ...], list]:
    """`Variant.attrs` that promise a multiple of 16 for each of `multiples`.

    As a launch says it, which is part of the key in Triton's cache: an empty list for every other parameter, and
    nothing for floats, for those that are `fixed`, not specialised, and, before Triton 3.7, for constexprs.
    """
    named = _names_constexprs()
    return {
        (i,): [["tt.divisibility", 16]] if name in multiples else []
        for i, name in enumerate(fn.arg_names)
        if (named if types[name] == "constexpr" else types[name][0] in "*i" and name not in fixed)
    }


@functools.cache
def _names_constexprs() -> bool:
    """Whether this Triton's launches list constexprs among the attributes, without any: 3.7 began to."""
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (3, 7)


def batch(problem: Problem) -> tuple[int, int]:
    """The first two dimensions of its tensors, B and T: rows, and tokens a row."""
    return (1, problem.T) if problem.packed else (problem.N, max(problem.seq_lens, default=0))


def strides(**shapes: tuple[int, ...]) -> dict[str, int]:
    """Strides of contiguous tensors under the names of the parameters they are passed as.

    A key is a prefix and a letter for each dimension whose stride is passed, from the first on: q_bth=(B, T, H, K)
    gives q_b, q_t and q_h.
    """
    out = {}
    for name, shape in shapes.items():
        prefix, _, letters = name.rpartition("_")
        for i, letter in enumerate(letters):
            out[f"{prefix}_{letter}"] = math.prod(max(n, 1) for n in shape[i + 1 :])
    return out


def state_pointers(problem: Problem) -> dict[str, str | None]:
    """h0 and ht, the state that comes in and the one that goes out: the same pool, or tensors of their own, or None."""
    pool, dtype = problem.pool_slots is not None, pointer(problem.state_dtype)
    h0 = dtype if pool or problem.initial_state else None
    ht = h0 or "*fp32"
    return {"h0": h0, "ht": ht if pool or problem.final_state else None}
