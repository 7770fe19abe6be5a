"""GPU time of the KDA part of SGLang's and vLLM's own layers, with their kernels and with ours.

    python -m benchmarks.engine_layers SOURCES [FILE]

SOURCES holds the Python files of the wheels, unpacked: vllm/, sglang/. What runs is what tests/engine_layers.py says:
from behind the projections to behind (vLLM) or before (SGLang) the gated norm, Kimi K3's 12 heads on one of 8 GPUs.
Medians in us, of a decode as the replay of a CUDA graph, of a prefill as an eager call, as engines run them, and as a
graph ("graph"), which leaves out the time of the host; the L2 cache is emptied before each.
"""

import contextlib
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from kdacli.provenance import collect
from tests import engine_layers
from tests.engine_layers import Batch, Run

CASES = {
    "decode N=8": Batch((1,) * 8, decode=True),
    "decode N=64": Batch((1,) * 64, decode=True),
    "fused decode N=8": Batch((1,) * 8, decode=True, fused=True),
    "fused decode N=64": Batch((1,) * 64, decode=True, fused=True),
    "verify N=16, 4 tokens": Batch(drafts=4, accepted=(2,) * 16),
    "prefill T=8192": Batch((8192,)),
    "prefill 16 x 512": Batch((512,) * 16),
}


def median_us(call: Callable[[], object], rounds: int = 30) -> float:
    """Of `call`, with the L2 cache emptied before it."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(rounds):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def timed(run: Run, graph: bool) -> float:
    for _ in range(3):
        run.go()
    torch.cuda.synchronize()
    if not graph:
        return median_us(run.go)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run.go()
    return median_us(captured.replay)


def main(root: Path, file: str | None) -> None:
    rows = []
    for engine in ("vllm", "sglang"):
        with engine_layers.load(engine, root):
            if engine == "sglang" and (reason := engine_layers.sglang_cuda(root)) is not None:
                print(f"SGLang's fused step cannot be built: {reason}", file=sys.stderr)
            for bound, (name, batch) in itertools.product((-5.0, None), CASES.items()):
                row = {"engine": engine, "case": name, "gate": "softplus" if bound is None else "safe"}
                for whose in ("theirs", "ours"):
                    graph = batch.decode or bool(batch.drafts)
                    row[whose] = measured(engine, whose == "ours", batch, bound, graph)
                    if not graph:
                        row[f"{whose}, graph"] = measured(engine, whose == "ours", batch, bound, True)
                rows.append(row)
                print(row, flush=True)
                if file:
                    report = {"schema": "kda.engine-layers/1", "provenance": collect(0), "rows": rows}
                    Path(file).write_text(json.dumps(report, indent=1) + "\n")


def measured(engine: str, ours: bool, batch: Batch, bound: float | None, graph: bool) -> float | None:
    """None where a graph of it cannot be captured."""
    torch.manual_seed(0)
    with contextlib.ExitStack() as stack:
        if engine == "sglang":
            stack.enter_context(engine_layers.ours_in_sglang())
            run = engine_layers.sglang_layer(batch, ours, bound, slots=128)
        else:
            if ours:
                stack.enter_context(engine_layers.ours_in_vllm())
            run = engine_layers.k3(batch, bound, slots=128)
        try:
            return round(timed(run, graph), 1)
        except (NotImplementedError, RuntimeError) as error:
            print(f"{engine}, {'ours' if ours else 'theirs'}: {str(error).splitlines()[0]}", file=sys.stderr)
            return None


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
