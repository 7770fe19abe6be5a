"""What a page shows of each kind of record: tables, charts and maps, without any HTML."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from kdacli.output import fmt_bytes, fmt_sci, fmt_us
from kdacli.profile.records import baseline, record
from kdacli.profile.records.record import Record
from kdacli.profile.records.row import TimedRow, failed, timed
from kdacli.report import charts

Data = dict[str, Any]
STATUSES = {"pass": "passed", "fail": "failed", "error": "crashed", "refused": "refused"}
GOOD, BAD, FAINT = "good", "bad", "faint"


@dataclasses.dataclass(frozen=True)
class Cell:
    """Text, with a style of `GOOD`, `BAD` or `FAINT`, or none."""

    text: str
    style: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns and rows; `folded` tables are closed until somebody opens them."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    folded: bool = False


@dataclasses.dataclass(frozen=True)
class Failure:
    """A check that failed: what is wrong, and maps of where."""

    title: str
    lines: Sequence[str]
    maps: Sequence[str]


@dataclasses.dataclass
class Part:
    """A section of the page: one run, or one comparison of runs."""

    title: str
    made: Data  # the record's provenance
    verdict: Cell | None = None
    lines: list[str] = dataclasses.field(default_factory=list)
    charts: list[str] = dataclasses.field(default_factory=list)  # SVG
    tables: list[Table] = dataclasses.field(default_factory=list)
    failures: "list[Failure]" = dataclasses.field(default_factory=list)


def _row(*cells: "str | float | None | Cell") -> list[Cell]:
    return [cell if isinstance(cell, Cell) else Cell("-" if cell is None else str(cell)) for cell in cells]


def _judged(bad: int, failed: str, passed: str) -> Cell:
    return Cell(failed, BAD) if bad else Cell(passed, GOOD)


def _number(value: "float | str | None") -> str:
    return value if isinstance(value, str) else fmt_sci(value)  # JSON has NaN and Inf as texts


def verify(data: Data) -> list[Part]:
    """Counts per kernel, every failure with its maps, and every check."""
    rows, said = data["rows"], data["summary"]
    bad = [row for row in rows if row["status"] in ("fail", "error")]
    part = Part("kda verify", data["provenance"], _judged(len(bad) or not data["complete"], said, said))
    part.lines = [] if data["complete"] else ["The run was cut short: not every check ran."]
    part.tables.append(_counts({k: Counter(r["status"] for r in rows if r["kernel"] == k) for k in _kernels(rows)}))
    part.failures = [_failure(row) for row in bad]
    checks = [_row(r["kernel"], r["case"], *_errors(r["tensors"]), _status(r["status"])) for r in rows]
    columns = ("kernel", "case", "o", "tolerance", "state", "tolerance", "")
    part.tables.append(Table(columns, checks, "Every check", folded=True))
    if data["not_run"]:
        left = [_row(one["kernel"], one["reason"]) for one in data["not_run"]]
        part.tables.append(Table(("kernel", "why it did not run"), left, "Not run", folded=True))
    return [part]


def _failure(row: Data) -> Failure:
    looks = [f"looks like: {line}" for line in row["looks_like"]]
    again = [f"again: {row['reproduce']}"] if row["reproduce"] else []
    lines = [*row["notes"], *_notes(row["tensors"]), *_notes(row["properties"]), *looks, *again]
    return Failure(f"{row['kernel']}: {row['case']}", lines, row.get("maps", []))


def verify_runs(data: Data) -> list[Part]:
    """Several runs in one record, as benchmarks/verify-h100.json: counts per kernel, and failures."""
    found = []
    for run in data["runs"]:
        bad = [row for row in run["rows"] if row["status"] in ("fail", "error")]
        part = Part("kda verify", run["provenance"], _judged(len(bad), run["summary"], run["summary"]))
        part.tables.append(_counts({kernel: Counter(count) for kernel, count in run["counts"].items()}))
        if bad:
            wrong = [_row(row["kernel"], row["case"], _status(row["status"])) for row in bad]
            part.tables.append(Table(("kernel", "case", ""), wrong, "Failures"))
        found.append(part)
    return found


def replay(data: Data) -> list[Part]:
    """A capture replayed: call by call, and decode traces by themselves, with their drift."""
    wrong = [*data["wrong"], *data["broken"]]
    verdict = _judged(len(wrong), f"{len(wrong)} results are wrong", "everything within tolerance")
    part = Part(f"kda verify --dump {data['dump']}", data["provenance"], verdict, [*wrong, *data["notes"]])
    rows = [
        _row(r["kernel"] or "as recorded", r["op"], r["tensor"], r["calls"], _number(r["error"]), _number(r["bound"]),
             r["call"], Cell(f"{r['failed']} failed", BAD) if r["failed"] else Cell("passed", GOOD))
        for r in data["rows"]
    ]  # fmt: skip
    columns = ("result of", "op", "tensor", "calls", "worst error", "tolerance", "in", "")
    part.tables.append(Table(columns, rows, "From the recorded states"))
    for tensor in ("o", "states"):
        for name in dict.fromkeys(one["trace"] for one in data["traces"] if one[tensor]):
            mine = [one for one in data["traces"] if one["trace"] == name and one[tensor]]
            curves = {one["kernel"]: list(enumerate(map(float, one[tensor]), 1)) for one in mine}
            part.charts.append(charts.lines(f"{tensor}, step of {name}", curves, "relative error"))
    return [part]


def over_ranks(data: Data) -> list[Part]:
    """`kda verify --cp`."""
    bad = sum(not row["passed"] for row in data["rows"])
    verdict = _judged(bad, f"{bad} of {len(data['rows'])} tensors are wrong", f"{len(data['rows'])} tensors passed")
    rows = [
        _row(r["case"], r["tensor"], _number(r["error"]), _number(r.get("one_rank")), _number(r["bound"]),
             _status("pass" if r["passed"] else "fail"), r["note"])
        for r in data["rows"]
    ]  # fmt: skip
    table = Table(("case", "tensor", "error", "on one rank", "tolerance", "", "note"), rows)
    return [Part(f"kda verify --cp, {data['ranks']} ranks", data["provenance"], verdict, tables=[table])]


def _kernels(rows: Iterable[Data]) -> list[str]:
    return list(dict.fromkeys(row["kernel"] for row in rows))


def _counts(counts: dict[str, Counter[str]]) -> Table:
    rows = []
    for kernel, count in counts.items():
        cells = [Cell(str(count[s]), BAD if count[s] and s in ("fail", "error") else "") for s in STATUSES]
        rows.append(_row(kernel, *cells))
    return Table(("kernel", *STATUSES.values()), rows)


def _notes(said: Iterable[Data]) -> list[str]:
    """Of verdicts and properties: what is wrong."""
    lines = []
    for one in said:
        wrong = not one["passed"] if "passed" in one else one["status"] in ("fail", "error")
        notes = [one["note"]] if "note" in one else one["notes"]
        lines += [f"{one.get('tensor') or one['name']}: {note}" for note in notes] if wrong else []
    return lines


def _errors(tensors: Sequence[Data]) -> list[str]:
    by_name = {"o" if t["tensor"] == "g_cumsum" else t["tensor"]: t for t in tensors}
    cells: list[str] = []
    for name in ("o", "final_state"):
        found = by_name.get(name)
        cells += ["-", "-"] if found is None else [_number(found["error"]), _number(found["bound"])]
    return cells


def _status(status: str) -> Cell:
    return Cell(STATUSES[status], {"pass": GOOD, "refused": FAINT}.get(status, BAD))


TIME_COLUMNS = ("kernel", "case", "gates", "us", "95% interval", "GB/s", "of ceiling", "fastest peer / this", "host us")


def profile(data: Data) -> list[Part]:
    """Times beside each other by gate regime, sweeps, the roofline, and the figures."""
    found = record.parse(data, "the record")
    rows = timed(found.rows)
    part = Part("kda profile", found.provenance, _complete(found), [_ceilings(found)], charts.of_record(found))
    part.tables.append(Table(TIME_COLUMNS, [_time(row) for row in rows], "Times", folded=len(rows) > 24))
    if wrong := [_row(r.kernel, r.case, r.gates, Cell(r.error, BAD)) for r in failed(found.rows)]:
        part.tables.append(Table(("kernel", "case", "gates", "error"), wrong, "Failures"))
    if found.refused:
        left = [_row(r.kernel, r.case, r.gates, r.reason) for r in found.refused]
        part.tables.append(Table(("kernel", "case", "gates", "why it cannot run"), left, "Refused", folded=True))
    return [part]


def _ceilings(found: Record) -> str:
    c = found.ceilings
    tensor = f", a matrix product {c.tensor_tflops:.0f} TFLOP/s" if c.tensor_tflops else ""
    return (
        f"Measured in the same run: in place {c.inplace_gbps:.0f} GB/s, copy {c.copy_gbps:.0f} GB/s{tensor}; "
        f"the smallest kernel takes {fmt_us(c.least_us)} us."
    )


def _complete(found: Record) -> Cell:
    if bad := failed(found.rows):
        return Cell(f"{len(bad)} of {len(found.rows)} timings failed", BAD)
    return _judged(not found.complete, "cut short: not every case was timed", f"{len(found.rows)} timings")


def _time(row: TimedRow) -> list[Cell]:
    versus = f"{row.vs.speedup:.2f}" if row.vs and row.vs.best_peer else None
    interval = f"{fmt_us(row.low_us)} to {fmt_us(row.high_us)}"
    times = (fmt_us(row.median_us), interval, f"{row.gbps:.0f}", f"{row.share:.0%}", versus, fmt_us(row.host_us))
    return _row(row.kernel, row.case, row.gates, *times)


def changes(before: Data, after: Data) -> Part:
    """Two records of `kda profile` of one GPU: which times changed beyond the noise."""
    old, new = record.parse(before, "the baseline"), record.parse(after, "the record")
    baseline.require_same_gpu(old.provenance, new.provenance)
    found = baseline.compare(old, new)
    slower = sum(change.is_regression for change in found)
    verdict = _judged(slower, f"{slower} of ours slower or failed", "nothing of ours is slower")
    styles = {"slower": BAD, "failed": BAD, "faster": GOOD}
    rows = [
        _row(c.kernel, c.case, c.gates, fmt_us(c.before_us), fmt_us(c.after_us), c.ratio and f"{c.ratio:.3f}",
             c.noise and f"{c.noise:.1%}", Cell(c.verdict, styles.get(c.verdict, FAINT)))
        for c in found
    ]  # fmt: skip
    columns = ("kernel", "case", "gates", "us before", "us now", "now / before", "noise", "")
    return Part("Against the baseline", old.provenance, verdict, tables=[Table(columns, rows)])


def compiled(data: Data) -> list[Part]:
    """Registers, spills, shared memory and occupancy."""
    rows = [
        _row(r["kernel"], r["variant"], r["arch"], r["registers"],
             Cell(fmt_bytes(r["spill_bytes"]), BAD if r["spill_bytes"] else ""), fmt_bytes(r["shared_bytes"]),
             r["num_warps"], r["resident_blocks"], r["limited_by"], (r.get("sass") or {}).get("instructions"))
        for r in data["rows"]
    ]  # fmt: skip
    names = "kernel, variant, architecture, registers, spilled, shared, warps, blocks per SM, limited by, instructions"
    spilled = sum(bool(row["spill_bytes"]) for row in data["rows"])
    verdict = _judged(spilled, f"{spilled} of {len(rows)} spill registers", f"{len(rows)} compiled, none spills")
    part = Part("kda compile", data["provenance"], verdict, tables=[Table(names.split(", "), rows)])
    part.lines = [f"Not compiled: {name}: {reason}" for name, reason in data["not_compiled"].items()]
    return [part]


def compare(data: Data) -> list[Part]:
    """Kernels on a dump's inputs."""
    wrong, count = sum(not row["passed"] for row in data["rows"]), len(data["rows"])
    verdict = _judged(wrong, f"{wrong} of {count} tensors are wrong", f"{count} tensors within tolerance")
    rows = [
        _row(r["call"] or None, r["kernel"] or "the dump", r["tensor"], _number(r["error"]), _number(r["bound"]),
             " ".join(f"{k} {v}" for k, v in (r["where"] or {}).items()), _status("pass" if r["passed"] else "fail"))
        for r in data["rows"]
    ]  # fmt: skip
    table = Table(("call", "result of", "tensor", "error", "tolerance", "worst at", ""), rows)
    lines = [f"Broken: {name}" for name in data["broken"]]
    return [Part(f"kda compare {data['dump']}", data["provenance"], verdict, lines, tables=[table])]


