"""What a step does around the recurrence: the convolution of q, k and v with its states, and the gated norm of o."""

import torch

from kda_kernels.checks import seq_lens
from kda_kernels.feature_checks import conv_slots
from kda_kernels.tensors import Dims, GatedNorm, Inputs


def convolved(inputs: Inputs, dims: Dims, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [B, T, H, K], k and v [B, T, HV, V] as the recurrence sees them, in `dtype` where there is a convolution.

    See `Convolution`. Rows that belong to no sequence, or to padding, are zero then. In float64, which says what is
    exact, nothing is rounded.
    """
    conv = inputs.conv
    if conv is None:
        return inputs.q, inputs.k, inputs.v
    x = _channels(inputs, dims).to(dtype)
    y, weight = torch.zeros_like(x), conv.weight.to(dtype)
    for _, start, window in _windows(inputs, dims, dtype):
        n = len(window) - conv.width + 1
        sums = torch.stack([weight[:, j] * window[j : j + n] for j in range(conv.width)]).sum(0)
        sums = sums if conv.bias is None else sums + conv.bias.to(dtype)
        y[start : start + n] = sums * torch.sigmoid(sums)
    if conv.rounded and dtype != torch.float64:
        y = y.to(inputs.q.dtype).to(dtype)
    parts = y.split([dims.H * dims.K, dims.H * dims.K, dims.HV * dims.V], dim=1)
    shapes = (inputs.q.shape, inputs.k.shape, inputs.v.shape)
    q, k, v = (part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))
    return q, k, v


def shifted_states(inputs: Inputs, dims: Dims) -> torch.Tensor:
    """The states of the convolution after the call, a copy in their own dtype, exact to the bit."""
    assert (conv := inputs.conv) is not None
    states = conv.states.clone()
    by_channel = states.mT if conv.tokens_first else states
    for slot, _, window in _windows(inputs, dims, None) if inputs.update_state else ():
        kept = window[1:] if inputs.num_accepted_tokens is not None else window[1 - conv.width :]
        by_channel[slot, :, : len(kept)] = kept.T
    return states


def gated_norm(o: torch.Tensor, norm: GatedNorm, gate: torch.Tensor) -> torch.Tensor:
    """See `GatedNorm`, in the dtype of o: o and its rows of the gate, [.., V]."""
    rms = torch.rsqrt(o.square().mean(-1, keepdim=True) + norm.eps)
    return o * rms * norm.weight.to(o.dtype) * torch.sigmoid(gate.to(o.dtype))


def _channels(inputs: Inputs, dims: Dims) -> torch.Tensor:
    """[R, D]: the raw numbers of every token."""
    rows = dims.B * dims.T
    return torch.cat([x.reshape(rows, x.shape[2] * x.shape[3]) for x in (inputs.q, inputs.k, inputs.v)], 1)


def _windows(inputs: Inputs, dims: Dims, dtype: torch.dtype | None) -> list[tuple[int, int, torch.Tensor]]:
    """Of each sequence with tokens that is no padding: its slot, first row, and raw tokens [W - 1 + S, D].

    Args:
        dtype: of the tokens; None: that of the states, to which those of the call are rounded.
    """
    assert (conv := inputs.conv) is not None
    x, found, start = _channels(inputs, dims), [], 0
    accepted = None if inputs.num_accepted_tokens is None else inputs.num_accepted_tokens.tolist()
    for n, (slot, length) in enumerate(zip(conv_slots(inputs), seq_lens(inputs, dims), strict=True)):
        if slot >= 0 and length:
            first = accepted[n] - 1 if accepted else 0
            old = conv.by_channel[slot, :, first : first + conv.width - 1].T
            if inputs.has_initial_state is not None and not bool(inputs.has_initial_state[n]):
                old = torch.zeros_like(old)
            to = conv.states.dtype if dtype is None else dtype
            found.append((slot, start, torch.cat([old.to(to), x[start : start + length].to(to)])))
        start += length
    return found
