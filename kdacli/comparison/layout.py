"""Where the sequences of a call lie in its tensors, so that any stretch of one can be read without the rest.

Dumps may be larger than memory: tensors are mapped from their file, and everything here hands out views of them.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch

from kda_kernels.checks import check_inputs, seq_lens
from kda_kernels.problem import CHUNK
from kda_kernels.tensors import Dims, Inputs

PIECE = 1 << 20  # elements of the largest tensor that are looked at in one go (8 MiB in fp64)


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Tokens [start, stop) of one sequence."""

    sequence: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """The sequences of one call.

    Attributes:
        dims: sizes. lens: tokens of each sequence. slots: of each, its place in the state or the pool, -1 for padding.
    """

    dims: Dims
    lens: list[int]
    slots: list[int]
    packed: bool

    @classmethod
    def of(cls, inputs: Inputs) -> "Layout":
        dims = check_inputs(inputs, values=True)
        slots = list(range(dims.N)) if inputs.state_indices is None else inputs.state_indices.tolist()
        return cls(dims, seq_lens(inputs, dims), slots, inputs.cu_seqlens is not None)

    def tokens(self, tensor: torch.Tensor, stretch: Stretch) -> torch.Tensor:
        """View [t, ...] of a tensor [B, T, ...]."""
        if not self.packed:
            return tensor[stretch.sequence, stretch.start : stretch.stop]
        first = self.starts[stretch.sequence]
        return tensor[0, first + stretch.start : first + stretch.stop]

    @property
    def starts(self) -> list[int]:
        return [0, *accumulate(self.lens)][:-1]

    def groups(self) -> Iterator[list[Stretch]]:
        """The sequences in order, in groups of about `PIECE` elements; a long one in several of whole chunks.

        A group is either whole sequences, or a stretch of one.
        """
        d = self.dims
        most_tokens = max(CHUNK, PIECE // (d.HV * max(d.K, d.V)) // CHUNK * CHUNK)
        most_states = max(1, PIECE // (d.HV * d.K * d.V))
        group: list[Stretch] = []
        held = 0
        for n, length in enumerate(self.lens):
            if group and (held + length > most_tokens or len(group) >= most_states):
                yield group
                group, held = [], 0
            if length > most_tokens:
                for start in range(0, length, most_tokens):
                    yield [Stretch(n, start, min(start + most_tokens, length))]
                continue
            group.append(Stretch(n, 0, length))
            held += length
        if group:
            yield group


def state_of(
    tensor: torch.Tensor, layout: Layout, sequence: int, *, pooled: bool, v_first: bool
) -> torch.Tensor | None:
    """View [HV, V, K] of a sequence's state in [N or P, HV, ., .]; None for padding."""
    slot = layout.slots[sequence] if pooled else sequence
    if layout.slots[sequence] < 0:
        return None
    return tensor[slot] if v_first else tensor[slot].mT


def stack(layout: Layout, tensor: torch.Tensor, group: Sequence[Stretch]) -> torch.Tensor:
    """[R, ...]: the tokens of a group, one sequence after another; a copy unless it is one stretch."""
    parts = [layout.tokens(tensor, stretch) for stretch in group]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
