"""How two tensors differ: sizes, ULPs, where it begins, and whether it grows along the sequence. Added up in pieces."""

import dataclasses
import math
from collections.abc import Sequence

import torch

from kda_kernels.problem import CHUNK
from kda_kernels.tensors import Outputs
from kdacli.judge import Verdict
from kdacli.judge.layout import Place, Stretch
from kdacli.judge.reference import Piece, Reference, rows_of
from kdacli.judge.tensor import keep_largest

# Two right results may each be off by the bound; a row of one token scatters more than the whole tensor.
_BEYOND = 4.0
# Upper ends of the bins of the histogram of ULPs; the last bin has no end.
ULPS = (0, 1, 2, 4, 8, 16, 64, 1024)
_INTS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


@dataclasses.dataclass(frozen=True)
class Growth:
    """How the relative difference depends on the position p in the sequence, fitted as p ** power over its chunks.

    `error` is the standard error of `power`; the difference grows or shrinks only where |power| is twice that and 0.1.
    """

    power: float
    error: float
    chunks: int

    @property
    def word(self) -> str:
        if abs(self.power) < max(2 * self.error, 0.1):
            return "does not grow along the sequence"
        return f"{'grows' if self.power > 0 else 'shrinks'} along the sequence, as position^{self.power:.2f}"


@dataclasses.dataclass
class Difference:
    """Two tensors, a and b, compared.

    Attributes:
        tensor: its name. dtypes: of a and of b. count: elements. different: those that are not equal.
        max_abs, where: the largest |a - b|, and its element.
        relative: ||a - b|| / ||b||. rms: of a - b. cosine: of the angle between a and b.
        ulps: elements in each bin of `ULPS`: how many steps of the coarser of the two dtypes lie between a and b, so
            that small numbers of different sign are far apart.
        not_finite: elements that are NaN or Inf in a, and in b.
        begins: the first token (sequence) and head with any difference; material: the first with one that rounding
            does not explain, as `threshold` says, and the norm from which a row there counts; None if there is none.
        growth: None for states, and where there are fewer than 4 chunks.
        heat: [heads, columns] relative differences: a column is a chunk of a sequence, or for states a sequence.
        columns: (sequence, first token) of each.
    """

    tensor: str
    dtypes: tuple[str, str]
    count: int
    different: int
    max_abs: float
    where: dict[str, str]
    relative: float
    rms: float
    cosine: float
    ulps: list[int]
    not_finite: tuple[int, int]
    begins: dict[str, str] | None
    material: dict[str, str] | None
    material_limit: float
    threshold: float
    growth: Growth | None
    heat: torch.Tensor
    columns: list[tuple[int, int]]


