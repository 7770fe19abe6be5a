"""The record of a run, which `kda profile --json` writes: made as cases are timed, or read from a file."""

import dataclasses
import math
import time
import types
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from kda_kernels.errors import CheckFailedError, InputError, UnavailableError
from kda_kernels.problem import Problem
from kdacli.output import read_json
from kdacli.profile.measuring.ceilings import Ceilings
from kdacli.profile.records.halflife import HalfLives
from kdacli.profile.records.layer import LayerCosts
from kdacli.profile.records.row import FailedRow, Refusal, Row, TimedRow, failed, to_json
from kdacli.profile.records.sweep import SeriesSummary

SCHEMA = "kda.profile/2"


@dataclasses.dataclass(kw_only=True)
class Record:
    """Everything that a run found; its fields make the table in benchmarks/README.md."""

    schema: Annotated[str, f"`{SCHEMA}`"] = dataclasses.field(default_factory=lambda: SCHEMA)
    provenance: Annotated[dict[str, Any], "GPU, driver, clocks, package versions, commit, command, seed"]
    ceilings: Annotated[
        Ceilings,
        "measured in the same run: `copy_gbps` (a 1 GiB copy, bytes read plus bytes written), `inplace_gbps` (adding a "
        "number to 1 GiB), `least_us` (the smallest kernel timed as the others are: no time is under it), "
        "`tensor_tflops` (a bf16 product of 8192 x 8192 random matrices)",
    ]
    seconds: Annotated[float | None, "sampling time of a kernel"]
    complete: Annotated[bool, "whether all cases were timed"]
    rows: Annotated[list[Row], "one for each case, gate regime and kernel, below"]
    refused: Annotated[list[Refusal], "`case`, `gates`, `kernel` and the `reason` why it cannot run"]
    sweep: Annotated[
        list[SeriesSummary] | None,
        "for each kernel along a sweep's first axis: the fitted `line` (us and us per token, sequence or head, "
        "standard errors, the point furthest off) and its `bumps`",
    ] = None
    layer: Annotated[
        LayerCosts | None,
        "with `--layer`: what the KDA operation costs in all KDA layers of the model, without projections; `saved_ms` "
        "of a step: what it saves against the chain of three kernels that `sglang-chain` is",
    ] = None
    half_lives: Annotated[
        HalfLives | None, "of a dump's gates: how many channels have a half-life between the `edges`, in tokens"
    ] = None
    not_watched: Annotated[str | None, "why the clocks could not be read, or not always"] = None

    @property
    def gpu(self) -> dict[str, Any]:
        """Of the provenance; empty where there was none."""
        return self.provenance.get("gpu") or {}

    @property
    def commit(self) -> str:
        return str((self.provenance.get("commit") or {}).get("id") or "unknown")[:12]


class Saver:
    """Writes a record as it grows: every five seconds, and less often where writing itself takes long."""

    EVERY_S, SHARE = 5.0, 0.05  # of the time

    def __init__(
        self, write: Callable[[Any, bool], None], force: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Takes what writes a record (and may overwrite a file), and whether the first write may overwrite one."""
        self.write, self.force, self.clock, self.due = write, force, clock, 0.0

    def __call__(self, record: Record) -> None:
        """Writes a record that is complete, or where enough time has gone by."""
        start = self.clock()
        if record.complete or start >= self.due:
            self.write(to_json(record), self.force)
            self.force = True  # the file is ours now
            end = self.clock()
            self.due = end + max(self.EVERY_S, (end - start) / self.SHARE)


def require_complete(record: Record, named: Sequence[str]) -> None:
    """The verdict on a whole run.

    Raises:
        CheckFailedError: a kernel raised an error, or its outputs are wrong.
        UnavailableError: a kernel asked for by name could run nowhere.
    """
    if bad := failed(record.rows):
        wrong = sum(row.output_error is not None for row in bad)
        outputs = f", {wrong} of them since the outputs are wrong" if wrong else ""
        raise CheckFailedError(f"{len(bad)} of {len(record.rows)} timings failed{outputs}")
    reasons = {refusal.kernel: refusal.reason for refusal in record.refused}
    if missing := [name for name in named if name not in {row.kernel for row in record.rows}]:
        raise UnavailableError("; ".join(f"{name} cannot run: {reasons[name]}" for name in missing))


def read(path: str) -> Record:
    """A recording. Raises `InputError` where the file holds none, or is none that this kda can read."""
    return parse(read_json(path, "recording of kda profile"), path)


def parse(data: Any, path: str) -> Record:
    """A recording from its JSON. Raises `InputError`, which names `path`, where it is none that can be read."""
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise InputError(f"{path} is no recording that can be read: its schema is {schema}, not {SCHEMA}")
    if not data.get("rows"):
        raise InputError(f"{path} is no recording of times: it has no rows")
    try:
        return _typed(Record, data, "the recording")
    except (InputError, ValueError) as error:
        raise InputError(f"{path} is no recording that can be read: {error}") from error


def _typed(hint: Any, value: Any, where: str) -> Any:
    """JSON's `value` as what an annotation says; `where` names it. Raises `ValueError` where it is something else."""
    if hint is Any:
        return value
    if hint is Row and isinstance(value, dict):
        return _typed(FailedRow if "error" in value else TimedRow, value, where)
    if hint is Problem and isinstance(value, dict):
        return Problem.from_dict(value)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _object(typing.cast(type, hint), value, where)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if value is None else _typed(inner[0], value, where)
    if origin is list and isinstance(value, list):
        return [_typed(inner[0], one, f"{where}[{i}]") for i, one in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {str(name): _typed(inner[1], one, f"{where}.{name}") for name, one in value.items()}
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if hint is float and value == "Infinity":
        return math.inf
    if isinstance(hint, type) and origin is None and type(value) is hint:
        return value
    shown = str(value)
    raise ValueError(f"{where} is {shown if len(shown) < 40 else shown[:37] + '...'}: it should be {_named(hint)}")


def _object(cls: type, data: dict[str, Any], where: str) -> Any:
    """Fields that older records lack are None where that is one of their values."""
    hints, given = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        if field.name in data:
            given[field.name] = _typed(hints[field.name], data[field.name], f"{where}.{field.name}")
        elif type(None) in typing.get_args(hints[field.name]):
            given[field.name] = None
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where} lacks {field.name}")
    return cls(**given)


def _named(hint: Any) -> str:
    names = {float: "a finite number", int: "a whole number", str: "a text", bool: "true or false"}
    return names.get(hint, "an array" if typing.get_origin(hint) is list else "an object")
