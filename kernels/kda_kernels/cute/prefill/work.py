"""What the prefill kernel hands from one part to another: arguments that travel together, and names of barriers."""

import dataclasses
import enum
from typing import Any

import cutlass.cute as cute
from cutlass import Int32, Int64

from kda_kernels.cute.prefill.config import CHUNK


class Barrier(enum.IntEnum):
    """Named barriers; each warpgroup has its own, from these numbers on. 0 is all threads'."""

    PREPARE = 1  # a preparing warpgroup
    SEND = 3  # a consuming warpgroup, which shares a buffer of o
    INVERT = 5  # of a preparing warpgroup the warps that make L, and the one that inverts; unless `chain_inverts`
    LEAVE = 7  # all that consume
    ASKED = 8  # all threads: those that prepare have asked for all they need first
    VACANT = 9  # of a consuming warpgroup, that its part of a checkpoint may be where operands were; two, in turns
    READ = 5  # of a preparing warpgroup, that its inputs have been read; gates without a bound


class Deed(enum.IntEnum):
    """What a CTA does with an item."""

    NOTHING = 0
    RUN = 1
    ZEROS = 2  # padding
    NAN = 3  # there is no such slot
    END = 4  # there is no further item


@dataclasses.dataclass(frozen=True)
class Work:
    """An item, what a CTA works on: a value head of a sequence, of its first segment, or of a unit.

    Attributes:
        i_n: the sequence. i_hv: the value head. slot: of the sequence's states in `h0` and `ht`.
        kind: 0 runs on values, 1 on the identity, which makes T.
        index: of the segment in its sequence, or of the checkpoint.
        unit: its number; of a first segment that of the next one.
        last: whether the sequence ends with this segment.
        b, first: where its tokens begin. length: the sequence's tokens. n_tokens: this segment's.
        segment: tokens of a unit. begin: the sequence's tokens in rounds before this one.
        deed: one of `Deed`. before: the chunks of this CTA's items before it.
    """

    i_n: Int32
    i_hv: Int32
    slot: Int64
    kind: Int32
    index: Int32
    unit: Int32
    last: Any
    b: Int32
    first: Int32
    length: Int32
    n_tokens: Int32
    segment: Int32
    begin: Int32
    deed: Any = Deed.RUN
    before: Any = 0

    @property
    def n_chunks(self) -> Int32:
        return (self.n_tokens + CHUNK - 1) // CHUNK

    def words(self) -> list:
        """What one warp tells the others of the head of a whole sequence."""
        return [Int32(getattr(self, name)) for name in TOLD]

    @staticmethod
    def of(words: list) -> "Work":
        """The inverse of `words`."""
        known: dict[str, Any] = dict(zip(TOLD, words, strict=True))
        known["slot"] = Int64(known["slot"])
        none = Int32(0)
        return Work(**known, kind=none, index=none, unit=none, last=True, segment=none, begin=none)


TOLD = ("deed", "before", "i_n", "i_hv", "slot", "b", "first", "length", "n_tokens")


@dataclasses.dataclass(frozen=True)
class Batch:
    """What items are made of. `items`: of the launch; `counter` counts them where CTAs stay. The other names are those
    of `PrefillKernel.__call__`."""

    o: cute.Tensor
    A_log: cute.Tensor | None
    dt_bias: cute.Tensor | None
    state_indices: cute.Tensor | None
    cu_seqlens: cute.Tensor | None
    heads: cute.FastDivmodDivisorV2
    null_slot: Int32
    lead: Int32
    segment: Int32
    begin: Int32
    limit: Int32
    items: Int32
    counter: cute.Tensor | None
    states: "States"


@dataclasses.dataclass(frozen=True)
class States:
    """Where states come from and go to; see `PrefillKernel.__call__`. `units`: room for so many in `starts`."""

    h0: cute.Tensor | None
    ht: cute.Tensor | None
    started: cute.Tensor | None
    summaries: cute.Tensor | None
    starts: cute.Tensor | None
    kept: cute.Tensor | None
    rows: cute.Tensor | None
    offsets: cute.Tensor | None
    every: Int32
    units: Int32


@dataclasses.dataclass(frozen=True)
class Registers:
    """What a thread of the chain holds.

    Attributes:
        S: the state. w, out: what is written to the state, and o.
        S_operand, w_operand: S and w as left operands.
        exponents: S and what is added to it is times 2 to these, row by row.
    """

    S: cute.Tensor
    w: cute.Tensor
    out: cute.Tensor
    S_operand: cute.Tensor
    w_operand: cute.Tensor
    exponents: cute.Tensor


@dataclasses.dataclass(frozen=True)
class Duty:
    """A chunk, and a thread that works on it.

    Attributes:
        number: of the chunk on this CTA. tokens: of the item, from the chunk on. group: the warpgroup, of two.
    """

    number: Int32
    stage: Int32
    tokens: Int32
    group: Int32
    warp: Int32
    lane: Int32


@dataclasses.dataclass(frozen=True)
class Link(Duty):
    """Of the chain. `col`: the lane's first column of 8. `decay`: those of the chunk's stage."""

    col: Int32
    decay: cute.Pointer


@dataclasses.dataclass(frozen=True)
class Patch(Duty):
    """Of those that prepare: channels 2 pair and 2 pair + 1 of a half of the tokens of a chunk, the item's `chunk`."""

    chunk: Int32
    pair: Int32
    half: Int32


@dataclasses.dataclass(frozen=True)
class Vacancy:
    """The stage that a chunk of an item, the `turn`-th of the CTA, will take; once it is free v is loaded into it."""

    shared: Any
    atoms: list[cute.CopyAtom]
    sources: list[cute.Tensor]
    work: Work
    turn: Any
    stage: Int32
    chunk: Int32


@dataclasses.dataclass(frozen=True)
class Exit:
    """Where a warpgroup's part of a checkpoint leaves from: what a chunk's operands took of shared memory.

    Attributes:
        atom, tiles: of the checkpoints, `kept`. shared: all of it. link: the chunk and the thread.
        i_hv: the value head.
    """

    atom: cute.CopyAtom
    tiles: cute.Tensor
    kept: cute.Tensor
    shared: Any
    link: Link
    i_hv: Int32


@dataclasses.dataclass(frozen=True)
class Products:
    """How the chain's products are made that `multiply_warpgroup` does not make."""

    solve: cute.TiledMma  # with the inverse
    mix: cute.TiledMma  # with tril(qE kI^T)
    write: cute.TiledMma  # w kI
