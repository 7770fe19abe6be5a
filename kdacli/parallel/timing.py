"""One prefill over ranks, timed on all of them together."""

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from kda_kernels.api import kda_prefill
from kda_kernels.parallel import ContextParallel, exchange
from kda_kernels.parallel import prefill as over_ranks
from kda_kernels.problem import Problem
from kda_kernels.tensors import Inputs
from kdacli.synthetic import make_inputs

WARM_UP, LEAST, MOST = 3, 10, 1000  # calls
CHAINED = ", chained"  # what the names of rows end in
IN_A_ROW = 6  # calls that follow each other, as layers do, behind one that is not timed


@dataclasses.dataclass(frozen=True)
class Timed:
    """What rows are of: a problem, how `make_inputs` draws it, and seconds of calls that a median is of."""

    problem: Problem
    regime: dict[str, Any]
    seconds: float

    def inputs(self, tokens: int) -> Inputs:
        """So many tokens of it on this GPU, as one sequence with room for the states of all."""
        N = self.problem.N
        local = dataclasses.replace(self.problem, seq_lens=(tokens,), pool_slots=N, packed=True, padding=0)
        inputs = make_inputs(local, **self.regime, device="cuda")
        return dataclasses.replace(inputs, state_indices=torch.arange(N, dtype=torch.int32, device="cuda"))


@dataclasses.dataclass(frozen=True)
class Row:
    """A prefill over ranks, or on one GPU; times are those of the slowest rank, us.

    Attributes:
        parts: tokens of each rank.
        median_us: of calls on idle GPUs. ahead_us: of calls that the host launches while the GPU runs those before, as
            layers follow each other.
        low_us, high_us: quartiles.
        exchange_us: the gather of summaries by itself, ahead. exposed_us: by how much a call ahead is faster where no
            rank waits for another's summary; it holds what ranks differ by.
        exchange_bytes: that each rank receives.
        late: calls by which the last rank is behind the first, where states go from rank to rank.
    """

    kernel: str
    tokens: int
    heads: int
    ranks: int
    parts: tuple[int, ...]
    median_us: float
    low_us: float
    high_us: float
    samples: int
    ahead_us: float
    exchange_us: float | None = None
    exposed_us: float | None = None
    exchange_bytes: int = 0
    late: int = 0


def times_of(
    call: Callable[[], Any], group: dist.ProcessGroup | None, seconds: float, in_a_row: int = 1
) -> list[float]:
    """us of each call on the slowest rank of the group, whose ranks begin together; or the mean of so many in a row."""
    device, alone = torch.device("cuda", torch.cuda.current_device()), dist.get_world_size(group) == 1
    ready, found, total = torch.ones(1, device=device), [], 0.0
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for i in range(MOST):
        if not alone:
            dist.all_reduce(ready, op=dist.ReduceOp.MAX, group=group)
        if in_a_row > 1:
            call()
        begin.record()
        for _ in range(in_a_row):
            call()
        end.record()
        end.synchronize()
        took = torch.tensor([1e3 * begin.elapsed_time(end) / in_a_row], device=device, dtype=torch.float64)
        if not alone:
            dist.all_reduce(took, op=dist.ReduceOp.MAX, group=group)
        if i >= WARM_UP:
            found.append(took.item())
            total += found[-1] * in_a_row
        if len(found) >= LEAST and total > seconds * 1e6:
            break
    return found


class Done:
    """An exchange that was none."""

    def wait(self) -> None:
        pass


def _no_gather(everyone: torch.Tensor, mine: torch.Tensor, group: Any) -> Done:
    return Done()


def ours(timed: Timed, cuts: Sequence[int], group: dist.ProcessGroup | None, chained: bool = False) -> Row:
    """Of this package, cut at `cuts`. chained: see `ContextParallel`."""
    problem, ranks, rank = timed.problem, len(cuts) - 1, dist.get_rank(group)
    ends = [0, *itertools.accumulate(problem.seq_lens)]
    inputs = timed.inputs(cuts[rank + 1] - cuts[rank])
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "state", "state_indices")
    given: dict[str, Any] = {name: getattr(inputs, name) for name in names}
    given |= {"out": torch.empty_like(inputs.v), "lower_bound": inputs.options.lower_bound}
    if ranks == 1:
        given["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32, device="cuda")
    else:
        given["group"] = ContextParallel.of(ends, group, cuts=cuts, chained=chained)

    def call() -> None:
        kda_prefill(**given)

    times = [times_of(call, group, timed.seconds, many) for many in (1, IN_A_ROW)]
    row = _row(f"ours{CHAINED}" if chained else "ours", problem, cuts, *times)
    if chained:
        return dataclasses.replace(row, late=ranks - 1)
    if ranks == 1:
        return row
    (HV, V), K = inputs.v.shape[2:], inputs.q.shape[3]
    summary = torch.zeros(HV, V + K, K, device="cuda")
    everyone = summary.new_empty((ranks, *summary.shape))

    def gather() -> None:
        exchange.wait(exchange.start_gather(everyone, summary, group))

    alone = statistics.median(times_of(gather, group, 0.05, IN_A_ROW))
    with mock.patch.object(over_ranks, "start_gather", _no_gather):
        without = statistics.median(times_of(call, group, timed.seconds, IN_A_ROW))
    return dataclasses.replace(
        row, exchange_us=alone, exposed_us=row.ahead_us - without, exchange_bytes=everyone.nbytes
    )


def flas(name: str, timed: Timed, group: dist.ProcessGroup | None) -> Row:
    """Of FLA's chunk_kda, whose parts are equally long, without states. Raises ImportError where there is none."""
    from fla.ops.cp import build_cp_context
    from fla.ops.kda import chunk_kda

    from kdacli.peers import fla

    problem, ranks = timed.problem, dist.get_world_size(group)
    part = problem.T // ranks
    inputs = dataclasses.replace(timed.inputs(part), state=None, state_indices=None, cu_seqlens=None)
    options = {**fla.options_of(inputs), "safe_gate": fla.safe_gate(inputs), "state_v_first": False}
    ends = torch.tensor([0, *itertools.accumulate(problem.seq_lens)], dtype=torch.int32, device="cuda")
    if ranks > 1:
        options["cp_context"] = build_cp_context(ends, group)
    else:
        options["cu_seqlens"] = ends
    tokens = (inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta)

    def call() -> None:
        chunk_kda(*tokens, **options)

    with torch.no_grad():
        times = [times_of(call, group, timed.seconds, many) for many in (1, IN_A_ROW)]
    return _row(name, problem, range(0, problem.T + 1, part), *times)


def _row(kernel: str, problem: Problem, cuts: Sequence[int], times: list[float], ahead: list[float]) -> Row:
    low, median, high = statistics.quantiles(times, n=4)
    parts = tuple(b - a for a, b in itertools.pairwise(cuts))
    size = problem.T, problem.HV, len(parts), parts
    return Row(kernel, *size, median, low, high, len(times), statistics.median(ahead))
