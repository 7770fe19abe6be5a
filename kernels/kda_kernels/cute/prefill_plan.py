"""Whether a prefill splits its sequences into segments, and how long they are: decided from shapes alone.

A CTA takes one head of one sequence or segment, chunk after chunk, and an SM holds one CTA. Few heads leave SMs idle;
cut into segments, a sequence takes three launches: what each segment makes of any state (two CTAs a segment and head,
for E and for T), the states between segments, and the segments themselves. That is three times the work, and pays
where it fills at least three times the SMs.
"""

import dataclasses

from kda_kernels.cute.prefill_config import CHUNK

# In units of the time of a chunk, 2.6 us on an H100 (`kernels/README.md`):
SUMMARY = 0.85  # a chunk of a summary
START = 2.0  # of a CTA, until its first chunk is ready
SCAN = 1.0  # a segment in the scan of the states between them (2.5 us in a trace of P3)
LAUNCHES = 2.5  # two more of them
MOST = 64  # segments a sequence


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a prefill runs: segments of `tokens` tokens, or whole sequences (None); and what that costs, in chunks."""

    tokens: int | None
    cost: float


def plan(sequences: int, tokens: int, HV: int, sms: int) -> Plan:
    """The cheapest way for `sequences` of `tokens` tokens together, taken as equally long.

    Args:
        HV: value heads. sms: of the GPU.
    """
    chunks = max(1, -(-tokens // (max(1, sequences) * CHUNK)))
    best = Plan(None, -(-sequences * HV // sms) * (chunks + START))
    for wanted in range(2, min(MOST, chunks) + 1):
        length = -(-chunks // wanted)
        segments = -(-chunks // length)
        summaries = -(-2 * sequences * (segments - 1) * HV // sms) * (length * SUMMARY + START)
        runs = -(-sequences * segments * HV // sms) * (length + START)
        cost = summaries + runs + segments * SCAN + LAUNCHES
        if cost < best.cost:
            best = Plan(length * CHUNK, cost)
    return best
