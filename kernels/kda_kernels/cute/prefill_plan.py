"""Whether a prefill splits its sequences into segments, and how long they are: decided from what the host knows.

A CTA takes one head of one sequence or segment, chunk after chunk, and an SM holds one CTA. Few heads leave SMs idle.
Cut into segments, the first of a sequence runs as ever; each of the others, a unit, takes two CTAs: one runs it from
no state, one runs the identity through it. A scan makes the states before the units, and what tokens read of those is
added to the output. That is twice the work for all but first segments, which may therefore be longer.

Of what tokens read, 256 bytes a token and value head are kept. Where that would be more than `MOST_BYTES`, sequences go
in rounds of so many tokens.
"""

import dataclasses
import functools
import heapq
import itertools
import math

from kda_kernels.cute.prefill_config import CHUNK

# In units of the time of a chunk, 2.1 us on an H100 (`kernels/README.md`):
START = 7.0  # of a CTA, until its first chunk is ready and after its last
SCAN = 1.2  # a unit in the scan of the states between them
LAUNCHES = 3.0  # two more of them
ADD = 0.005  # a chunk and head in the sum of outputs, on the whole GPU: 24 KB at 2.3 TB/s
GAIN = 1.1  # what a split must promise: with all SMs busy each is slower (P1, by hand: 583 us, promised 530, whole 554)
MOST = 64  # units a sequence and round
CHOICES = 4  # numbers of waves that `plan` looks at
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


@functools.lru_cache(maxsize=4096)
def plan(sequences: int, tokens: int, HV: int, sms: int) -> Plan:
    """A way for `sequences` of `tokens` tokens together, taken as equally long, that costs least but for 2%.

    Units run in waves on the workers that first segments leave free. For the fewest waves in which there is room for
    one unit a sequence, for two, and so on, the segments are so long that all end together; where there is room for
    more units than their scan is worth, there are as many as make the sum of both least.

    Args:
        HV: value heads. sms: of the GPU.
    """
    sequences = max(1, sequences)
    chunks = max(1, -(-tokens // (sequences * CHUNK)))
    heads = sequences * HV
    whole = -(-heads // sms) * (chunks + START)
    rounds = -(-chunks * heads * CHUNK * 256 // MOST_BYTES)
    ours = -(-chunks // rounds)  # in a round
    free, most = sms - heads % sms, min(MOST, ours)
    # the cost is rounds * (waves * (segment + START) + units * each), first segments ending when the waves do
    best, lead, segment, units, waves = whole / (GAIN * rounds) - LAUNCHES, 0, 0, 0, 0
    for _ in range(CHOICES):
        waves = max(waves + 1, -(-2 * heads * (units + 1) // free))
        units = min(most, waves * free // (2 * heads))
        room = ours + START - waves * START
        if room <= 0 or waves * START >= best:
            break
        ideal = int(math.sqrt(max(0.0, waves * room * (1 - heads * ADD) / SCAN))) - waves
        for n in (units,) if units <= ideal else (max(1, ideal), min(units, max(1, ideal + 1))):
            shorter = int(room / (n + waves))
            if (waves + n * heads * ADD) * shorter + waves * START + n * SCAN >= best:
                continue
            for size in (shorter, shorter + 1) if shorter else (1,):
                longer = max(ours - n * size, size)
                cost = makespan(sms, (heads, longer + START), (2 * n * heads, size + START))
                cost += n * (SCAN + size * heads * ADD)
                if cost < best and longer < ours:
                    best, lead, segment = cost, longer, size
        if units == most:
            break
    if not segment:
        return Plan(None, whole)
    # one round holds any sequence, however the tokens are shared out
    limit = ours if rounds > 1 else -(-tokens // CHUNK)
    return Plan(Split(lead * CHUNK, segment * CHUNK, limit * CHUNK), GAIN * rounds * (best + LAUNCHES))


def makespan(sms: int, first: tuple[int, float], then: tuple[int, float]) -> float:
    """When `sms` workers are done with so many tasks of so much time, and then, as they get free, with others."""
    (tasks, time), (more, shorter) = first, then
    waves, late = divmod(tasks, sms)
    early = waves * time  # when workers get free, `late` of them at the end
    end = early + time if late else early
    if not more:
        return end
    before, free = int((end - early) / shorter), sms - late  # tasks that each of the free ones has done by the end
    if more <= before * free:
        return end if late else early + -(-more // free) * shorter
    again, rest = divmod(more - before * free - 1, sms)
    done = early + (before + again + 1) * shorter
    return done if rest < free else end + (again + 1) * shorter


@functools.lru_cache(maxsize=4096)
def plan_of(lengths: tuple[int, ...], HV: int, sms: int) -> Plan:
    """As `plan`, for sequences of these lengths: its splits of the longest ones, judged by what they cost all."""
    if len(set(lengths)) < 2 or sum(lengths) * HV * 256 > MOST_BYTES:
        return plan(len(lengths), sum(lengths), HV, sms)
    chunks = sorted((-(-n // CHUNK) for n in lengths), reverse=True)
    best = Plan(None, _finish(sms, [(HV, n + START) for n in chunks]))
    total, limit = sum(chunks), -(-sum(lengths) // CHUNK) * CHUNK  # one round
    several = sum(n * len(chunks) > total for n in chunks)
    for cut, weight in itertools.product(sorted({1, max(1, several), len(chunks)}), (1, 2, math.inf)):
        # as if alone, on the workers that are left for them: what is cut runs once, or twice; or the rest hardly counts
        longest = sum(chunks[:cut])
        others = (total - longest + (len(chunks) - cut) * START) / weight
        split = plan(cut, longest * CHUNK, HV, max(1, round(sms * longest / (longest + others)))).split
        if split is None:
            continue
        lead, segment = split.lead // CHUNK, split.segment // CHUNK
        units = [-(-max(0, n - lead) // segment) for n in chunks]
        tasks = [(HV, min(n, lead) + START) for n in chunks] + [(2 * HV * sum(units), segment + START)]
        cost = _finish(sms, tasks) + max(units) * SCAN + LAUNCHES + sum(units) * segment * HV * ADD
        if GAIN * cost < best.cost:
            best = Plan(Split(split.lead, split.segment, limit), GAIN * cost)
    return best


def _finish(sms: int, tasks: list[tuple[int, float]]) -> float:
    """When `sms` workers are done with tasks, so many of so much time, each on the worker that is free first."""
    free, end = [(0.0, sms)], 0.0  # when workers get free, and how many
    for left, time in tasks:
        while left:
            now, workers = heapq.heappop(free)
            if workers > left:
                heapq.heappush(free, (now, workers - left))
            started = min(workers, left)
            heapq.heappush(free, (now + time, started))
            left, end = left - started, max(end, now + time)
    return end
