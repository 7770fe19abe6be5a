"""The parts of a fused step, of the arguments that engines give it: convolution and gated norm, by a dump's names.

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
        tensors["norm_gate"] = (gate.unflatten(-1, pool.shape[1:3]) if gate.ndim == 2 else gate).unsqueeze(0)
        options["norm_eps"] = eps
    return {name: tensor.detach() for name, tensor in tensors.items() if tensor is not None}, options


ARRANGEMENTS = {"vllm": vllm, "sglang": sglang}
