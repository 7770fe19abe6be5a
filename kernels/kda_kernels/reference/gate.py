"""The activations that turn what a model hands over into what the recurrence takes, in any floating dtype.

softplus gate   g -> -exp(A_log) * softplus(g + dt_bias)
safe gate       g -> lower_bound * sigmoid(exp(A_log) * (g + dt_bias))
beta            logit -> sigmoid(logit), times 2 with allow_neg_eigval
q, k            x -> x * rsqrt(sum x^2 + 1e-6)
"""

from collections.abc import Callable
from typing import Any

import torch

from kda_kernels.problem import Gate, Options

L2NORM_EPS = 1e-6


def log_decay(
    g: torch.Tensor,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    options: Options,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """The log decay (natural log, <= 0) of every token and channel.

    Args:
        g: raw gates, or log decays when `options.gate` is none; [..., HV, K].
        A_log: HV elements in any shape. None (safe gate only) stands for zeros.
        dt_bias: [HV * K] or [HV, K]. None stands for zeros.
        dtype: of the arithmetic and the result.

    Returns:
        [..., HV, K] in `dtype`.
    """
    HV, K = g.shape[-2:]
    x = g.to(dtype)
    if options.gate is Gate.NONE:
        return x
    if dt_bias is not None:
        x = x + dt_bias.to(dtype).reshape(HV, K)
    rate = x.new_ones(HV, 1) if A_log is None else gate_rate(A_log, dtype).reshape(HV, 1)
    return _FORMS[options.gate](x, rate, options.lower_bound)


def gate_rate(A_log: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """exp(A_log), at most the largest number there is: infinity times a gate of 0 would be NaN."""
    return A_log.to(dtype).exp().clamp(max=torch.finfo(dtype).max)


def softplus(x: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(x)), exact to the dtype for every x (torch's own turns linear at x = 20, e^-20 too early)."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


_FORMS: dict[Gate, Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]] = {
    Gate.SOFTPLUS: lambda x, rate, bound: -rate * softplus(x),
    Gate.SAFE: lambda x, rate, bound: bound * torch.sigmoid(rate * x),
}


def beta_values(beta: torch.Tensor, options: Options, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """beta in `dtype` from its logit or its value, same shape."""
    beta = beta.to(dtype)
    if not options.beta_is_logit:
        return beta
    return torch.sigmoid(beta) * (2 if options.allow_neg_eigval else 1)


def l2norm(x: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last dimension, in `dtype`."""
    x = x.to(dtype)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2NORM_EPS)
