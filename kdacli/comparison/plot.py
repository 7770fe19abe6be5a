"""`--plot`: differences as a picture, a row for each tensor. matplotlib is an extra."""

from collections.abc import Sequence

from kdacli.comparison.difference import ULPS, Difference
from kdacli.comparison.difference_map import shrink

_COLUMNS = 512
_SMALLEST = 1e-12


def draw(differences: Sequence[tuple[str, Difference]], path: str) -> None:
    """Writes the picture of (title, difference): heads and chunks, the size along the sequence, and ULPs."""
    import matplotlib.figure

    with matplotlib.rc_context({"font.size": 8, "svg.hashsalt": "kda"}):
        figure = matplotlib.figure.Figure((13, 3.2 * len(differences)), layout="constrained")
        grid = figure.subplots(len(differences), 3, squeeze=False)
        for (title, difference), (heat, along, ulps) in zip(differences, grid, strict=True):
            _heat(figure, heat, title, difference)
            _along(along, difference)
            _ulps(ulps, difference)
        figure.savefig(path, dpi=150)


def _heat(figure, axes, title: str, difference: Difference) -> None:
    grid = shrink(difference.heat, _COLUMNS)
    grid = grid.clamp(min=_SMALLEST).log10().where(grid > 0, float("nan"))  # no difference: left white
    image = axes.imshow(grid.numpy(), aspect="auto", interpolation="nearest", cmap="magma")
    figure.colorbar(image, ax=axes, label="log10 relative difference")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    states = difference.tensor == "final_state"
    axes.set(title=title, xlabel="sequence" if states else "chunks of 64 tokens, sequence by sequence", ylabel="head")


def _along(axes, difference: Difference) -> None:
    heat = difference.heat.square().mean(0).sqrt()
    states = difference.tensor == "final_state"
    points = [
        (n if states else first + 1, heat[i].item()) for i, (n, first) in enumerate(difference.columns) if heat[i] > 0
    ]
    axes.plot(*(zip(*points, strict=True) if points else ([], [])), ".", markersize=3)
    growth = difference.growth
    axes.set(
        title=growth.word if growth else "",
        xlabel="sequence" if states else "token",
        ylabel="relative difference",
        xscale="log" if points and not states else "linear",
        yscale="log" if points else "linear",
    )


def _ulps(axes, difference: Difference) -> None:
    names = [*bins(), f"> {ULPS[-1]}"]
    axes.bar(range(len(names)), [100 * n / max(1, difference.count) for n in difference.ulps])
    axes.set_xticks(range(len(names)), names, rotation=45)
    axes.set(title=f"steps of {difference.dtypes[0]}", ylabel="% of elements", yscale="symlog")


def bins() -> list[str]:
    """The names of the histogram's bins but the last."""
    lows = [0, *(top + 1 for top in ULPS[:-1])]
    return [str(top) if low == top else f"{low}-{top}" for low, top in zip(lows, ULPS, strict=True)]
