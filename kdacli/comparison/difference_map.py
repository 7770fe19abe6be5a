"""A difference as a map of characters: heads down, chunks of the sequences (or the sequences' states) across."""

import torch

from kdacli.comparison.difference import Difference

HEIGHT = 12
# Each character stands for the largest relative difference under it, in multiples of the bound.
LEVELS = ((0.0, " "), (0.3, "."), (1.0, ":"), (3.0, "+"), (10.0, "*"))
WORST = "#"
KEY = "blank: none, . up to 0.3, : 1, + 3, * 10 times the bound, # more"


def difference_map(difference: Difference, bound: float, width: int) -> list[str]:
    """Lines no longer than `width`, title first; empty if there is nothing to draw.

    Args:
        bound: the relative error that either side may have.
    """
    grid, columns = difference.heat, difference.columns
    if not columns:
        return []
    heads, across = grid.shape
    tall = -(-heads // HEIGHT)
    label = len(f"head {heads - 1}-{heads - 1}" if tall > 1 else f"head {heads - 1}")
    room = width - label - 1
    wide = -(-across // room)
    bars = _bars(columns) if wide == 1 and across + columns[-1][0] <= room else set()
    lines = [f"{difference.tensor}: heads down, {_across(difference, wide)} across"]
    for top in range(0, heads, tall):
        name = f"head {top}" if tall == 1 else f"head {top}-{min(top + tall, heads) - 1}"
        cells = []
        for left in range(0, across, wide):
            cells.append("|" if left in bars else "")
            cells.append(_character(grid[top : top + tall, left : left + wide].max().item(), bound))
        lines.append(f"{name:>{label}} {''.join(cells)}".rstrip())
    return lines


def _across(difference: Difference, wide: int) -> str:
    if difference.tensor == "final_state":
        return f"sequences{f', {wide} a character,' if wide > 1 else ''}"
    return f"chunks of 64 tokens{f', {wide} a character,' if wide > 1 else ', | between sequences,'}"


def _bars(columns: list[tuple[int, int]]) -> set[int]:
    if all(first == 0 for _, first in columns):  # a character each
        return set()
    return {i for i in range(1, len(columns)) if columns[i][0] != columns[i - 1][0]}


def _character(value: float, bound: float) -> str:
    share = value / bound if bound else (float("inf") if value else 0.0)
    return next((char for limit, char in LEVELS if share <= limit), WORST)


def shrink(grid: torch.Tensor, most: int) -> torch.Tensor:
    """[heads, columns] with neighbouring columns joined by their maximum until there are at most `most`."""
    wide = -(-grid.shape[1] // most)
    padded = torch.nn.functional.pad(grid, (0, -grid.shape[1] % wide))
    return padded.unflatten(1, (-1, wide)).amax(-1)
