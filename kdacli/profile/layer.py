"""What KDA costs a whole model: one layer's time, times its KDA layers."""

from collections.abc import Mapping, Sequence
from typing import Any

from kdacli.presets import PRESETS


def costs(model: str, tp: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Adds up a record's rows, each of which is one layer's kernel on one of `tp` GPUs.

    Counted is the KDA operation alone, from q, k, v, g and beta to o and the state: no projection, convolution or norm
    around it, no other kind of layer, and nothing that the GPUs tell each other.

    Returns:
        model, tp, kda_layers, layers, and rows of op, gates, kernel, tokens, layer_us, ms (all KDA layers), low_ms,
        high_ms (95% confidence) and tokens_per_ms (of a prefill its tokens, of a decode step one a sequence).
    """
    preset = PRESETS[model]
    found = []
    for row in rows:
        if "error" in row:
            continue
        tokens = sum(row["problem"]["seq_lens"])
        low, ms, high = (preset.kda_layers * row[key] / 1e3 for key in ("low_us", "median_us", "high_us"))
        found.append(
            {
                "op": row["op"],
                "gates": row["gates"],
                "kernel": row["kernel"],
                "tokens": tokens,
                "layer_us": row["median_us"],
                "ms": ms,
                "low_ms": low,
                "high_ms": high,
                "tokens_per_ms": tokens / ms,
            }  # fmt: skip
        )
    return {"model": model, "tp": tp, "kda_layers": preset.kda_layers, "layers": preset.layers, "rows": found}
