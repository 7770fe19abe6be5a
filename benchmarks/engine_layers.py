"""GPU time of the KDA part of SGLang's and vLLM's own layers, with their kernels and with ours.

    python3 -m benchmarks.engine_layers SOURCES [--layer NAME] [--gate NAME] [--case NAME] [--json FILE]

SOURCES holds the Python files of the wheels, unpacked: vllm/, sglang/. What runs is what tests/engine_layers.py says:
from behind the projections to behind (vLLM's Kimi K3, all fused steps) or before the gated norm, 12 heads, Kimi K3's on
one of 8 GPUs. Medians in us, of a decode as the replay of a CUDA graph, of a prefill as an eager call, as engines run
them, and as a graph ("graph"), which leaves out the time of the host, which is "host"; the L2 cache is emptied before
each, and theirs and ours take turns, ten calls each behind three that are not timed. `apart` is how far the outputs and
the states lie apart, relative; `kernels` are those of ours that ran.
"""

import argparse
import contextlib
import dataclasses
import gc
import itertools
import shlex
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kdacli import output
from kdacli.benchmark import ready
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
    "prefill 4 x 1024, decode 8": Batch((1024,) * 4 + (1,) * 8),
    "prefill T=4096, a checkpoint": Batch((4096,), checkpoint=2048),
}
SLOTS, TURNS, CALLS = 128, 6, 10
BOUNDS = {"safe": -5.0, "softplus": None}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One of an engine's.

    Attributes:
        make: the layer's call of a batch with a gate's bound, with ours or with theirs.
        lacks: what it does not do, of Batch's features. gates: that it has.
        prompts_in_graphs: whether it can be captured with prompts, which reads nothing back from the GPU.
    """

    engine: str
    make: Callable[[Batch, float | None, bool], Run]
    lacks: tuple[str, ...] = ()
    gates: tuple[str, ...] = ("safe", "softplus")
    prompts_in_graphs: bool = True


LAYERS = {
    "vLLM, Kimi K3": Layer("vllm", lambda batch, bound, ours: engine_layers.k3(batch, bound, SLOTS)),
    "vLLM, GLM-5.3-Flash": Layer(
        "vllm", lambda batch, bound, ours: engine_layers.glm(batch, bound, SLOTS), ("fused",), ("safe",)
    ),
    "vLLM, Kimi-Linear": Layer(
        "vllm", lambda batch, bound, ours: engine_layers.kimi_linear(batch, bound, SLOTS), ("fused", "checkpoint")
    ),
    "vLLM, Ling-3.0-flash": Layer(
        "vllm",
        lambda batch, bound, ours: engine_layers.ling(batch, bound, SLOTS),
        ("fused", "checkpoint"),
        prompts_in_graphs=False,
    ),
    "SGLang": Layer("sglang", lambda batch, bound, ours: engine_layers.sglang_layer(batch, ours, bound, SLOTS)),
}


@dataclasses.dataclass
class Timed:
    """Calls of a run, each with the L2 cache emptied before it: us on the GPU from its start to its end, which include
    what the GPU waits for the host, and us of the host.
    """

    run: Run  # whose tensors a graph needs
    call: Callable[[], object]
    gpu: list[float] = dataclasses.field(default_factory=list)
    host: list[float] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, run: Run, graph: bool) -> "Timed":
        eager = cls(run, run.go)
        gc.collect()
        gc.freeze()  # what is there now is not looked through before each turn
        eager.warm()
        if not graph:
            return eager
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            run.go()
        return cls(run, captured.replay)

    def warm(self) -> None:
        """Calls that are not timed.

        Where ours replace an engine's functions, its sources were read just before, which leaves the host's caches cold
        and much to collect.
        """
        gc.collect()
        for _ in range(3):
            self.call()
        torch.cuda.synchronize()

    def more(self, rounds: int) -> None:
        flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        for _ in range(rounds):
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            start = time.perf_counter()
            self.call()
            self.host.append((time.perf_counter() - start) * 1e6)
            end.record()
            end.synchronize()
            self.gpu.append(begin.elapsed_time(end) * 1e3)


def main(
    root: Path, names: tuple[str, ...], gates: tuple[str, ...], file: str | None, cases: Sequence[str] = tuple(CASES)
) -> None:
    rows = []
    for gate, name in itertools.product(gates, names):
        layer = LAYERS[name]
        if gate not in layer.gates:
            continue
        with engine_layers.load(layer.engine, root):
            for case, batch in ((case, CASES[case]) for case in cases):
                if any(getattr(batch, feature) for feature in layer.lacks):
                    continue
                row = {"layer": name, "case": case, "gate": gate}
                rows.append(row | compared(layer, root, batch, BOUNDS[gate]))
                print(rows[-1], flush=True)
                if file:
                    provenance = collect(0) | {"command": command(names, gates, cases)}
                    report = {"schema": "kda.engine-layers/2", "provenance": provenance, "rows": rows}
                    output.write_json(report, file, force=True)


def command(names: Sequence[str], gates: Sequence[str], cases: Sequence[str]) -> str:
    """That makes a record of these."""
    chosen = {"--layer": (names, LAYERS), "--gate": (gates, BOUNDS), "--case": (cases, CASES)}
    flags = [
        f"{flag} {shlex.quote(x)}" for flag, (some, every) in chosen.items() if len(some) < len(every) for x in some
    ]
    return " ".join(["python3 -m benchmarks.engine_layers SOURCES", *flags, "--json FILE"])


def compared(layer: Layer, root: Path, batch: Batch, bound: float | None) -> dict[str, Any]:
    """A row: times of both, how far they lie apart; or why there is none."""
    if batch.checkpoint and layer.engine == "vllm" and (bound is None or not engine_layers.flashkda()):
        return {"note": "vLLM keeps checkpoints with FlashKDA only, which is not here or has no such gate"}
    decode = batch.decode or bool(batch.drafts)
    graphs = (True,) if decode else (False, True) if layer.prompts_in_graphs else (False,)
    row: dict[str, Any] = {}
    if reason := fused_reason(layer, root, batch):
        row["note"] = f"theirs is not their fused step: {reason}"
        if layer.engine == "sglang":  # whose model, and not the backend, then has the norm
            return row
    left: list[dict[str, torch.Tensor]] = []
    times: dict[str, dict[str, Timed]] = {}
    gc.unfreeze()
    for turn, whose in itertools.product(range(1 + TURNS), ("theirs", "ours")):  # what drifts meanwhile is in both
        try:
            with OURS[layer.engine]() if layer.engine == "sglang" or whose == "ours" else contextlib.nullcontext():
                if turn == 0:
                    unfused = whose == "theirs" and layer.engine == "vllm" and "note" in row
                    run = _first_run(layer, dataclasses.replace(batch, fused=False) if unfused else batch, bound, whose)
                    left.append(run.left)
                    row |= {"kernels": run.kernels} if run.kernels else {}
                    names = (whose, f"{whose}, graph")  # the first as engines run it
                    times[whose] = {name: Timed.of(run.run, graph) for name, graph in zip(names, graphs, strict=False)}
                    continue
                for timed in times[whose].values():
                    timed.warm()
                    timed.more(CALLS)
        except (NotImplementedError, RuntimeError) as error:
            return row | {"note": f"{whose} failed: {str(error).splitlines()[0]}"}
    for name, timed in (times["theirs"] | times["ours"]).items():
        row[name] = round(statistics.median(timed.gpu), 1)
        if name in ("theirs", "ours") and not decode:
            row[f"{name}, host"] = round(statistics.median(timed.host), 1)
    return row | {"apart": dict(apart(*left))}


class _First(NamedTuple):
    """A run, what it left, and the kernels of ours that ran."""

    run: Run
    left: dict[str, torch.Tensor]
    kernels: list[str]


def _first_run(layer: Layer, batch: Batch, bound: float | None, whose: str) -> _First:
    torch.manual_seed(0)
    run = layer.make(batch, bound, whose == "ours")
    with engine_layers.kernels_seen() as seen:
        left = run.results()
    if bool(seen) != (whose == "ours"):
        raise AssertionError(f"{whose}: of our kernels {seen or 'none'} ran")
    return _First(run, left, sorted(seen))


OURS = {"vllm": engine_layers.ours_in_vllm, "sglang": engine_layers.ours_in_sglang}


def fused_reason(layer: Layer, root: Path, batch: Batch) -> str | None:
    """Why the engine's own fused step does not run a fused batch; None if it does, or there is nothing to fuse."""
    if not batch.fused:
        return None
    return engine_layers.vllm_fused() if layer.engine == "vllm" else engine_layers.sglang_cuda(root)


def apart(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> Iterator[tuple[str, float]]:
    """Relative distances, of what is not zero everywhere."""
    for name, want in theirs.items():
        if want.any():
            distance = (ours[name].double() - want.double()).norm() / want.double().norm()
            yield name, float(f"{distance.item():.2g}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path)
    parser.add_argument("--layer", action="append", choices=tuple(LAYERS))
    parser.add_argument("--gate", action="append", choices=tuple(BOUNDS))
    parser.add_argument("--case", action="append", choices=tuple(CASES))
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--force", action="store_true", help="overwrite the file")
    given = parser.parse_args()
    ready(given.json, given.force)
    names, gates, cases = given.layer or LAYERS, given.gate or BOUNDS, given.case or CASES
    main(given.sources, tuple(names), tuple(gates), given.json, tuple(cases))
