"""What Nsight Compute saw, as tables: what limits each launch, and what is inside it."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kdacli import output
from kdacli.profile.reporting.columns import fitting
from kdacli.profile.reporting.tables import short

if TYPE_CHECKING:
    from rich.table import Table

NOTE = (
    "Eager calls, one launch each, clocks left alone; ncu empties the caches and replays each launch to read all "
    "counters, so its us are not those of kda profile. Warps: resident ones, of the most an SM holds. Limited by: "
    "the unit over 60% of its peak, else latency with the reason that warps wait for most. Local: bytes to and from "
    "local memory, which are spills or arrays that found no register."
)


def tables(rows: Sequence[dict[str, Any]]) -> "Iterator[tuple[Table, list[str]]]":
    """Two for each kernel at each case."""
    for case, kernel in dict.fromkeys((row["case"], row["kernel"]) for row in rows):
        mine = [row for row in rows if (row["case"], row["kernel"]) == (case, kernel)]
        title = f"{kernel} at {case}" if kernel else "all launches"
        yield fitting(
            f"{title}: percent of peak",
            ("CUDA kernel", "us", "DRAM", "L2", "SM", "tensor", "warps", "limited by"),
            [
                [_name(r), output.fmt_us(r["us"]), *(_percent(r[k]) for k in ("dram", "l2", "sm", "tensor")),
                 _percent(r["occupancy"]), r["limit"]]
                for r in mine
            ],
            ("warps", "SM"),
        )  # fmt: skip
        yield fitting(
            f"{title}: inside",
            ("CUDA kernel", "regs", "shared", "local", "conflicts", "read", "written", "stalls"),
            [
                [_name(r), _count(r["registers"]), output.fmt_bytes(r["shared_bytes"]),
                 output.fmt_bytes(r["local_bytes"]), _count(r["bank_conflicts"]), output.fmt_bytes(r["read_bytes"]),
                 output.fmt_bytes(r["written_bytes"]),
                 ", ".join(f"{name} {share:.0%}" for name, share in list(r["stalls"].items())[:2]) or None]
                for r in mine
            ],
            ("written", "read"),
        )  # fmt: skip


def _name(row: dict[str, Any]) -> str:
    return short(f"{row['stage']}: {row['cuda_kernel']}" if row["stage"] else row["cuda_kernel"])


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.0f}%"


def _count(value: float | None) -> str | None:
    return None if value is None else f"{value:.0f}" if value < 1e6 else f"{value / 1e6:.3g}M"
