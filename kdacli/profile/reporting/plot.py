"""`--plot`: times against T or N, or beside each other, from a record. matplotlib is an extra."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from kda_kernels.errors import InputError
from kdacli.profile.measuring.ceilings import Ceilings
from kdacli.profile.records.record import Record
from kdacli.profile.records.row import TimedRow, timed
from kdacli.profile.records.sweep import UNITS, Series, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = (7.5, 4.8)  # inches
_MARKERS = "osD^vP*X<>"


def draw(record: Record, path: str) -> None:
    """Writes the picture: of a sweep, time against its first axis with a panel for each group; else the kernels' times
    beside each other, with a panel for each gate regime.
    """
    import matplotlib.figure

    with matplotlib.rc_context({"font.size": 9, "svg.hashsalt": "kda"}):
        found, rows = series(record.rows), timed(record.rows)
        panels: list[tuple[float, Callable[[Axes], None]]] = []  # height, what draws it
        for group in dict.fromkeys((one.op, one.label) for one in found):
            panels.append((_SIZE[1], functools.partial(against, group=[o for o in found if (o.op, o.label) == group])))
        for gates in [] if found else dict.fromkeys(row.gates for row in rows):
            mine = [row for row in rows if row.gates == gates]
            panels.append((1.6 + 0.35 * len({row.case for row in mine}), functools.partial(beside, rows=mine)))
        columns = min(2, len(panels))
        high = -(-len(panels) // columns)
        size = (_SIZE[0] * columns, max(height for height, _ in panels) * high)
        figure = matplotlib.figure.Figure(size, layout="constrained")
        for part, (_, draw_panel) in zip(figure.subfigures(high, columns, squeeze=False).flat, panels, strict=False):
            draw_panel(part.subplots())
        figure.suptitle(_machine(record), fontsize=9)
        metadata = {"Date": None} if path.lower().endswith((".svg", ".pdf")) else None
        figure.savefig(path, dpi=150, metadata={"CreationDate": None} if path.lower().endswith(".pdf") else metadata)


def _machine(record: Record) -> str:
    return f"{record.gpu.get('name', 'unknown GPU')}, commit {record.commit}, {str(record.provenance.get('date'))[:10]}"


def logarithmic(panel: "Axes", name: Literal["x", "y"], base: int = 10) -> None:
    """With numbers as plain text: as formulas, which powers are by default, they take a third of a chart's time."""
    from matplotlib.ticker import FuncFormatter, LogFormatter

    (panel.set_xscale if name == "x" else panel.set_yscale)("log", base=base)
    axis = panel.xaxis if name == "x" else panel.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(LogFormatter(base, minor_thresholds=(1, 0.4)))


def against(panel: "Axes", group: Sequence[Series]) -> None:
    """Median time against the axis, one curve a kernel, with the floor under all of them."""
    for i, one in enumerate(group):
        panel.plot(one.x, one.y, label=one.kernel, marker=_marker(i, len(one.x)), markersize=4, linewidth=1.2)
    first = group[0]
    panel.plot(first.x, [row.floor_us for row in first.rows], "k--", linewidth=1, label="floor: bytes at the ceiling")
    logarithmic(panel, "x", base=2)
    logarithmic(panel, "y")
    panel.set_xlabel(f"{UNITS[first.axis]}s")
    panel.set_ylabel("us per call, median")
    panel.set_title(f"{first.op}, {first.label} gates: us against {UNITS[first.axis]}s")
    panel.grid(True, which="both", alpha=0.25)
    panel.legend(fontsize=8)


def _marker(i: int, points: int) -> str:
    return _MARKERS[i % len(_MARKERS)] if points <= 40 else ""


def beside(panel: "Axes", rows: Sequence[TimedRow]) -> None:
    """Times of one gate regime: cases down, one mark a kernel with the 95% interval of its median, and the floor."""
    cases = list(dict.fromkeys(row.case for row in rows))
    for i, kernel in enumerate(dict.fromkeys(row.kernel for row in rows)):
        mine = [row for row in rows if row.kernel == kernel]
        x = [row.median_us for row in mine]
        off = [[row.median_us - row.low_us for row in mine], [row.high_us - row.median_us for row in mine]]
        y = [cases.index(row.case) for row in mine]
        panel.errorbar(x, y, xerr=off, fmt=_MARKERS[i % len(_MARKERS)], markersize=5, linewidth=1, label=kernel)
    floors = {row.case: row.floor_us for row in rows}
    panel.scatter(
        list(floors.values()), range(len(cases)), marker="|", s=120, color="grey", label="floor: bytes at the ceiling"
    )
    panel.set_yticks(range(len(cases)), cases)
    panel.invert_yaxis()
    logarithmic(panel, "x")
    panel.set_xlabel("us per call, median with its 95% interval")
    panel.set_title(f"{rows[0].op}, {rows[0].gates} gates")
    panel.grid(True, axis="x", which="both", alpha=0.25)
    assert (figure := panel.get_figure()) is not None
    figure.legend(fontsize=8, loc="outside lower center", ncols=3, frameon=False)


def roofline(panel: "Axes", rows: Sequence[TimedRow], ceilings: Ceilings) -> None:
    """TFLOP/s against operations a byte, under the measured bandwidths. The gate stage has no operations: no point."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.tflops:
            intensity = row.tflops * row.median_us * 1e6 / row.bytes
            points.setdefault(row.kernel, []).append((intensity, row.tflops))
    if not points:
        raise InputError("--plot draws a roofline, and the gate stage has no operations to speak of: use --sweep T=..")
    for i, (kernel, at) in enumerate(points.items()):
        xs, ys = zip(*at, strict=True)
        panel.scatter(xs, ys, label=kernel, marker=_MARKERS[i % len(_MARKERS)], s=28)
    every = [x for at in points.values() for x, _ in at]
    top = ceilings.tensor_tflops
    for gbps, title, style in ((ceilings.copy_gbps, "copy", "k--"), (ceilings.inplace_gbps, "in place", "k-")):
        slope = gbps / 1e3
        ends = [min(every) / 2, top / slope if top else 2 * max(every)]
        roof = [(x, x * slope) for x in ends] + ([(4 * max(ends[1], *every), top)] if top else [])
        panel.plot(*zip(*roof, strict=True), style, linewidth=1, label=f"{title}, measured")
    logarithmic(panel, "x")
    logarithmic(panel, "y")
    panel.set_xlabel("operations a byte that must move")
    panel.set_ylabel("TFLOP/s")
    panel.set_title("roofline under the ceilings of the same run")
    panel.grid(True, which="both", alpha=0.25)
    panel.legend(fontsize=8)
