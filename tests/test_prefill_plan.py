"""Whether and how a prefill is split, beside a search that tries all."""

import heapq
import itertools
import math
import random

import pytest

from kda_kernels.cute.prefill.config import CHUNK
from kda_kernels.cute.prefill.plan import (
    ADD,
    GAIN,
    LAUNCHES,
    MOST,
    MOST_BYTES,
    SCAN,
    START,
    Split,
    makespan,
    plan,
    plan_of,
)

SMS = 132
SHAPES = [
    (sequences, sequences * each, HV)
    for sequences in (1, 2, 5, 8, 64)
    for each in (1, 100, 300, 1024, 8190, 65536, 1_000_000)
    for HV in (1, 12, 32, 96)
]


@pytest.mark.parametrize(("sequences", "each", "HV"), [(8, 1024, 96), (64, 1024, 12), (64, 1024, 96), (6, 1365, 64)])
def test_sequences_that_fill_the_gpu_stay_whole(sequences, each, HV):
    assert plan(sequences, sequences * each, HV, SMS).split is None


@pytest.mark.parametrize(("tokens", "HV"), [(8192, 32), (2048, 12), (8192, 12), (32768, 16), (1 << 20, 12)])
def test_few_heads_and_long_sequences_are_split(tokens, HV):
    whole, found = tokens // CHUNK + START, plan(1, tokens, HV, SMS)
    assert found.split is not None
    assert found.cost < 0.75 * whole


def test_first_segments_are_longer_where_they_take_most_sms():
    """The others take two CTAs each. With 96 heads there may be nothing to gain."""
    splits = [plan(1, 8192, HV, SMS).split for HV in (32, 64, 96)]
    assert splits[0] is not None
    assert all(split is None or split.lead > split.segment for split in splits)