def compare_dumps(data: Data) -> list[Part]:
    """Two dumps, tensor by tensor."""
    wrong, count = sum(bool(row["wrong"]) for row in data["rows"]), len(data["rows"])
    verdict = _judged(wrong, f"{wrong} of {count} tensors are wrong", f"{count} tensors compared, none is wrong")
    rows = [
        _row(r["call"] or None, r["tensor"], _number(r["relative"]), _number(r["a"]["error"]), _number(r["b"]["error"]),
             _number(r["a"]["bound"]), Cell(r["words"], BAD if r["wrong"] else GOOD))
        for r in data["rows"]
    ]  # fmt: skip
    table = Table(("call", "tensor", "difference", "error of A", "error of B", "tolerance of A", ""), rows)
    lines = [f"Broken: {name}" for name in data["broken"]] + [f"Not compared: {one}" for one in data["unmatched"]]
    return [Part(f"kda compare {data['a']} {data['b']}", data["provenance"], verdict, lines, tables=[table])]


def host_time(data: Data) -> list[Part]:
    """What an eager call costs the CPU: of benchmarks/host_time.py."""
    rows = [
        _row(r["kernel"], r["op"], r["heads"], r["shapes"], fmt_us(r["p50_us"]), fmt_us(r["p90_us"]),
             fmt_us(r["max_us"]), Cell(r["error"] or "", BAD))
        for r in data["rows"]
    ]  # fmt: skip
    columns = ("kernel", "op", "heads", "shapes", "median us", "90th percentile", "longest", "")
    return [Part("Host time of eager calls", data["provenance"], tables=[Table(columns, rows)])]


