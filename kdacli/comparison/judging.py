"""`kdacli.judge` for results that do not fit into memory: at the same three levels, in one pass, and as strict as it is
from one run of the plain implementation; with fp32 and fp16 activations stricter, since nothing is granted for cutting.

An element may be off by a part that its block decides (its sequence and head) and by a rounding of its own. The first
is known only at the end of a block, so of each block the element is kept that is off by most beyond its rounding.
"""

import dataclasses
import math

import torch

from kda_kernels.tensors import Inputs
from kdacli.comparison.layout import Layout
from kdacli.judge import ELEMENT_FACTOR, FACTOR, FLOOR, SMALLEST, UNIT_ROUNDOFF, Verdict, said
from kdacli.judge.bits import bits


@dataclasses.dataclass(frozen=True)
class Place:
    """What the rows that are added belong to.

    Attributes:
        owner: int64 [R], the sequence of each row. first: int64 [R], the token, or 0 for states.
        axes: for states, the sizes of V and K. slot: of a pool, where the state lies.
    """

    owner: torch.Tensor
    first: torch.Tensor
    axes: tuple[int, int] | None = None
    slot: int | None = None

    def name(self, row: int, head: int, column: int) -> dict[str, str]:
        sequence = int(self.owner[row])
        if self.axes is None:
            place = {"sequence": sequence, "token": int(self.first[row]), "head": head, "channel": column}
        else:
            v, k = divmod(column, self.axes[1])
            place = {"sequence": sequence, "head": head, "v": v, "k": k}
            if self.slot is not None:
                place["slot"] = self.slot
        return {name: str(value) for name, value in place.items()}


