#!/usr/bin/env python3
"""Host time of eager calls as serving makes them: lengths, or the batch, change at every call.

\b
    python3 benchmarks/host_time.py                          prefill and decode, 12, 32 and 96 heads, with the peers
    python3 benchmarks/host_time.py --op decode --heads 96 --no-peers --json host.json

Timed is what a call keeps the CPU, with the GPU idle before it. Of the shapes "queued" nothing waits: calls follow each
other as layers do. `kda_prefill` and `kda_decode` are called as an engine does, on a pool and with `out`; kernels by
name as `kda profile` calls them, their outputs allocated, but peers without the check that their adapter makes. All run
in one process, in turns; with them `beta.add_(0)`, which says what one launch by torch costs there, and a loop of 2000
steps of plain Python, which says at what pace the CPU runs: hosts have been seen to take twice as long for minutes.
"""

import dataclasses
import functools
import itertools
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import click
import torch

from kda_kernels.api import kda_decode, kda_prefill
from kda_kernels.errors import one_line
from kda_kernels.problem import SAFE_BOUND, Gate, Op, Options, Problem
from kda_kernels.registry import Kernel
from kda_kernels.tensors import Inputs
from kdacli import autotuning, output, provenance
from kdacli.benchmark import ready
from kdacli.profile.cases.select import candidates
from kdacli.profile.measuring.timing import Statistics
from kdacli.synthetic import make_inputs

TOKENS, SEQUENCES, BATCH = 8192, 6, 128  # at most: of a prefill call, packed in it, of a decode step
TURN = 20  # calls of a row before the next one's; in the first turn they warm up
LIMIT_S = 20.0  # for the calls of one row, of which each may compile
OPS = (Op.PREFILL.value, Op.DECODE.value)
SHAPES = {Op.PREFILL: ("same", "length", "packed"), Op.DECODE: ("same", "batch", "queued")}
TOKEN_NAMES = ("q", "k", "v", "g", "beta")


@dataclasses.dataclass(frozen=True)
class Row:
    """Microseconds of `calls` calls; `shapes` says how they differ from each other."""

    op: str
    heads: int
    shapes: str
    kernel: str
    calls: int = 0
    p50_us: float | None = None
    p90_us: float | None = None
    max_us: float | None = None
    error: str | None = None


