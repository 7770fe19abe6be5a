"""Where it is wrong, as a small map of characters: errors against what the worst element may be off."""

import torch

from kda_kernels.problem import CHUNK
from kda_kernels.tensors import Inputs
from kdacli.judge import Verdict
from kdacli.judge.layout import Place

WIDTH, HEIGHT = 64, 12
# Each character stands for the worst element under it, in multiples of what it may be off.
LEVELS = ((1.0, "."), (3.0, "-"), (10.0, "+"), (100.0, "*"))
WORST, NOT_FINITE = "#", "N"
KEY = ". - + * #: errors up to 1, 3, 10, 100 and over 100 times the bound; N: NaN or Inf"


def error_map(inputs: Inputs, field: str, out: torch.Tensor, ref: torch.Tensor, verdict: Verdict) -> list[str]:
    """Lines of a map of the sequence that is worst (for a state: of its worst head), title first.

    Token tensors: heads down, tokens across, with a bar at every chunk's end where they fit; states: V down, K across.
    Several neighbours share a character where there are many.

    Args:
        field: "o" (also for the gate's sums) or "final_state". out, ref: what came out, and what should.
        verdict: on it.
    """
    place = Place.whole(inputs, field)
    out, ref = place.rows(out).double().cpu(), place.rows(ref).cpu()
    bound = verdict.worst_bound if verdict.worst_bound > 0 else 2.0**-6  # NaN where it is not finite
    rms = torch.stack([ref[place.owner == n].square().mean((0, 2)).sqrt() for n in place.owner.unique()])
    allowed = bound * rms[place.owner.unique(return_inverse=True)[1]].unsqueeze(-1)
    wrong = (out - ref).abs()
    share = torch.where(wrong > 0, wrong / allowed.clamp(min=1e-300), 0.0)
    share = torch.where(out.isfinite(), share, torch.inf)
    row = int(share.flatten(1).amax(1).argmax())
    sequence = int(place.owner[row])
    if place.group:
        grid, finite = (x[place.owner == sequence].transpose(0, 1) for x in (share, out.isfinite()))
        grid, finite = grid.amax(-1), finite.all(-1)
        tokens = grid.shape[1]
        title = f"{field}, sequence {sequence}: {len(grid)} heads down, {tokens} tokens across"
        return [title, *_draw(grid, finite, "head", CHUNK if CHUNK < tokens <= WIDTH * 4 else None)]
    head, d = int(share[row].amax(-1).argmax()), place.layout.dims
    grid, finite = (x[row, head].view(d.V, d.K) for x in (share, out.isfinite()))
    title = f"{field}, sequence {sequence}, head {head}: {d.V} v down, {d.K} k across"
    return [title, *_draw(grid, finite, "v", None)]


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
