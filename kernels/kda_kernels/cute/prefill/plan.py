"""Whether a prefill splits its sequences into segments, and how long they are: decided from what the host knows.

A CTA takes one head of one sequence or segment, chunk after chunk, and an SM holds one CTA. Few heads leave SMs idle.
Cut into segments, the first of a sequence runs as ever; each of the others, a unit, takes two CTAs: one runs it from
no state, one runs the identity through it. A second launch makes the states before the units, and adds what tokens read
of those to the output. That is twice the work for all but first segments, which may therefore be longer.

Of what tokens read, 256 bytes per token and value head are kept. Where that would be more than `MOST_BYTES`, sequences
go in rounds of so many tokens.
"""

import functools
import math
from collections.abc import Sequence
from heapq import heappush, heapreplace
from typing import NamedTuple

from kda_kernels.cute.prefill.config import CHUNK

# In units of the time of a chunk, 2.3 us on an H200 (`docs/notes/prefill-cute.md`):
START = 4.6  # of a CTA, until its first chunk is ready and after its last
SCAN = 0.35  # a unit in the states between them
LAUNCHES = 2.3  # the join, but for its units
ADD = 0.003  # a chunk and head in the sum of outputs, on the whole GPU
CARRIED_START, CARRIED_SCAN = 7.0, 1.0  # the first two of sequences cut between ranks, whose states Triton's scan makes
GAIN = 1.1  # what a split must promise: with all SMs busy each is slower (P1, by hand: 583 us, promised 530, whole 554)
MOST = 64  # units per sequence and round
CHOICES = 4  # numbers of waves that `plan` looks at
MOST_BYTES = 512 << 20


