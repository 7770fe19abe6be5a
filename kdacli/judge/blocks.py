"""A tensor of the operation as rows of (sequence, head) blocks: [R, heads, C], and which sequence each row is of."""

import dataclasses

import torch

from kda_kernels.tensors import Inputs


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How one output tensor falls into (sequence, head) blocks.

    Attributes:
        owner: int64 [R], the sequence of each row. For token tensors a row is a token; for states it is a sequence.
        sequences: how many sequences there are (with or without rows).
        slots: int64 [R], for a pool: the slot of each row.
        state_axes: for states: the last two axes, such as (("v", 128), ("k", 128)), in the order they are stored.
    """

    owner: torch.Tensor
    sequences: int
    slots: torch.Tensor | None = None
    state_axes: tuple[tuple[str, int], tuple[str, int]] | None = None

    @classmethod
    def of_tokens(cls, inputs: Inputs) -> "Blocks":
        """For o and the gate's cumsum: [B, T, heads, C]."""
        B, T = inputs.q.shape[:2]
        device = inputs.q.device
        if inputs.cu_seqlens is None:
            return cls(torch.arange(B, device=device).repeat_interleave(T), B)
        lens = inputs.cu_seqlens.diff().long().to(device)
        return cls(torch.arange(len(lens), device=device).repeat_interleave(lens), len(lens))

    @classmethod
    def of_state(cls, inputs: Inputs) -> "Blocks":
        """For final_state: [N, heads, V, K], or the used slots of a pool."""
        B, _, _, K = inputs.q.shape
        V = inputs.v.shape[-1]
        axes = (("v", V), ("k", K)) if inputs.state_v_first else (("k", K), ("v", V))
        n = B if inputs.cu_seqlens is None else len(inputs.cu_seqlens) - 1
        every = torch.arange(n, device=inputs.q.device)
        if inputs.state_indices is None:
            return cls(every, n, None, axes)
        slots = inputs.state_indices.long()
        return cls(every[slots >= 0], n, slots[slots >= 0], axes)

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """float64 [R, heads, C]."""
        if self.state_axes is None:
            return tensor.flatten(0, 1).double()
        return (tensor if self.slots is None else tensor[self.slots]).flatten(2).double()

    def sums(self, rows: torch.Tensor) -> torch.Tensor:
        """Sum over each block, of booleans how many hold: [R, heads, C] -> [sequences, heads]."""
        per_row = rows.sum(-1)
        return per_row.new_zeros(self.sequences, per_row.shape[1]).index_add_(0, self.owner, per_row)

    def maxima(self, rows: torch.Tensor) -> torch.Tensor:
        """Largest value (at least 0) of each block: [R, heads, C] -> [sequences, heads]."""
        per_row = rows.amax(-1)
        owner = self.owner.unsqueeze(-1).expand_as(per_row)
        return per_row.new_zeros(self.sequences, per_row.shape[1]).scatter_reduce_(0, owner, per_row, "amax")

    def spread(self, per_block: torch.Tensor) -> torch.Tensor:
        """[sequences, heads] -> [R, heads, 1], to set beside `rows`."""
        return per_block[self.owner].unsqueeze(-1)

    def where(self, flat: int, shape: torch.Size) -> dict[str, str]:
        """Names the element at `flat` of a [R, heads, C] tensor."""
        _, heads, columns = shape
        row, head, column = flat // (heads * columns), flat // columns % heads, flat % columns
        sequence = int(self.owner[row])
        if self.state_axes is None:
            first = int((self.owner < sequence).sum())
            place = {"sequence": sequence, "token": row - first, "head": head, "channel": column}
        else:
            (outer, _), (inner, size) = self.state_axes
            place = {"sequence": sequence, "head": head, outer: column // size, inner: column % size}
            if self.slots is not None:
                place["slot"] = int(self.slots[row])
        return {name: str(value) for name, value in place.items()}
