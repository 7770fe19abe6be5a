"""One output tensor, rows of which are added piece by piece, at three levels: the tensor, its blocks, its elements.

An element may be off by a part that its block decides (its sequence and head) and by a rounding of its own. The first
is known only at the end of a block, so of each block two elements are kept: the one that is off by most beyond its
rounding, which decides, and the one that is off by most.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch

from kda_kernels.dtypes import STATES, name_of
from kdacli.judge.layout import Place
from kdacli.judge.plain import Plain
from kdacli.judge.reference import Rows, fine

# Another legal order of the same roundings (other sub-chunks, other reduction trees) makes an error of the same size:
# three kernels by three houses lie within 1.6x of each other on the same inputs. Twice that is another arithmetic.
FACTOR = 2.0
# The largest of many errors scatters more than their norm does.
ELEMENT_FACTOR = 3.0
# Partial sums of K products in fp32 wander like a random walk, 2^-24 * sqrt(K) each, and several of them in a row.
FLOOR = 4 * 2.0**-24

# Elements of a block that all lack digits, where 1 of 2^13 does by chance.
ENOUGH = 64


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the judge says about one output tensor.

    Attributes:
        tensor: "o", "final_state", ..., or "g_cumsum" (the op `gate`).
        error, bound: ||out - ref|| / ||ref|| over the tensor, and what it may be.
        worst, worst_bound: the element furthest over its own bound, or, where none is, one near it; both relative to
            the rms of its (sequence, head) block of the reference.
        where: that element, or the first one that is NaN or Inf: sequence, token, head, channel; for a state sequence,
            head, v, k and, in a pool, slot.
        passed: at all three levels, finite, zero where it must be, nothing touched that is nobody's.
        note: what is wrong, in words; "" if nothing is.
        rounding: what `error` would be if the exact tensor were rounded once, to the dtype that it is in.
    """

    tensor: str
    error: float
    bound: float
    worst: float
    worst_bound: float
    where: dict[str, str]
    passed: bool
    note: str = ""
    rounding: float = math.nan

    @classmethod
    def failed(cls, tensor: str, note: str, where: dict[str, str] | None = None) -> "Verdict":
        """Of what cannot be measured."""
        return cls(tensor, math.nan, math.nan, math.nan, math.nan, where or {}, False, note)

    def with_fault(self, note: str) -> "Verdict":
        """The same, failed by one thing more; as it is where `note` is empty."""
        if not note:
            return self
        return dataclasses.replace(self, passed=False, note="; ".join(filter(None, (self.note, note))))


def said(where: dict[str, str]) -> str:
    """sequence 1, token 65, head 0, channel 17."""
    return ", ".join(f"{name} {value}" for name, value in where.items())


