"""Whether and how a prefill is split: from shapes alone."""

import itertools

import pytest

from kda_kernels.cute.prefill_config import CHUNK
from kda_kernels.cute.prefill_plan import MOST, plan

SMS = 132


@pytest.mark.parametrize(("sequences", "tokens", "HV"), [(1, 8192, 96), (8, 8192, 96), (6, 8192, 64), (64, 65536, 12)])
def test_sequences_that_fill_the_gpu_stay_whole(sequences, tokens, HV):
    assert plan(sequences, tokens, HV, SMS).tokens is None


@pytest.mark.parametrize(("tokens", "HV"), [(8192, 32), (2048, 12), (8192, 12), (32768, 16), (1 << 20, 12)])
def test_few_heads_and_long_sequences_are_split(tokens, HV):
    segment = plan(1, tokens, HV, SMS).tokens
    assert segment % CHUNK == 0
    assert 1 < -(-tokens // segment) <= MOST


def test_short_sequences_stay_whole():
    """What two more launches cost is more than what there is to gain."""
    assert plan(1, 2 * CHUNK, 12, SMS).tokens is None
    assert plan(3, 0, 12, SMS).tokens is None


def test_more_work_never_costs_less():
    for HV, sequences in itertools.product((1, 12, 96), (1, 4)):
        costs = [plan(sequences, CHUNK * n, HV, SMS).cost for n in (1, 10, 100, 1000, 10000)]
        assert costs == sorted(costs)


def test_a_larger_gpu_is_never_slower():
    assert plan(1, 8192, 12, 264).cost <= plan(1, 8192, 12, SMS).cost <= plan(1, 8192, 12, 66).cost
