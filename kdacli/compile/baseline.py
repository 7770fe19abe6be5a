"""What a change did to each kernel: the rows of now beside those of an earlier report."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from kda_kernels.errors import InputError
from kdacli.output import read_json

SCHEMA = "kda.compile/1"
COMPILERS = ("triton", "nvidia-cutlass-dsl")
_WIDE = ("LDG", "STG", "LDGSTS", "LDS", "STS")
Row = Mapping[str, Any]
Report = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Change:
    """One number of one variant that is not what it was.

    Attributes:
        what: registers, spill_bytes, sass.LDG.128, ..., or "compiles" and "there" for a row that came or went.
        before, now: None where a report does not say it.
        fatal: why --strict fails, or None.
    """

    kernel: str
    variant: str
    arch: str
    what: str
    before: int | str | None
    now: int | str | None
    fatal: str | None = None


def load(path: str) -> Report:
    """A report that `kda compile --json` wrote.

    Raises:
        InputError: it cannot be read, or is none.
    """
    report = read_json(path, "report of kda compile")
    if not isinstance(report, dict) or report.get("schema") != SCHEMA or not isinstance(report.get("rows"), list):
        raise InputError(
            f"{path} is no report of kda compile: it should have been written by kda compile --json {path}"
        )
    for i, row in enumerate(report["rows"]):
        if not isinstance(row, dict) or not all(isinstance(row.get(k), str) for k in ("kernel", "variant", "arch")):
            raise InputError(f"{path} is no report of kda compile: row {i} has no kernel, variant and arch")
    return report


def compilers(report: Report) -> dict[str, str]:
    """Versions of the compilers a report was made with."""
    packages = (report.get("provenance") or {}).get("packages") or {}
    return {name: packages[name] for name in COMPILERS if name in packages}


def other_compilers(before: Report, now: Report) -> list[str]:
    """One line for each compiler whose version is another one; its changes are in the numbers too."""
    mine, theirs = compilers(now), compilers(before)
    return [
        f"the baseline was made with {name} {theirs.get(name, '(not recorded)')}, this with {mine[name]}: differences "
        "may be the compiler's"
        for name in mine
        if mine[name] != theirs.get(name)
    ]


def compare(before: Report, rows: Sequence[Row], patterns: Sequence[str] = ()) -> list[Change]:
    """All changes from the rows of `before` to `rows`.

    Rows meet by kernel, variant, architecture and problem. Of the rows of `before`, those count whose kernel,
    architecture and problem are among `rows`, and whose variant matches one of `patterns` (empty: any): the others were
    not asked for.

    Raises:
        InputError: the reports have no row in common.
    """
    old = {_key(row): row for row in before["rows"]}
    new = {_key(row): row for row in rows}
    if not old.keys() & new.keys():
        raise InputError("the baseline has no row in common with this: same --kernel, --arch and shape flags?")
    asked = {(kernel, arch, problem) for kernel, _, arch, problem in new}
    changes = [c for key, row in new.items() for c in _changes(old.get(key), row)]
    for key, row in old.items():
        wanted = not patterns or any(fnmatchcase(row["variant"], pattern) for pattern in patterns)
        if key not in new and wanted and (key[0], key[2], key[3]) in asked:
            changes.append(Change(*_name(row), "there", "yes", "no", "it is not compiled any more"))
    return changes


def _key(row: Row) -> tuple[str, str, str, str]:
    return row["kernel"], row["variant"], row["arch"], json.dumps(row.get("problem"), sort_keys=True)


def _name(row: Row) -> tuple[str, str, str]:
    return row["kernel"], row["variant"], row["arch"]


def _changes(old: Row | None, new: Row) -> Iterator[Change]:
    name = _name(new)
    if old is None:
        yield Change(*name, "there", "no", "yes")
        return
    was, compiles = ("registers" in row for row in (old, new))
    if was and not compiles:
        yield Change(*name, "compiles", "yes", "no", new.get("error") or new.get("unsupported"))
    elif compiles and not was:
        yield Change(*name, "compiles", "no", "yes")
    if not (was and compiles):
        return
    before, now = _numbers(old), _numbers(new)
    fatal = _fatal(before, now)
    for what in dict.fromkeys([*now, *before]):
        if before.get(what) != now.get(what):
            yield Change(*name, what, before.get(what), now.get(what), fatal.get(what))


def _numbers(row: Row) -> dict[str, Any]:
    """What is compared of a row, flat."""
    plain = ("registers", "spill_bytes", "stack_bytes", "shared_bytes", "num_warps", "resident_blocks", "limited_by")
    out = {name: row[name] for name in (*plain, "binary_bytes") if name in row}
    for family in ("sass", "isa"):
        out |= {f"{family}.{name}": n for name, n in (row.get(family) or {}).items()}
    return out


def _fatal(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """By number, what is worse in a way that no change should be by accident."""
    found = {}
    for what, why in {
        "spill_bytes": "it spills more",
        "sass.local": "more traffic of local memory",
        "isa.scratch": "more traffic of scratch memory",
    }.items():
        if (now.get(what) or 0) > (before.get(what) or 0):
            found[what] = why
    for name in _WIDE:
        all_of, wide = f"sass.{name}", f"sass.{name}.128"
        if wide in before and wide in now:
            lost = before[wide] - now[wide]
            narrower = (now[all_of] - now[wide]) - (before[all_of] - before[wide])
            if lost > 0 and narrower > 0:  # else they are gone, not narrower
                found[wide] = f"{lost} 16-byte accesses less, {narrower} narrower ones more"
    if now.get("spill_bytes") is None and before.get("spill_bytes") is not None:
        found["spill_bytes"] = "it is not known whether it spills"
    return found
