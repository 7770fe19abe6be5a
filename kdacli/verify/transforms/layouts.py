"""What serving does to a tensor's memory: views that are not contiguous, pools with gaps, unaligned pointers.

Each takes `Inputs` and returns new ones that mean the same call. Memory between the elements of a view is NaN, so that
a kernel that reads there cannot hide it.
"""

import dataclasses
from typing import Any

import torch

from kda_kernels.tensors import Inputs
from kdacli.synthetic import nothing

FAR = 1 << 29  # elements between slots: from the fifth on, an offset is over 2^31


def packed_projection(inputs: Inputs) -> Inputs:
    """q, k, v as slices of one projection, and g and beta of another, or, where their dtypes differ, of two: rows are
    longer than the tensors in them.
    """
    q, k, v = _slices(inputs.q, inputs.k, inputs.v)
    together = inputs.g.dtype is inputs.beta.dtype
    g, beta = _slices(inputs.g, inputs.beta) if together else _slices(inputs.g) + _slices(inputs.beta)
    return dataclasses.replace(inputs, q=q, k=k, v=v, g=g, beta=beta)


def padded_heads(inputs: Inputs) -> Inputs:
    """q, k, v, g with 8 more elements after each head."""
    names = ("q", "k", "v", "g")
    padded: dict[str, Any] = {name: _padded(getattr(inputs, name)) for name in names}
    return dataclasses.replace(inputs, **padded)


def heads_first(inputs: Inputs) -> Inputs:
    """All token tensors stored [B, heads, T, ...] and seen through a transpose, as attention layers keep them."""
    return inputs.map_tokens(lambda t: t.transpose(1, 2).contiguous().transpose(1, 2))


def every_second_token(inputs: Inputs) -> Inputs:
    """All token tensors as every second row of twice as many; the rows between are NaN."""

    def spread(t: torch.Tensor) -> torch.Tensor:
        wide = t.new_full((t.shape[0], 2 * t.shape[1], *t.shape[2:]), torch.nan)
        return wide[:, ::2].copy_(t)

    return inputs.map_tokens(spread)


def offset(inputs: Inputs) -> Inputs:
    """Every tensor begins one element into its memory: no pointer is aligned to more than its element."""

    def moved(t: torch.Tensor) -> torch.Tensor:
        flat = t.new_full((t.numel() + 1,), torch.nan if t.is_floating_point() else -1)
        return flat[1:].view(t.shape).copy_(t)

    return inputs.map(moved)


def int64_indices(inputs: Inputs) -> Inputs:
    """cu_seqlens and state_indices as int64."""
    names = [name for name in ("cu_seqlens", "state_indices") if getattr(inputs, name) is not None]
    return dataclasses.replace(inputs, **{name: getattr(inputs, name).long() for name in names})


def pool_with_gaps(inputs: Inputs) -> Inputs:
    """A state whose slots lie further apart than they are long, as where a slot holds the convolution's state too."""
    conv = inputs.conv
    if conv is not None:
        conv = dataclasses.replace(conv, states=_spaced(conv.states, conv.states[0].numel() + 24))
    if inputs.state is None:
        return dataclasses.replace(inputs, conv=conv)
    scales = None if (s := inputs.state_scales) is None else _spaced(s, s[0].numel() + 8)
    state = _spaced(inputs.state, inputs.state[0].numel() + 64)
    return dataclasses.replace(_on_pool(inputs, state), state_scales=scales, conv=conv)


def far_pool(inputs: Inputs) -> Inputs:
    """A pool whose last slots lie over 2^31 elements from its start (gigabytes: for a GPU)."""
    assert inputs.state is not None
    return _on_pool(inputs, _spaced(inputs.state, FAR))


def _on_pool(inputs: Inputs, pool: torch.Tensor) -> Inputs:
    """With another pool, to which checkpoints go if they went to the one before."""
    kept = inputs.checkpoints
    if kept is not None and kept.states is inputs.state:
        kept = dataclasses.replace(kept, states=pool)
    return dataclasses.replace(inputs, state=pool, checkpoints=kept)


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
    flat = pool.new_full(((len(pool) - 1) * stride + size,), nothing(pool))
    return flat.as_strided(pool.shape, (stride, *pool[0].contiguous().stride())).copy_(pool)
