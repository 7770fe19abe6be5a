"""GPU time of the convolution of whole prompts: kda_conv beside what SGLang's and vLLM's layers call, and a copy.

    python3 -m benchmarks.convolution SOURCES [--json FILE]

SOURCES holds the Python files of the wheels, unpacked: vllm/, sglang/. Width 4, SiLU, bf16 tokens in rows that are
wider than q, k and v, a weight in fp32, bf16 states in a pool, of which every second sequence starts from none. vLLM's
is called for q, k and v each, as Kimi K3's layer does, SGLang's and ours once. `copy` is torch's, of as many numbers as
q, k and v have, side by side. Medians in us of replays of a CUDA graph, L2 emptied before each, all in turns, and of
the host's time for an eager call; `apart` is how far results lie from ours, relative, and `states` whether theirs are
the same bits.
"""

import argparse
import dataclasses
import importlib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kda_kernels.api import Convolution, kda_conv
from kdacli import output
from kdacli.benchmark import ready
from kdacli.profile.measuring import ceilings
from kdacli.profile.measuring.gpu_timer import GpuTimer
from kdacli.profile.measuring.timing import Budget, Statistics, interleave
from kdacli.profile.measuring.traffic import floor_us
from kdacli.provenance import collect
from tests import engine_layers

CASES = {
    "T=8192": (8192,),
    "16 x 512": (512,) * 16,
    "8 x 1000, 56 x 1": (1000,) * 8 + (1,) * 56,
    "T=1024": (1024,),
}
HEADS = (12, 96, 3)
WIDTH = 4
BUDGET = Budget(seconds=0.1, min_samples=20, max_samples=60)
Fn = Callable[[], tuple[torch.Tensor, ...]]


@dataclasses.dataclass
class Prompts:
    """Tensors of one case."""

    lens: tuple[int, ...]
    heads: int

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        N, D = len(self.lens), 3 * self.heads * 128
        self.x = engine_layers.random(sum(self.lens), D + self.heads * 128)[:, :D]
        self.weight = engine_layers.random(D, WIDTH, scale=0.5, dtype=torch.float32)
        self.states = engine_layers.random(N + 8, WIDTH - 1, D)
        self.slots = engine_layers.ints(*range(1, N + 1))
        self.has = torch.arange(N, device=self.x.device) % 2 == 0
        self.ends = engine_layers.offsets(self.lens)

    @property
    def bytes(self) -> int:
        """Each number read and written once."""
        return 4 * self.x.numel() + self.weight.nbytes + 2 * self.states[: len(self.lens)].nbytes

    def ours(self) -> tuple[torch.Tensor, ...]:
        conv = Convolution(self.weight, None, self.states, self.slots, tokens_first=True)
        return (kda_conv(self.x, conv, cu_seqlens=self.ends, has_initial_state=self.has, null_slot=0),)

    def theirs(self, module: types.ModuleType, parts: int, **more: Any) -> tuple[torch.Tensor, ...]:
        """By an engine's function, in so many calls."""
        split = zip(self.x.T.chunk(parts), self.weight.chunk(parts), self.states.mT.chunk(parts, 1), strict=True)
        return tuple(
            module.causal_conv1d_fn(
                x, weight, None, activation="silu", conv_states=states, has_initial_state=self.has,
                cache_indices=self.slots, query_start_loc=self.ends, **more,
            ).T
            for x, weight, states in split
        )  # fmt: skip


def calls(prompts: Prompts, root: Path) -> dict[str, Fn]:
    """By name; the engines' modules stay usable once they are out of sys.modules."""
    plan = types.SimpleNamespace()
    engine_layers.conv_plan(plan, prompts.lens)
    with engine_layers.load("vllm", root):
        vllm = importlib.import_module("vllm.model_executor.layers.mamba.ops.causal_conv1d")
    with engine_layers.load("sglang", root):
        sglang = importlib.import_module("sglang.kernels.ops.mamba.causal_conv1d_triton")
    source = prompts.x.contiguous()
    room = torch.empty_like(source)
    return {
        "kda_conv": prompts.ours,
        "vllm": lambda: prompts.theirs(vllm, 3, metadata=plan),
        "sglang": lambda: prompts.theirs(sglang, 1, seq_lens_cpu=list(prompts.lens)),
        "copy": lambda: (room.copy_(source),),
    }


def results(prompts: Prompts, call: Fn) -> tuple[torch.Tensor, torch.Tensor]:
    """What it returns and the states that it leaves, which are put back."""
    before = prompts.states.clone()
    made, left = torch.cat(call(), 1).double(), prompts.states.clone()
    prompts.states.copy_(before)
    return made, left


def row(case: str, heads: int, root: Path, timer: GpuTimer) -> dict[str, Any]:
    prompts = Prompts(CASES[case], heads)
    every = calls(prompts, root)
    ours, states = results(prompts, every["kda_conv"])
    found: dict[str, Any] = {"heads": heads, "case": case, "bytes": prompts.bytes, "apart": {}, "states": {}}
    for name in ("vllm", "sglang"):
        made, left = results(prompts, every[name])
        found["apart"][name] = float(f"{((made - ours).norm() / ours.norm()).item():.2g}")
        found["states"][name] = torch.equal(left, states)
    timed = {name: timer.prepare(call) for name, call in every.items()}
    samples, failed = interleave(timed, BUDGET)
    if failed:
        raise next(iter(failed.values()))
    found["us"] = {name: round(Statistics.of(some).median_us, 1) for name, some in samples.items()}
    found["host_us"] = {name: round(call.host.same_us, 1) for name, call in timed.items() if name != "copy"}
    return found


def main(root: Path, file: str | None) -> None:
    timer = GpuTimer()
    bandwidth = ceilings.measure(timer.prepare)
    rows = []
    for heads in HEADS:
        for case in CASES:
            rows.append(row(case, heads, root, timer))
            rows[-1]["floor_us"] = round(floor_us(rows[-1]["bytes"], bandwidth.inplace_gbps), 1)
            print(rows[-1], flush=True)
            if file:
                provenance = collect(0) | {"command": "python3 -m benchmarks.convolution SOURCES --json FILE"}
                report = {
                    "schema": "kda.convolution/1", "provenance": provenance,
                    "ceilings": dataclasses.asdict(bandwidth), "rows": rows,
                }  # fmt: skip
                output.write_json(report, file, force=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--force", action="store_true", help="overwrite the file")
    given = parser.parse_args()
    ready(given.json, given.force)
    main(given.sources, given.json)
