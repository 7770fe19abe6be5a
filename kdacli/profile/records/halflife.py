"""How long a call's gates remember: the half-life of every channel, in tokens, as a histogram."""

import dataclasses
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kda_kernels.tensors import Inputs

EDGES = (1, 4, 16, 64, 256, 1024, 4096, 16384)  # tokens
_TOKENS = 4096  # at most as many are looked at: the mean over a channel needs no more


@dataclasses.dataclass(frozen=True)
class HalfLives:
    """Of channels, in tokens; a channel that never forgets has an infinite one.

    Attributes:
        counts: one more than `edges`: below the first, between two, from the last on.
        tokens: how many were looked at.
    """

    edges: list[int]
    counts: list[int]
    tokens: int
    p10: float
    p50: float
    p90: float


def half_lives(inputs: "Inputs") -> HalfLives:
    """The half-lives of the HV * K channels: ln 2 over the mean of -log decay over the tokens of all sequences.

    A state decays by the product of its decays, so that the mean of their logarithms is what counts; within one channel
    the decay of single tokens may differ much.
    """
    import torch

    from kda_kernels.reference.gate import log_decay

    g = inputs.g.reshape(-1, *inputs.g.shape[-2:])
    if g.shape[0] > _TOKENS:
        g = g[torch.linspace(0, g.shape[0] - 1, _TOKENS, device=g.device).long()]
    decay = log_decay(g, inputs.A_log, inputs.dt_bias, inputs.options, torch.float32).mean(0).flatten().double().cpu()
    lives = math.log(2) / decay.clamp(max=0).abs()  # abs: a zero may come with a minus
    edges = torch.tensor(EDGES, dtype=torch.float64)
    counts = torch.bucketize(lives, edges, right=True).bincount(minlength=len(EDGES) + 1)
    ordered = lives.sort().values
    p10, p50, p90 = (float(ordered[round(q * (len(ordered) - 1))]) for q in (0.1, 0.5, 0.9))
    return HalfLives(list(EDGES), counts.tolist(), g.shape[0], p10, p50, p90)


def lines(found: HalfLives, width: int = 40) -> list[str]:
    """The histogram for a terminal, a line for each range that is not empty outside the ends."""
    names = [f"< {EDGES[0]}", *(f"{a}-{b}" for a, b in zip(EDGES, EDGES[1:], strict=False)), f">= {EDGES[-1]}"]
    counts, total = found.counts, sum(found.counts)
    there = [i for i, n in enumerate(counts) if n]
    p10, p50, p90 = (_tokens(value) for value in (found.p10, found.p50, found.p90))
    out = [
        f"Half-life of the {total} channels, in tokens: median {p50}, 10th to 90th percentile {p10} to {p90} (from "
        f"{found.tokens} tokens)."
    ]
    for i in range(there[0], there[-1] + 1):
        bar = "█" * math.ceil(width * counts[i] / max(counts))
        out.append(f"  {names[i]:>11}  {counts[i] / total:>4.0%}  {bar}".rstrip())
    return out


def _tokens(value: float) -> str:
    return f"{value:.3g}" if value < 1000 or math.isinf(value) else f"{value:.0f}"
