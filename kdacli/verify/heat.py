"""Where it is wrong, as a small map of characters: errors against the largest that a plain implementation makes."""

import torch

from kda_kernels.problem import CHUNK
from kda_kernels.tensors import Inputs
from kdacli.judge import ELEMENT_FACTOR
from kdacli.judge.blocks import Blocks

WIDTH, HEIGHT = 64, 12
# Each character stands for the worst element under it, in multiples of what it may be off.
LEVELS = ((1.0, "."), (3.0, "-"), (10.0, "+"), (100.0, "*"))
WORST, NOT_FINITE = "#", "N"
KEY = ". - + * #: errors up to 1, 3, 10, 100 and over 100 times the bound; N: NaN or Inf"


def heat_map(inputs: Inputs, tensor: str, out: torch.Tensor, ref: torch.Tensor, plain_out: torch.Tensor) -> list[str]:
    """Lines of a map of the sequence that is worst (for a state: of its worst head), title first.

    Token tensors: heads down, tokens across, with a bar at every chunk's end where they fit; states: their last two
    axes. Several neighbours share a character where there are many.

    Args:
        tensor: "o" (also for the gate's sums) or "final_state". out, ref, plain_out: as the judge has them.
    """
    blocks = Blocks.of_tokens(inputs) if tensor != "final_state" else Blocks.of_state(inputs)
    out, ref, plain_out = blocks.rows(out), blocks.rows(ref), blocks.rows(plain_out)
    wrong = (out - ref).abs()
    allowed = blocks.spread(ELEMENT_FACTOR * blocks.maxima((plain_out - ref).abs())) + 2.0**-8 * ref.abs()
    share = torch.where(wrong > 0, wrong / allowed.clamp(min=1e-300), 0.0)
    share = torch.where(out.isfinite(), share, torch.inf)
    row = int(share.flatten(1).amax(1).argmax())
    sequence = int(blocks.owner[row])
    if blocks.state_axes is None:
        grid, finite = (x[blocks.owner == sequence].transpose(0, 1) for x in (share, out.isfinite()))
        grid, finite = grid.amax(-1), finite.all(-1)
        tokens = grid.shape[1]
        title = f"{tensor}, sequence {sequence}: {len(grid)} heads down, {tokens} tokens across"
        return [title, *_draw(grid, finite, "head", CHUNK if CHUNK < tokens <= WIDTH * 4 else None)]
    head = int(share[row].amax(-1).argmax())
    shape = [size for _, size in blocks.state_axes]
    grid, finite = (x[row, head].view(shape) for x in (share, out.isfinite()))
    down, across = (f"{size} {name}" for name, size in blocks.state_axes)
    title = f"{tensor}, sequence {sequence}, head {head}: {down} down, {across} across"
    return [title, *_draw(grid, finite, blocks.state_axes[0][0], None)]


def _draw(grid: torch.Tensor, finite: torch.Tensor, row_name: str, mark: int | None) -> list[str]:
    """[rows, columns] as lines; `mark`: a bar after every so many columns."""
    rows, columns = grid.shape
    tall, wide = -(-rows // HEIGHT), -(-columns // WIDTH)
    if mark is not None:
        wide = next(w for w in range(wide, mark + 1) if mark % w == 0)
    lines = []
    for top in range(0, rows, tall):
        name = f"{row_name} {top}" if tall == 1 else f"{row_name} {top}-{min(top + tall, rows) - 1}"
        cells = []
        for left in range(0, columns, wide):
            if mark is not None and left and left % mark == 0:
                cells.append("|")
            part = (slice(top, top + tall), slice(left, left + wide))
            cells.append(_character(grid[part], finite[part]))
        lines.append(f"{name:>12} {''.join(cells)}")
    return lines


def _character(share: torch.Tensor, finite: torch.Tensor) -> str:
    if not bool(finite.all()):
        return NOT_FINITE
    worst = share.max().item()
    return next((char for limit, char in LEVELS if worst <= limit), WORST)