class Split(NamedTuple):
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
        lead, segment, limit = self
        longest = tokens if packed else tokens // sequences
        of_one = -((lead - (longest if longest < limit else limit)) // segment)
        if of_one <= 0:
            return 0
        if sequences == 1 or not packed:
            return sequences * of_one
        return min(sequences * of_one, -((lead - tokens) // segment))

    def rounds(self, sequences: int, tokens: int, packed: bool) -> int:
        """Rounds until the longest sequence ends, as far as it can be known."""
        return -(-(tokens if packed else tokens // sequences) // self.limit)


class Plan(NamedTuple):
    """How a prefill runs, whole sequences if `split` is None; and what that costs, in chunks."""

    split: Split | None
    cost: float


def plan(sequences: int, tokens: int, HV: int, sms: int) -> Plan:
    """A way for `sequences` of `tokens` tokens together, taken as equally long, that costs least but for 2%.

    Args:
        HV: value heads. sms: of the GPU.
    """
    sequences = max(1, sequences)
    return _plan(sequences, -(-tokens // (sequences * CHUNK)) or 1, HV, sms)


@functools.lru_cache(maxsize=4096)
def _plan(sequences: int, chunks: int, HV: int, sms: int) -> Plan:
    """`plan` for sequences of so many chunks.

    Units run in waves on the workers that first segments leave free. For the fewest waves in which there is room for
    one unit a sequence, for two, and so on, the segments are so long that all end together; where there is room for
    more units than their scan is worth, there are as many as make the sum of both least.
    """
    heads = sequences * HV
    whole = -(-heads // sms) * (chunks + START)
    rounds = -(-chunks * heads * CHUNK * 256 // MOST_BYTES)
    ours = -(-chunks // rounds)  # in a round
    adding = heads * ADD
    # the cost is rounds * (waves * (segment + START) + units * each), first segments ending when the waves do
    best, lead, segment = whole / (GAIN * rounds) - LAUNCHES, 0, 0
    if _least(ours, ours + START, heads / sms, adding) >= best:
        return Plan(None, whole)
    most, worth = min(MOST, ours), max(0.0, 1 - adding) / SCAN
    for waves, room_for in _waves(heads, sms):
        units, starts = min(most, room_for), waves * START
        room = ours + START - starts
        if room <= 0 or starts >= best:
            break
        ideal = int(math.sqrt(waves * room * worth)) - waves
        for n in (units,) if units <= ideal else (max(1, ideal), min(units, max(1, ideal + 1))):
            shorter = int(room / (n + waves))
            if (waves + n * adding) * shorter + starts + n * SCAN >= best:
                continue
            for size in (shorter, shorter + 1) if shorter else (1,):
                longer = max(ours - n * size, size)
                behind = -((longer - ours) // size)  # the longest segment may have taken a unit's tokens
                each = behind * (SCAN + size * adding)
                if longer + START + each >= best:
                    continue
                cost = makespan(sms, (heads, longer + START), (2 * behind * heads, size + START)) + each
                if cost < best and longer < ours:
                    best, lead, segment = cost, longer, size
        if units == most:
            break
    if not segment:
        return Plan(None, whole)
    # one round holds any sequence, however the tokens are shared out
    limit = ours if rounds > 1 else sequences * chunks
    return Plan(Split(lead * CHUNK, segment * CHUNK, limit * CHUNK), GAIN * rounds * (best + LAUNCHES))


def _least(longest: float, work: float, share: float, adding: float) -> float:
    """Below which no split goes, `LAUNCHES` aside, of sequences whose chunks and starts are `work` together.

    A split makes the longest sequence x chunks shorter, runs as many twice in at least one unit, and adds what they
    read: the least over x of max(longest + START - x, share * (work + x + 2 START)) + SCAN + x * adding.

    Args:
        share: what a head of all sequences takes of the GPU. adding: what a chunk of all heads costs the sum.
    """
    chain, busy = longest + START, share * (work + 2 * START)
    shorter = max(0.0, (chain - busy) / (1 + share)) if adding < 1 else 0.0
    return max(chain - shorter, busy + share * shorter) + SCAN + shorter * adding


@functools.lru_cache(maxsize=4096)
def _waves(heads: int, sms: int) -> tuple[tuple[int, int], ...]:
    """The fewest waves that have room for one unit of each of so many heads, the fewest for two, and so on; with it
    the units that there is room for."""
    free, waves, units, found = sms - heads % sms, 0, 0, []
    for _ in range(CHOICES):
        waves = max(waves + 1, -(-2 * heads * (units + 1) // free))
        units = waves * free // (2 * heads)
        found.append((waves, units))
    return tuple(found)


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


def plan_of(lengths: Sequence[int], HV: int, sms: int) -> Plan:
    """As `plan`, for sequences of these lengths: its splits of the longest ones, judged by what they cost all.

    The splits are those of round numbers of chunks and workers, stretched: so they are few and mostly known already.
    By `Plan.cost` that loses 0.4% on average to splits of the very numbers (800 batches of up to 8 sequences).
    """
    if len(lengths) < 2:
        return plan(1, sum(lengths), HV, sms)
    chunks = [-(-n // CHUNK) for n in lengths]
    chunks.sort(reverse=True)
    return _plan_of(tuple(chunks), HV, sms)


@functools.lru_cache(maxsize=4096)
def _plan_of(chunks: tuple[int, ...], HV: int, sms: int) -> Plan:
    """`plan_of` of several sequences, the longest first."""
    N, longest, total = len(chunks), chunks[0], sum(chunks)
    if longest == chunks[-1] or total * CHUNK * HV * 256 > MOST_BYTES:
        return _plan(N, -(-total // N) or 1, HV, sms)
    work = total + N * START
    whole = longest + START if N * HV <= sms else _finish(sms, HV, [n + START for n in chunks])
    if whole <= GAIN * (_least(longest, work, HV / sms, HV * ADD) + LAUNCHES):
        return Plan(None, whole)
    # as if alone, on the workers that are left for them: what is cut runs once, or twice; or the rest hardly counts
    ways = [(1, longest, 1.0), (1, longest, 0.5)]
    if 2 * chunks[1] > longest:
        several = sum([n * N > total for n in chunks])
        ways.append((several, sum(chunks[:several]), 1.0) if several > 1 else (N, total, 1.0))
    found = []
    for cut, cut_chunks, weight in ways:
        others = (total - cut_chunks + (N - cut) * START) * weight
        each = -(-cut_chunks // cut)
        bits = max(0, each.bit_length() - 2)
        like, workers = (each + (1 << bits) - 1 >> bits) << bits, sms * cut_chunks / (cut_chunks + others)
        cuts = _cuts(cut, like, HV, round(workers / 8) * 8)
        if cuts is None:
            continue
        segment = math.ceil(cuts[1] * each)
        lead = max(segment, each - cuts[0] * segment)
        units = behind = 0
        for n in chunks:
            if n <= lead:
                break
            units, behind = units - (lead - n) // segment, behind + n - lead
        if units:
            more = -((lead - longest) // segment) * SCAN + LAUNCHES + units * segment * HV * ADD
            least = max(HV * (work - behind + 2 * units * (segment + START)) / sms, lead + START) + more
            found.append((least, lead, segment, units, more))
    found.sort()
    best, split = whole / GAIN, None
    for least, lead, segment, units, more in found:
        if least >= best:
            break
        first = [min(n, lead) + START for n in chunks]
        cost = _finish(sms, HV, first, 2 * HV * units, segment + START) + more
        if cost < best:
            best, split = cost, Split(lead * CHUNK, segment * CHUNK, total * CHUNK)  # one round
    return Plan(split, GAIN * best)


@functools.lru_cache(maxsize=4096)
def _cuts(sequences: int, chunks: int, HV: int, sms: int) -> tuple[int, float] | None:
    """How `plan` cuts sequences of so many chunks: how many units each has, and which part of it a unit is."""
    split = _plan(sequences, chunks, HV, max(1, sms)).split
    if split is None:
        return None
    return split.units(1, chunks * CHUNK, False), split.segment / (CHUNK * chunks)


def _finish(sms: int, HV: int, first: list[float], then: int = 0, time: float = 0.0) -> float:
    """When `sms` workers are done with `HV` tasks of each time in `first`, the longest first, and `then` tasks of
    `time`, each on the worker that is free first."""
    at_once = min(len(first), sms // HV)
    free = [(end, HV) for end in first[at_once - 1 :: -1]] if at_once else []  # when workers get free, and how many
    if idle := sms - at_once * HV:
        free.insert(0, (0.0, idle))
    last = first[0]
    tasks = [(HV, end) for end in first[at_once:]]
    tasks.append((then, time))
    for left, each in tasks:
        while left > 0:
            now, workers = free[0]
            end = now + each
            if workers > left:
                free[0] = now, workers - left
                heappush(free, (end, left))
            else:
                heapreplace(free, (end, workers))
            left -= workers
            if end > last:
                last = end
    return last
