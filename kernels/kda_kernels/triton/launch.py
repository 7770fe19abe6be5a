"""Launches of Triton kernels whose compiled form is known already, past the part of its launcher that looks it up."""

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver

# Triton's compiled kernel, what of it a launch takes, and functions for the current stream of the current device.
_compiled: dict[Hashable, tuple[Any, ...]] = {}


def launch(kernel: Any, grid: tuple[int, ...], kind: Hashable, arguments: tuple, **options: int) -> None:
    """`kernel[grid](*arguments, **options)`, in a fraction of its host time from the second time on.

    Args:
        kind: tells apart what Triton compiles separately: the device, dtypes, which arguments are None, constexprs.
            What else differs from call to call must be declared `do_not_specialize`, or on alignment, or be `usual`.
            None: Triton looks at the arguments itself.
        arguments: every parameter, in order.
    """
    if kind is None:
        kernel[grid](*arguments, **options)
        return
    if len(grid) < 3:
        grid = (*grid, 1, 1)[:3]
    key = id(kernel), kind  # to hash a kernel takes a lock
    known = _compiled.get(key)
    if known is None:
        made = kernel[grid](*arguments, **options)
        if hasattr(made, "packed_metadata"):  # not in the interpreter, nor where launches are recorded
            gpu = driver.active
            launched = made, made.run, made.function, made.packed_metadata
            _compiled[key] = *launched, gpu.get_current_stream, gpu.get_current_device
        return
    made, run, function, metadata, stream_of, device = known
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # a profiler's
        made[grid](*arguments)
        return
    run(*grid, stream_of(device()), function, metadata, None, None, None, *arguments)


def usual(tensors: Iterable[torch.Tensor | None], steps: Iterable[int], others: Iterable[int] = ()) -> bool:
    """Whether Triton specialises on nothing in these arguments but that they are multiples of 16.

    Args:
        tensors: their addresses. steps: numbers. others: numbers that are declared `do_not_specialize`.
    """
    addresses = numbers = rest = 0
    for tensor in tensors:
        if tensor is not None:
            addresses |= tensor.data_ptr()
    for step in steps:
        numbers |= step
    for number in others:
        rest |= number
    return not (addresses | numbers) & 15 and not (numbers | rest) >> 31


def dtype_of(x: torch.Tensor | None) -> torch.dtype | None:
    return None if x is None else x.dtype
