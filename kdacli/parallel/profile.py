"""`kda profile --cp`: one prefill over 1, 2, 4, .. and all ranks in one run; rank 0 prints the table."""

import importlib.util
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from kda_kernels.errors import UnavailableError, one_line
from kda_kernels.parallel import even_cuts
from kda_kernels.parallel.balance import balanced_cuts
from kda_kernels.problem import Op, Problem
from kda_kernels.triton.runtime import multiprocessors
from kdacli import autotuning, options, output, provenance
from kdacli.parallel.ranks import joined, progress
from kdacli.parallel.timing import CHAINED, Row, Timed, flas, ours
from kdacli.presets import PRESETS
from kdacli.profile.tools import nvtx
from kdacli.synthetic import elements

SCHEMA = "kda.profile-cp/1"
ROOM = 0.9  # of a GPU's memory that inputs and what is made of them may take


def profile(params: Mapping[str, Any]) -> None:
    """On every rank, with the parameters of `kda profile`. Raises `UnavailableError` where there are no GPUs."""
    if not torch.cuda.is_available():
        raise UnavailableError("--cp times prefills on GPUs, and torch finds none here")
    layer = params["layer"]
    model = {"model": layer} if layer else {}
    problem = options.problem_from({**params, **model, "gates": None, "op": None}, default_op=Op.PREFILL)
    gates = params["gates"][0] if params["gates"] else "init"
    regime = {**options.regime_from({**params, "gates": gates}), "gates": gates}
    from kda_kernels import ranges

    if nvtx.listening():  # ranges cost host time
        ranges.enable(nvtx.open_range)
    if (config := params["triton_config"]) is not None:
        autotuning.take(config)
    peer = None if params["no_peers"] else "fla" if config is None else f"fla, configuration {config}"
    with joined("cuda") as (rank, ranks):
        mine = {**regime, "seed": regime["seed"] + rank}
        rows, left_out = _rows(Timed(problem, mine, params["seconds"]), peer, rank, ranks)
        if rank:
            return
        _print(problem, gates, rows, left_out, layer, params["json_dest"] == "-")
        if params["json_dest"] is not None:
            record = {
                "schema": SCHEMA, "provenance": provenance.collect(regime["seed"]), "problem": problem.to_dict(),
                "gates": gates, "layer": layer, "rows": rows, "left_out": left_out,
            }  # fmt: skip
            output.write_json(record, params["json_dest"], params["force"])


def _rows(timed: Timed, peer: str | None, rank: int, ranks: int) -> tuple[list[Row], list[str]]:
    """Of rank 0; and what was not timed, with the reason. peer: what FLA's rows are called, if there are any."""
    rows: list[Row] = []
    left_out: list[str] = []
    room = ROOM * torch.cuda.mem_get_info()[1]
    sms = multiprocessors(torch.device("cuda", torch.cuda.current_device()))
    counts = sorted({1, ranks, *(2**i for i in range(1, ranks.bit_length()) if 2**i < ranks)})
    with progress(rank, "timing", len(counts)) as advance:
        for count in counts:
            advance(f"{count} ranks", 0)
            group = dist.new_group(list(range(count)))
            cuts = balanced_cuts(timed.problem.T, count, timed.problem.HV, sms)
            if (needed := _needed(timed.problem, cuts)) > room:
                left_out.append(f"{count} ranks: about {output.fmt_bytes(needed)} a GPU, more than there is")
            elif rank < count:
                rows += _ours(timed, cuts, group)
                if peer is not None:
                    advance(f"{peer} over {count} ranks", 0)
                    row = _flas(peer, timed, group, count)
                    if isinstance(row, Row):
                        rows.append(row)
                    else:
                        left_out.append(row)
            dist.barrier()
            advance()
    return rows, left_out


def _needed(problem: Problem, cuts: Sequence[int]) -> float:
    """Bytes of the longest part; drawing takes as much again for the largest tensor, in fp32."""
    return 3 * elements(problem) / problem.T * max(b - a for a, b in itertools.pairwise(cuts))


def _ours(timed: Timed, cuts: Sequence[int], group: dist.ProcessGroup | None) -> Iterator[Row]:
    yield ours(timed, cuts, group)
    torch.cuda.empty_cache()
    if (ranks := len(cuts) - 1) > 1:
        yield ours(timed, even_cuts(timed.problem.T, ranks), group, chained=True)
        torch.cuda.empty_cache()


def _flas(peer: str, timed: Timed, group: dist.ProcessGroup | None, ranks: int) -> Row | str:
    """Or why there is none."""
    if (reason := _no_fla(timed.problem, ranks)) is None:
        try:
            return flas(peer, timed, group)
        except Exception as error:  # a peer's failure is its own
            reason = one_line(error, 200)
        finally:
            torch.cuda.empty_cache()
    return f"{peer} over {ranks} ranks: {reason}"


def _no_fla(problem: Problem, ranks: int) -> str | None:
    from kdacli.peers import fla

    if (reason := fla.unsupported_here()) is not None:
        return reason
    if importlib.util.find_spec("fla.ops.cp") is None:
        return "this version has no fla.ops.cp"
    return f"T is {problem.T}: it should be a multiple of the ranks" if problem.T % ranks else None


def _print(problem: Problem, gates: str, rows: list[Row], left_out: list[str], layer: str | None, stderr: bool) -> None:
    alone = {row.kernel: row for row in rows if row.ranks == 1}
    layers = PRESETS[layer].kda_layers if layer else 0
    cells = []
    for row in rows:
        one = alone.get(row.kernel.removesuffix(CHAINED))
        cells.append((
            row.kernel, row.ranks, output.fmt_us(row.median_us), f"{(row.high_us - row.low_us) / row.median_us:.1%}",
            None if one is None else f"{one.median_us / row.median_us:.2f}x",
            output.fmt_us(row.ahead_us), None if one is None else f"{one.ahead_us / row.ahead_us:.2f}x",
            *((f"{row.ahead_us * (layers + row.late) / 1e3:.1f}",) if layer else ()),
        ))  # fmt: skip
    columns = ("kernel", "ranks", "us", "spread", "vs 1", "ahead us", "vs 1", *((f"ms of {layers}",) if layer else ()))
    what = f"; {layers} KDA layers of {layer}, ahead" if layer else ""
    output.console(stderr).print(output.table(f"{problem.name}, {gates} gates{what}", columns, cells))
    notes = ["us: of calls on idle GPUs. ahead: the host launches them while the GPU runs others, as in a model"]
    if any(row.late for row in rows):
        notes.append(
            "chained: a rank waits for the one before it; ranks work side by side in calls that follow each other"
        )
    notes += [
        f"{row.kernel} over {row.ranks} ranks, ahead: the exchange of {output.fmt_bytes(row.exchange_bytes)} takes"
        f" {output.fmt_us(row.exchange_us)} us alone; without it a call takes {output.fmt_us(row.exposed_us)} us less"
        for row in rows
        if row.exchange_us is not None
    ]
    for line in (*notes, *(f"not timed: {line}" for line in left_out)):
        output.say(line, stderr=stderr)
