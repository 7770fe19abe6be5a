"""Which differences the noise supports: ratios of medians with their confidence, and what a repetition differs by."""

import dataclasses
from collections.abc import Sequence

from kdacli.profile.measuring.timing import TICK_US

RESAMPLES = 1000
CONFIDENCE = 0.95
SEED = 0  # so that the same samples give the same interval


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A ratio of two medians and its 95% confidence interval."""

    value: float
    low: float
    high: float

    def supported(self, repeat: float | None) -> bool:
        """Whether it is other than 1: the interval excludes 1, and it lies further from 1 than a mere repetition did.

        Args:
            repeat: by how much two timings of the same kernel differed, as a fraction; None if that is not known.
        """
        return not self.low <= 1 <= self.high and abs(self.value - 1) > (repeat or 0.0)


def ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """median(above) / median(below) of samples in microseconds that were taken in turns.

    A bootstrap over rounds: a round's two samples stay together, since what disturbs one often disturbs the other, and
    rounds are drawn in blocks of neighbours (circular, n^(1/3) long), since clocks drift slowly: single rounds would
    pass for independent and the interval would be too narrow. The interval is not narrower than the clock's tick.

    Raises:
        ValueError: there are no samples.
    """
    import numpy as np

    n = min(len(above), len(below))
    if not n:
        raise ValueError("a ratio needs samples of both")
    x, y = np.asarray(above[:n], dtype=np.float64), np.asarray(below[:n], dtype=np.float64)
    block = max(1, round(n ** (1 / 3)))
    starts = np.random.default_rng(SEED).integers(0, n, (RESAMPLES, -(-n // block)))
    rounds = ((starts[:, :, None] + np.arange(block)) % n).reshape(RESAMPLES, -1)[:, :n]
    drawn = np.median(x[rounds], axis=1) / np.median(y[rounds], axis=1)
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    value = float(np.median(x) / np.median(y))
    tick = value * TICK_US / 2 * float(1 / np.median(x) + 1 / np.median(y))
    return Ratio(value, min(float(low), value - tick), max(float(high), value + tick))
