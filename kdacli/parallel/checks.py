"""Prefills over ranks against the fp64 oracle: `kda verify --cp`, and the tests."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from kda_kernels.api import Checkpoints, chunk_kda, kda_prefill
from kda_kernels.parallel import ContextParallel, convolution_halo, even_cuts
from kda_kernels.parallel.context import part_of_batch
from kda_kernels.problem import CHUNK, Gate, Op, Options, Problem
from kda_kernels.tensors import Inputs, Outputs
from kdacli.judge import Reference, Verdict, judge
from kdacli.judge.bits import same_bits
from kdacli.synthetic import make_inputs

TOKENS = ("q", "k", "v", "g", "beta")
WIDTH = 4  # of a convolution before the prefill
SAFE, SOFTPLUS = Options(gate=Gate.SAFE, lower_bound=-5.0), Options()


@dataclasses.dataclass(frozen=True)
class Case:
    """A packed batch and where it is cut.

    Attributes:
        cuts: the first token of each rank's part, and the number of all.
        every: checkpoints at so many tokens; negative: at offsets that lie as far apart.
        fresh: every other request is new.
        dtype: of states. activations: of q, k, v and g.
        chained: see `ContextParallel`.
    """

    lens: tuple[int, ...]
    cuts: tuple[int, ...]
    options: Options = SAFE
    padding: int = 0
    every: int | None = None
    fresh: bool = False
    K: int = 16
    V: int = 16
    H: int = 1
    HV: int = 1
    dtype: str = "float32"
    activations: str = "bfloat16"
    chained: bool = False

    @property
    def ranks(self) -> int:
        return len(self.cuts) - 1

    @property
    def problem(self) -> Problem:
        return Problem(
            Op.PREFILL, self.lens, H=self.H, HV=self.HV, K=self.K, V=self.V, pool_slots=len(self.lens) + 1,
            padding=self.padding, options=self.options, state_dtype=self.dtype, dtype=self.activations,
            g_dtype=self.activations, beta_dtype=self.activations,
        )  # fmt: skip

    def inputs(self, device: str = "cpu") -> Inputs:
        """Of the whole batch, the same on every rank."""
        inputs = make_inputs(self.problem, gates="weak", seed=5, device=device)
        N = len(self.lens)
        if self.every is not None:
            step = abs(self.every)
            columns = max(self.lens) // step
            rows = torch.arange(N * columns, dtype=torch.int32, device=device).view(N, columns)
            assert inputs.state is not None  # a pool
            states = torch.zeros(N * columns, *inputs.state.shape[1:], device=device)
            at = torch.arange(step, step * columns + 1, step, dtype=torch.int32, device=device).repeat(N, 1)
            kept = Checkpoints(states, rows, every=step) if self.every > 0 else Checkpoints(states, rows, at)
            inputs = dataclasses.replace(inputs, checkpoints=kept)
        if self.fresh:
            inputs = dataclasses.replace(inputs, has_initial_state=torch.arange(N, device=device) % 2 == 1)
        return inputs

    def stateless(self, device: str) -> Inputs:
        """As FLA's object for several ranks, which knows no states."""
        problem = dataclasses.replace(self.problem, pool_slots=None, initial_state=False, final_state=False)
        return make_inputs(problem, gates="weak", seed=5, device=device)

    def context(self, rank: int) -> ContextParallel:
        """Of a rank of a group that is not there."""
        part = part_of_batch((0, *itertools.accumulate(self.lens)), self.cuts, rank)
        return ContextParallel(None, rank, self.ranks, **part, chained=self.chained)

    def halo(self, rank: int, x: torch.Tensor) -> torch.Tensor:
        """The tokens of x [T, D] before a rank's part that a convolution of `WIDTH` taps reads."""
        begin, end = self.cuts[rank : rank + 2]
        first = max(n for n in itertools.accumulate(self.lens, initial=0) if n <= begin) if begin < end else begin
        before = x[max(first, begin - WIDTH + 1) : begin]
        return torch.cat((x.new_zeros(WIDTH - 1 - len(before), x.shape[1]), before))

    def sequences(self, inputs: Inputs) -> Iterator[tuple[int, int, int]]:
        """Slot, first token and length of each."""
        starts = itertools.accumulate(self.lens, initial=0)
        yield from zip(inputs.pool[1].tolist(), starts, self.lens, strict=False)

    def owner(self, start: int, length: int) -> int:
        """The rank that has a sequence's last token."""
        return next(r for r in range(self.ranks) if self.cuts[r] < start + length <= self.cuts[r + 1])


