"""The memory of a call: copies that keep strides and gaps, and what a call modified of them."""

import dataclasses

import torch

from kda_kernels.tensors import Inputs
from kdacli.judge.reference import written_by
from kdacli.verify.checks.guards import ZONE, Guarded


@dataclasses.dataclass(frozen=True)
class Copy:
    """A copy of inputs for one call, in memory of its own.

    Attributes:
        inputs: the copy. Whole storages are copied, so strides, and what lies between the elements of a view, stay;
            views of one storage remain views of one.
        zones: the memory under it, with guard zones around each storage.
    """

    inputs: Inputs
    zones: tuple[Guarded, ...]

    @classmethod
    def of(cls, inputs: Inputs) -> "Copy":
        housed: dict[tuple[int, int], Guarded] = {}
        names: dict[tuple[int, int], list[str]] = {}
        for name, t in every_tensor(inputs).items():
            names.setdefault(_storage_key(t), []).append(name)

        def copy(t: torch.Tensor) -> torch.Tensor:
            key = _storage_key(t)
            if key not in housed:
                what = f"the memory of {' and '.join(names[key])}"
                housed[key] = Guarded.allocate(what, t.untyped_storage().nbytes(), t.device)
                housed[key].inside.copy_(_all_of(t))
            return housed[key].view(t, int(t.storage_offset()))

        return cls(inputs.map(copy), tuple(housed.values()))

    def broken_zones(self) -> list[str]:
        """What was written around the inputs, in words."""
        return [f"it wrote {found}" for zone in self.zones if (found := zone.broken())]


def own_memory(inputs: Inputs) -> Inputs:
    """A copy of `inputs` that shares no memory with it: see `Copy`."""
    return Copy.of(inputs).inputs


def modified(before: Inputs, after: Inputs) -> list[str]:
    """Names of what a call modified that it must not: inputs, and a pool's memory between its slots.

    Args:
        before: the inputs.
        after: `own_memory(before)`, after the call.
    """
    written = {id(tensor) for tensor in written_by(before).values()}
    names, tensors = [], every_tensor(after)
    for name, was in every_tensor(before).items():
        inside = _all_of(tensors[name])[ZONE:-ZONE]
        if id(was) in written:
            inside = inside.clone()
            _moved(was, inside.untyped_storage()).copy_(was)  # the slots are judged elsewhere
        if name != "workspace" and not torch.equal(_all_of(was), inside):
            between = "the slots of the pool" if name == "state" else f"the states of {name}"
            names.append(f"memory between {between}" if id(was) in written else name)
    return names


def every_tensor(inputs: Inputs) -> dict[str, torch.Tensor]:
    """Those of a call by name, those of its checkpoints and parts too, but what is on the host beside a GPU."""
    found = {name: t for name, t in inputs.tensors().items() if name != "cu_seqlens_cpu"}
    if (kept := inputs.checkpoints) is not None:
        parts = {"checkpoints": kept.states, "checkpoints.rows": kept.rows, "checkpoints.offsets": kept.offsets}
        found |= {name: t for name, t in parts.items() if t is not None and t is not inputs.state}
    for part in ("conv", "norm"):
        fields = {} if (one := getattr(inputs, part)) is None else vars(one)
        found |= {f"{part}.{name}": t for name, t in fields.items() if isinstance(t, torch.Tensor)}
    return found


def _storage_key(t: torch.Tensor) -> tuple[int, int]:
    storage = t.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _moved(t: torch.Tensor, storage: torch.UntypedStorage) -> torch.Tensor:
    """The same view, of another storage."""
    return t.new_empty(0).set_(storage, t.storage_offset(), t.shape, t.stride())


def _all_of(t: torch.Tensor) -> torch.Tensor:
    """The bytes of the storage under `t`."""
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())
