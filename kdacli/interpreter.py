"""Triton's interpreter without work that it does again and again: checks on a CPU take half of the time."""

import dataclasses
import functools
import importlib.util
import inspect
from typing import Any


def quicken() -> None:
    """For this process; not where there is no Triton, or a version of it with other names for these parts.

    At each call of a device function the interpreter looks through all of `triton.language` for what it replaces,
    though the launch has replaced it. For each value it builds its table of dtypes anew. And it makes each sum and
    product of integers twice, to find an overflow, which a GPU does not look for either.
    """
    if importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    parts = ("_LangPatchScope", "_patch_lang", "_get_np_dtype", "interpreter_builder")
    if hasattr(interpreter, "_kda_quick") or not all(hasattr(interpreter, name) for name in parts):
        return
    hidden: Any = interpreter
    hidden._kda_quick = True
    patch, replaced = hidden._patch_lang, set[Any]()
    launch: list[Any] = []  # the one that runs

    class Launch(hidden._LangPatchScope):
        """What a launch replaced, until it ends."""

        def restore(self) -> None:
            launch.clear()
            replaced.clear()
            super().restore()

    @functools.cache
    def languages(fn: Any) -> frozenset[Any]:
        return frozenset(v for v in fn.__globals__.values() if inspect.ismodule(v) and v in (tl, tl.core))

    def patch_once(fn: Any) -> Any:
        """As `_patch_lang`. A call inside a launch leaves it to the launch to restore what it replaces beyond it."""
        scope = hidden._LangPatchScope() if languages(fn) <= replaced else patch(fn)
        replaced.update(languages(fn))
        if launch:
            launch[0]._changes += scope._changes
        else:
            scope.__class__ = Launch
            launch.append(scope)
        return scope

    of_pointers, of_numbers = hidden._get_np_dtype, functools.cache(hidden._get_np_dtype)
    hidden._patch_lang = patch_once
    hidden._get_np_dtype = lambda ty: (of_pointers if ty.scalar.is_ptr() else of_numbers)(ty.scalar)
    builder = hidden.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
