#!/usr/bin/env python3
"""Prefill over a grid of sizes, few samples a cell: where is another kernel faster, and where does a curve stick out?

\b
    python3 benchmarks/prefill_grid.py --json grid.json                 our kernels and the peers that tune nothing
    python3 benchmarks/prefill_grid.py --kernel cute-prefill --kernel triton-prefill --gate softplus --heads 12

A cell is N packed sequences of T tokens with H heads, K = V = 128, a state that comes and goes, `bench` gates.
All cells are views of one set of tensors; a cell that needs more is left out. A time is the median of a few replays of
a CUDA graph, L2 evicted, the kernels of a cell in turns. Outputs are not checked, but for their last token's being
finite: for that, and for closer times, there is `kda profile`.
"""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import click
import torch

from kda_kernels.checks import problem_of
from kda_kernels.errors import one_line
from kda_kernels.problem import SAFE_BOUND, Gate, Op, Options, Problem
from kda_kernels.registry import Kernel
from kda_kernels.tensors import Inputs
from kdacli import output, provenance
from kdacli.benchmark import ready
from kdacli.profile.cases.select import candidates
from kdacli.profile.measuring.gpu_timer import Evictor, capture
from kdacli.synthetic import make_inputs

LENGTHS = tuple(2**i for i in range(4, 17))
HEADS = (3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)
SEQUENCES = (1, 4, 16, 64)
KERNELS = ("cute-prefill", "triton-prefill", "flashkda-prefill", "cudnn-prefill")
MOST = 1 << 25  # tokens times heads
AHEAD = 0.98  # of our time: another kernel that takes less is faster
BUMP = 1.05  # over the line through both neighbours
LARGE = 1 << 30  # elements of q
HOPELESS = 1.5  # a kernel that takes so much longer than the best is sampled twice only


class Cell(NamedTuple):
    """N sequences of T tokens, H heads."""

    T: int
    H: int
    N: int


