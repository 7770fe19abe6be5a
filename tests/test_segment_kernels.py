"""The scan of states between segments and the sum of outputs, each by itself, against sums in fp64.

What they are given is random; units, which the kernels find from lengths, are counted here once more, token by token.
"""

import dataclasses
import itertools

import pytest
import torch
from decode_inputs import DEVICE

from kda_kernels.triton import segment_scan
from kda_kernels.triton.segment_outputs import add_segment_outputs
from kda_kernels.triton.segment_scan import Segments, scan_segments

K, HV, SPARE, SLOTS = 128, 2, 2, 7  # SPARE: units that the workspaces have room for, and that there are not
NAN = float("nan")


@dataclasses.dataclass(frozen=True)
class Round:
    """Lengths of sequences, and what both kernels are told of them. `slots`: of a pool; None: plain states."""

    lens: list[int]
    lead: int
    segment: int
    begin: int = 0
    limit: int = 1 << 20
    slots: list[int] | None = None
    packed: bool = True
    wide: bool = False  # int64 offsets and indices
    final: bool = True  # whether final states are wanted
    null: int | None = None

    @property
    def units(self) -> list[tuple[int, list[int]]]:
        """Sequence and tokens of each, in order; tokens are counted from the sequence's first."""
        found = []
        for n, length in enumerate(self.lens):
            here = range(length)[self.begin : self.begin + self.limit][self.lead :]
            found += [(n, list(here[i : i + self.segment])) for i in range(0, len(here), self.segment)]
        return found

    @property
    def indices(self) -> torch.Tensor | None:
        return None if self.slots is None else self.ints(self.slots)

    @property
    def offsets(self) -> torch.Tensor | None:
        return self.ints([0, *itertools.accumulate(self.lens)]) if self.packed else None

    def ints(self, numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64 if self.wide else torch.int32, device=DEVICE)

    def segments(self, parts: list[torch.Tensor], final: torch.Tensor | None) -> Segments:
        """With these starts, summaries and reads, one behind the other."""
        workspace = torch.cat([part.view(torch.float32).flatten() for part in parts])
        cut = self.lead, self.segment, self.begin, self.limit
        return Segments(
            workspace, final, self.indices, self.offsets, len(self.lens), len(self.units) + SPARE, self.null, *cut
        )

    def skipped(self, n: int) -> bool:
        """Padding, or no slot of a pool of SLOTS."""
        return self.slots is not None and (not 0 <= self.slots[n] < SLOTS or self.slots[n] == self.null)


ROUNDS = {
    "one round": Round([161, 0, 33, 100, 32], 64, 32, slots=[4, 1, 0, 2, 3]),
    "the first of two": Round([161, 0, 33, 100, 96], 64, 32, 0, 96, slots=[4, 1, 0, 2, 3]),
    "the second of two": Round([161, 0, 33, 100, 96, 192], 32, 32, 96, 96),
    "nothing left": Round([90, 0, 96], 32, 32, 96, 96),
    "padding": Round([161, 100, 97], 32, 64, slots=[1, -1, 0], wide=True),
    "a null slot, and one that there is not": Round([161, 100, 97, 99], 32, 64, slots=[0, -7, 0, 7], null=0),
    "plain": Round([64, 65, 400], 64, 64, wide=True),
    "no final states": Round([64, 65, 161], 64, 32, final=False),
    "dense": Round([161] * 3, 64, 32, packed=False),
    "dense pool": Round([100] * 4, 32, 32, slots=[3, -1, 0, 1], packed=False),
    "dense, the first of two": Round([129] * 2, 32, 32, 0, 96, packed=False),
    "dense, the second of two": Round([129] * 2, 32, 32, 96, 96, packed=False),
    "dense, nothing left": Round([129] * 2, 32, 32, 192, 96, packed=False),
    "long segments": Round([700, 900], 320, 320, slots=[0, 1]),
}
all_rounds = pytest.mark.parametrize("how", ROUNDS.values(), ids=list(ROUNDS))