def lengths(shapes: str, calls: int, tokens: int) -> list[list[int]]:
    """Of the sequences of each call: none comes twice, but for the shapes "same". The longest and the shortest come
    first, while calls warm up: between them they compile what any length takes."""
    draw = random.Random(0)
    if shapes == "same":
        return [[tokens // 2]] * calls
    if shapes == "length":
        return [[n] for n in (tokens, 1, *draw.sample(range(2, tokens), min(calls, tokens) - 2))]
    cuts = [sorted(draw.sample(range(1, tokens + 1), draw.randint(1, SEQUENCES))) for _ in range(calls)]
    return [[end - begin for begin, end in itertools.pairwise([0, *ends])] for ends in cuts]


def prefill_calls(heads: int, shapes: str, calls: int, tokens: int = TOKENS, device: str = "cuda") -> Iterator[Inputs]:
    """Packed, with the safe gate; on a pool."""
    options = Options(Gate.SAFE, SAFE_BOUND)
    most = make_inputs(Problem(Op.PREFILL, (tokens,), heads, heads, options=options, pool_slots=1), device=device)
    pool = most.state.repeat(SEQUENCES, 1, 1, 1)
    for lens in lengths(shapes, calls, tokens):
        ends = torch.tensor([0, *itertools.accumulate(lens)], dtype=torch.int32)
        part = {name: getattr(most, name)[:, : sum(lens)] for name in TOKEN_NAMES}
        slots = torch.arange(len(lens), dtype=torch.int32, device=device)
        yield dataclasses.replace(
            most, **part, state=pool, state_indices=slots, cu_seqlens=ends.to(device), cu_seqlens_cpu=ends
        )


def decode_calls(heads: int, shapes: str, calls: int, batch: int = BATCH, device: str = "cuda") -> Iterator[Inputs]:
    """One token per sequence, with what SGLang's kernel takes: the softplus gate and its parameters in bf16."""
    problem = Problem(
        Op.DECODE, (1,) * batch, heads, heads, packed=False, pool_slots=batch, param_dtype="bfloat16",
        options=Options(Gate.SOFTPLUS),
    )  # fmt: skip
    most = make_inputs(problem, device=device)
    sizes = [batch // 2] * calls if shapes == "same" else random.Random(0).choices(range(1, batch + 1), k=calls)
    for n in sizes if shapes == "same" else [batch, 1, *sizes[2:]]:
        yield dataclasses.replace(most, **{name: getattr(most, name)[:n] for name in (*TOKEN_NAMES, "state_indices")})


def as_an_engine(inputs: Inputs, out: torch.Tensor) -> Callable[[], object]:
    """`kda_prefill` or `kda_decode`, told by keywords what an engine knows; `out` has room for the largest call.

    Parameters have one dimension, as vLLM's layers have them.
    """
    q, k, v, g, beta, pool, slots = (getattr(inputs, name) for name in (*TOKEN_NAMES, "state", "state_indices"))
    assert inputs.A_log is not None and inputs.dt_bias is not None
    A_log, bias, bound = inputs.A_log.flatten(), inputs.dt_bias.flatten(), inputs.options.lower_bound
    ends, on_host, o = inputs.cu_seqlens, inputs.cu_seqlens_cpu, out[: v.shape[0], : v.shape[1]]
    if ends is None:
        return lambda: kda_decode(
            q, k, v, g, beta, state=pool, state_indices=slots, A_log=A_log, dt_bias=bias, lower_bound=bound, out=o
        )
    return lambda: kda_prefill(
        q, k, v, g, beta, state=pool, state_indices=slots, A_log=A_log, dt_bias=bias, lower_bound=bound,
        cu_seqlens=ends, cu_seqlens_cpu=on_host, out=o,
    )  # fmt: skip


def python_loop() -> None:
    n = 0
    for i in range(2000):
        n += i & 3


def times_us(calls: list[Callable[[], object]], wait: Callable[[], object], until: float) -> list[float]:
    """Of each call, as many as begin before the clock is at `until`."""
    times = []
    for call in calls:
        if time.monotonic() > until:
            break
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) / 1e3)
        wait()
    return times


@dataclasses.dataclass
class _Timed:
    """One row on its way. Attributes: wait: after each call. left: seconds that its calls may still take."""

    shapes: str
    kernel: str
    caller: Callable[[Inputs], Callable[[], object]]
    wait: Callable[[], object]
    times_us: list[float] = dataclasses.field(default_factory=list)
    left: float = LIMIT_S
    error: str | None = None

    def turn(self, inputs: list[Inputs], counts: bool) -> None:
        """A call of each of the inputs, whose times are kept if it `counts`."""
        begin = time.monotonic()
        try:
            with torch.inference_mode():
                found = times_us([self.caller(x) for x in inputs], self.wait, begin + self.left)
        except Exception as error:  # a peer may raise anything
            self.error = one_line(error, 200)
            return
        self.times_us += found if counts else []
        self.left -= time.monotonic() - begin

    def row(self, op: Op, heads: int) -> Row:
        said = self.error or (None if self.times_us else f"the first {TURN} calls took more than {LIMIT_S:.0f} s")
        if said is not None:
            return Row(op, heads, self.shapes, self.kernel, error=said)
        about, most = Statistics.of(self.times_us), max(self.times_us)
        return Row(op, heads, self.shapes, self.kernel, len(self.times_us), about.median_us, about.p90_us, most)


def measure(op: Op, heads: int, inputs: dict[str, list[Inputs]], kernels: list[Kernel]) -> Iterator[Row]:
    """Of the calls of each shapes, as many of one as of another: the public function, one launch of torch's, a loop of
    Python's, then the kernels that can. The pace of a machine changes: a turn goes through all rows."""
    from kda_kernels.checks import problem_of

    largest = max(itertools.chain(*inputs.values()), key=lambda x: x.v.numel())
    out = torch.empty(largest.v.shape, dtype=largest.v.dtype, device=largest.v.device)
    callers = {
        f"kda_{op}": lambda x: as_an_engine(x, out),
        "torch add_": lambda x: functools.partial(x.beta.add_, 0),
        "python loop": lambda x: python_loop,
    }
    for kernel in kernels:
        if kernel.unsupported(problem_of(largest, op)) is None:
            callers[kernel.name] = lambda x, kernel=kernel: functools.partial(kernel.run, x)
            if not kernel.ours:  # no engine checks a call before a peer does
                vars(kernel.code).update(check_inputs=lambda inputs: None)
    synchronize = torch.cuda.synchronize if out.is_cuda else lambda: None
    rows = [
        _Timed(shapes, name, caller, (lambda: None) if shapes == "queued" else synchronize)
        for shapes, (name, caller) in itertools.product(inputs, callers.items())
    ]
    for first in range(0, max(map(len, inputs.values())), TURN):
        for row in [row for row in rows if row.error is None]:
            row.turn(inputs[row.shapes][first:][:TURN], first > 0)
            if row.error is None:
                synchronize()
    for row in rows:
        yield row.row(op, heads)


@click.command(help=__doc__)
@click.option("--op", "ops", type=click.Choice(OPS), multiple=True, default=OPS)
@click.option("--heads", type=click.IntRange(1), multiple=True, default=(12, 32, 96))
@click.option("--shapes", type=click.Choice([*SHAPES[Op.PREFILL], *SHAPES[Op.DECODE][1:]]), multiple=True)
@click.option("--calls", type=click.IntRange(2), default=200, show_default=True)
@click.option("--kernel", "names", multiple=True, help="Beside the public functions only these, not all there are.")
@click.option("--no-peers", is_flag=True)
@click.option("--untuned", is_flag=True, help="Autotuned Triton kernels take their first configuration.")
@click.option("--json", "dest", metavar="FILE")
@click.option("--force", is_flag=True, help="Overwrite the file.")
def main(
    ops: tuple[str, ...],
    heads: tuple[int, ...],
    shapes: tuple[str, ...],
    calls: int,
    names: tuple[str, ...],
    no_peers: bool,
    untuned: bool,
    dest: str | None,
    force: bool,
) -> None:
    ready(dest, force)
    if untuned:
        autotuning.take_first()
    stderr, rows = dest == "-", list[Row]()
    record = {"schema": "kda.host-time/1", "provenance": provenance.collect(0), "rows": rows}
    output.say(f"{'':40} {'calls':>6} {'p50 us':>9} {'p90 us':>9} {'max us':>9}", stderr=stderr)
    for row in rows_of(map(Op, ops), heads, shapes, calls, names, peers=not no_peers):
        times = " ".join(f"{output.fmt_us(us):>9}" for us in (row.p50_us, row.p90_us, row.max_us))
        name = f"{row.op} H={row.heads} {row.shapes:7} {row.kernel}"
        output.say(f"{name:40} {row.calls:>6} {times}  {row.error or ''}".rstrip(), stderr=stderr)
        rows.append(row)
        if dest and not stderr:  # as it grows: a run that is cut short keeps what it has
            output.write_json(record, dest, force)
            force = True
    if stderr:
        output.write_json(record, "-")


def rows_of(
    ops: Iterable[Op], heads: Iterable[int], wanted: Sequence[str], calls: int, names: Sequence[str], peers: bool
) -> Iterator[Row]:
    for op, H in itertools.product(ops, heads):
        kernels = [kernel for kernel in candidates([op], names, peers) if kernel.op is op]
        make = prefill_calls if op is Op.PREFILL else decode_calls
        shapes = [one for one in SHAPES[op] if not wanted or one in wanted]
        yield from measure(op, H, {one: list(make(H, one, calls + TURN)) for one in shapes}, kernels)


if __name__ == "__main__":
    main()