class Grid:
    """Inputs of cells, views of one set of tensors."""

    def __init__(self, gate: str, most: int, dtype: str = "bfloat16", device: str = "cuda") -> None:
        options = Options(Gate.SAFE, SAFE_BOUND) if gate == "safe" else Options(Gate(gate))
        heads = max(HEADS)
        dtypes = {"dtype": dtype, "g_dtype": dtype, "beta_dtype": dtype}
        problem = Problem(Op.PREFILL, (most // heads,), heads, heads, options=options, **dtypes)
        self.all = make_inputs(problem, device=device)
        self.rows = {name: getattr(self.all, name).flatten()[: most // heads * heads * 128] for name in "qkvg"}
        self.beta = self.all.beta.flatten()
        self.states = torch.zeros(max(SEQUENCES) * heads * 128 * 128, device=device)
        self.most = most // heads * heads

    def inputs(self, cell: Cell) -> Inputs:
        T, H, N = cell
        tokens = N * T
        rows = {name: x[: tokens * H * 128].view(1, tokens, H, 128) for name, x in self.rows.items()}
        assert self.all.A_log is not None and self.all.dt_bias is not None
        return dataclasses.replace(
            self.all,
            **rows,
            beta=self.beta[: tokens * H].view(1, tokens, H),
            A_log=self.all.A_log.flatten()[:H],
            dt_bias=self.all.dt_bias.flatten()[: H * 128],
            state=self.states[: N * H * 128 * 128].view(N, H, 128, 128),
            cu_seqlens=torch.arange(0, tokens + 1, T, dtype=torch.int32, device=self.beta.device),
        )


def prepared(kernel: Kernel, inputs: Inputs) -> Callable[[], object]:
    """A call to time: a replay, or, of what cannot be captured, the call."""
    for _ in range(2):
        made = kernel.run(inputs)
    if not bool(made.o[:, -1].isfinite().all()):
        raise RuntimeError("the output is not finite")
    del made
    if inputs.q.numel() > LARGE:  # a graph has memory of its own
        torch.cuda.empty_cache()
    graph, _ = capture(lambda: kernel.run(inputs))
    return (lambda: kernel.run(inputs)) if graph is None else graph.launch


def sample(call: Callable[[], object], evict: Evictor) -> float:
    """Microseconds."""
    evict()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def measure(cell: Cell, inputs: Inputs, kernels: list[Kernel], samples: int, evict: Evictor) -> dict[str, Any]:
    """A row: medians by kernel, and errors."""
    problem = problem_of(inputs, Op.PREFILL)
    calls: dict[str, Callable[[], object]] = {}
    errors: dict[str, str] = {}
    for kernel in kernels:
        if (reason := kernel.unsupported(problem)) is not None:
            errors[kernel.name] = reason
            continue
        try:
            calls[kernel.name] = prepared(kernel, inputs)
        except Exception as error:  # a peer may raise anything; no memory
            errors[kernel.name] = one_line(error, 120)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(samples):
        best = min((min(x) for x in times.values() if x), default=0.0)
        for name, call in calls.items():
            if i < 2 or min(times[name]) < HOPELESS * best:
                times[name].append(sample(call, evict))
    row: dict[str, Any] = cell._asdict() | {"us": {name: round(statistics.median(x), 2) for name, x in times.items()}}
    return row | ({"errors": errors} if errors else {})


def ahead(rows: list[dict[str, Any]], ours: str) -> Iterator[str]:
    """Cells where another kernel takes less than `ours`."""
    for row in rows:
        us = row["us"]
        if ours in us:
            name = min(us, key=us.get)
            if us[name] < AHEAD * us[ours]:
                cell = f"T={row['T']} H={row['H']} N={row['N']}"
                yield f"{cell}: {ours} {us[ours]:.1f} us, {name} {us[name]:.1f} ({us[name] / us[ours]:.2f})"


def sticking_out(rows: list[dict[str, Any]], ours: str) -> Iterator[str]:
    """Cells that lie over the line through half and twice as many tokens."""
    times = {Cell(row["T"], row["H"], row["N"]): row["us"].get(ours) for row in rows}
    for cell, us in times.items():
        half, twice = (times.get(cell._replace(T=T)) for T in (cell.T // 2, cell.T * 2))
        if us and half and twice and us > BUMP * (line := half + (twice - half) / 3):
            yield f"T={cell.T} H={cell.H} N={cell.N}: {ours} {us:.1f} us, {us / line - 1:.1%} over the line"


@click.command(help=__doc__)
@click.option("--kernel", "names", multiple=True, default=KERNELS, show_default=True)
@click.option("--gate", type=click.Choice(["safe", "softplus"]), default="safe", show_default=True)
@click.option("--dtype", type=click.Choice(["bf16", "fp16"]), default="bf16", show_default=True)
@click.option("--heads", type=click.Choice(list(map(str, HEADS))), multiple=True, help="Only these.")
@click.option("--tokens", type=click.Choice(list(map(str, LENGTHS))), multiple=True, help="Only these.")
@click.option("--samples", type=click.IntRange(2), default=5, show_default=True)
@click.option("--seconds", type=float, default=600.0, show_default=True, help="No cell begins after so many.")
@click.option("--most", type=click.IntRange(16), default=MOST, show_default=True, help="Tokens times heads of a cell.")
@click.option("--json", "dest", metavar="FILE")
@click.option("--force", is_flag=True, help="Overwrite the file.")
def main(
    names: tuple[str, ...],
    gate: str,
    dtype: str,
    heads: tuple[str, ...],
    tokens: tuple[str, ...],
    samples: int,
    seconds: float,
    most: int,
    dest: str | None,
    force: bool,
) -> None:
    ready(dest, force)
    begin, rows, evict = time.monotonic(), list[dict[str, Any]](), Evictor()
    kernels = [kernel for kernel in candidates([Op.PREFILL], names, True) if kernel.op is Op.PREFILL]
    grid = Grid(gate, most, {"bf16": "bfloat16", "fp16": "float16"}[dtype])
    record = {
        "schema": "kda.prefill-grid/1",
        "provenance": provenance.collect(0),
        "gate": gate,
        "dtype": dtype,
        "rows": rows,
    }
    axes = (SEQUENCES, [int(H) for H in heads] or HEADS, [int(T) for T in tokens] or LENGTHS)
    cells = [Cell(T, H, N) for N, H, T in itertools.product(*axes) if N * T * H <= grid.most]
    cells.sort(key=lambda cell: cell.T * cell.H * cell.N)
    with torch.inference_mode():
        for cell in cells:
            if time.monotonic() - begin > seconds:
                break
            rows.append(measure(cell, grid.inputs(cell), kernels, samples, evict))
            if dest and len(rows) % 50 == 0:  # as it grows: a run that is cut short keeps what it has
                output.write_json(record, dest, force)
                force = True
    output.say(f"{len(rows)} of {len(cells)} cells in {time.monotonic() - begin:.0f} s")
    for line in (*ahead(rows, kernels[0].name), *sticking_out(rows, kernels[0].name)):
        output.say(line)
    if dest:
        output.write_json(record, dest, force)


if __name__ == "__main__":
    main()
