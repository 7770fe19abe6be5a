"""A capture of several calls, replayed by every kernel that can run it: call by call, and decode traces as a whole."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from kdacli.comparison import kernels as one_call
from kdacli.comparison import trace as traces
from kdacli.comparison.kernels import Comparison, NotRun
from kdacli.dumps import Dump


@dataclasses.dataclass
class Replay:
    """What came out.

    Attributes:
        calls: of each call, by each kernel, from the recorded states. drifts: (trace, steps, by itself).
        notes: of traces that end early.
    """

    calls: list[Comparison] = dataclasses.field(default_factory=list)
    drifts: list[tuple[str, int, traces.Drift]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def wrong(self) -> list[str]:
        """Each failure in words."""
        found = [
            f"{r.source}, call {r.call}, {r.verdict.tensor}: {r.verdict.note}" for c in self.calls for r in c.failed
        ]
        for name, _, drift in self.drifts:
            failed = (verdict for verdict in drift.verdicts if not verdict.passed)
            found += [f"{drift.kernel} by itself, {name}, {v.tensor}: {v.note}" for v in failed]
        return found

    @property
    def not_run(self) -> dict[tuple[str, str], int]:
        """Kernels and the reasons why they did not run, and of how many calls."""
        every = [(skipped.kernel, skipped.reason) for call in self.calls for skipped in call.not_run]
        every += [(drift.kernel, drift.refused) for _, _, drift in self.drifts if drift.refused and not drift.verdicts]
        return {key: every.count(key) for key in dict.fromkeys(every)}

    def summary(self) -> list[dict[str, Any]]:
        """A row for each op, kernel (None: what was recorded) and tensor: calls, failed; of the worst its error."""
        rows: dict[tuple[str, str, str], list[one_call.Row]] = {}
        for call in self.calls:
            for row in call.rows:
                rows.setdefault((call.problem.op, row.source, row.verdict.tensor), []).append(row)
        return [
            {
                "op": op,
                "kernel": None if source == one_call.DUMP else source,
                "tensor": tensor,
                "calls": len(found),
                "failed": sum(not row.verdict.passed for row in found),
                "error": (worst := max(found, key=_badness)).verdict.error,
                "bound": worst.verdict.bound,
                "call": worst.call,
            }
            for (op, source, tensor), found in rows.items()
        ]


def _badness(row: one_call.Row) -> tuple[bool, float]:
    v = row.verdict
    ratio = v.error / v.bound if v.bound else v.error
    return not v.passed, math.inf if math.isnan(ratio) else ratio


def replay(dumps: Sequence[Dump], names: Sequence[str], device: str, advance: Callable[[str], None]) -> Replay:
    """Runs the kernels named, or all that can run a call, peers too.

    Raises:
        InputError, UnavailableError: see `kernels.plan` and `kernels.compare`.
    """
    plans = one_call.plan(dumps, names, peers=True)
    found = Replay(calls=list(one_call.compare(plans, device, advance)))
    traced, found.notes = traces.find(dumps)
    chosen = {id(plan.dump): plan.kernels for plan in plans}
    for one in traced:
        for drift in traces.drift(one, chosen[id(one.dumps[0])], device):
            found.drifts.append((one.name, len(one.dumps), drift))
        advance(one.name)
    return found


__all__ = ["NotRun", "Replay", "replay"]