def normal(*shape, seed=0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


def summaries_of(end: torch.Tensor, transition: torch.Tensor) -> torch.Tensor:
    """The kernel's: E, and T in two bf16 parts in the memory of as many fp32 numbers; NaN where no unit is."""
    units = end.shape[0]
    both = torch.full((2 * (units + SPARE), HV, K, K), NAN, device=DEVICE)
    both[0 : 2 * units : 2] = end
    parts = both.view(torch.bfloat16).view(-1, HV, 2, K, K)
    upper = transition.bfloat16()
    parts[1 : 2 * units : 2, :, 0], parts[1 : 2 * units : 2, :, 1] = upper, (transition - upper).bfloat16()
    return both


@all_rounds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_scan(how, dtype, monkeypatch):
    """It writes the states before units and after sequences, with 16 bits in products, and nothing else."""
    if DEVICE == "cpu":  # fewer programs: the interpreter takes as long for a small one as for a large one
        monkeypatch.setattr(segment_scan, "BV", 64)
    N, units = len(how.lens), how.units
    end, transition = normal(len(units), HV, K, K), normal(len(units), HV, K, K, seed=1) / K**0.5
    starts = torch.full((N + len(units) + SPARE, HV, K, K), NAN, device=DEVICE)
    memory = torch.full((SLOTS, HV * K * K + 64), NAN, dtype=dtype, device=DEVICE)
    final = memory[:, 64:].view(SLOTS, HV, K, K)
    first = normal(N, HV, K, K, seed=2)
    expected: dict[int, torch.Tensor] = {}  # of starts
    finals: dict[int, torch.Tensor] = {}
    for n in range(N):
        mine = [u for u, unit in enumerate(units) if unit[0] == n]
        if not mine:
            continue
        starts[N + mine[0]] = first[n]
        state = first[n].double()
        for u in [] if how.skipped(n) else mine:
            expected[N + u] = state
            state = state @ transition[u].double() + end[u].double()
        if how.skipped(n):
            expected[N + mine[0]] = first[n].double()
        elif how.lens[n] > how.begin + how.limit:
            expected[n] = state
        elif how.final:
            finals[n if how.slots is None else how.slots[n]] = state
    both = summaries_of(end, transition)
    segments = how.segments([starts, both], final if how.final else None)
    scan_segments(segments, how.lens[0], HV)
    starts = segments.workspace[: starts.numel()].view_as(starts)
    assert set(starts.isfinite().flatten(1).all(1).nonzero().flatten().tolist()) == set(expected)
    assert sum(starts[i].isnan().all() for i in range(len(starts))) == len(starts) - len(expected)
    for i, state in expected.items():
        assert relative(starts[i], state) < 2**-15
    assert set((~final.isnan().flatten(1).all(1)).nonzero().flatten().tolist()) == set(finals)
    assert memory[:, :64].isnan().all(), "between slots"
    for slot, state in finals.items():
        assert relative(final[slot], state) < (2**-15 if dtype is torch.float32 else 2**-8)


@all_rounds
@pytest.mark.parametrize("apart", [False, True], ids=["contiguous", "heads first"])
def test_the_sum_of_outputs(how, apart):
    """It adds S r, S in bf16, to the tokens of units, rounded once, and touches no others, nor what is around them."""
    N, units = len(how.lens), how.units
    B, T = (1, sum(how.lens)) if how.packed else (N, how.lens[0])
    row, size = T * HV * K, B * T * HV * K
    memory = normal(row + size + (len(units) + SPARE) * row, seed=3, dtype=torch.bfloat16)
    o = memory[row : row + size].view((B, HV, T, K) if apart else (B, T, HV, K))
    o = o.transpose(1, 2) if apart else o
    starts = torch.full((N + len(units) + SPARE, HV, K, K), NAN, device=DEVICE)
    starts[N : N + len(units)] = normal(len(units), HV, K, K, seed=4)
    reads = torch.full(((len(units) + SPARE) * how.segment, HV, K), NAN, dtype=torch.bfloat16, device=DEVICE)
    before, expected = memory.clone(), o.double()
    edges = [0, *itertools.accumulate(how.lens)]
    for u, (n, tokens) in enumerate(units):
        at = slice(u * how.segment, u * how.segment + len(tokens))
        reads[at] = normal(len(tokens), HV, K, seed=5 + u).bfloat16() / K**0.5
        if not how.skipped(n):
            b, first = (0, edges[n]) if how.packed else (n, 0)
            where = slice(first + tokens[0], first + tokens[-1] + 1)
            rounded = starts[N + u].bfloat16().double()
            expected[b, where] += torch.einsum("thk,hvk->thv", reads[at].double(), rounded)
    untouched = expected.eq(o)
    summaries = torch.full((2 * (len(units) + SPARE), HV, K, K), NAN, device=DEVICE)
    add_segment_outputs(how.segments([starts, summaries, reads], torch.empty(SLOTS, 1, device=DEVICE)), o)
    assert same_bits(memory[:row], before[:row]) and same_bits(memory[row + size :], before[row + size :])
    torch.testing.assert_close(o.double(), expected, rtol=2**-8, atol=2**-14)
    assert torch.equal(o[untouched].double(), expected[untouched])
