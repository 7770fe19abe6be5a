"""Where the sequences and states of a call lie in its tensors, so that any part can be read without the rest.

Dumps may be larger than memory: tensors are mapped from their file, and everything here hands out views of them.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch

from kda_kernels.checks import check_inputs, loaded_slots, seq_lens
from kda_kernels.feature_checks import conv_slots
from kda_kernels.problem import CHUNK
from kda_kernels.reference.stored import Stored
from kda_kernels.reference.targets import Target, targets
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
        packed: all tokens lie in one row. pooled: states lie in a pool. v_first: how they are stored.
        targets: by output tensor, where states go, in the order of sequences and tokens.
        conv_slots: of each sequence, the slot of its convolution's state, -1 for padding; none without a convolution.
    """

    dims: Dims
    lens: list[int]
    slots: list[int]
    packed: bool
    pooled: bool
    v_first: bool
    targets: dict[str, list[Target]]
    conv_slots: list[int]

    @classmethod
    def of(cls, inputs: Inputs) -> "Layout":
        dims = check_inputs(inputs, values=True)
        lens = seq_lens(inputs, dims)
        packed, pooled = inputs.cu_seqlens is not None, inputs.state_indices is not None
        slots = loaded_slots(inputs) if pooled else list(range(dims.N))
        conv = [] if inputs.conv is None else conv_slots(inputs)
        return cls(dims, lens, slots, packed, pooled, inputs.state_v_first, targets(inputs, lens), conv)

    def tokens(self, tensor: torch.Tensor, stretch: Stretch) -> torch.Tensor:
        """View [t, ...] of a tensor [B, T, ...]."""
        if not self.packed:
            return tensor[stretch.sequence, stretch.start : stretch.stop]
        first = self.starts[stretch.sequence]
        return tensor[0, first + stretch.start : first + stretch.stop]

    @property
    def starts(self) -> list[int]:
        return [0, *accumulate(self.lens)][:-1]

    def stacked(self, tensor: torch.Tensor, group: Sequence[Stretch]) -> torch.Tensor:
        """[R, ...]: the tokens of a group, one sequence after another; a copy unless it is one stretch."""
        parts = [self.tokens(tensor, stretch) for stretch in group]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def state(self, tensor: torch.Tensor, index: tuple[int, ...]) -> torch.Tensor:
        """View [HV, V, K] of one of its states."""
        return tensor[index] if self.v_first else tensor[index].mT

    def initial(self, inputs: Inputs, sequence: int) -> torch.Tensor | None:
        """[HV, V, K], the state that a sequence starts from, a view of floats; None: from zeros, or it is padding."""
        slot, has = self.slots[sequence], inputs.has_initial_state
        if inputs.state is None or slot < 0 or (has is not None and not bool(has[sequence])):
            return None
        state = self.state(inputs.state, (slot,))
        if inputs.state_scales is None:
            return state
        return Stored(state, inputs.state_scales[slot]).values(torch.float32)

    def groups(self) -> Iterator[list[Stretch]]:
        """The sequences in order, in groups of about `PIECE` elements; a long one in several of whole chunks.

        A group is either whole sequences, or a stretch of one.
        """
        d = self.dims
        most_tokens = max(CHUNK, PIECE // (d.HV * max(d.K, d.V)) // CHUNK * CHUNK)
        if any(len(every) > 4 * len(self.lens) for every in self.targets.values()):  # a state for each token
            most_tokens = CHUNK
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


@dataclasses.dataclass(frozen=True)
class Place:
    """Which part of an output tensor some rows [R, HV, C] are, and whose each is.

    Attributes:
        layout: of the call. group: whose tokens they are; empty: they are states.
        owner: int64 [R], the sequence of each row. token: int64 [R]; of states, after how many it is.
        index: for states, where each lies in its tensor. several: a sequence may have more than one.
    """

    layout: Layout
    group: tuple[Stretch, ...]
    owner: torch.Tensor
    token: torch.Tensor
    index: tuple[tuple[int, ...], ...] = ()
    several: bool = False

    @classmethod
    def of_tokens(cls, layout: Layout, group: Sequence[Stretch]) -> "Place":
        owner = torch.cat([torch.full((s.stop - s.start,), s.sequence) for s in group])
        return cls(layout, tuple(group), owner, torch.cat([torch.arange(s.start, s.stop) for s in group]))

    @classmethod
    def of_states(cls, layout: Layout, targets: Sequence[Target], *, several: bool = False) -> "Place":
        owner = torch.tensor([t.sequence for t in targets], dtype=torch.int64)
        tokens = torch.tensor([t.tokens for t in targets], dtype=torch.int64)
        return cls(layout, (), owner, tokens, tuple(t.index for t in targets), several)

    @classmethod
    def whole(cls, inputs: Inputs, field: str) -> "Place":
        """All of `o` or of another field of `Outputs`."""
        layout = Layout.of(inputs)
        if field != "o":
            return cls.of_states(layout, layout.targets[field])
        return cls.of_tokens(layout, [Stretch(n, 0, length) for n, length in enumerate(layout.lens)])

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """[R, HV, C] of the output tensor, states V-first."""
        if self.group:
            return self.layout.stacked(tensor, self.group)
        d = self.layout.dims
        if not self.index:
            return tensor.new_empty(0, d.HV, d.V * d.K)
        return torch.stack([self.layout.state(tensor, index) for index in self.index]).flatten(2)

    def name(self, row: int, head: int, column: int) -> dict[str, str]:
        """The element at [row, head, column], in words."""
        sequence, token = int(self.owner[row]), int(self.token[row])
        place: dict[str, object] = {"sequence": sequence}
        if self.group:
            place |= {"token": token, "head": head, "channel": column}
        else:
            v, k = divmod(column, self.layout.dims.K)
            place |= {"token": token - 1} if self.several else {}
            place |= {"head": head, "v": v, "k": k}
            if self.layout.pooled:
                place["slot"] = ",".join(map(str, self.index[row]))
        return {name: str(value) for name, value in place.items()}

    def name_flat(self, flat: int, shape: torch.Size) -> dict[str, str]:
        """As `name`, of the element at `flat` of all of [R, HV, C]."""
        _, heads, columns = shape
        return self.name(flat // (heads * columns), flat // columns % heads, flat % columns)
