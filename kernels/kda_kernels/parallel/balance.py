"""Where to cut one long sequence so that all ranks have their summaries together.

Rank 0 starts from a state that it knows; the others run every token twice, once from nothing and once from the
identity (`kda_kernels.parallel.prefill`). Costs are those of the fused prefill, in chunks of 32 tokens.
"""

import functools

from kda_kernels.cute.prefill.carried import units_of
from kda_kernels.cute.prefill.config import CHUNK
from kda_kernels.cute.prefill.plan import CARRIED_SCAN, CARRIED_START, plan
from kda_kernels.ints import cdiv
from kda_kernels.problem import CHUNK as STEP

# What a chunk takes where no SM is idle, over one where a quarter is: on two H200 2.27 to 2.29 us over 2.14 to 2.18.
BUSY = 1.05


def carried_cost(tokens: int, HV: int, sms: int) -> float:
    """Of a part that begins inside a sequence, until its summary is there."""
    if not tokens:
        return 0.0
    chunks, units = cdiv(tokens, CHUNK), units_of(tokens, HV, sms)
    return cdiv(2 * HV * units, sms) * (cdiv(chunks, units) + CARRIED_START) + units * CARRIED_SCAN


def begun_cost(tokens: int, HV: int, sms: int) -> float:
    """Of the part where a sequence begins, until its state is there."""
    split = plan(1, tokens, HV, sms).split
    if split is None:
        return cdiv(HV, sms) * (cdiv(tokens, CHUNK) + CARRIED_START) / BUSY
    rounds = split.rounds(1, tokens, False)
    return rounds * split.lead / CHUNK + CARRIED_START + split.units(1, tokens, False) * CARRIED_SCAN


@functools.lru_cache(maxsize=256)
def balanced_cuts(tokens: int, ranks: int, HV: int, sms: int) -> tuple[int, ...]:
    """The first token of each rank's part, and `tokens`; multiples of 64. For `ContextParallel.of(cuts=...)`.

    Args:
        tokens: of one long sequence. HV: value heads. sms: multiprocessors of a GPU.
    """
    if ranks == 1:
        return (0, tokens)
    low, high = 0, cdiv(tokens, STEP)  # the first rank's share, in steps
    while high - low > 1:
        middle = (low + high) // 2
        others = cdiv(max(0, tokens - middle * STEP), ranks - 1)
        if begun_cost(middle * STEP, HV, sms) < carried_cost(others, HV, sms):
            low = middle
        else:
            high = middle
    first = min(tokens, low * STEP)
    rest = cdiv(tokens - first, STEP)
    cuts = tuple(min(tokens, first + STEP * (rest * i // (ranks - 1))) for i in range(ranks - 1))
    return (0, *cuts, tokens)
