"""What the replay of a capture came to: tables for people, JSON for machines, and the curves of decode traces."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from kda_kernels.errors import CheckFailedError, InputError
from kdacli.comparison import trace
from kdacli.comparison.replay import Replay, replay
from kdacli.device import describe
from kdacli.dumps import Dump
from kdacli.output import bad, console, dim, fmt_sci, good, progress, say, table, write_json
from kdacli.provenance import collect

RECORDED = "as recorded"
SHOWN = 5  # failures in words


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A replay and where its report goes: `json_dest`, `plot`: files, or None; `force`: over what is there."""

    dump: str
    kernels: tuple[str, ...]
    device: str
    json_dest: str | None
    plot: str | None
    force: bool


def run(wanted: Wanted, dumps: Sequence[Dump], broken: Sequence[str]) -> None:
    """Replays and reports.

    Args:
        broken: what is wrong with calls that could not be read.

    Raises:
        CheckFailedError: something is wrong. InputError: there is no decode trace to draw.
    """
    traces, gaps = trace.find(dumps)
    if wanted.plot and not traces:
        why = gaps[0] if gaps else "of no layer are there two calls with one token of each sequence over a pool"
        raise InputError(f"--plot has nothing to draw, no decode call carries on where another ended: {why}")
    with progress("replaying", len(dumps) + len(traces)) as advance:
        found = replay(dumps, wanted.kernels, wanted.device, advance)
    if wanted.plot:
        trace.draw([(name, drift) for name, _, drift in found.drifts if drift.o], wanted.plot)
    if wanted.json_dest:
        write_json(_json(wanted, found, broken), wanted.json_dest, wanted.force)
    if wanted.json_dest != "-":
        _print(wanted, found, broken)
    wrong = [*found.wrong, *broken]
    if wrong:
        raise CheckFailedError(wrong[0] + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""))


def _json(wanted: Wanted, found: Replay, broken: Sequence[str]) -> dict[str, Any]:
    return {
        "schema": "kda.verify-replay/1",
        "provenance": collect(),
        "dump": wanted.dump,
        "device": describe(wanted.device),
        "rows": found.summary(),
        "traces": [
            {
                "trace": name,
                "steps": steps,
                "kernel": drift.kernel,
                "refused": drift.refused or None,
                "passed": drift.passed,
                "verdicts": [dataclasses.asdict(verdict) for verdict in drift.verdicts],
                "o": drift.o,
                "states": drift.states,
            }
            for name, steps, drift in found.drifts
        ],
        "not_run": [{"kernel": k, "reason": why, "calls": n} for (k, why), n in found.not_run.items()],
        "wrong": found.wrong,
        "broken": list(broken),
        "notes": found.notes,
    }


def _print(wanted: Wanted, found: Replay, broken: Sequence[str]) -> None:
    title = f"{wanted.dump}: {len(found.calls)} calls, each from its recorded states, on {describe(wanted.device)}"
    cells = [
        (
            row["kernel"] or RECORDED,
            row["tensor"],
            str(row["calls"]),
            fmt_sci(row["error"]),
            fmt_sci(row["bound"]),
            row["call"],
            good("ok") if not row["failed"] else bad(f"{row['failed']} FAIL"),
        )
        for row in found.summary()
    ]
    say(f"{title}:")
    console().print(table(None, ("result of", "tensor", "calls", "worst", "bound", "in", ""), cells))
    for name, steps in dict.fromkeys((name, steps) for name, steps, drift in found.drifts if drift.verdicts):
        say(f"{name}: {steps} steps, each kernel by itself; errors after the first, the middle and the last step:")
        drifts = [drift for trace_name, _, drift in found.drifts if trace_name == name]
        rows = [
            (drift.kernel, v.tensor, *_curve(drift, v.tensor), fmt_sci(v.bound), _word(v.passed))
            for drift in drifts
            for v in drift.verdicts
        ]
        console().print(table(None, ("by itself", "tensor", "first", "middle", "last", "bound", ""), rows))
    for (kernel, reason), calls in found.not_run.items():
        console().print(dim(f"not run: {kernel}: {reason} ({calls} of the calls)"), soft_wrap=True)
    for note in found.notes:
        console().print(dim(f"note: {note}"), soft_wrap=True)
    for line in [*found.wrong[:SHOWN], *broken]:
        console().print(bad(f"FAIL {line}"), soft_wrap=True)
    if not found.wrong and not broken:
        say("everything within its bounds")


def _word(passed: bool) -> Any:
    return good("ok") if passed else bad("FAIL")


def _curve(drift: trace.Drift, tensor: str) -> list[str]:
    errors = drift.curve(tensor)
    return [fmt_sci(errors[i]) for i in (0, len(errors) // 2, -1)] if errors else ["-"] * 3
