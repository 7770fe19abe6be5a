"""Sampling and its statistics, with no GPU in sight: what is sampled is anything with a `sample()`."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

Z95 = 1.96  # standard deviations that hold 95% of a normal distribution
TICK_US = 0.032  # an H100's event clock moves in steps of it: no interval is narrower


class Timed(Protocol):
    """A call that is ready to be timed.

    Attributes:
        mode: "graph" (replay of a CUDA graph) or "eager".
        note: why it is not the mode that was asked for; None if it is.
        host: what an eager call costs the CPU.
        call_bytes: what one eager call takes of torch's allocator at its peak, the output included.
    """

    mode: str
    note: str | None
    host: "HostTime"
    call_bytes: int

    def sample(self) -> float:
        """Runs it once; returns microseconds of GPU time."""
        ...

    def run(self) -> Any:
        """Runs it once, as `sample` does; returns its outputs."""
        ...


@dataclasses.dataclass(frozen=True)
class HostTime:
    """Microseconds of the CPU: medians of eager calls of one shape, and of calls that each have a new one (or None)."""

    same_us: float
    new_us: float | None


class Timer(Protocol):
    """Makes calls ready for timing.

    Attributes:
        cold: whether the L2 cache is emptied before each sample.
    """

    cold: bool

    def prepare(self, call: Callable[[], Any], new_shapes: Iterable[Callable[[], Any]] = ()) -> Timed: ...


@dataclasses.dataclass(frozen=True)
class Budget:
    """When to stop sampling.

    Attributes:
        seconds: wall time to spend on each kernel of a case.
        min_samples: not fewer, however long they take, until `patience_s` is over.
        max_samples: not more.
        patience_s: wall time for each kernel after which `few_samples` will do.
        few_samples: the least number ever.
    """

    seconds: float = 0.3
    min_samples: int = 20
    max_samples: int = 500
    patience_s: float = 10.0
    few_samples: int = 3

    def spent(self, rounds: int, elapsed_s: float, kernels: int) -> bool:
        """True after enough `rounds`, each of one sample from each of `kernels`."""
        share = elapsed_s / max(kernels, 1)
        return (
            rounds >= self.max_samples
            or (rounds >= self.min_samples and share >= self.seconds)
            or (rounds >= self.few_samples and share >= self.patience_s)
        )


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of one kernel's samples, in microseconds.

    Attributes:
        median_us, p10_us, p90_us: percentiles.
        low_us, high_us: 95% confidence interval of the median, from order statistics: no distribution is assumed.
        samples: how many.
    """

    median_us: float
    p10_us: float
    p90_us: float
    low_us: float
    high_us: float
    samples: int

    @property
    def spread_us(self) -> float:
        return self.p90_us - self.p10_us

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Statistics":
        """Raises `ValueError` for no samples, or for one that is no time."""
        if not samples or not all(math.isfinite(s) and s > 0 for s in samples):
            raise ValueError(f"samples should be positive times, not {list(samples)[:5]}")
        ordered = sorted(samples)
        n = len(ordered)
        # The number of samples under the true median is binomial (n, 1/2): its 95% range, as ranks.
        reach = Z95 * math.sqrt(n) / 2
        low, high = ordered[max(0, math.floor(n / 2 - reach))], ordered[min(n - 1, math.ceil(n / 2 + reach) - 1)]
        return cls(
            statistics.median(ordered), _quantile(ordered, 0.1), _quantile(ordered, 0.9),
            low - TICK_US / 2, high + TICK_US / 2, n,
        )  # fmt: skip


def _quantile(ordered: Sequence[float], q: float) -> float:
    """Linear between neighbours, as numpy's default."""
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def interleave(
    timed: Mapping[str, Timed], budget: Budget, clock: Callable[[], float] = time.perf_counter
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Samples all kernels in rounds, one sample of each, so that a drift of the clocks hits all alike.

    Returns:
        The samples of each kernel in microseconds, and the error of each one that raised, which is then left out.
    """
    samples: dict[str, list[float]] = {name: [] for name in timed}
    failed: dict[str, Exception] = {}
    start, rounds = clock(), 0
    while len(failed) < len(timed):
        for name, call in timed.items():
            if name in failed:
                continue
            try:
                samples[name].append(call.sample())
            except Exception as error:  # a peer may raise anything; the others go on
                failed[name] = error
        rounds += 1
        if budget.spent(rounds, clock() - start, len(timed)):
            break
    return samples, failed