class Comparing:
    """Adds up a `Difference`.

    Args:
        tensor: its name. lens: rows of each sequence; for states 1 each. heads: how many.
        dtypes: of a and b.
        states: whether a row is a state.
    """

    def __init__(
        self, tensor: str, lens: list[int], heads: int, dtypes: tuple[torch.dtype, torch.dtype], states: bool = False
    ) -> None:
        self.tensor, self.dtypes, self.states, self.lens = tensor, dtypes, states, lens
        self.coarse = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        self.columns = [(n, first) for n, length in enumerate(lens) for first in range(0, length, CHUNK)]
        self.first_column = torch.tensor([0, *(-(-length // CHUNK) for length in lens)]).cumsum(0)
        shape = (max(1, len(self.columns)), heads)
        self.sum_d, self.sum_b, self.worst_row = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
        self.dot = self.sum_a = self.max_abs = 0.0
        self.where: dict[str, str] = {}
        self.count = self.different = 0
        self.not_finite = [0, 0]
        self.ulps = torch.zeros(len(ULPS) + 1, dtype=torch.int64)
        self.begins: dict[str, str] | None = None

    def add(self, place: Place, a: torch.Tensor, b: torch.Tensor) -> None:
        """Rows [R, heads, C] of both, in their own dtypes; what is not finite counts as different, and in no sum."""
        self.count += a.numel()
        if not a.numel():
            return
        x, y = a.double(), b.double()
        for i, t in enumerate((x, y)):
            self.not_finite[i] += t.numel() - int(t.isfinite().sum())
        unequal = (x != y) & ~(x.isnan() & y.isnan())
        self.different += int(unequal.sum())
        both = x.isfinite() & y.isfinite()
        x, y = torch.where(both, x, 0.0), torch.where(both, y, 0.0)
        d = (x - y).abs_()
        self.dot += (x * y).sum().item()
        self.sum_a += x.square().sum().item()
        column = self.first_column[place.owner] + (0 if self.states else place.token // CHUNK)
        rows = d.square().sum(-1).cpu()
        self.sum_d.index_add_(0, column, rows)
        self.sum_b.index_add_(0, column, y.square().sum(-1).cpu())
        keep_largest(self.worst_row, column, torch.where(unequal.any(-1).cpu() & (rows == 0), math.inf, rows))
        if (largest := d.max().item()) > self.max_abs or not self.where:
            at = torch.unravel_index(d.argmax().cpu(), d.shape)
            self.max_abs, self.where = largest, place.name(*(int(i) for i in at))
        self._begin(place, unequal)
        self._count_ulps(a, b, both)

    def _begin(self, place: Place, unequal: torch.Tensor) -> None:
        if self.begins is not None or not bool(unequal.any()):
            return
        row, head, column = (int(i) for i in unequal.nonzero()[0])
        self.begins = place.name(row, head, column)

    def _count_ulps(self, a: torch.Tensor, b: torch.Tensor, both: torch.Tensor) -> None:
        apart = (_ordered(a, self.coarse) - _ordered(b, self.coarse)).abs_()[both]
        edges = torch.tensor(ULPS, dtype=torch.int64, device=apart.device)
        self.ulps += torch.bucketize(apart, edges).bincount(minlength=len(ULPS) + 1).cpu()

    def result(self, threshold: float) -> Difference:
        """The difference. `threshold`: a row of one token and head that is off by more than so many times the rms of
        the rows of its sequence and head is more than rounding.
        """
        norm_d, norm_b = (x.sum().sqrt().item() for x in (self.sum_d, self.sum_b))
        cosine = self.dot / math.sqrt(self.sum_a) / norm_b if self.sum_a and norm_b else float(self.sum_a == norm_b)
        material = self._material(threshold)
        heat = (self.sum_d / self.sum_b.clamp(min=1e-300)).sqrt().where(self.sum_d > 0, 0.0)
        return Difference(
            tensor=self.tensor,
            dtypes=(str(self.dtypes[0]).removeprefix("torch."), str(self.dtypes[1]).removeprefix("torch.")),
            count=self.count,
            different=self.different,
            max_abs=self.max_abs,
            where=self.where if self.different else {},
            relative=norm_d / norm_b if norm_b else (math.inf if norm_d else 0.0),
            rms=norm_d / math.sqrt(self.count) if self.count else 0.0,
            cosine=min(1.0, cosine),
            ulps=self.ulps.tolist(),
            not_finite=(self.not_finite[0], self.not_finite[1]),
            begins=self.begins,
            material=material[0],
            material_limit=material[1],
            threshold=threshold,
            growth=None if self.states else self._growth(),
            heat=heat.T[:, : len(self.columns)],
            columns=self.columns,
        )

    def _material(self, threshold: float) -> tuple[dict[str, str] | None, float]:
        """The first chunk (for states: sequence) and head with a row beyond the threshold."""
        for n in dict.fromkeys(n for n, _ in self.columns):
            span = slice(int(self.first_column[n]), int(self.first_column[n + 1]))
            rms = (self.sum_b[span].sum(0) / self.lens[n]).sqrt()
            beyond = self.worst_row[span].sqrt() > threshold * rms
            if bool(beyond.any()):
                c, head = (int(i) for i in beyond.nonzero()[0])
                place = {"sequence": n, "head": head} if self.states else {"sequence": n, "chunk": c, "head": head}
                return {name: str(value) for name, value in place.items()}, threshold * rms[head].item()
        return None, 0.0

    def _growth(self) -> Growth | None:
        """Weighted least squares of log(relative difference) against log(position), over all chunks."""
        d, b = self.sum_d.sum(1), self.sum_b.sum(1)
        points = [
            (math.log(first + CHUNK / 2), 0.5 * math.log(d[i] / b[i]))
            for i, (_, first) in enumerate(self.columns)
            if d[i] > 0 and b[i] > 0
        ]
        xs = {x for x, _ in points}
        if len(points) < 4 or len(xs) < 4:
            return None
        x, y = torch.tensor(points, dtype=torch.float64).T
        x, y = x - x.mean(), y - y.mean()
        power = (x * y).sum() / x.square().sum()
        spread = (y - power * x).square().sum() / (len(x) - 2) / x.square().sum()
        return Growth(power.item(), spread.sqrt().item(), len(points))


class CallDifference:
    """The differences of the outputs that two calls, a and b, both hold, a piece of their references at a time."""

    def __init__(self, references: Sequence[Reference], outputs: Sequence[Outputs]) -> None:
        self.references, self.outputs = references, outputs
        self.by_field: dict[str, Comparing] = {}
        layout = references[0].layout
        for field in ("o", "final_state"):
            tensors = [getattr(one, field) for one in outputs]
            if all(t is not None and r.fits(field, t) for t, r in zip(tensors, references, strict=True)):
                states = field != "o"
                lens = [1] * layout.dims.N if states else layout.lens
                a, b = (torch.float32 if t.dtype is torch.int16 else t.dtype for t in tensors)  # see `rows_of`
                dtypes = a, b
                self.by_field[field] = Comparing(references[0].name(field), lens, layout.dims.HV, dtypes, states)

    def add(self, pieces: Sequence[Piece]) -> None:
        """One of each call."""
        for field, comparing in self.by_field.items():
            if all(field in piece.rows for piece in pieces):
                places = [piece.rows[field].place for piece in pieces]
                a, b = (rows_of(p, one, field) for p, one in zip(places, self.outputs, strict=True))
                device = self.references[0].device
                comparing.add(places[0], a.to(device), b.to(device))

    def of(self, verdicts: Sequence[Verdict]) -> Difference | None:
        """That of the tensor that the verdicts are about; what rounding does not explain begins beyond their bounds."""
        threshold = _BEYOND * max((v.bound for v in verdicts if not math.isnan(v.bound)), default=0.0)
        for field, comparing in self.by_field.items():
            if comparing.tensor == verdicts[0].tensor:
                found = comparing.result(threshold)
                return found if field != "o" else self._with_first_token(found)
        return None

    def _with_first_token(self, difference: Difference) -> Difference:
        """With the token, in the chunk that `material` names, where it begins to be more than rounding."""
        place = difference.material
        if place is None:
            return difference
        n, chunk, head = (int(place[name]) for name in ("sequence", "chunk", "head"))
        stretch = Stretch(n, chunk * CHUNK, (chunk + 1) * CHUNK)
        each = zip(self.references, self.outputs, strict=True)
        a, b = (reference.layout.tokens(one.o, stretch)[:, head].double() for reference, one in each)
        apart = (a - b.to(a.device)).square().sum(-1).sqrt()
        token = chunk * CHUNK + int((~(apart <= difference.material_limit)).nonzero()[0])
        names = {"sequence": n, "chunk": chunk, "token": token, "head": head}
        return dataclasses.replace(difference, material={name: str(value) for name, value in names.items()})


def _ordered(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """int64 that counts the numbers of `dtype` from zero to each element."""
    bits = tensor.to(dtype).view(_INTS[dtype.itemsize]).to(torch.int64)
    sign_bit = 8 * dtype.itemsize - 1
    magnitude = bits & ((1 << sign_bit) - 1)
    return torch.where(bits < 0, -magnitude, magnitude)
