"""A named compile variant of a Triton kernel: all that `kda compile` needs to build it on a machine without a GPU."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from kda_kernels.problem import Problem

if TYPE_CHECKING:
    from triton.runtime.jit import JITFunction

TRITON_TYPES = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "int32": "i32",
    "int64": "i64",
}


def pointer(dtype: str) -> str:
    """Triton's name of a pointer to a dtype of `kda_kernels.problem`: "bfloat16" -> "*bf16"."""
    return "*" + TRITON_TYPES[dtype]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, as a launch would build it.

    Attributes:
        name: unique within its module, words joined by dashes: "softplus-fp32-state".
        fn: the function decorated with `triton.jit`.
        signature: Triton type of every parameter by name, in order: "*bf16", "i32", "fp32", or "constexpr". A pointer
            that is not given at the launch (None) is a constexpr too.
        constexprs: value of every parameter whose type is "constexpr".
        attrs: Triton's attributes by parameter position: {(0,): [["tt.divisibility", 16]]} for a pointer whose address,
            or an integer whose value, is a multiple of 16. `aligned` makes them from names.
        num_warps, num_stages, maxnreg: launch options; maxnreg None leaves the registers to the compiler.
    """

    name: str
    fn: "JITFunction"
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], list] = dataclasses.field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 1
    maxnreg: int | None = None

    @classmethod
    def of(
        cls,
        fn: "JITFunction",
        name: str,
        *,
        num_warps: int,
        num_stages: int = 3,
        maxnreg: int | None = None,
        **args: Any,
    ) -> "Variant":
        """What a launch with these arguments builds: every parameter of `fn` by name.

        A pointer or a float is given as its Triton type (pointers are multiples of 16, as torch allocates), an integer
        as its value: as in a launch, a 1 is built in, and a multiple of 16 is known as one, unless `fn` says
        `do_not_specialize`. Everything else is a constexpr's value, or None.
        """
        fixed = getattr(fn, "do_not_specialize", ())  # the interpreter's functions specialise nothing
        types = {n: _type(args[n], n in fn.fn.__annotations__, n not in fixed) for n in fn.arg_names}
        multiples = [n for n, t in types.items() if t[0] in "*i" and n not in fixed and _is_multiple(args[n])]
        constexprs = {n: args[n] for n, t in types.items() if t == "constexpr"}
        return cls(name, fn, types, constexprs, aligned(fn, *multiples), num_warps, num_stages, maxnreg)


def _type(arg: Any, constexpr: bool, specialise: bool) -> str:
    """Triton's type of an argument; `constexpr` says that the parameter is annotated as one."""
    if constexpr or arg is None or (arg == 1 and specialise):
        return "constexpr"
    if isinstance(arg, str):
        return arg
    return "i32" if arg < 2**31 else "i64"


def _is_multiple(arg: str | int) -> bool:
    return isinstance(arg, str) or arg % 16 == 0


def aligned(fn: "JITFunction", *names: str) -> dict[tuple[int, ...], list]:
    """`Variant.attrs` that promise a multiple of 16 for each named parameter of `fn`."""
    return {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in names}


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
