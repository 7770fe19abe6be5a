"""Charts of a record as SVG that takes its text colour from the page, so that it reads in the dark too."""

import functools
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kdacli.profile.records.record import Record
from kdacli.profile.records.row import timed
from kdacli.profile.records.sweep import series
from kdacli.profile.reporting import plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 6.4  # inches: at a font of 11 points it can still be read on a phone
_INK = "#010203"  # becomes the page's text colour
_STYLE: Any = {
    "font.size": 11,
    "svg.fonttype": "none",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": "#808080",
    "legend.framealpha": 0.0,
    "lines.color": _INK,
}
# Colours that keep a contrast of 3 to 1 on white and on near black.
_COLOURS = ["#2f7ed8", "#d9480f", "#2b8a3e", "#9c36b5", "#b08900", "#0b8793", "#c2255c", "#868e96"]


def of_record(record: Record) -> list[str]:
    """A sweep against its axis; else the times of each gate regime, and a roofline where points differ in intensity."""
    drawn, found = [], series(record.rows)
    for group in dict.fromkeys((one.op, one.label) for one in found):
        mine = [one for one in found if (one.op, one.label) == group]
        drawn.append(_svg(functools.partial(plot.against, group=mine), 4.4))
    rows = [] if found else timed(record.rows)
    for gates in dict.fromkeys(row.gates for row in rows):
        regime = [row for row in rows if row.gates == gates]
        drawn.append(_svg(functools.partial(plot.beside, rows=regime), 1.6 + 0.45 * len({r.case for r in regime})))
    intensities = [row.tflops * row.median_us / row.bytes for row in rows if row.tflops]
    if intensities and max(intensities) > 2 * min(intensities):
        drawn.append(_svg(functools.partial(plot.roofline, rows=rows, ceilings=record.ceilings), 4.4))
    return drawn


_drawn = 0


def _svg(draw: "Callable[[Axes], None]", height: float) -> str:
    """An <svg> element whose identifiers no other one on the page has."""
    global _drawn
    import matplotlib
    import matplotlib.figure
    from cycler import cycler

    _drawn += 1
    with matplotlib.rc_context({**_STYLE, "axes.prop_cycle": cycler(color=_COLOURS), "svg.hashsalt": "kda"}):
        figure = matplotlib.figure.Figure((WIDTH, height), layout="constrained", facecolor="none")
        panel = figure.subplots()
        panel.set_facecolor("none")
        draw(panel)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>c{_drawn}-", svg)


def lines(label: str, curves: Mapping[str, Sequence[tuple[float, float]]], what: str = "us per call, median") -> str:
    """`what` against something, one curve per kernel."""

    def draw(panel: "Axes") -> None:
        for kernel, points in curves.items():
            panel.plot(*zip(*points, strict=True), label=kernel, linewidth=1.2)
        plot.logarithmic(panel, "x")
        plot.logarithmic(panel, "y")
        panel.set(xlabel=label, ylabel=what)
        panel.grid(True, which="both", alpha=0.25)
        panel.legend(fontsize=9)

    return _svg(draw, 4.4)