def cases(ranks: int, device: str) -> dict[str, Case]:
    """For so many ranks: small ones for Triton's interpreter, large ones on GPUs."""
    size: dict[str, Any] = {"K": 128, "V": 128, "H": 2, "HV": 4} if device == "cuda" else {}
    unit = 1000 if device == "cuda" else 40  # tokens of a rank
    T = unit * ranks
    odd = tuple(i * T // ranks + i % 3 for i in range(ranks)) + (T,)
    hole = (*odd[: ranks // 2], *odd[ranks // 2 - 1 : ranks - 1], T)
    many = tuple(itertools.chain(*([unit // 5, 0, unit // 3, 1] for _ in range(ranks))))
    whole = sum(many)
    found = {
        "one long sequence": Case((T,), even_cuts(T, ranks), **size),
        "one long sequence, softplus": Case((T,), odd, SOFTPLUS, **size),
        "an empty rank": Case((T,), hole, **size),
        "many short sequences": Case(many, (*(i * whole // ranks for i in range(ranks)), whole), **size),
        "padding, bf16 states": Case((T // 2, T - T // 2), odd, padding=1, dtype="bfloat16", **size),
    }
    step = CHUNK * max(1, unit // CHUNK)
    long = step * ranks
    found["checkpoints"] = Case((long,), tuple(range(0, long + 1, step)), every=CHUNK, **size)
    late = (0, *(20 + step * i for i in range(1, ranks)), 20 + long)
    found["checkpoints at offsets, new requests"] = Case((20, long), late, every=-CHUNK, fresh=True, **size)
    short = (0, 20, *(20 + unit * i for i in range(1, ranks)))
    found["a part shorter than a chunk"] = Case((short[-1],), short, **size)
    for name in ("one long sequence, softplus", "many short sequences", "padding, bf16 states"):
        found[f"{name}, chained"] = dataclasses.replace(found[name], chained=True)
    found["checkpoints, chained"] = dataclasses.replace(found["checkpoints at offsets, new requests"], chained=True)
    if device == "cuda":
        found["fp16"] = Case((T,), odd, activations="float16", **size)
        found["heads that fill the GPU"] = Case((T // 3,), tuple(cut // 3 for cut in odd), K=128, V=128, H=96, HV=96)
    return found


def arguments(inputs: Inputs, **changes: Any) -> dict[str, Any]:
    """Of `kda_prefill`."""
    names = ("A_log", "dt_bias", "state", "state_indices", "has_initial_state", "checkpoints")
    given = {name: getattr(inputs, name) for name in (*TOKENS, *names)}
    return given | {"lower_bound": inputs.options.lower_bound} | changes


def part_of(inputs: Inputs, begin: int, end: int) -> dict[str, torch.Tensor]:
    return {name: getattr(inputs, name)[:, begin:end] for name in TOKENS}


def gathered(mine: Any, group: dist.ProcessGroup | None) -> list:
    """What each rank has, on all of them."""
    everyone: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


@dataclasses.dataclass(frozen=True)
class Part:
    """What a rank made: o, its pool before and after, checkpoints, and `convolution_halo` of v; on the CPU."""

    o: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    kept: torch.Tensor | None
    halo: torch.Tensor | None = None


def prefilled(case: Case, inputs: Inputs, group: dist.ProcessGroup | None, **how: Any) -> list[Part]:
    """Of each rank. A pool holds NaN wherever a rank has no business to read."""
    rank = dist.get_rank(group)
    begin, end = case.cuts[rank : rank + 2]
    local = inputs.fresh()
    pool, _ = local.pool
    for slot, start, _ in case.sequences(inputs):
        if slot >= 0 and not begin <= start < end:
            pool[slot] = float("nan")
    before = pool.clone()
    assert inputs.cu_seqlens is not None  # cases are packed
    context = ContextParallel.of(inputs.cu_seqlens, group, cuts=case.cuts, chained=case.chained, **how)
    tokens = part_of(inputs, begin, end)
    halo = convolution_halo(tokens["v"].flatten(2), context, WIDTH)
    o = kda_prefill(**arguments(local, **tokens), group=context)
    kept = None if local.checkpoints is None else local.checkpoints.states.cpu()
    return gathered(Part(o.cpu(), before.cpu(), pool.cpu(), kept, halo.cpu()), group)


def alone(inputs: Inputs) -> Outputs:
    """Of the whole batch on one rank."""
    local = inputs.fresh()
    o = kda_prefill(**arguments(local), cu_seqlens=inputs.cu_seqlens)
    return Outputs(o, local.state, checkpoints=None if local.checkpoints is None else local.checkpoints.states)


def equal_parts(ranks: int) -> Case:
    """As FLA cuts: a sequence is cut inside of chunks."""
    part = 1000
    lens = part // 2 + 1, part * ranks - part // 2 - 1
    return Case(lens, tuple(range(0, part * ranks + 1, part)), K=128, V=128)


def through_chunk_kda(case: Case, inputs: Inputs, context: Any, rank: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A rank's outputs, and the state that it returns, of `chunk_kda` with FLA's object for equal parts.

    inputs: `Case.stateless`.
    """
    tokens: dict[str, Any] = part_of(inputs, *case.cuts[rank : rank + 2])
    o, state, *_ = chunk_kda(
        **tokens, A_log=inputs.A_log, dt_bias=inputs.dt_bias, lower_bound=-5.0,
        safe_gate=True, use_gate_in_kernel=True, use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True,
        cp_context=context,
    )  # fmt: skip
    return o, state


def drop_in(case: Case, context: Any, group: dist.ProcessGroup | None, device: str) -> tuple[list[Verdict], Any]:
    """Of `chunk_kda` over ranks; and the state that it returns."""
    inputs, rank = case.stateless(device), dist.get_rank(group)
    o, state = through_chunk_kda(case, inputs, context, rank)
    whole = Outputs(torch.cat(gathered(o.cpu(), group), 1))
    return (judge(Reference(inputs, Op.PREFILL), whole) if rank == 0 else []), state


def judged(
    case: Case, inputs: Inputs, parts: list[Part], reference: Reference | None = None
) -> tuple[list[Verdict], str]:
    """Of the whole batch; and which slots were written on the wrong rank, and which halos are wrong, if any."""
    pool, wrong = inputs.pool[0].cpu().clone(), []
    for rank, part in enumerate(parts):
        if part.halo is not None and not torch.equal(part.halo, case.halo(rank, inputs.v[0].flatten(1).cpu())):
            wrong.append(f"the convolution's halo is wrong on rank {rank}")
    for slot, start, length in case.sequences(inputs):
        if slot < 0 or not length:
            continue
        owner = case.owner(start, length)
        pool[slot] = parts[owner].after[slot]
        for rank, part in enumerate(parts):
            changed = not same_bits(part.before[slot], part.after[slot])
            if changed != (rank == owner):
                wrong.append(f"slot {slot} was {'' if changed else 'not '}written on rank {rank}")
    outputs = Outputs(torch.cat([part.o for part in parts], 1), pool)
    kept = [part.kept for part in parts if part.kept is not None]
    if kept:
        outputs.checkpoints = torch.stack(kept).sum(0)  # each is on one rank, and zero on the others
    return judge(reference or Reference(inputs, Op.PREFILL), outputs), "; ".join(wrong)
