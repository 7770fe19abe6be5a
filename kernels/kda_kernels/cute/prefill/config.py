"""What the prefill kernel is compiled for."""

import dataclasses
import enum
import math

from kda_kernels.problem import Gate

CHUNK = 32  # tokens: the widest with which decays from its middle, exp(+-80), stay inside bf16's range
BLOCK = 8  # tokens: of the smallest blocks of the inverse; that one product relates where gates have no bound
STAGES = 3  # prepared chunks between the warps that prepare and those that run the chain
SHORT = 16  # chunks of an item at most, where a CTA that stays takes the next one before it ends
SLOTS = 8  # of items that its chain has not ended, and of the next: a power of two
PARTS = 2  # of kI where the state is written: the two bf16 halves of a number of 16 bits
# A tf32 product takes 10 bits of its numbers' fractions, and so 2^-11 / (2 ln 2) less of each on average: what makes up
# for it. Numbers that have no more bits, as keys have, stay as they are.
UNCUT = 1.0 + 2.0**-12 / math.log(2.0)
CONSUMERS = 256  # threads: two warpgroups, 64 value channels each
PRODUCERS = 256  # threads: two warpgroups, every other chunk each
THREADS = CONSUMERS + PRODUCERS
JOIN_WARPS = 8, 1, 1  # that multiply, that load transitions, and outputs
ALIGNMENT = 2 * CHUNK  # of checkpoints, in tokens
LEAST_LEFT = -18.0  # log2 of what the second half of a chunk leaves of a state; see `Preparer.decays`
SHIFT = 25.0  # log2 of what rows of the first half of a chunk are divided by, and those of the second multiplied
MOST_NORM = 2.0**37  # of q and k; see `kernel`
# Of rows of S and w in fp16, log2: 16 to 32 is their largest number before a chunk. What 32 tokens of at most that, L2
# normalised and with beta up to 2, can make of it stays under 65504.
LARGEST = 4
MOST_EXPONENT = 60  # of the power of two that a row is multiplied by, or divided
JOINED = 14  # as LARGEST, of states and transitions where the join multiplies them in fp16
LEAST_EXPONENT = -110  # of the power of two there; the largest is MOST_EXPONENT


class Part(enum.StrEnum):
    """What a launch does with the sequences."""

    WHOLE = "whole"  # a CTA runs a head of a sequence from its first to its last token
    STAYING = "staying"  # the same, but a CTA takes one after another: there are more than multiprocessors
    SUMMARY = "summary"  # of each sequence, what it makes of any state: S -> S T + E, T [K, K], E [V, K]
    SPLIT = "split"  # a head of a sequence's first segment; of the others E and T, and with them what goes into o
    CUT = "cut"  # a split whose states Triton's kernels make
    JOIN = "join"  # after a split: the states between segments, and what these add to o
    KEPT = "kept"  # after a split: from the state before a unit to a checkpoint inside it

    @property
    def reads(self) -> bool:
        """Whether tokens read the state: there are q and o."""
        return self.whole or self.splits

    @property
    def whole(self) -> bool:
        """Whether it runs whole sequences."""
        return self in (Part.WHOLE, Part.STAYING)

    @property
    def splits(self) -> bool:
        """Whether it runs the segments of sequences that are cut."""
        return self in (Part.SPLIT, Part.CUT)


@dataclasses.dataclass(frozen=True)
class PrefillSpec:
    """What a compiled prefill kernel depends on: nothing that changes from batch to batch, nor the number of heads.

    Dtypes are torch's names; None where there is no such tensor.

    Attributes:
        group: value heads that share a query and key head.
        bounded: whether log decays are -5 or more.
        fresh: whether has_initial_state says which states begin with nothing.
        kept: dtype of the checkpoints' states; rows: of their rows, and of their offsets unless `every`.
        every: whether checkpoints come at regular distances.
        invariant: whether no bit depends on where a sequence was cut, at every second chunk's end: the state is rounded
            there as if it left.
        each_arrives: at barriers, each thread, not a warp's first; and warps meet where an mma keeps their order: what
            compute-sanitizer can follow.
    """

    group: int
    gate: Gate
    bounded: bool
    beta_is_logit: bool
    allow_neg_eigval: bool
    qk_l2norm: bool
    dtype: str
    g: str
    beta: str
    A_log: str | None
    dt_bias: str | None
    h0: str | None
    ht: str | None
    index: str | None
    offsets: str | None
    part: Part = Part.WHOLE
    fresh: bool = False
    kept: str | None = None
    rows: str | None = None
    every: bool = False
    invariant: bool = False
    each_arrives: bool = False
    K: int = 128
    V: int = 128

    @property
    def pooled(self) -> bool:
        return self.index is not None

    @property
    def stays(self) -> bool:
        """Whether a CTA takes one item after another."""
        return self.part is Part.STAYING

    @property
    def scaled(self) -> bool:
        """Whether operands are in fp16, and powers of two keep what they hold in its range."""
        return self.dtype == "float16"

    @property
    def inverse_parts(self) -> int:
        """Of bf16. With beta up to 2 and alike keys the inverse's entries do not fade, and add up over a sequence.

        A beta that is given may be as large.
        """
        return 2 if self.allow_neg_eigval or not self.beta_is_logit else 1

    @property
    def write_in_tf32(self) -> bool:
        """Whether w kI, which is added to the state, is a product of tf32 numbers: where shared memory has room for kI
        in fp32 and, if gates have a bound, what relates the tokens of a chunk in bf16. Else kI is in PARTS parts of 16
        bits.
        """
        return not self.bounded or (self.inverse_parts == 1 and self.g != "float32")

    @property
    def keeps(self) -> bool:
        """Whether states leave on the way, as checkpoints."""
        return self.kept is not None and self.part.reads

    @property
    def chain_inverts(self) -> bool:
        """Whether warps that run the chain make the inverse. With a bound they have no time for it where states leave
        in fp32, or leave and decay twice a chunk."""
        return not (self.bounded and self.keeps and (self.to_the_end or self.kept == "float32"))

    @property
    def to_the_end(self) -> bool:
        """Whether, with a bound, the state decays to each chunk's end, where a sequence may be cut, and then to the
        middle of the next. Else from middle to middle by one factor, for which kI must be free to be smaller where the
        state is written than where tokens are related; see `Preparer.decays`."""
        return self.bounded and (self.invariant or not self.write_in_tf32)

    @property
    def out_buffers(self) -> int:
        """For o on its way out: two, if shared memory has room."""
        return 1 if self.g == "float32" else 2

    @property
    def packed(self) -> bool:
        return self.offsets is not None
