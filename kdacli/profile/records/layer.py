"""What KDA costs a whole model: one layer's time, times its KDA layers."""

import dataclasses
from collections.abc import Sequence

from kda_kernels.problem import Op
from kdacli.presets import PRESETS
from kdacli.profile.records.row import Row, timed

UNFUSED = "sglang-chain"  # the step in kernels of their own


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """Of a prefill of so many tokens, or of a decode step of so many sequences, one token each."""

    op: str
    gates: str
    kernel: str
    tokens: int
    layer_us: float
    ms: float  # all KDA layers
    low_ms: float  # 95% confidence
    high_ms: float
    tokens_per_ms: float
    saved_ms: float | None = None  # by a fused step, of what the same step takes in kernels of their own


@dataclasses.dataclass(frozen=True)
class LayerCosts:
    """A model's, on one of `tp` GPUs; `layers` counts those that are not KDA too."""

    model: str
    tp: int
    kda_layers: int
    layers: int
    rows: list[LayerCost]


def costs(model: str, tp: int, rows: Sequence[Row]) -> LayerCosts:
    """Adds up a record's rows, each of which is one layer's kernel on one of `tp` GPUs.

    Counted is the KDA operation alone, from q, k, v, g and beta to o and the state, in the op `step` with convolution
    and gated norm: no projection around it, no other kind of layer, and nothing that the GPUs tell each other.
    """
    preset, found = PRESETS[model], []
    for row in timed(rows):
        low, ms, high = (preset.kda_layers * us / 1e3 for us in (row.low_us, row.median_us, row.high_us))
        tokens = row.problem.T
        found.append(LayerCost(row.op, row.gates, row.kernel, tokens, row.median_us, ms, low, high, tokens / ms))
    apart = {(cost.gates, cost.tokens): cost.ms for cost in found if cost.kernel == UNFUSED}
    for i, cost in enumerate(found):
        chain = apart.get((cost.gates, cost.tokens)) if cost.op == Op.STEP and cost.kernel != UNFUSED else None
        if chain is not None:
            found[i] = dataclasses.replace(cost, saved_ms=chain - cost.ms)
    return LayerCosts(model, tp, preset.kda_layers, preset.layers, found)
