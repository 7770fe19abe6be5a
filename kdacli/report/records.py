"""Records as they lie on a disk: read, told apart by their schema, and joined where they are shards of one run."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kda_kernels.errors import InputError
from kdacli.output import read_json
from kdacli.report import parts
from kdacli.report.parts import Part

Data = dict[str, Any]


class Source(NamedTuple):
    """A record: where it lies and what it holds."""

    path: str
    data: Data


# What each schema's records become. A newer version of one is refused: its fields may mean something else.
SCHEMAS: dict[str, Callable[[Data], list[Part]]] = {
    "kda.verify/1": parts.verify,
    "kda.verify-record/1": parts.verify_runs,
    "kda.verify-replay/1": parts.replay,
    "kda.verify-cp/1": parts.over_ranks,
    "kda.profile/2": parts.profile,
    "kda.profile/2 (rows cut to a few keys)": parts.cut_sweeps,
    "kda.profile-cp/1": parts.context_parallel,
    "kda.compile/1": parts.compiled,
    "kda.compare/1": parts.compare,
    "kda.compare-dumps/1": parts.compare_dumps,
    "kda.host-time/1": parts.host_time,
    "kda.prefill-grid/1": parts.prefill_grid,
    "kda.capture/1": functools.partial(parts.as_they_are, "A captured decode loop"),
    "kda.convolution/1": functools.partial(parts.as_they_are, "Convolutions of prompts"),
    "kda.ranks-apart/1": functools.partial(parts.as_they_are, "Ranks of a prefill, each by itself"),
    "kda.engine-layers/2": functools.partial(parts.as_they_are, "The KDA part of engines' layers"),
}


def read(path: str) -> Source:
    """A record. Raises `InputError` where the file holds none, or one of a kind that no page shows."""
    data = read_json(path, "record")
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema not in SCHEMAS:
        raise InputError(f"{path} is no record that a page shows: its schema is {schema}, not {', '.join(SCHEMAS)}")
    return Source(path, data)


def shown(source: Source) -> list[Part]:
    """What a page shows of a record. Raises `InputError` where its fields are not those of its schema."""
    try:
        return SCHEMAS[source.data["schema"]](source.data)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{source.path} is no whole record: {type(error).__name__}: {error}") from error


def joined(sources: Sequence[Source]) -> list[Source]:
    """The shards of one `kda verify --shard I/N` as one record, in the place of the first; others as they are.

    Shards belong together where all but their number is the same: kda, its commit, the seed, the device, and the
    command but for its files.

    Raises:
        InputError: a shard is missing, or given twice.
    """
    runs: dict[str, list[Source]] = {}
    for i, source in enumerate(sources):
        shard = source.data.get("shard") if source.data["schema"] == "kda.verify/1" else None
        runs.setdefault(str(i) if shard is None else _run_of(source.data), []).append(source)
    return [run[0] if run[0].data.get("shard") is None else _join(run) for run in runs.values()]


def _run_of(data: Data) -> str:
    made = data["provenance"]
    words = re.sub(r"--(shard|json|junit|save)[ =]\S+|--force\b", "", str(made.get("command"))).split()
    same = [made.get(key) for key in ("kda", "commit", "seed")]
    return repr([*same, data["shard"].split("/")[1], data["device"], words])


def _join(run: list[Source]) -> Source:
    parts_of = int(run[0].data["shard"].split("/")[1])
    found = sorted(int(source.data["shard"].split("/")[0]) for source in run)
    if missing := sorted(set(range(1, parts_of + 1)) - set(found)):
        raise InputError(f"shard {missing[0]}/{parts_of} is missing: give the records of all {parts_of} shards")
    if len(found) != len(set(found)):
        raise InputError(f"a shard of {parts_of} is given twice: give the record of each once")
    data = dict(run[0].data)
    data["shard"] = None
    for key in ("rows", "not_run", "searched"):
        data[key] = [one for source in run for one in source.data[key]]
    data["not_run"] = [one for i, one in enumerate(data["not_run"]) if one not in data["not_run"][:i]]
    data["complete"] = all(source.data["complete"] for source in run)
    data["seconds"] = {name: sum(s.data["seconds"].get(name, 0.0) for s in run) for name in data["seconds"]}
    data["summary"] = ", ".join(
        f"{sum(row['status'] == status for row in data['rows'])} {word}"
        for status, word in parts.STATUSES.items()
        if any(row["status"] == status for row in data["rows"])
    )
    return Source(f"{run[0].path} and {len(run) - 1} more shards", data)
