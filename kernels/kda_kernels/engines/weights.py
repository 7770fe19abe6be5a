"""The weight of a layer's convolution as engines keep it, tap by tap, as ours [D, W]."""

import torch


def joined(weight: torch.Tensor) -> torch.Tensor:
    """Of vLLM's and FlashInfer's [3, W, D / 3]: q, k and v, whose channels are as many."""
    return weight.mT.flatten(0, 1)


def apart(*weights: torch.Tensor) -> torch.Tensor:
    """Of SGLang's [W, channels] each of q, k and v."""
    return torch.cat([weight.mT for weight in weights])
