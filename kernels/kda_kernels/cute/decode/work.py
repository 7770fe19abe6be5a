"""What the parts of the decode kernel hand to each other: arguments that travel together."""

import dataclasses
from typing import Any

import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

# Tensors that are indexed: the DSL says of their elements that they may be tensors and integers, too.
Values = Any


@dataclasses.dataclass(frozen=True)
class Work:
    """What a thread works on: some rows of a value head's state, through the tokens of a sequence.

    Attributes:
        i_n: the sequence. i_h, i_hv: the head of q and k, and that of v. i_slice: which of the head's CTAs this is.
        slot: that the sequence loads from, unsigned: see `DecodeKernel.inside`. column: that of the indices for the
            token that was accepted last.
        b, first: where the sequence's tokens begin. n_tokens: how many they are.
        tid, lane: the thread, in its CTA and its warp. row, col: its first row and column of the state; `States` knows
            the others.
    """

    i_n: Int32
    i_h: Int32
    i_hv: Int32
    i_slice: Int32
    slot: Any
    column: Int32
    b: Int32
    first: Int32
    n_tokens: Int32
    tid: Int32
    lane: Int32
    row: Int32
    col: Int32


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Those of a call, see `DecodeKernel.__call__`; or a block of them as they lie in memory, in registers: this
    thread's channels of q, k and g [channels, block], its row of v [block], and one beta [1]."""

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    g: cute.Tensor
    beta: cute.Tensor


@dataclasses.dataclass(frozen=True)
class Gate:
    """`A_log` of the head and dt_bias of this thread's channels [channels], fp32; 0 where there are none."""

    A_log: Float32
    bias: Values
    lower_bound: Float32


@dataclasses.dataclass(frozen=True)
class Memory:
    """Where states come from and go to: see `DecodeKernel.__call__`."""

    h0: cute.Tensor | None
    ht: cute.Tensor | None
    state_indices: cute.Tensor | None
    state_scales: cute.Tensor | None
    token_states: cute.Tensor | None
    token_rows: cute.Tensor | None
    started: cute.Tensor | None
    null_slot: Int32


@dataclasses.dataclass(frozen=True)
class Past:
    """The convolution's states, the slot of this sequence's, and the channel of each of this thread's lines."""

    states: cute.Tensor
    slot: Any
    lines: tuple[Int32, ...]


@dataclasses.dataclass(frozen=True)
class Factors:
    """What the norm multiplies with, of this thread's row: the gates of a block of tokens [block], weight [1]; eps."""

    gates: Values
    weight: Values
    eps: Float32


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Of a head under the norm, in shared memory [V, tokens], and barriers that count their bytes."""

    words: Values
    barriers: cute.Pointer


@dataclasses.dataclass(frozen=True)
class Tile:
    """The CTA's part of a state in shared memory, in the dtype of the state, and a barrier for each piece of it."""

    words: cute.Tensor
    arrived: cute.Pointer


@dataclasses.dataclass(frozen=True)
class Shared:
    """Shared memory for what a block of tokens has for all rows.

    Attributes:
        channels: q, k and decays of all channels [width, block]. sums: of each warp, over its channels.
        values: v [threads, block]. scalars: those of `DecodeKernel.scalars` [4, block]; a lone token's are made by
            each thread, but for beta.
    """

    channels: tuple[cute.Tensor, cute.Tensor, cute.Tensor]
    sums: cute.Tensor
    values: cute.Tensor
    scalars: cute.Tensor


@dataclasses.dataclass(frozen=True)
class Rounding:
    """What this thread's rows are rounded by where the pool has two bytes an element.

    Attributes:
        scales: fp32 [1]: of an int16 pool that of the thread's row l, where l is this lane's number among those that
            share rows; or None. odd: [rows at once], not finite where a row may hold NaN.
        keys: the halves of the seed, or None. slot: that the sequence loads from. row: the thread's first, hv V + v.
    """

    scales: Values
    odd: Values
    keys: tuple[Uint32, Uint32] | None
    slot: Uint32
    row: Int32


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is on its way before the slot is known.

    Attributes:
        raw: the first block of `tokens`. factors: of the norm, whose `norm_gate` further blocks have. taps: of the
            convolution, weight and bias of this thread's lines as they lie in memory. keys: see `Rounding`.
    """

    tokens: Tokens
    raw: Tokens
    gate: Gate
    norm_gate: cute.Tensor | None
    factors: Factors | None
    taps: tuple[cute.Tensor, cute.Tensor] | None
    keys: tuple[Uint32, Uint32] | None


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same through all tokens of a sequence.

    Attributes:
        S: this thread's rows of the state, where registers hold them through all tokens. tile: where shared memory
            does. begun: whether the sequence has a state; if not, it begins with zeros.
        target: where this thread's part of the state of the last token goes, with `tile` this CTA's; or None.
        inside: where this thread's part begins in a state.
    """

    work: Work
    memory: Memory
    o: cute.Tensor
    scale: Float32
    shared: Shared
    outputs: Outputs | None
    rounding: Rounding
    S: Values
    tile: Tile | None
    begun: Any
    target: cute.Pointer | None
    inside: Int32
