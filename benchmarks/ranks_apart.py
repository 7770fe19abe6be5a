"""GPU time of each rank of a context-parallel prefill by itself, one after another on one GPU: what ranks compute.

    python3 -m benchmarks.ranks_apart [-T TOKENS] [-H HEADS] [--ranks R ...] [--triton-config N] [--json FILE]

The process group is one of torch's that exchanges nothing: a gather gives a rank its own summary again, and a state
from the rank before is zeros, which take as long. So times lack the exchange and what ranks wait for each other, and
the slowest rank is the least that all take together. `ours` is cut by `balanced_cuts`, `ours, chained` and FLA's (with
--triton-config, in that configuration of its kernels, not tuned) in equal parts. Medians in us: of calls on an idle
GPU, and ahead, the mean of six in a row; `init` gates.
"""

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from kda_kernels.parallel import context, even_cuts, prefill
from kda_kernels.parallel.balance import balanced_cuts
from kda_kernels.problem import SAFE_BOUND, Gate, Op, Options, Problem
from kda_kernels.triton.runtime import multiprocessors
from kdacli import autotuning, output
from kdacli.benchmark import ready
from kdacli.parallel.timing import Done, Row, Timed, flas, ours
from kdacli.provenance import collect

SECONDS = 0.1


def _own(everyone: torch.Tensor, mine: torch.Tensor, *group: Any, **how: Any) -> Done:
    everyone.view(-1, mine.numel()).copy_(mine.view(1, -1))
    return Done()


def _nothing(state: torch.Tensor, *rank: Any) -> Done:
    state.zero_()
    return Done()


@contextlib.contextmanager
def _without_exchange() -> Iterator[None]:
    with (
        mock.patch.object(dist, "all_gather_into_tensor", _own),  # FLA's
        mock.patch.object(context, "agree"),
        mock.patch.object(context, "start_send", return_value=Done()),
        mock.patch.object(prefill, "start_gather", _own),
        mock.patch.object(prefill, "start_receive", _nothing),
    ):
        yield


def rows_of(rank: int, ranks: int, T: int, heads: int, config: int | None) -> list[Row]:
    """What there is to time of one rank; config: of FLA's, which is left out without one."""
    safe = Options(gate=Gate.SAFE, lower_bound=SAFE_BOUND)
    problem = Problem(Op.PREFILL, (T,), H=heads, HV=heads, pool_slots=1, options=safe)
    timed = Timed(problem, {"gates": "init", "keys": "random", "seed": rank}, SECONDS)
    cuts = balanced_cuts(T, ranks, heads, multiprocessors(torch.device("cuda", torch.cuda.current_device())))
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        with _without_exchange():
            rows = [ours(timed, cuts, None)]
            if ranks > 1:
                rows.append(ours(timed, even_cuts(T, ranks), None, chained=True))
            if config is not None:
                autotuning.take(config)
                rows.append(flas(f"fla, configuration {config}", timed, dist.group.WORLD))
    finally:
        dist.destroy_process_group()
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-T", type=int, default=1 << 20, help="tokens of all ranks")
    parser.add_argument("-H", type=int, default=12, help="heads")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--triton-config", type=int, help="FLA's, too, in this configuration")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--force", action="store_true", help="overwrite the file")
    given = parser.parse_args()
    ready(given.json, given.force)
    found = []
    for ranks in given.ranks:
        for rank in sorted({0, 1, ranks - 1} & set(range(ranks))):  # those between are like the second
            for row in rows_of(rank, ranks, given.T, given.H, given.triton_config):
                exchanged = ("exchange_us", "exposed_us", "exchange_bytes")  # there was none
                said = {name: value for name, value in dataclasses.asdict(row).items() if name not in exchanged}
                found.append({"rank": rank, **said})
                cells = f"{row.kernel:20} rank {rank} of {ranks}: {row.parts[rank]:8} tokens"
                print(f"{cells} {row.median_us:9.1f} us, ahead {row.ahead_us:9.1f}", flush=True)
    if given.json:
        head = {"schema": "kda.ranks-apart/1", "provenance": collect(0), "tokens": given.T, "heads": given.H}
        output.write_json({**head, "rows": found}, given.json, given.force)


if __name__ == "__main__":
    main()