def prefill_grid(data: Data) -> list[Part]:
    """Prefills over sizes, of benchmarks/prefill_grid.py: by how much the fastest other one is slower than ours."""
    ours, rows = "cute-prefill", sorted(data["rows"], key=lambda r: (r["N"], r["H"], r["T"]))
    kernels = list(dict.fromkeys(name for row in rows for name in row["us"]))
    at = {(r["N"], r["T"], r["H"]): r["us"] for r in rows}
    N, T, H = (sorted({key[i] for key in at}) for i in range(3))
    tables = [
        Table(
            ("tokens", *(f"H={h}" for h in H)),
            [_row(t, *(_gain(at.get((n, t, h), {}), ours) for h in H)) for t in T if any((n, t, h) in at for h in H)],
            f"N={n}: the fastest other kernel's time over that of {ours}",
        )
        for n in N
    ]
    every = [
        _row(r["N"], r["H"], r["T"], *(_plain(r["us"].get(name)) for name in kernels), _plain(r.get("errors")))
        for r in rows
    ]
    tables.append(Table(("N", "H", "tokens", *kernels, "errors"), every, "us per call", folded=True))
    compared = [cell for us in at.values() if (cell := _gain(us, ours)).style != FAINT]
    behind, wrong = sum(cell.style == BAD for cell in compared), sum("errors" in r for r in rows)
    verdict = _judged(
        behind,
        f"another is ahead by over 2% in {behind} of {len(compared)}",
        f"none is ahead by over 2% in {len(compared)}",
    )
    lines = [f"{data['gate']} gate, {data['dtype']}; red: another kernel is ahead by over 2%; -: nothing to compare."]
    lines += [f"In {wrong} of {len(rows)} cells a kernel did not run; why, the last table says."] if wrong else []
    return [Part("Prefill over a grid of sizes", data["provenance"], verdict, lines, tables=tables)]


