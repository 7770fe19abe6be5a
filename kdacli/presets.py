"""The KDA layers of published models, so that `--model kimi-k3 --tp 8` stands for a shape."""

import dataclasses

from kda_kernels.errors import InputError
from kda_kernels.problem import SAFE_BOUND, Gate


@dataclasses.dataclass(frozen=True)
class Preset:
    """One model's KDA layers.

    Attributes:
        heads: query/key heads, and value heads as many, of the whole model.
        head_dim: K and V.
        gate, lower_bound: the gate's activation, as in `kda_kernels.problem.Options`.
        kda_layers, layers: KDA layers, and layers in all.
    """

    heads: int
    head_dim: int
    gate: Gate
    lower_bound: float | None
    kda_layers: int
    layers: int

    def heads_per_gpu(self, tp: int) -> int:
        """Heads left on one of `tp` tensor-parallel GPUs. Raises `InputError` unless `tp` divides them."""
        if tp < 1 or self.heads % tp:
            raise InputError("--tp", f"is {tp}", f"it should divide the model's {self.heads} heads")
        return self.heads // tp


# Sources. Kimi-Linear: `linear_attn_config` in the config.json of Kimi-Linear-48B-A3B-Instruct (32 heads of 128, 20
# of 27 layers). Kimi K3: our own documents; Megatron-Bridge's tests quote its config.json (96 heads of 128,
# `gate_lower_bound` -5). GLM-5.3-Flash: the defaults of `Glm5NextConfig` in SGLang 0.5.23 (64 heads of 128, 45 layers
# of which each fourth has no KDA); vLLM's tests of its tensor parallelism quote its config.json (`gate_lower_bound`
# -5). Ling-3.0-flash: the same of vLLM's `BailingMoeV3TextConfig` (42 layers, the last of each six without KDA) and
# of pull request 63 of AtomicBot-ai/atomic-llama-cpp-turboquant (`kda_lower_bound` -5; 35 KDA layers), 32 heads of
# 128.
PRESETS = {
    "kimi-k3": Preset(96, 128, Gate.SAFE, SAFE_BOUND, 69, 93),
    "kimi-linear": Preset(32, 128, Gate.SOFTPLUS, None, 20, 27),
    "glm-5.3-flash": Preset(64, 128, Gate.SAFE, SAFE_BOUND, 34, 45),
    "ling-3.0-flash": Preset(32, 128, Gate.SAFE, SAFE_BOUND, 35, 42),
}