class TensorJudge:
    """Judges one output tensor.

    Args:
        tensor: its name. sequences, heads: how many.
        plains: the plain implementations whose errors come with the rows.
        stored: what it is stored in. dtype: what it should be rounded to, that or less.
        terms: how many numbers are summed into an element.
    """

    def __init__(
        self,
        tensor: str,
        sequences: int,
        heads: int,
        plains: Sequence[Plain],
        stored: torch.dtype,
        dtype: torch.dtype,
        terms: int,
    ) -> None:
        self.tensor, self.dtype, self.stored = tensor, dtype, stored
        # Half a unit in the last place of 1.0: the most that one rounding changes an element, relative to it. Over a
        # tensor the roundings have an rms of a little under half of that, which is what norms are granted.
        self.unit, self.smallest = 2.0 ** -STATES[name_of(dtype)].digits, STATES[name_of(dtype)].smallest
        self.floor = FLOOR * math.sqrt(terms)
        self.cut = torch.tensor([one.cut for one in plains])
        shape = (sequences, heads)
        self.count, self.norms, self.wrongs, self.needed, self.held = (torch.zeros(shape).double() for _ in range(5))
        self.plains, self.plain_worst = (torch.zeros(len(plains), *shape).double() for _ in range(2))
        # Of the two elements that are kept of each block: by how much they are off beyond their rounding, and at all;
        # the place, row and column of each; its error and what it should be.
        self.places: list[Place] = []
        self.most = torch.full((2, *shape), -math.inf).double()
        self.at, self.sizes = torch.zeros(2, *shape, 3, dtype=torch.int64), torch.zeros(2, *shape, 2).double()
        self.bad = self.total = 0
        self.rounded = 0.0  # the sum of squares of what one rounding takes off
        self.first_bad: tuple[str, dict[str, str]] | None = None

    def add(self, rows: Rows, out: torch.Tensor) -> None:
        """`out`: what came out, [R, HV, C]."""
        self.total += out.numel()
        if not out.numel():
            return
        out, owner = out.to(rows.exact.device).double(), rows.place.owner
        self._finite(rows, out)
        wrong = (out - rows.exact).abs_()
        for sums, per_row in ((self.norms, rows.exact.square()), (self.wrongs, wrong.square())):
            sums.index_add_(0, owner, per_row.sum(-1).cpu())
        self.rounded += (rows.exact.to(self.dtype).double() - rows.exact).square().sum().item()
        self.count.index_add_(0, owner, torch.full(out.shape[:2], float(out.shape[-1])).double())
        self.plains.index_add_(1, owner, rows.squares.cpu())
        for largest, worst in zip(self.plain_worst, rows.worst.cpu(), strict=True):
            keep_largest(largest, owner, worst)
        if rows.fine is not None:
            needed = rows.fine & out.ne(0)
            self.needed.index_add_(0, owner, needed.sum(-1).double().cpu())
            held = needed & fine(out, self.stored)
            self.held.index_add_(0, owner, held.sum(-1).double().cpu())
        self._keep_worst(rows, wrong)

    def _keep_worst(self, rows: Rows, wrong: torch.Tensor) -> None:
        self.places.append(rows.place)
        owner, head = rows.place.owner, torch.arange(wrong.shape[1])
        for i, measure in enumerate((wrong - self.unit * rows.exact.abs(), wrong)):
            off, column = measure.nan_to_num(nan=math.inf).max(-1, keepdim=True)
            sizes = torch.cat([wrong.gather(-1, column), rows.exact.gather(-1, column)], -1).cpu()
            off, column = off.squeeze(-1).cpu(), column.squeeze(-1).cpu()
            for n in owner.unique().tolist():
                own = (owner == n).nonzero().squeeze(1)
                most, at = off[own].max(0)
                row = own[at]
                more = (most > self.most[i, n]).unsqueeze(-1)
                where = torch.stack([torch.full_like(row, len(self.places) - 1), row, column[row, head]], -1)
                self.most[i, n] = torch.maximum(most, self.most[i, n])
                self.at[i, n] = torch.where(more, where, self.at[i, n])
                self.sizes[i, n] = torch.where(more, sizes[row, head], self.sizes[i, n])

    def _finite(self, rows: Rows, out: torch.Tensor) -> None:
        if not rows.finite:
            self.bad += 1
            self.first_bad = self.first_bad or ("the plain implementation made NaN or Inf", rows.place.name(0, 0, 0))
        for what, values in (("the reference is ", rows.exact), ("", out)):
            finite = values.isfinite()
            if (count := values.numel() - int(finite.sum())) == 0:
                continue
            self.bad += count
            if self.first_bad is None or (what and not self.first_bad[0].startswith(what)):
                flat = int((~finite).flatten().byte().argmax())
                kind = "NaN" if bool(values.flatten()[flat].isnan()) else "Inf"
                self.first_bad = (f"{what}{kind}", rows.place.name_flat(flat, values.shape))

    def verdict(self, usual: torch.Tensor | None = None) -> Verdict:
        """What it comes to. `usual`: float64 [sequences, heads], see `Reference`; None: blocks do not cancel."""
        if self.first_bad is not None:
            what, where = self.first_bad
            note = f"{what}, first at {said(where)}; {self.bad} of {self.total} elements are not finite"
            return Verdict.failed(self.tensor, note, where)
        if not self.total:
            return Verdict(self.tensor, 0.0, 0.0, 0.0, 0.0, {}, True)
        norm = self.norms.sum().sqrt().item()
        error = _ratio(self.wrongs.sum().sqrt().item(), norm)
        granted = _granted(self.plains.sum((1, 2)).sqrt(), self.cut, FACTOR).item()
        lost = self.smallest * math.sqrt(self.total)
        bound = (granted + lost) / norm + self.unit / 2 + self.floor if norm else 0.0
        norms, wrongs = self.norms.sqrt(), self.wrongs.sqrt()
        limits, may = self._allowed(norms, usual)
        notes = [f"relative error {error:.2e} > {bound:.2e}"] if not error <= bound else []
        notes += self._blocks(wrongs, limits, norms)
        share, where, worst, worst_bound = self._worst(may, norms)
        if share > 1:
            notes.append(f"the element at {said(where)} is off by {share:.3g} times its bound")
        notes += self._digits()
        rounding = _ratio(math.sqrt(self.rounded), norm)
        return Verdict(self.tensor, error, bound, worst, worst_bound, where, not notes, "; ".join(notes), rounding)

    def _allowed(self, norms: torch.Tensor, usual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """How wrong each block may be, and each element of it beyond its own rounding.

        A block whose plain error is small by luck is granted a typical one, relative to its usual size.
        """
        sizes = norms if usual is None else torch.maximum(norms, usual)
        size = sizes / self.count.clamp(min=1).sqrt()
        lost = self.smallest * self.count.sqrt()
        there = sizes > lost  # of a block that vanishes all digits are lost, which is typical of no other
        plains = _granted(self.plains.sqrt(), self.cut, FACTOR)
        granted = torch.maximum(plains, _typical(plains[there], sizes[there]) * sizes)
        limits = granted + self.unit / 2 * norms + self.floor * sizes + lost
        largest = _granted(self.plain_worst, self.cut, ELEMENT_FACTOR, _rms)
        largest = torch.maximum(largest, _typical(largest[there], size[there]) * size)
        may = largest + ELEMENT_FACTOR * self.floor * size + self.smallest
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

    def _worst(self, may: torch.Tensor, norms: torch.Tensor) -> tuple[float, dict[str, str], float, float]:
        """The element nearest to, or furthest over, its bound: its share of it, place, error and bound."""
        wrong, reference = self.sizes.unbind(-1)
        allowed = torch.where(norms > 0, may + self.unit * reference.abs(), 0.0)
        share = torch.where(wrong > 0, wrong / allowed, 0.0)  # inf where nothing may be wrong
        row, h = divmod(int(share.argmax()), share.shape[2])  # torch.unravel_index imports sympy, which takes seconds
        i, n = divmod(row, share.shape[1])
        place, row, column = self.at[i, n, h].tolist()
        scale = norms[n, h].item() / math.sqrt(max(1.0, self.count[n, h].item()))
        worst, worst_bound = (_ratio(x[i, n, h].item(), scale) for x in (wrong, allowed))
        return share[i, n, h].item(), self.places[place].name(row, h, column), worst, worst_bound

    def _digits(self) -> list[str]:
        """A state that was rounded to less than it is stored in on its way, in words.

        One such rounding of a final state is smaller than what products of bf16 operands make of it, so that no bound
        sees it. But a state that is handed on from step to step, and rounded in each, drifts; who asks for float32
        means to prevent it.
        """
        lacking = (self.needed >= ENOUGH) & (self.held == 0)
        if self.dtype is not self.stored or not bool(lacking.any()):
            return []
        n, h = divmod(int(lacking.flatten().byte().argmax()), lacking.shape[1])
        left, to = ("ten", "bf16, fp16 or tf32") if self.stored is torch.float32 else ("seven", "bf16")
        return [
            f"{int(lacking.sum())} of {lacking.numel()} (sequence, head) blocks, first sequence {n}, head {h}, hold"
            f" {left} bits of mantissa at most: they were rounded on their way to {to}, and the kernel declares no"
            " carried_state"
        ]


def keep_largest(largest: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """largest[rows[i]] = max(itself, values[i]), in place; [N, heads], int64 [R], [R, heads]."""
    largest.scatter_reduce_(0, rows.unsqueeze(-1).expand_as(values), values, "amax")


def _largest(errors: torch.Tensor) -> torch.Tensor:
    return errors.amax(0)


def _rms(errors: torch.Tensor) -> torch.Tensor:
    return errors.square().mean(0).sqrt()


def _granted(
    errors: torch.Tensor,
    cut: torch.Tensor,
    factor: float,
    of_draws: Callable[[torch.Tensor], torch.Tensor] = _largest,
) -> torch.Tensor:
    """What may be wrong, of the plain implementations' errors [draws, ...] and which of these cut, [draws].

    The factor is for what scatters from one order of roundings to another. The shift by cutting goes one way: it counts
    once.
    """
    scatter = of_draws(errors[~cut])
    if not bool(cut.any()):
        return factor * scatter
    return factor * scatter + (of_draws(errors[cut]).square() - scatter.square()).clamp(min=0).sqrt()


def _typical(errors: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """The rms over blocks of the errors relative to the sizes."""
    return (errors / sizes).square().mean().sqrt().nan_to_num(0.0)


def _ratio(a: float, b: float) -> float:
    """a / b, where nothing relative to nothing is 0 and something relative to nothing is infinite."""
    return a / b if b else (math.inf if a else 0.0)
