"""Two recordings held against each other: which changes exceed the noise, and which of them are regressions."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kda_kernels import registry
from kda_kernels.errors import CheckFailedError, InputError
from kdacli.profile.record import READS

# Medians of one kernel on one machine in two processes, whatever the samples inside each say: memory lies elsewhere,
# the card is warmer. Of P2 on an H100 in two runs an hour apart: 0.4%, 0.8% and 0.6%.
RUN_TO_RUN = 0.01
_MEDIAN_ERROR = 1.2533  # standard error of a median over that of a mean, for normal samples
_P10_P90 = 2.5631  # standard deviations from the 10th to the 90th percentile
_Z95 = 1.96
Row = Mapping[str, Any]
Key = tuple[str, str, str, str]


@dataclasses.dataclass(frozen=True)
class Change:
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


def read(path: str) -> dict[str, Any]:
    """A recording. Raises `InputError` where the file holds none, or is none that this kda can read."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is no recording of kda profile: it is no JSON ({error})") from error
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema not in READS:
        raise InputError(f"{path} is no recording that can be read: its schema is {schema}, not {' or '.join(READS)}")
    rows = record.get("rows")
    if not isinstance(rows, list) or not rows or not all(_is_row(row) for row in rows):
        raise InputError(f"{path} is no recording of times: it has no rows, or rows that lack a time and an error")
    return record


def _is_row(row: Any) -> bool:
    named = isinstance(row, dict) and all(isinstance(row.get(k), str) for k in ("op", "case", "gates", "kernel"))
    timed = named and all(_is_time(row.get(k)) for k in ("median_us", "p10_us", "p90_us")) and "samples" in row
    return named and ("error" in row or timed)


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def require_same_gpu(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Raises `InputError` where two `provenance` objects name different GPUs: their times say nothing of a change."""
    names = [(p.get("gpu") or {}).get("name") for p in (before, after)]
    if None not in names and names[0] != names[1]:
        raise InputError(f"the baseline is of a {names[0]} and this is a {names[1]}: compare recordings of one GPU")


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Every timing of two recordings, in the order of `after`, then those that are missing now."""
    old, new = ({_key(row): row for row in record["rows"]} for record in (before, after))
    changes = [_change(key, old.get(key), row) for key, row in new.items()]
    return changes + [_change(key, row, None) for key, row in old.items() if key not in new]


def _key(row: Row) -> Key:
    return row["op"], row["case"], row["gates"], row["kernel"]


def _change(key: Key, before: Row | None, after: Row | None) -> Change:
    row = after or before
    assert row is not None
    there = [r for r in (before, after) if r is not None and "error" not in r]
    noise = _noise(*there) if len(there) == 2 else None
    verdict, why = _verdict(before, after, noise)
    times = [r["median_us"] if r is not None and "error" not in r else None for r in (before, after)]
    return Change(*key, *times, noise, verdict, _is_ours(row), why)


def _verdict(before: Row | None, after: Row | None, noise: float | None) -> tuple[str, str | None]:
    if after is None:
        return "missing", None
    if before is None or "error" in before:
        return ("failed", after["error"]) if "error" in after else ("new", None)
    if "error" in after:
        return "failed", after["error"]
    for what in ("mode", "cache"):
        if before.get(what) != after.get(what):
            return "incomparable", f"{what} was {before.get(what)} and is {after.get(what)}"
    if before.get("problem") != after.get("problem"):
        return "incomparable", "the problem was another"
    assert noise is not None
    change = after["median_us"] / before["median_us"]
    return ("slower" if change > 1 + noise else "faster" if change < 1 / (1 + noise) else "same"), None


def _noise(before: Row, after: Row) -> float:
    """The fraction that the ratio of two medians may be off: both intervals, and what a repetition differs by."""
    repeat = max(RUN_TO_RUN, before.get("repeat") or 0.0, after.get("repeat") or 0.0)
    return math.hypot(_half_width(before), _half_width(after), repeat)


def _half_width(row: Row) -> float:
    """Half of the median's 95% interval, as a fraction; estimated from the spread where the recording has none."""
    if "low_us" in row:
        return max(row["high_us"] - row["median_us"], row["median_us"] - row["low_us"]) / row["median_us"]
    deviation = (row["p90_us"] - row["p10_us"]) / _P10_P90
    return _Z95 * _MEDIAN_ERROR * deviation / math.sqrt(max(row["samples"], 1)) / row["median_us"]


def _is_ours(row: Row) -> bool:
    """Whether its slowing down is a regression: a peer's is none. Where version 1 did not say, the registry does."""
    if "peer" in row:
        return not row["peer"]
    try:
        return registry.get(row["kernel"]).ours
    except InputError:
        return True


def require_no_regression(changes: list[Change]) -> None:
    """Raises `CheckFailedError` where one of ours became slower beyond the noise, or fails, or nothing was compared."""
    if bad := [c for c in changes if c.is_regression]:
        named = ", ".join(dict.fromkeys(f"{c.kernel} at {c.case} {c.gates}" for c in bad))
        raise CheckFailedError(f"{len(bad)} of {len(changes)} timings regressed: {named}")
    if not any(c.verdict in ("same", "faster", "slower") for c in changes):
        raise CheckFailedError("no timing of the baseline could be compared: it is of other cases or kernels")
