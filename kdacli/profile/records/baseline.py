"""Two recordings held against each other: which changes exceed the noise, and which of them are regressions."""

import dataclasses
import math
from typing import Any

from kda_kernels.errors import CheckFailedError, InputError
from kdacli.profile.records.record import Record
from kdacli.profile.records.row import FailedRow, Row, TimedRow

# Medians of one kernel on one machine in two processes, whatever the samples inside each say: memory lies elsewhere,
# the card is warmer. Of P2 on an H100 in two runs an hour apart: 0.4%, 0.8% and 0.6%.
RUN_TO_RUN = 0.01
Key = tuple[str, str, str, str]


@dataclasses.dataclass(frozen=True)
class TimeChange:
    """One timing, then and now.

    Attributes:
        op, case, gates, kernel: which.
        before_us, after_us: medians; None where there is none.
        noise: the fraction by which the two may differ for no reason.
        verdict: faster, slower, same (within the noise), failed (now), missing (now), new, or incomparable.
        ours: whether a slower or failed one is a regression.
        why: what makes it incomparable, or the error; else None.
    """

    op: str
    case: str
    gates: str
    kernel: str
    before_us: float | None
    after_us: float | None
    noise: float | None
    verdict: str
    ours: bool
    why: str | None = None

    @property
    def ratio(self) -> float | None:
        """Now over then."""
        return self.after_us / self.before_us if self.after_us and self.before_us else None

    @property
    def is_regression(self) -> bool:
        return self.ours and self.verdict in ("slower", "failed")


def require_same_gpu(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Raises `InputError` where two `provenance` objects name different GPUs: their times say nothing of a change."""
    names = [(p.get("gpu") or {}).get("name") for p in (before, after)]
    if None not in names and names[0] != names[1]:
        raise InputError(f"the baseline is of a {names[0]} and this is a {names[1]}: compare recordings of one GPU")


def compare(before: Record, after: Record) -> list[TimeChange]:
    """Every timing of two recordings, in the order of `after`, then those that are missing now."""
    old, new = ({_key(row): row for row in record.rows} for record in (before, after))
    changes = [_change(old.get(key), row) for key, row in new.items()]
    return changes + [
        TimeChange(*key, _median(row), None, None, "missing", not row.peer)
        for key, row in old.items()
        if key not in new
    ]


def _key(row: Row) -> Key:
    return row.op, row.case, row.gates, row.kernel


def _median(row: Row | None) -> float | None:
    return row.median_us if isinstance(row, TimedRow) else None


def _change(before: Row | None, after: Row) -> TimeChange:
    noise = _noise(before, after) if isinstance(before, TimedRow) and isinstance(after, TimedRow) else None
    verdict, why = _verdict(before, after, noise)
    return TimeChange(*_key(after), _median(before), _median(after), noise, verdict, not after.peer, why)


def _verdict(before: Row | None, after: Row, noise: float | None) -> tuple[str, str | None]:
    if isinstance(after, FailedRow):
        return "failed", after.error
    if noise is None or not (isinstance(before, TimedRow) and isinstance(after, TimedRow)):
        return "new", None
    for what in ("mode", "cache"):
        was, now = getattr(before, what), getattr(after, what)
        if was != now:
            return "incomparable", f"{what} was {was} and is {now}"
    if before.problem != after.problem:
        return "incomparable", "the problem was another"
    change = after.median_us / before.median_us
    return ("slower" if change > 1 + noise else "faster" if change < 1 / (1 + noise) else "same"), None


def _noise(before: TimedRow, after: TimedRow) -> float:
    """The fraction that the ratio of two medians may be off: both intervals, and what a repetition differs by."""
    repeat = max(RUN_TO_RUN, before.repeat or 0.0, after.repeat or 0.0)
    return math.hypot(_half_width(before), _half_width(after), repeat)


def _half_width(row: TimedRow) -> float:
    """Half of the median's 95% interval, as a fraction."""
    return max(row.high_us - row.median_us, row.median_us - row.low_us) / row.median_us


def require_no_regression(changes: list[TimeChange]) -> None:
    """Raises `CheckFailedError` where one of ours became slower beyond the noise, or fails, or nothing was compared."""
    if bad := [c for c in changes if c.is_regression]:
        named = ", ".join(dict.fromkeys(f"{c.kernel} at {c.case} {c.gates}" for c in bad))
        raise CheckFailedError(f"{len(bad)} of {len(changes)} timings regressed: {named}")
    if not any(c.verdict in ("same", "faster", "slower") for c in changes):
        raise CheckFailedError("no timing of the baseline could be compared: it is of other cases or kernels")
