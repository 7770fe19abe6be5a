"""The parts of a call beside the recurrence, of the arguments that engines give it, by a dump's names: of a fused step
convolution and gated norm; of ours checkpoints too.

Nothing is computed on the GPU, as a graph under capture would do it in every replay: a convolution's weight that an
engine keeps tap by tap or apart is joined when a dump is written.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

Parts = tuple[dict[str, torch.Tensor], dict[str, Any]]  # tensors and options

# What a call writes and a dump has no place for: the windows of the convolution after each draft.
NOT_HELD = ("intermediate_conv_window", "intermediate_conv_q", "intermediate_conv_k", "intermediate_conv_v")


def vllm(arguments: Mapping[str, Any]) -> Parts:
    """vLLM's `fused_kda_decode`, and FlashInfer's two, which take no bias, and of which the packed one has drafts.

    weight [3, W, H K], with q, k and v of one size; conv_state a view [P, D, L].
    """
    tensors = _weights(*arguments["weight"].mT.unbind()) | {"conv_bias": arguments.get("bias")}
    norm = arguments["output_gate"], arguments["norm_weight"], arguments["norm_eps"]
    return _common(tensors, arguments["conv_state"], arguments["state"], norm)


def sglang(arguments: Mapping[str, Any]) -> Parts:
    """`kda_fused_decode`: a weight [W, H K] each for q, k and v; conv_states [P, L, D]."""
    norm = arguments["onorm_g"], arguments["onorm_weight"], arguments["onorm_eps"]
    tensors = _weights(*(arguments[f"w_{name}_t"].mT for name in "qkv")) | {"conv_bias": arguments["conv_bias"]}
    return _common(tensors, arguments["conv_states"].mT, arguments["ssm_states"], norm)


def sglang_verify(arguments: Mapping[str, Any]) -> Parts:
    """`fused_kda_conv_gating_verify`: T tokens of each sequence; conv_weight [D, W], conv_state a view [P, D, L].

    It rounds what comes out of the convolution, as SGLang's two kernels do.

    Raises:
        ValueError: the convolution has slots of its own.
    """
    if not _same(arguments["conv_state_indices"], arguments["cache_indices"]):
        raise ValueError(_OWN_SLOTS)
    mixed, tokens = arguments["mixed_qkv"], arguments["T"]
    offsets = torch.arange(0, len(mixed) + 1, tokens, dtype=torch.int32)
    states, pool = arguments["conv_state"], arguments["ssm_states"]
    tensors, options = _common({"cu_seqlens": offsets}, states, pool, (None, None, None))
    return tensors, options | {"conv_rounded": True}


def sglang_mtp(arguments: Mapping[str, Any]) -> Parts:
    """`fused_kda_decode_mtp_dspark`: of q, k and v each has tokens [1, T, H, K], a weight [H K, W] and states
    [P, H K, L], which are slices of one pool.

    Raises:
        ValueError: the states are no such slices.
    """
    tensors = {name: arguments[f"x_{name}"] for name in "qkv"}
    tensors |= _weights(*(arguments[f"w_{name}"] for name in "qkv"))
    states = _side_by_side([arguments[f"cs_{name}"] for name in "qkv"])
    norm = arguments["onorm_gate"], arguments["onorm_weight"], arguments["onorm_eps"]
    return _common(tensors, states, arguments["recurrent_state"], norm)


def kda(arguments: Mapping[str, Any]) -> Parts:
    """Ours, `kda_step` and `kda_prefill`: the parts are objects, or None.

    Raises:
        ValueError: the convolution has slots of its own.
    """
    tensors: dict[str, torch.Tensor | None] = {}
    options: dict[str, Any] = {}
    if (conv := arguments.get("conv")) is not None:
        if conv.indices is not None:
            raise ValueError(_OWN_SLOTS)
        tensors |= {"conv_weight": conv.weight, "conv_bias": conv.bias, "conv_states": conv.states}
        options["conv_tokens_first"] = conv.tokens_first
    if (norm := arguments.get("norm")) is not None:
        tensors |= {"norm_gate": _by_head(norm.gate, arguments["state"]), "norm_weight": norm.weight}
        options["norm_eps"] = norm.eps
    if (kept := arguments.get("checkpoints")) is not None:
        tensors |= {f"checkpoint_{name}": getattr(kept, name) for name in ("states", "rows", "offsets")}
        options |= {} if kept.every is None else {"checkpoint_every": kept.every}
    return {name: tensor.detach() for name, tensor in tensors.items() if tensor is not None}, options


def _weights(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the channels of each [channels, W], for `joined`."""
    return dict(zip(WEIGHTS, (q, k, v), strict=True))


WEIGHTS = ("conv_weight.q", "conv_weight.k", "conv_weight.v")


def joined(tensors: dict[str, torch.Tensor]) -> None:
    """Puts `conv_weight` in the place of its parts, if there are any."""
    if WEIGHTS[0] in tensors:
        tensors["conv_weight"] = torch.cat([tensors.pop(name) for name in WEIGHTS])


_OWN_SLOTS = "its convolution has slots of its own, which a dump of the slots in use does not hold"


def _common(tensors: dict[str, Any], states: torch.Tensor, pool: torch.Tensor, norm: tuple[Any, Any, Any]) -> Parts:
    """`states`: as [P, D, L]; `norm`: its gate [N, HV, V] or [N, HV * V], weight and eps; Nones: there is no norm."""
    tokens_first = states.stride(1) == 1
    tensors["conv_states"] = states.mT if tokens_first else states
    options: dict[str, Any] = {"conv_tokens_first": tokens_first}
    gate, weight, eps = norm
    if gate is not None:
        tensors |= {"norm_gate": _by_head(gate, pool), "norm_weight": weight}
        options["norm_eps"] = eps
    return {name: tensor.detach() for name, tensor in tensors.items() if tensor is not None}, options


def _by_head(gate: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
    """[B, T, HV, V] of [N, HV, V] or [N, HV * V], or of the same with two dimensions of tokens."""
    gate = gate if gate.shape[-2:] == pool.shape[1:3] else gate.unflatten(-1, pool.shape[1:3])
    return gate.unsqueeze(0) if gate.ndim == 3 else gate


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether these are the same elements of one memory."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _side_by_side(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The [P, D, L] whose channels these are, one after the other."""
    first, channels = parts[0], [part.shape[1] for part in parts]
    whole = first.as_strided((first.shape[0], sum(channels), first.shape[2]), first.stride(), first.storage_offset())
    if not all(map(_same, whole.split(channels, 1), parts)):
        raise ValueError("the states of its convolution do not lie side by side")
    return whole


ARRANGEMENTS = {"kda": kda, "vllm": vllm, "sglang": sglang, "sglang_verify": sglang_verify, "sglang_mtp": sglang_mtp}
