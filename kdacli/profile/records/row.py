"""The rows of a record: what was timed, and what came of it. Their fields make the tables of benchmarks/README.md."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, get_type_hints

from kda_kernels.problem import Problem


@dataclasses.dataclass(frozen=True)
class Versus:
    """How many times as fast as a reference a kernel is, with the ratio's 95% confidence interval."""

    kernel: str  # the reference
    best_peer: bool  # whether that is the fastest peer; else it is the first kernel
    speedup: float
    low: float
    high: float
    supported: bool | None  # whether the noise supports a difference; None for the reference itself


@dataclasses.dataclass(frozen=True)
class Clocks:
    """What NVML said while a case was timed."""

    sm_mhz: list[float]  # least, median, most
    memory_mhz: list[float]
    power_w: float  # the highest
    temperature_c: float
    throttle: list[str]  # what slowed the GPU down in any reading
    readings: int


@dataclasses.dataclass(frozen=True)
class Stage:
    """A CUDA kernel of one eager call."""

    stage: str | None
    kernel: str
    launches: float
    us: float


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A kernel that cannot run a case."""

    case: str
    gates: str
    kernel: str
    reason: str
    point: dict[str, int] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One kernel at one case: a `TimedRow` or a `FailedRow`."""

    op: Annotated[str, "`prefill`, `decode` or `gate`"]
    case: Annotated[str, "its name, the same from record to record"]
    gates: Annotated[str, "regime of the gates: `bench`, `init`, `weak`, or `dump`"]
    point: Annotated[dict[str, int] | None, "of a sweep: the value of each axis"] = None
    kernel: Annotated[str, "its name"]
    ours: Annotated[bool, "whether the kernel is one of kda's"]
    peer: Annotated[bool, "whether it is somebody else's; neither of the two: a user's own"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FailedRow(Row):
    """Of a kernel that raised an error, or whose outputs are wrong."""

    error: Annotated[str, "why there are no figures"]
    output_error: Annotated[float | None, "where the timed call's outputs are wrong: by how much"] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimedRow(Row):
    """Of a kernel that was timed."""

    problem: Annotated[Problem, "shapes, dtypes, layouts and options of the call"]
    median_us: Annotated[float, "GPU time of one call"]
    low_us: Annotated[float, "with `high_us` the 95% confidence interval of the median"]
    high_us: Annotated[float, "see `low_us`"]
    p10_us: Annotated[float, "10th percentile of the samples"]
    p90_us: Annotated[float, "90th percentile"]
    spread_us: Annotated[float, "`p90_us` - `p10_us`"]
    samples: Annotated[int, "how many"]
    cache: Annotated[str, "the L2 cache: `cold` or `warm`"]
    mode: Annotated[str, "`graph` (a CUDA graph's replay) or `eager`"]
    note: Annotated[str | None, "why a call is timed eagerly though a graph was wanted"]
    host_us: Annotated[
        float,
        "what an eager call costs the CPU where the one before had the same shape: its output allocated, median of 20; "
        "with other work on the machine, twice as much",
    ]
    host_new_us: Annotated[
        float | None,
        "the same where each call has a shape that was not seen before, as in serving: one token, or one sequence of "
        "one token, fewer than the last; median of up to 10. Null in a sweep, where there is no smaller shape, and in "
        "older records",
    ] = None
    call_bytes: Annotated[
        int | None,
        "what an eager call takes of torch's memory at its peak, workspaces and output; null in older records",
    ]
    output_error: Annotated[
        float | None,
        "by how much the timed call was off once its inputs had changed; null in older records",
    ]
    bytes: Annotated[int, "that each input and output must move once"]
    state_bytes: Annotated[int, "those of the state alone"]
    gbps: Annotated[float, "`bytes` over the time, 1e9 a second"]
    floor_us: Annotated[float, "`bytes` over the ceiling"]
    share: Annotated[float, "`floor_us` / `median_us`"]
    tflops: Annotated[
        float | None,
        "arithmetic of the recurrence (decode) or of the chunk form at chunk 64 (prefill), 1e12 a second; null for the "
        "gate",
    ]
    tensor_share: Annotated[float | None, "`tflops` over the matrix product's"]
    tokens_per_ms: Annotated[float, "throughput"]
    repeat: Annotated[float | None, "by how much the case's first kernel, timed twice, differs from itself"]
    vs: Annotated[
        Versus | None,
        "against the fastest peer, or the first kernel where no peer ran: `kernel`, `best_peer`, `speedup` (its time "
        "over this one's), `low`, `high`, `supported`",
    ]
    clocks: Annotated[Clocks | None, "what NVML said meanwhile: `sm_mhz` and `memory_mhz` (least, median, most), "
                                     "`power_w`, `temperature_c`, `throttle`, `readings`"]  # fmt: skip
    stages: Annotated[list[Stage] | None, "with `--stages`: the CUDA kernels of one eager call"] = None
    rechecked: Annotated[bool, "whether a point that stuck out was timed again"] = False

    def __post_init__(self) -> None:
        if not 0 < self.median_us < math.inf:
            raise ValueError(f"the median of {self.kernel} at {self.case} is {self.median_us}: it should be a time")


def timed(rows: Sequence[Row]) -> list[TimedRow]:
    return [row for row in rows if isinstance(row, TimedRow)]


def failed(rows: Sequence[Row]) -> list[FailedRow]:
    return [row for row in rows if isinstance(row, FailedRow)]


def to_json(value: Any) -> Any:
    """Plain types; of a dataclass the fields that differ from their defaults."""
    if isinstance(value, Problem):
        return value.to_dict()
    if dataclasses.is_dataclass(value):
        kept = ((f.name, getattr(value, f.name), f.default) for f in dataclasses.fields(value))
        return {name: to_json(one) for name, one, default in kept if one is not default}
    if isinstance(value, dict):
        return {name: to_json(one) for name, one in value.items()}
    return [to_json(one) for one in value] if isinstance(value, list | tuple) else value


def documented(*classes: type) -> Iterator[str]:
    """The lines of a Markdown table of the classes' fields."""
    yield "| key | meaning |"
    yield "| --- | --- |"
    meanings = {
        name: hint.__metadata__[0] for cls in classes for name, hint in get_type_hints(cls, include_extras=True).items()
    }
    yield from (f"| `{name}` | {meaning} |" for name, meaning in meanings.items())
