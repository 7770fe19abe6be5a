"""What --kernel may be: a registered name, a function in a file or module, or a packaged entry point."""

import importlib.metadata
import re
from collections.abc import Callable
from typing import Any

from kda_kernels import registry
from kda_kernels.errors import InputError, KdaError
from kda_kernels.problem import Op
from kda_kernels.registry import Kernel
from kdacli.userkernels.find import find
from kdacli.userkernels.kernel import UserKernel
from kdacli.userkernels.signature import Signature

GROUP = "kda.kernels"
CARRIED = ("bfloat16", "float16")  # what an attribute carried_state may say
_WORDS = {
    Op.DECODE: {"decode", "recurrent", "update", "step"},
    Op.PREFILL: {"prefill", "chunk", "chunked", "chunkwise"},
}


def resolve(spec: str, op: Op | str | None = None) -> Kernel:
    """The kernel that `spec` names.

    Imports the module of a user's function, so call it after `kdacli.device.pick_device`, which decides how Triton is
    imported.

    Args:
        spec: a registered name, `path.py:function`, `package.module:function`, or a name in the entry-point group
            `kda.kernels`.
        op: the op it is wanted for. A function that does not say its own serves this one.

    Raises:
        InputError: there is no such kernel, file, module or function; it cannot be imported or called; it is of
            another op, or says of none.
        UnavailableError: its module imports something that is not installed.
    """
    op = None if op is None else Op(op)
    try:
        kernel = registry.get(spec)
    except InputError as error:
        if ":" in spec or spec.endswith(".py"):
            kernel = _user_kernel(spec, find(spec), op)
        elif (entry := _entry_points().get(spec)) is not None:
            kernel = _user_kernel(spec, _load(entry), op)
        else:
            wanted = f"{error.wanted}; or give path.py:function or package.module:function"
            raise InputError("kernel", f"{spec} is unknown", wanted) from error
    if op not in (None, kernel.op):
        raise InputError(f"kernel {spec} serves the op {kernel.op}, not {op}: choose another kernel or --op")
    return kernel


def installed() -> list[tuple[str, UserKernel | str]]:
    """The entry points of the group `kda.kernels`: name, and the kernel or the reason why there is none."""
    found: list[tuple[str, UserKernel | str]] = []
    for name, entry in _entry_points().items():
        try:
            if any(name == kernel.name for kernel in registry.kernels()):
                raise InputError("one of kda's own kernels has this name")
            found.append((name, _user_kernel(name, _load(entry), None)))
        except KdaError as error:
            found.append((name, f"{entry.value}: {error}"))
    return found


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}


def _load(entry: importlib.metadata.EntryPoint) -> Callable[..., Any]:
    return find(f"{entry.module}:{entry.attr}")


def _user_kernel(spec: str, function: Callable[..., Any], op: Op | None) -> UserKernel:
    op = _op(spec, function, op)
    if (carried := getattr(function, "carried_state", None)) not in (None, *CARRIED):
        raise InputError(f"{spec} has carried_state = {carried!r}: it should be one of {', '.join(CARRIED)}")
    summary = next(iter((getattr(function, "__doc__", None) or "").strip().splitlines()), "")
    return UserKernel(
        spec, op, "user", getattr(function, "__module__", None) or "", summary or "a user's function", False,
        function=function, signature=Signature.of(function, op, spec),
    )  # fmt: skip


def _op(spec: str, function: Callable[..., Any], asked: Op | None) -> Op:
    """The function's own word, else what is asked for, else what its name says."""
    own = getattr(function, "op", None)
    if own is not None:
        try:
            return Op(own)
        except ValueError:
            raise InputError(f"{spec} has op = {own!r}: it should be one of {', '.join(Op)}") from None
    if asked is not None:
        return asked
    words = set(re.split(r"[^a-z]+", f"{spec.rpartition(':')[2]} {getattr(function, '__name__', '')}".lower()))
    if "cumsum" in words or ("gate" in words and not words & (_WORDS[Op.DECODE] | _WORDS[Op.PREFILL])):
        return Op.GATE
    said = [op for op, hints in _WORDS.items() if words & hints]
    if len(said) != 1:
        name = spec.rpartition(":")[2]
        raise InputError(
            f"{spec} does not say which op it serves: give --op, or set {name}.op to decode, prefill or gate"
        )
    return said[0]