def _gain(us: dict[str, float], ours: str) -> Cell:
    others = [time for name, time in us.items() if name != ours]
    if ours not in us or not others:
        return Cell("-", FAINT)
    gain = min(others) / us[ours]
    return Cell(f"{gain:.2f}", BAD if gain < 0.98 else "")


def as_they_are(title: str, data: Data) -> list[Part]:
    """Rows of a script's record, a column for each key."""
    columns = tuple(dict.fromkeys(name for row in data["rows"] for name in row))
    rows = [_row(*(_plain(row.get(name)) for name in columns)) for row in data["rows"]]
    return [Part(title, data["provenance"], tables=[Table(columns, rows)])]


def _plain(value: Any) -> str | None:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(x)}" for name, x in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return None if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def cut_sweeps(data: Data) -> list[Part]:
    """Sweeps of `kda profile` whose rows were cut to N, the kernel and its times."""
    found = []
    for sweep in data["sweeps"]:
        kernels = _kernels(sweep["rows"])
        by_kernel = {k: [row for row in sweep["rows"] if row["kernel"] == k] for k in kernels}
        chart = charts.lines("N, sequences", {k: [(r["N"], r["median_us"]) for r in by_kernel[k]] for k in kernels})
        found.append(Part(f"kda profile, H={sweep['H']}", sweep["provenance"], charts=[chart]))
    return found


def context_parallel(data: Data) -> list[Part]:
    """One sequence over several GPUs: times by number of ranks."""
    one = {(r["kernel"], r["tokens"], r["heads"]): r for r in data["rows"] if r["ranks"] == 1}
    rows = [
        _row(r["kernel"], r["tokens"], r["heads"], r["ranks"], fmt_us(r["median_us"]),
             f"{fmt_us(r['low_us'])} to {fmt_us(r['high_us'])}", _speedup(r, one, "median_us"),
             fmt_us(r.get("ahead_us")), _speedup(r, one, "ahead_us"), fmt_us(r["exchange_us"]),
             fmt_bytes(r["exchange_bytes"]))
        for r in data["rows"]
    ]  # fmt: skip
    names = "kernel, tokens, heads, GPUs, us, quartiles, one GPU / this, us with the host ahead, one GPU / this"
    names += ", exchange us, received"
    return [
        Part(f"kda profile --cp, {data['gates']} gates", data["provenance"], tables=[Table(names.split(", "), rows)])
    ]


def _speedup(row: Data, one: dict[tuple[str, int, int], Data], time: str) -> str | None:
    from kdacli.parallel.timing import CHAINED

    alone = one.get((row["kernel"].removesuffix(CHAINED), row["tokens"], row["heads"]))
    return None if alone is None or time not in row else f"{alone[time] / row[time]:.2f}"
