"""A named compile variant of a Triton kernel: all that `kda compile` needs to build it on a machine without a GPU."""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

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
        odd: Iterable[str] = (),
        **args: Any,
    ) -> "Variant":
        """Every parameter of `fn` by name: a Triton type as a string, or a constexpr's value.

        Pointers and integers are taken as multiples of 16, as for the usual head sizes they are, except those in `odd`.
        """
        typed = {n: t for n, t in args.items() if isinstance(t, str)}
        return cls(
            name,
            fn,
            {n: typed.get(n, "constexpr") for n in fn.arg_names},
            {n: args[n] for n in fn.arg_names if n not in typed},
            aligned(fn, *(n for n, t in typed.items() if t[0] in "*i" and n not in odd)),
            num_warps,
            num_stages,
            maxnreg,
        )


def aligned(fn: "JITFunction", *names: str) -> dict[tuple[int, ...], list]:
    """`Variant.attrs` that promise a multiple of 16 for each named parameter of `fn`."""
    return {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in names}