def test_short_sequences_stay_whole():
    """What two more launches cost is more than what there is to gain."""
    assert plan(1, 2 * CHUNK, 12, SMS).split is None
    assert plan(3, 0, 12, SMS).split is None
    assert plan(0, 0, 12, SMS).split is None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_launches_rely_on(shape):
    """Of every split: a workspace that is not empty and not too large, and rounds that hand a state on."""
    sequences, tokens, HV = shape
    found = plan(*shape, SMS)
    chunks = -(-tokens // sequences // CHUNK)
    assert found.cost <= -(-sequences * HV // SMS) * (chunks + START), "not more than whole sequences cost"
    if (split := found.split) is None:
        return
    assert not any(x % CHUNK for x in (split.lead, split.segment, split.limit))
    assert 0 < split.segment <= split.lead < split.limit
    assert split.rounds(sequences, tokens, packed=False) * split.limit >= tokens / sequences
    for packed in (True, False):
        units = split.units(*shape[:2], packed)
        assert units > 0
        assert units * split.segment * HV * 256 <= MOST_BYTES


def test_long_sequences_go_in_rounds():
    split = plan(1, 1 << 20, 12, SMS).split
    assert split.rounds(1, 1 << 20, packed=True) == split.rounds(1, 1 << 20, packed=False) > 1
    assert plan(1, 32768, 16, SMS).split.limit >= 32768


def test_more_work_never_costs_less():
    for HV, sequences in itertools.product((1, 12, 96), (1, 4)):
        costs = [plan(sequences, CHUNK * n, HV, SMS).cost for n in (1, 10, 100, 1000, 10000)]
        assert costs == sorted(costs)


def test_a_larger_gpu_is_never_slower():
    assert plan(1, 8192, 12, 264).cost <= plan(1, 8192, 12, SMS).cost <= plan(1, 8192, 12, 66).cost


# --- beside a search


def searched(sequences: int, tokens: int, HV: int, sms: int) -> float:
    """The least cost of many numbers of units and ratios of the first segment to the others."""
    chunks = max(1, -(-tokens // (sequences * CHUNK)))
    heads = sequences * HV
    best = makespan(sms, (heads, chunks + START), (0, 1.0))
    rounds = -(-chunks * heads * CHUNK * 256 // MOST_BYTES)
    ours = -(-chunks // rounds)
    for units in range(1, min(MOST, ours) + 1):
        for ratio in (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12):
            segment = math.ceil(ours / (units + ratio))
            lead = max(ours - units * segment, segment)
            cost = makespan(sms, (heads, lead + START), (2 * units * heads, segment + START))
            cost += units * SCAN + LAUNCHES + units * segment * heads * ADD
            best = min(best, GAIN * rounds * cost)
    return best


@pytest.mark.parametrize("sms", [132, 78])
def test_as_good_as_a_search(sms):
    """Within 2% of it, and on the average no worse."""
    rng = random.Random(0)
    shapes = [(N, N * each, HV) for N, each, HV in itertools.product((1, 3, 8), (777, 2048, 8190), (4, 12, 32, 96))]
    for _ in range(40):
        N = rng.randint(1, 16)
        shapes.append((N, N * rng.randint(1, 1 << rng.randint(8, 17)), rng.randint(1, 128)))
    ratios = [plan(*shape, sms).cost / searched(*shape, sms) for shape in shapes]
    assert max(ratios) < 1.02, shapes[ratios.index(max(ratios))]
    assert sum(ratios) / len(ratios) < 1.001


def cost_of(lengths: tuple[int, ...], HV: int, split: Split | None) -> float:
    """In chunks, task by task."""
    chunks = sorted((-(-n // CHUNK) for n in lengths), reverse=True)
    if split is None:
        return listed(SMS, [n + START for n in chunks for _ in range(HV)])
    lead, segment = split.lead // CHUNK, split.segment // CHUNK
    units = [max(0, -(-(n - lead) // segment)) for n in chunks]
    tasks = [min(n, lead) + START for n in chunks for _ in range(HV)] + [segment + START] * (2 * HV * sum(units))
    return GAIN * (listed(SMS, tasks) + max(units) * SCAN + LAUNCHES + sum(units) * segment * HV * ADD)


def test_lengths_that_the_host_knows():
    """The cost is that of these lengths, not of as many of their mean; a search over segments finds little better."""
    rng = random.Random(3)
    known = [(8192, 100), (8192,) + (100,) * 7, (1300, 547, 2048, 963, 271, 3063), (5000, 0, 3000, 3000)]
    known += [tuple(rng.randint(1, 1 << rng.randint(5, 14)) for _ in range(rng.randint(2, 8))) for _ in range(4)]
    ratios = []
    for lengths, HV in itertools.product(known, (12, 32)):
        found = plan_of(lengths, HV, SMS)
        assert found.cost == pytest.approx(cost_of(lengths, HV, found.split), rel=1e-6)
        assert found.split is None or found.split.rounds(len(lengths), sum(lengths), packed=True) == 1
        assert found.cost < 1.001 * cost_of(lengths, HV, plan(len(lengths), sum(lengths), HV, SMS).split)
        leads = [max(lengths) * share // 100 // CHUNK * CHUNK for share in (12, 20, 30, 40, 50, 60, 80)]
        splits = [Split(x, max(CHUNK, x // n // CHUNK * CHUNK), 1 << 14) for x in leads if x for n in (1, 2, 3)]
        ratios.append(found.cost / min(cost_of(lengths, HV, split) for split in [None, *splits]))
    assert max(ratios) < 1.2
    assert sum(ratios) / len(ratios) < 1.02


@pytest.mark.parametrize("lengths", [(33, 40), (0, 1), (1, 2, 3), (0, 0, 5), (64, 63, 0)])
def test_lengths_that_take_as_many_chunks(lengths):
    """Their mean is that of the longest, or nothing is."""
    assert plan_of(lengths, 12, SMS).cost <= cost_of(lengths, 12, None)


def test_equal_lengths_are_planned_as_such():
    assert plan_of((2048,) * 3, 12, SMS) == plan(3, 3 * 2048, 12, SMS)


# --- the time that CTAs take


def listed(sms: int, tasks: list[float]) -> float:
    """When the last is done, if each goes to the worker that is free first."""
    free = [0.0] * sms
    for time in tasks:
        heapq.heapreplace(free, free[0] + time)
    return max(free)


@pytest.mark.parametrize(
    ("sms", "first", "then"),
    [
        (132, (96, 258.0), (0, 1.0)),
        (132, (133, 3.0), (0, 1.0)),
        (132, (132, 3.0), (132, 2.0)),
        (132, (96, 229.0), (192, 31.0)),
        (4, (3, 10.0), (7, 1.5)),
        (4, (3, 10.0), (6, 20.0)),
        (1, (2, 3.0), (5, 2.0)),
        (8, (0, 1.0), (9, 2.0)),
    ],
)
def test_makespan(sms, first, then):
    tasks = [first[1]] * first[0] + [then[1]] * then[0]
    assert makespan(sms, first, then) == pytest.approx(listed(sms, tasks), abs=2e-3)


def test_makespan_of_anything():
    rng = random.Random(0)
    for _ in range(500):
        sms = rng.randint(1, 20)
        first = rng.randint(1, 60), rng.uniform(1, 50)
        then = rng.randint(0, 80), rng.uniform(1, first[1])
        tasks = [first[1]] * first[0] + [then[1]] * then[0]
        assert makespan(sms, first, then) == pytest.approx(listed(sms, tasks), abs=2e-3), (sms, first, then)


# --- units and rounds


def units(split: Split, lens: list[int]) -> list[int]:
    """In each round, until the last token: found by walking."""
    left, found = list(lens), []
    while any(left):
        count = 0
        for n, tokens in enumerate(left):
            now = min(tokens, split.limit)
            left[n] -= now
            now -= min(now, split.lead)
            while now > 0:
                count, now = count + 1, now - split.segment
        found.append(count)
    return found


SPLITS = [Split(64, 64, 256), Split(64, 32, 96), Split(96, 32, 1 << 20), Split(160, 64, 480), Split(32, 32, 1 << 20)]


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_units_and_rounds_of_any_lengths(split):
    """There never are more than the most, of lengths that add up to the same."""
    rng = random.Random(1)
    for _ in range(2000):
        N = rng.randint(1, 6)
        lens = [rng.choice((0, rng.randint(1, 60), rng.randint(1, 700))) for _ in range(N)]
        found = units(split, lens)
        assert all(count <= split.units(N, sum(lens), packed=True) for count in found), lens
        assert len(found) <= split.rounds(N, sum(lens), packed=True), lens


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_the_most_units_are_reached(split):
    """By one sequence that has all tokens, by dense ones, and by packed ones that fill a round each."""
    for N, tokens in itertools.product((1, 3), (1, 64, 65, 100, 160, 161, 700)):
        dense = units(split, [tokens] * N)
        assert dense[0] == max(dense) == split.units(N, N * tokens, packed=False)
        assert len(dense) == split.rounds(N, N * tokens, packed=False)
        alone = units(split, [tokens] + [0] * (N - 1))
        assert alone[0] == split.units(1, tokens, packed=True)
        assert len(alone) == split.rounds(N, tokens, packed=True)
        if tokens <= split.limit:
            assert alone[0] == split.units(N, tokens, packed=True)
    if split.limit < 1000:
        N = 3
        assert units(split, [split.limit] * N) == [split.units(N, N * split.limit, packed=True)]
