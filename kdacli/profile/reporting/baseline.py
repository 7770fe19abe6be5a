"""The comparison with a baseline as a table."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kdacli import output
from kdacli.profile.records.baseline import RUN_TO_RUN, TimeChange
from kdacli.profile.records.record import Record
from kdacli.profile.reporting.tables import gates_named

if TYPE_CHECKING:
    from rich.table import Table

MOST_ROWS = 40  # beyond it, timings that did not change are only counted


def table(changes: Sequence[TimeChange]) -> "Table":
    shown = [c for c in changes if c.verdict != "same"] if len(changes) > MOST_ROWS else changes
    regimes = {c.gates for c in changes}
    lines = [
        [
            f"{c.case} {c.gates}", c.kernel, output.fmt_us(c.before_us), output.fmt_us(c.after_us),
            f"{c.ratio - 1:+.1%}" if c.ratio else None, f"{c.noise:.1%}" if c.noise else None, _verdict(c),
        ]
        for c in shown
    ]  # fmt: skip
    title = f"against the baseline, {gates_named(*regimes)}" if len(regimes) == 1 else "against the baseline"
    return output.table(title, ("case", "kernel", "before", "now", "change", "noise", "verdict"), lines)


def _verdict(change: TimeChange) -> object:
    if change.is_regression:
        return output.bad(change.verdict)
    return output.good(change.verdict) if change.verdict == "faster" else change.verdict


def notes(changes: Sequence[TimeChange], before: Record, after: Record) -> list[str]:
    """How many changed, why some could not be compared, and what the machine itself did."""
    counts = {v: sum(c.verdict == v for c in changes) for v in dict.fromkeys(c.verdict for c in changes)}
    named = ", ".join(f"{n} {v}" for v, n in counts.items())
    old, new = before.ceilings, after.ceilings
    return [
        *(f"{c.kernel} at {c.case} {c.gates}: {c.why}" for c in changes if c.why),
        f"{len(changes)} timings: {named}. Same: within both confidence intervals, and what the same thing timed twice "
        f"differs by, at least {RUN_TO_RUN:.0%} from run to run. A peer that changes is no regression.",
        f"The baseline is of {before.provenance.get('date')}, commit {before.commit}; its ceilings: copy "
        f"{old.copy_gbps:.0f} GB/s (now {new.copy_gbps / old.copy_gbps - 1:+.1%}), in place "
        f"{old.inplace_gbps:.0f} GB/s ({new.inplace_gbps / old.inplace_gbps - 1:+.1%}).",
    ]