class Judge:
    """Judges one output tensor, rows of which are added in order.

    Passed or not, error and bound are those of `kdacli.judge`. Of elements that are within their bounds it may name
    another as the worst: one that is off by most beyond its rounding, not one that uses most of its bound.

    Args:
        tensor: its name. sequences, heads: how many.
        dtype: what it should be rounded to.
        terms: how many products are summed into an element.
    """

    def __init__(self, tensor: str, sequences: int, heads: int, dtype: torch.dtype, terms: int) -> None:
        self.tensor = tensor
        self.unit, self.floor, self.smallest = UNIT_ROUNDOFF[dtype], FLOOR * math.sqrt(terms), SMALLEST[dtype]
        shape = (sequences, heads)
        self.count, self.norms, self.wrongs, self.plains, self.plain_worst = (
            torch.zeros(shape, dtype=torch.float64) for _ in range(5)
        )
        self.over = torch.full(shape, -math.inf, dtype=torch.float64)
        self.element: dict[tuple[int, int], tuple[dict[str, str], float, float]] = {}  # place, how wrong, reference
        self.bad = 0
        self.total = 0
        self.first_bad: tuple[str, dict[str, str]] | None = None

    def add(self, place: Place, out: torch.Tensor, ref: torch.Tensor, plain: torch.Tensor) -> None:
        """Rows [R, heads, C], all in fp64 and on one device."""
        self.total += out.numel()
        if not out.numel():
            return
        self._finite(place, out, ref, plain)
        wrong, plain_wrong = (out - ref).abs_(), (plain - ref).abs_()
        blocks = place.owner
        for sums, rows in ((self.norms, ref), (self.wrongs, wrong), (self.plains, plain_wrong)):
            sums.index_add_(0, blocks, rows.square().sum(-1).cpu())
        self.count.index_add_(0, blocks, torch.full(ref.shape[:2], float(ref.shape[-1]), dtype=torch.float64))
        keep_largest(self.plain_worst, blocks, plain_wrong.amax(-1).cpu())
        beyond, column = (wrong - self.unit * ref.abs()).max(-1)
        beyond, column = beyond.cpu(), column.cpu()
        for n in blocks.unique().tolist():
            rows = (blocks == n).nonzero().squeeze(1)
            most, at = beyond[rows].max(0)
            for h in (most > self.over[n]).nonzero().squeeze(1).tolist():
                row = int(rows[at[h]])
                c = int(column[row, h])
                self.over[n, h] = most[h]
                self.element[n, h] = (place.name(row, h, c), wrong[row, h, c].item(), ref[row, h, c].item())

    def _finite(self, place: Place, out: torch.Tensor, ref: torch.Tensor, plain: torch.Tensor) -> None:
        for what, rows in (("the reference is ", ref), ("the plain implementation made ", plain), ("", out)):
            finite = rows.isfinite()
            if (count := rows.numel() - int(finite.sum())) == 0:
                continue
            self.bad += count
            if self.first_bad is None:
                flat = int((~finite).flatten().byte().argmax())
                row, head, column = (int(i) for i in torch.unravel_index(torch.tensor(flat), rows.shape))
                kind = "NaN" if bool(rows.flatten()[flat].isnan()) else "Inf"
                self.first_bad = (f"{what}{kind}", place.name(row, head, column))

    def verdict(self, usual: torch.Tensor | None = None) -> Verdict:
        """What it comes to. `usual`: float64 [sequences, heads], see `Walk`; None: blocks do not cancel."""
        if self.first_bad is not None:
            what, where = self.first_bad
            note = f"{what}, first at {said(where)}; {self.bad} of {self.total} elements are not finite"
            return Verdict(self.tensor, math.nan, math.nan, math.nan, math.nan, where, False, note)
        if not self.total:
            return Verdict(self.tensor, 0.0, 0.0, 0.0, 0.0, {}, True)
        norm = self.norms.sum().sqrt().item()
        error, plain_error = (_ratio(x.sum().sqrt().item(), norm) for x in (self.wrongs, self.plains))
        lost = self.smallest * math.sqrt(self.total)
        bound = FACTOR * plain_error + self.unit / 2 + self.floor + lost / norm if norm else 0.0
        norms, wrongs, plains = self.norms.sqrt(), self.wrongs.sqrt(), self.plains.sqrt()
        limits, may = self._allowed(norms, plains, usual)
        notes = [f"relative error {error:.2e} > {bound:.2e}"] if not error <= bound else []
        notes += self._blocks(wrongs, limits, norms)
        (n, h), share, where, wrong, allowed = self._worst(may, norms)
        if share > 1:
            notes.append(f"the element at {said(where)} is off by {share:.3g} times its bound")
        scale = norms[n, h].item() / math.sqrt(max(1.0, self.count[n, h].item()))
        worst, worst_bound = _ratio(wrong, scale), _ratio(allowed, scale)
        return Verdict(self.tensor, error, bound, worst, worst_bound, where, not notes, "; ".join(notes))

    def _allowed(
        self, norms: torch.Tensor, plains: torch.Tensor, usual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """How wrong each block may be, and each element of it beyond its own rounding; as `kdacli.judge` has it."""
        sizes = norms if usual is None else torch.maximum(norms, usual)
        size = sizes / self.count.clamp(min=1).sqrt()
        granted = torch.maximum(plains, _typical(plains, sizes) * sizes)
        limits = FACTOR * granted + self.unit / 2 * norms + self.floor * sizes + self.smallest * self.count.sqrt()
        largest = torch.maximum(self.plain_worst, _typical(self.plain_worst, size) * size)
        may = ELEMENT_FACTOR * (largest + self.floor * size) + self.smallest
        return torch.where(norms > 0, limits, 0.0), torch.where(norms > 0, may, 0.0)

    def _blocks(self, wrongs: torch.Tensor, limits: torch.Tensor, norms: torch.Tensor) -> list[str]:
        excess = torch.where(wrongs > 0, wrongs / limits, 0.0)
        if bool((excess <= 1).all()):
            return []
        n, h = divmod(int(excess.argmax()), norms.shape[1])
        if norms[n, h] == 0:
            return [f"sequence {n}, head {h} should be zero"]
        off, limit = (x[n, h].item() / norms[n, h].item() for x in (wrongs, limits))
        return [
            f"{int((excess > 1).sum())} of {norms.numel()} (sequence, head) blocks are off, most of all sequence {n},"
            f" head {h}: {off:.2e} > {limit:.2e}"
        ]

    def _worst(
        self, may: torch.Tensor, norms: torch.Tensor
    ) -> tuple[tuple[int, int], float, dict[str, str], float, float]:
        """The element nearest to, or furthest over, its bound: block, share of the bound, place, how wrong, bound."""
        best = ((0, 0), -1.0, {}, 0.0, 0.0)
        for (n, h), (where, wrong, ref) in self.element.items():
            allowed = may[n, h].item() + self.unit * abs(ref) if norms[n, h] > 0 else 0.0
            if (share := _ratio(wrong, allowed)) > best[1]:
                best = ((n, h), share, where, wrong, allowed)
        return best


def written_slots(inputs: Inputs, layout: Layout, pool: torch.Tensor) -> str:
    """Which slot was written that no sequence uses, in words; "" if none, or there is no pool. A slot at a time."""
    if inputs.state_indices is None:
        return ""
    used = set(layout.slots)
    for slot in range(len(pool)):
        if slot not in used and not torch.equal(bits(pool[slot]).cpu(), bits(inputs.state[slot]).cpu()):
            return f"slot {slot} of the pool was written, and no sequence uses it"
    return ""


def keep_largest(largest: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """largest[rows[i]] = max(itself, values[i]), in place; [N, heads], int64 [R], [R, heads]."""
    largest.scatter_reduce_(0, rows.unsqueeze(-1).expand_as(values), values, "amax")


def _typical(errors: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """The rms over blocks of the errors relative to the sizes; blocks of size 0 do not count."""
    there = sizes > 0
    return (errors[there] / sizes[there]).square().mean().sqrt().nan_to_num(0.0)


def _ratio(a: float, b: float) -> float:
    return a / b if b else (math.inf if a else 0.0)
