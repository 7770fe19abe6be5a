"""What a decode loop in a CUDA graph costs with `kda capture` in it, and whether it leaves the same bits.

    python -m benchmarks.capture [FILE]

One layer of Kimi K3's 12 heads on one of 8 GPUs, recurrence alone and fused step, with new tokens in every step: first
without a capture, then with one that writes steps 1, 10 and 100, and some later ones to time what the writing costs.
Each dump is judged by the fp64 reference. Times are medians in us of a graph's replay, with the L2 cache emptied before
it: what a step costs on top is the same whatever else the graph holds.
"""

import argparse
import dataclasses
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kda_kernels import api
from kda_kernels.problem import Op, Options, Problem
from kda_kernels.tensors import Inputs, Outputs
from kdacli import output
from kdacli.benchmark import ready
from kdacli.capture import capture
from kdacli.dumps import load
from kdacli.dumps.strides import copy_of
from kdacli.judge import Reference, judge
from kdacli.provenance import collect
from kdacli.synthetic import make_inputs

H, STEPS, ROUNDS = 12, 100, 40
CHOSEN = (1, 10, 100)
LATER = tuple(range(STEPS + 5, STEPS + ROUNDS, 10))  # written while replays are timed
CHANGING = ("q", "k", "v", "g", "beta")


@dataclasses.dataclass
class Loop:
    """A decode loop whose step is the replay of a graph.

    Attributes:
        outputs: of each step. pools: what the steps left, after all of them.
    """

    replay: Callable[[], None]
    outputs: list[torch.Tensor]
    pools: list[torch.Tensor]


def problem_of(op: Op, N: int) -> Problem:
    return Problem(op, (1,) * N, H, H, packed=False, pool_slots=N + 2, padding=1, options=Options("safe", -5.0))


def run(op: Op, N: int) -> Loop:
    x = make_inputs(problem_of(op, N), device="cuda")
    x.state.nan_to_num_(0.5)
    pools = [x.state]
    if x.conv is not None:
        pools.append(x.conv.states.nan_to_num_(0.5))
    call = decode if op is Op.DECODE else step
    call(copy_of(x, "cuda"))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = call(x)
    outputs = []
    for seed in range(STEPS):
        torch.manual_seed(seed)
        for name in CHANGING:
            getattr(x, name).normal_()
        graph.replay()
        outputs.append(o.clone())
    return Loop(graph.replay, outputs, [pool.clone() for pool in pools])


def decode(x: Inputs) -> torch.Tensor:
    return api.kda_decode(
        x.q, x.k, x.v, x.g, x.beta, state=x.state, state_indices=x.state_indices, A_log=x.A_log, dt_bias=x.dt_bias,
        lower_bound=x.options.lower_bound,
    )  # fmt: skip


def step(x: Inputs) -> torch.Tensor:
    """q, k and v of `make_inputs` are views of one projection."""
    rows = x.q.as_strided((x.N, x.conv.weight.shape[0]), (x.q.stride(0), 1))
    return api.kda_step(
        rows, x.g.squeeze(1), x.beta.squeeze(1), state=x.state, state_indices=x.state_indices, A_log=x.A_log,
        dt_bias=x.dt_bias, conv=x.conv, norm=dataclasses.replace(x.norm, gate=x.norm.gate.squeeze(1)),
        lower_bound=x.options.lower_bound,
    )  # fmt: skip


def replay_us(loop: Loop, written: Callable[[int], bool]) -> dict[int, float]:
    """The time of each replay after the first STEPS; waits for the file where one is written."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times = {}
    for number in range(STEPS + 1, STEPS + ROUNDS + 1):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        loop.replay()
        end.record()
        end.synchronize()
        times[number] = begin.elapsed_time(end) * 1e3
        ends = time.monotonic() + 10
        while not written(number) and time.monotonic() < ends:
            time.sleep(0.01)
    return times


def measured(op: Op, N: int, folder: Path) -> dict[str, Any]:
    alone = run(op, N)
    plain = replay_us(alone, lambda number: True)
    replays = (*CHOSEN, *LATER)
    with capture("kda", out=folder, skip=1, replays=replays, max_bytes=8 << 30, graph_bytes=2 << 30) as files:
        recorded = run(op, N)
        many = replay_us(recorded, lambda number: len(files) >= sum(chosen <= number for chosen in replays))
    same = all(map(torch.equal, alone.outputs + alone.pools, recorded.outputs + recorded.pools))
    shares = [share for file in sorted(files) for share in judged(file)]
    return {
        "op": str(op),
        "case": f"H={H},N={N}",
        "steps": STEPS,
        "same_bits": same,
        "dumps": sorted(load(file).meta["replay"] for file in files),
        "dump_bytes": max(file.stat().st_size for file in files),
        "largest_share_of_bound": max(shares),
        "alone_us": round(statistics.median(plain.values()), 1),
        "recorded_us": round(statistics.median(us for number, us in many.items() if number not in LATER), 1),
        "written_us": round(statistics.median(many[number] for number in LATER), 1),
    }


def judged(file: Path) -> list[float]:
    """How much of its bound each output of a dump uses; infinite where it does not pass."""
    dump = load(file)
    outputs = Outputs(**{name: tensor.cuda() for name, tensor in dump.outputs.tensors().items()})
    verdicts = judge(Reference(copy_of(dump.inputs, "cuda"), dump.op), outputs, partial=True)
    return [v.error / v.bound if v.bound else 0.0 for v in verdicts if v.passed] + [
        float("inf") for v in verdicts if not v.passed
    ]


def main(file: str | None) -> bool:
    """Whether all bits were the same, and all dumps there and within their bounds."""
    rows = []
    for op, N in itertools.product((Op.DECODE, Op.STEP), (8, 64)):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measured(op, N, Path(folder) / "dumps"))
        print(rows[-1], flush=True)
        if file:
            provenance = collect(0) | {"command": "python3 -m benchmarks.capture FILE"}
            report = {"schema": "kda.capture/1", "provenance": provenance, "rows": rows}
            output.write_json(report, file, force=True)
    wanted = sorted((*CHOSEN, *LATER))
    return all(row["same_bits"] and row["dumps"] == wanted and row["largest_share_of_bound"] <= 1 for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", help="where the record goes")
    parser.add_argument("--force", action="store_true", help="overwrite the file")
    given = parser.parse_args()
    ready(given.file, given.force)
    sys.exit(not main(given.file))
