"""The memory of a call: copies that keep strides and gaps, comparisons bit for bit, and NaN where nothing was put."""

import contextlib
import warnings
from collections.abc import Iterator

import torch

from kda_kernels.tensors import Inputs


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers of its element size, so that NaN equals the same NaN, and 0.0 is not -0.0."""
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype is b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def own_memory(inputs: Inputs) -> Inputs:
    """A copy of `inputs` that shares no memory with it. Whole storages are copied, so strides, and what lies between
    the elements of a view, stay; views of one storage remain views of one.
    """
    copies: dict[tuple[int, int], torch.UntypedStorage] = {}

    def copy(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        key = (storage.data_ptr(), storage.nbytes())
        if key not in copies:
            copies[key] = _all_of(t).clone().untyped_storage()
        return _moved(t, copies[key])

    return inputs.map(copy)


def modified(before: Inputs, after: Inputs) -> list[str]:
    """Names of what a call modified that it must not: inputs, and a pool's memory between its slots.

    Args:
        before: the inputs.
        after: `own_memory(before)`, after the call.
    """
    pooled = before.state_indices is not None
    names = []
    for name, was in before.tensors().items():
        now = after.tensors()[name]
        if name == "state" and pooled:
            now = _moved(now, _all_of(now).clone().untyped_storage())
            now.copy_(was)  # the slots are judged elsewhere
        if not torch.equal(_all_of(was), _all_of(now)):
            names.append("memory between the slots of the pool" if name == "state" and pooled else name)
    return names


def _moved(t: torch.Tensor, storage: torch.UntypedStorage) -> torch.Tensor:
    """The same view, of another storage."""
    return t.new_empty(0).set_(storage, t.storage_offset(), t.shape, t.stride())


def _all_of(t: torch.Tensor) -> torch.Tensor:
    """The bytes of the storage under `t`."""
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, `torch.empty` and its kin hand out NaN (and the largest integers), so that an element that a kernel does
    not write, or reads before it is written, cannot pass for a result.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = True
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            torch.utils.deterministic.fill_uninitialized_memory = fill
