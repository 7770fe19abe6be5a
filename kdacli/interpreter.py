"""Triton's interpreter without work that it does again and again: checks on a CPU take a fraction of the time."""

import dataclasses
import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np


def quicken() -> None:
    """For this process; of Triton, that of which the version here has the parts.

    At each call of a device function the interpreter looks through all of `triton.language` for what it replaces,
    though the launch has replaced it. For each value it builds its table of dtypes anew, and its type, whose shape it
    checks and wraps. It makes each sum and product of integers twice, to find an overflow, which a GPU does not look
    for either. And it takes apart the exponents of float32 and bfloat16, which are the same.
    """
    if importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    hidden: Any = interpreter
    if hasattr(hidden, "_kda_quick"):
        return
    hidden._kda_quick = True
    _remember_types()
    if hasattr(hidden, "_convert_float"):
        hidden._convert_float = _converting(hidden._convert_float)
    if all(
        hasattr(hidden, name) for name in ("_LangPatchScope", "_patch_lang", "_get_np_dtype", "interpreter_builder")
    ):
        _prepare_once(hidden)


def _prepare_once(hidden: Any) -> None:
    """What the interpreter does at each call, or for each value, once a launch, or once a dtype."""
    import triton.language as tl

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


def _converting(convert: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """`_convert_float`, quick between float32 and bfloat16."""
    import triton.language as tl

    def quick(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if rounding is None and source == tl.bfloat16 and target == tl.float32:
            return data.view(np.uint16).astype(np.uint32) << 16
        if rounding is None and source == tl.float32 and target == tl.bfloat16:
            return (data.view(np.uint32) >> 16).astype(np.uint16)
        return convert(data, source, target, rounding)

    return quick


def _remember_types() -> None:
    """What the types of blocks, and tensors of such a type, hold beside their data is made once a shape and dtype."""
    import triton.language as tl

    make_type, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    types: dict[Any, dict[str, Any]] = {}

    def type_once(self: Any, element_ty: Any, shape: Any) -> None:
        if type(element_ty) is not tl.dtype:  # a pointer
            make_type(self, element_ty, shape)
            return
        key = element_ty.name, *(getattr(size, "value", size) for size in shape)
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = {**vars(self), "_kda_tensor": {}}
        vars(self).update(types[key])

    def tensor_once(self: Any, handle: Any, type: Any) -> None:
        held = getattr(type, "_kda_tensor", None)
        if not held:
            make_tensor(self, handle, type)
            if held is not None:
                held.update(vars(self), handle=None)
            return
        vars(self).update(held)
        self.handle = handle

    tl.block_type.__init__, tl.tensor.__init__ = type_once, tensor_once
