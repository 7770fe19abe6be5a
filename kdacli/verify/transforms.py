"""What serving does to a tensor's memory, and to its values, that no random draw would: named changes of the inputs.

Each takes `Inputs` and returns new ones that mean the same call (or, for `cut-off-gates`, a nastier one). Memory
between the elements of a view is NaN, so that a kernel that reads there cannot hide it.
"""

import dataclasses
from collections.abc import Callable

import torch

from kda_kernels.problem import Gate
from kda_kernels.tensors import Inputs

FAR = 1 << 29  # elements between slots: from the fifth on, an offset is over 2^31


def packed_projection(inputs: Inputs) -> Inputs:
    """q, k, v as slices of one projection, and g and beta of another: rows are longer than the tensors in them."""
    q, k, v = _slices(inputs.q, inputs.k, inputs.v)
    g, beta = _slices(inputs.g, inputs.beta.to(inputs.g.dtype))
    return dataclasses.replace(inputs, q=q, k=k, v=v, g=g, beta=beta)


def padded_heads(inputs: Inputs) -> Inputs:
    """q, k, v, g with 8 more elements after each head."""
    names = ("q", "k", "v", "g")
    return dataclasses.replace(inputs, **{name: _padded(getattr(inputs, name)) for name in names})


def pool_with_gaps(inputs: Inputs) -> Inputs:
    """A pool whose slots lie further apart than they are long, as where a slot holds the convolution's state too."""
    return dataclasses.replace(inputs, state=_spaced(inputs.state, inputs.state[0].numel() + 64))


def far_pool(inputs: Inputs) -> Inputs:
    """A pool whose last slots lie over 2^31 elements from its start (gigabytes: for a GPU)."""
    return dataclasses.replace(inputs, state=_spaced(inputs.state, FAR))


def cut_off_gates(inputs: Inputs) -> Inputs:
    """Gates that forget everything, beside gates that keep everything: log decays of about -1000 and of (nearly) 0.

    One token in 7 is cut off in all channels, the others in a third of theirs; the other channels keep all.
    """
    T, K = inputs.g.shape[1], inputs.g.shape[3]
    token = torch.arange(T, device=inputs.g.device).view(1, T, 1, 1)
    channel = torch.arange(K, device=inputs.g.device).view(1, 1, 1, K)
    forget = (token % 7 == 3) | ((token + channel) % 3 == 0)
    # raw gates go through an activation: +1000 is the most it can forget, -1000 the least
    low, high = (-1000.0, 0.0) if inputs.options.gate is Gate.NONE else (1000.0, -1000.0)
    g = torch.where(forget, low, high).expand(inputs.g.shape).to(inputs.g.dtype)
    return dataclasses.replace(inputs, g=g.contiguous())


TRANSFORMS: dict[str, Callable[[Inputs], Inputs]] = {
    "packed-projection": packed_projection,
    "padded-heads": padded_heads,
    "pool-with-gaps": pool_with_gaps,
    "far-pool": far_pool,
    "cut-off-gates": cut_off_gates,
}


def _slices(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors [B, T, ...] as slices of one [B, T, columns], with a few columns of NaN at the end of each row."""
    B, T = tensors[0].shape[:2]
    widths = [t.shape[2:].numel() for t in tensors]
    wide = tensors[0].new_full((B, T, sum(widths) + 16), torch.nan)
    out, start = [], 0
    for t, width in zip(tensors, widths, strict=True):
        view = wide[..., start : start + width].unflatten(-1, t.shape[2:])
        out.append(view.copy_(t))
        start += width
    return out


def _padded(t: torch.Tensor) -> torch.Tensor:
    """[..., D] as a view of [..., D + 8]."""
    wide = t.new_full((*t.shape[:-1], t.shape[-1] + 8), torch.nan)
    return wide[..., : t.shape[-1]].copy_(t)


def _spaced(pool: torch.Tensor, stride: int) -> torch.Tensor:
    """The pool with `stride` elements from slot to slot, NaN between them."""
    size = pool[0].numel()
    flat = pool.new_full(((len(pool) - 1) * stride + size,), torch.nan)
    return flat.as_strided(pool.shape, (stride, *pool[0].contiguous().stride())).copy_(pool)
