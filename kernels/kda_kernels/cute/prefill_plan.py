"""Whether a prefill splits its sequences into segments, and how long they are: decided from shapes alone.

A CTA takes one head of one sequence or segment, chunk after chunk, and an SM holds one CTA. Few heads leave SMs idle.
Cut into segments, the first of a sequence runs as ever; each of the others, a unit, takes two CTAs: one runs it from
no state, one runs the identity through it. A scan makes the states before the units, and what tokens read of those is
added to the output. That is twice the work for all but first segments, which may therefore be longer.

Of what tokens read, 256 bytes a token and value head are kept. Where that would be more than `MOST_BYTES`, sequences go
in rounds of so many tokens.
"""

import dataclasses
import math

from kda_kernels.cute.prefill_config import CHUNK

# In units of the time of a chunk, 2.1 us on an H100 (`kernels/README.md`):
START = 7.0  # of a CTA, until its first chunk is ready and after its last
SCAN = 1.2  # a unit in the scan of the states between them
LAUNCHES = 3.0  # two more of them
ADD = 0.005  # a chunk and head in the sum of outputs, on the whole GPU: 24 KB at 2.3 TB/s
GAIN = 1.1  # what a split must promise: with all SMs busy each is slower (P1, by hand: 583 us, promised 530, whole 554)
MOST = 64  # units a sequence and round
RATIOS = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12)  # of the first segment to the others
MOST_BYTES = 512 << 20


@dataclasses.dataclass(frozen=True)
class Split:
    """How sequences are cut, in tokens, multiples of `CHUNK`.

    Attributes:
        lead: the first segment's, at least as many as the others'. segment: the others'.
        limit: of a sequence in one round.
    """

    lead: int
    segment: int
    limit: int

    def units(self, sequences: int, tokens: int, packed: bool) -> int:
        """Segments that are not first ones in one round of `sequences` of `tokens` together.

        In a packed batch, whose lengths only the GPU knows, the most that there can be: one long sequence has more than
        several, since each has a first segment.
        """
        of_one = -(-max(0, min(tokens if packed else tokens // sequences, self.limit) - self.lead) // self.segment)
        if not packed:
            return sequences * of_one
        return min(sequences * of_one, -(-max(0, tokens - self.lead) // self.segment))

    def rounds(self, sequences: int, tokens: int, packed: bool) -> int:
        """Rounds until the longest sequence ends, as far as it can be known."""
        return -(-(tokens if packed else tokens // sequences) // self.limit)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a prefill runs, whole sequences if `split` is None; and what that costs, in chunks."""

    split: Split | None
    cost: float


def plan(sequences: int, tokens: int, HV: int, sms: int) -> Plan:
    """The cheapest way for `sequences` of `tokens` tokens together, taken as equally long.

    Args:
        HV: value heads. sms: of the GPU.
    """
    sequences = max(1, sequences)
    chunks = max(1, -(-tokens // (sequences * CHUNK)))
    heads = sequences * HV
    best = Plan(None, makespan(sms, (heads, chunks + START), (0, 1.0)))
    rounds = -(-chunks * heads * CHUNK * 256 // MOST_BYTES)
    ours = -(-chunks // rounds)  # in a round
    for units in range(1, min(MOST, ours) + 1):
        for ratio in RATIOS:
            segment = math.ceil(ours / (units + ratio))
            lead = max(ours - units * segment, segment)
            cost = makespan(sms, (heads, lead + START), (2 * units * heads, segment + START))
            cost += units * SCAN + LAUNCHES + units * segment * heads * ADD
            if GAIN * rounds * cost < best.cost:
                # one round holds any sequence, however the tokens are shared out
                limit = ours if rounds > 1 else -(-tokens // CHUNK)
                best = Plan(Split(lead * CHUNK, segment * CHUNK, limit * CHUNK), GAIN * rounds * cost)
    return best


def makespan(sms: int, first: tuple[int, float], then: tuple[int, float]) -> float:
    """When `sms` workers are done with so many tasks of so much time, and then, as they get free, with others."""
    (tasks, time), (more, shorter) = first, then
    waves, late = divmod(tasks, sms)
    early, end = waves * time, (waves + (late > 0)) * time  # when workers get free, `late` of them at the end
    if not more:
        return end

    def done(now: float) -> int:
        """Of the later tasks, by then."""
        return (sms - late) * int((now - early) / shorter) + late * int(max(0.0, now - end) / shorter)

    low, high = early, end + math.ceil(more / sms) * shorter * (1 + 1e-9)
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if done(middle) >= more else (middle, high)
    return max(end, high)
