"""What a sweep says: the line through its points, and the points that lie over the line through their neighbours."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Line:
    """y = intercept + slope * x, fitted to relative errors, so that small points count as much as large ones.

    Attributes:
        slope_error, intercept_error: standard errors of the fit.
        worst, worst_x: the largest relative distance of a point from the line (positive: above), and where.
    """

    slope: float
    slope_error: float
    intercept: float
    intercept_error: float
    worst: float
    worst_x: float


@dataclasses.dataclass(frozen=True)
class Bump:
    """A point over the line through the points before and after it.

    Attributes:
        over: by how much, as a fraction of the line.
        least: the same with the lowest the point may be and the highest its neighbours may be.
    """

    x: float
    over: float
    least: float


def fit(x: Sequence[float], y: Sequence[float]) -> Line | None:
    """Least squares of the relative residuals (weights 1 / y). None for fewer than three points: any line fits two."""
    import numpy as np

    if len(x) < 3:
        return None
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    scale = xs.max()  # keeps the normal equations well conditioned for a million tokens
    (slope, intercept), cov = np.polyfit(xs / scale, ys, 1, w=1 / ys, cov=True)
    line = intercept + slope * xs / scale
    off = ys / line - 1
    worst = int(np.abs(off).argmax())
    slope_error, intercept_error = np.sqrt(np.diag(cov))
    return Line(
        float(slope / scale), float(slope_error / scale), float(intercept), float(intercept_error),
        float(off[worst]), float(xs[worst]),
    )  # fmt: skip


def bumps(
    x: Sequence[float], y: Sequence[float], low: Sequence[float], high: Sequence[float], limit: float
) -> list[Bump]:
    """The points more than `limit` over the line through their neighbours; the two ends have only one and are left out.

    Args:
        x: ascending.
        y: times; `low` and `high` their confidence intervals.
        limit: as a fraction, 0.05 for 5%.
    """
    found = []
    for i in range(1, len(x) - 1):
        along = (x[i] - x[i - 1]) / (x[i + 1] - x[i - 1])
        over = y[i] / _between(y[i - 1], y[i + 1], along) - 1
        if over > limit:
            found.append(Bump(x[i], over, low[i] / _between(high[i - 1], high[i + 1], along) - 1))
    return found


def _between(before: float, after: float, along: float) -> float:
    return before + along * (after - before)
