"""The parts of a call beside the recurrence, of the arguments that engines give it, by a dump's names: of a fused step
convolution and gated norm; of ours checkpoints too.

Nothing is copied but weights, which engines keep width by width.
"""

from collections.abc import Mapping
from typing import Any

import torch

Parts = tuple[dict[str, torch.Tensor], dict[str, Any]]  # tensors and options


def vllm(arguments: Mapping[str, Any]) -> Parts:
    """`fused_kda_decode`: weight [3, W, H K] with q, k and v of one size; conv_state a view [P, D, L]."""
    tensors = {"conv_weight": arguments["weight"].mT.flatten(0, 1), "conv_bias": arguments["bias"]}
    tensors["norm_weight"] = arguments["norm_weight"]
    return _common(
        tensors, arguments["conv_state"], arguments["state"], arguments["output_gate"], arguments["norm_eps"]
    )


def sglang(arguments: Mapping[str, Any]) -> Parts:
    """`kda_fused_decode`: a weight [W, H K] each for q, k and v; conv_states [P, L, D]."""
    weight = torch.cat([arguments[f"w_{name}_t"].mT for name in "qkv"])
    tensors = {"conv_weight": weight, "conv_bias": arguments["conv_bias"]}
    tensors["norm_weight"] = arguments["onorm_weight"]
    states = arguments["conv_states"].mT
    return _common(tensors, states, arguments["ssm_states"], arguments["onorm_g"], arguments["onorm_eps"])


def kda(arguments: Mapping[str, Any]) -> Parts:
    """Ours, `kda_step` and `kda_prefill`: the parts are objects, or None.

    Raises:
        ValueError: the convolution has slots of its own.
    """
    tensors: dict[str, torch.Tensor | None] = {}
    options: dict[str, Any] = {}
    if (conv := arguments.get("conv")) is not None:
        if conv.indices is not None:
            raise ValueError("its convolution has slots of its own, which a dump of the slots in use does not hold")
        tensors |= {"conv_weight": conv.weight, "conv_bias": conv.bias, "conv_states": conv.states}
        options["conv_tokens_first"] = conv.tokens_first
    if (norm := arguments.get("norm")) is not None:
        tensors |= {"norm_gate": _by_head(norm.gate, arguments["state"]), "norm_weight": norm.weight}
        options["norm_eps"] = norm.eps
    if (kept := arguments.get("checkpoints")) is not None:
        tensors |= {f"checkpoint_{name}": getattr(kept, name) for name in ("states", "rows", "offsets")}
        options |= {} if kept.every is None else {"checkpoint_every": kept.every}
    return {name: tensor.detach() for name, tensor in tensors.items() if tensor is not None}, options


def _common(
    tensors: dict[str, Any], states: torch.Tensor, pool: torch.Tensor, gate: torch.Tensor | None, eps: float
) -> Parts:
    """`states`: as [P, D, L]; `gate`: [N, HV, V] or [N, HV * V]; None: there is no norm."""
    tokens_first = states.stride(1) == 1
    tensors["conv_states"] = states.mT if tokens_first else states
    options: dict[str, Any] = {"conv_tokens_first": tokens_first}
    if gate is None:
        tensors["norm_weight"] = None
    else:
        tensors["norm_gate"] = _by_head(gate, pool)
        options["norm_eps"] = eps
    return {name: tensor.detach() for name, tensor in tensors.items() if tensor is not None}, options


def _by_head(gate: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
    """[B, T, HV, V] of [N, HV, V] or [N, HV * V], or of the same with two dimensions of tokens."""
    gate = gate if gate.shape[-2:] == pool.shape[1:3] else gate.unflatten(-1, pool.shape[1:3])
    return gate.unsqueeze(0) if gate.ndim == 3 else gate


ARRANGEMENTS = {"kda": kda, "vllm": vllm, "sglang": sglang}
