"""Values that no random draw would give: gates, keys, betas and states at the ends of what a model can produce.

Each takes `Inputs` and returns new ones in the same shapes, dtypes and (but for g and beta) memory.
"""

import dataclasses
import math
from collections.abc import Callable

import torch

from kda_kernels.problem import Gate
from kda_kernels.tensors import Inputs

# Raw gates go through an activation: +1000 is the most that it can forget, -1000 the least (a log decay of exactly 0 in
# fp32 and fp64, through either gate and any A_log of the regimes).
FORGET, KEEP = 1000.0, -1000.0
LARGE_STATE = 1e6
HUGE, TINY, TINIEST = 3e3, 1e-4, 1e-12  # of keys: squares of fp16's largest still fit fp32; tiny ones meet the epsilon


def cut_off_gates(inputs: Inputs) -> Inputs:
    """Gates that forget everything, beside gates that keep everything: log decays of about -1000 and of (nearly) 0.

    One token in 7 is cut off in all channels, the others in a third of theirs; the other channels keep all.
    """
    token, channel = _axes(inputs)
    forget = (token % 7 == 3) | ((token + channel) % 3 == 0)
    low, high = (-1000.0, 0.0) if inputs.options.gate is Gate.NONE else (FORGET, KEEP)
    return _gates(inputs, torch.where(forget, low, high))


def forget_everything(inputs: Inputs) -> Inputs:
    """Every token forgets all that came before it, in every channel: o = scale * beta (q . k) v."""
    return _gates(inputs, torch.full((1, 1, 1, 1), -1000.0 if inputs.options.gate is Gate.NONE else FORGET))


def open_gates(inputs: Inputs) -> Inputs:
    """A decay of exactly 1 everywhere: KDA without its gate, where nothing is ever forgotten."""
    return _gates(inputs, torch.full((1, 1, 1, 1), 0.0 if inputs.options.gate is Gate.NONE else KEEP))


def mixed_gates(inputs: Inputs) -> Inputs:
    """Four kinds of channels side by side in each head: exact 1, long memory, as drawn, and 20 to 40 e-folds a token.

    Where a bound is promised for activated gates, they stay within it.
    """
    _, channel = _axes(inputs)
    options, g = inputs.options, inputs.g.float()
    if options.gate is Gate.NONE:
        strong = options.lower_bound if options.lower_bound is not None else -30.0
        keep, slow = 0.0, -1e-4
    else:
        strong, keep, slow = 30.0, KEEP, -9.0
    for kind, value in ((0, keep), (1, slow), (2, strong)):
        g = torch.where(channel % 4 == kind, value, g)
    return _gates(inputs, g)


def strong_gates(inputs: Inputs) -> Inputs:
    """Every gate near -8 or so where nothing bounds it: a chunk's sum passes -500, whose exp no fp32 holds."""
    token, channel = _axes(inputs)
    wave = 8.0 + ((token * 5 + channel * 3) % 7) / 7
    if inputs.options.gate is Gate.NONE:
        wave = -wave if inputs.options.lower_bound is None else inputs.options.lower_bound * wave / 9.0
    return _gates(inputs, wave)


def sudden_gates(inputs: Inputs) -> Inputs:
    """A long memory, of which one token in 64 leaves some e^-12: what went before may still count."""
    token, _ = _axes(inputs)
    sudden = token % 64 == 40
    if inputs.options.gate is Gate.NONE:
        return _gates(inputs, torch.where(sudden, inputs.options.lower_bound or -12.0, -1e-3))
    return _gates(inputs, torch.where(sudden, 16.0, -8.0))


def gate_range(inputs: Inputs) -> Inputs:
    """Activations over all that they are given: raw + bias from -30 to 30 in each head, exp(A_log) from 1e-3 to 200.

    beta is 0 in fp32, so that states do nothing but decay, and every digit of a decay shows in them.
    """
    if inputs.options.gate is Gate.NONE:
        return inputs
    token, channel = _axes(inputs)
    HV, K = inputs.g.shape[2:]
    head = torch.arange(HV, device=inputs.g.device).view(1, 1, HV, 1)
    share = (channel / K + 0.618034 * token + 0.37 * head) % 1.0
    bias = 0.0 if inputs.dt_bias is None else inputs.dt_bias.float().reshape(HV, K)
    low, high = math.log(1e-3), math.log(200.0)
    rates = low + (high - low) * torch.arange(HV, device=inputs.g.device) / max(HV - 1, 1)
    beta = torch.tensor(-200.0 if inputs.options.beta_is_logit else 0.0)
    found = dataclasses.replace(_gates(inputs, 60.0 * share - 30.0 - bias), beta=_like(inputs.beta, beta))
    A_log = inputs.A_log
    return found if A_log is None else dataclasses.replace(found, A_log=_like(A_log, rates.view(A_log.shape)))


def repeated_keys(inputs: Inputs) -> Inputs:
    """One key for all tokens of a head, to the bit: the chunk's matrix is as near to singular as it gets."""
    return dataclasses.replace(inputs, k=_like(inputs.k, inputs.k[:, :1]))


def zero_keys(inputs: Inputs) -> Inputs:
    """Every third key, and every fourth query, is zero: the norm's epsilon keeps 0 / 0 away."""
    token, _ = _axes(inputs)
    q, k = torch.where(token % 4 == 1, 0.0, inputs.q), torch.where(token % 3 == 1, 0.0, inputs.k)
    return dataclasses.replace(inputs, q=_like(inputs.q, q), k=_like(inputs.k, k))


def huge_keys(inputs: Inputs) -> Inputs:
    """Queries and keys of 3000 N(0,1), where the kernel normalises them: their squares do not fit into fp16."""
    return _scaled_keys(inputs, lambda token: torch.full_like(token, HUGE, dtype=torch.float32))


def tiny_keys(inputs: Inputs) -> Inputs:
    """Queries and keys so small that the norm's epsilon of 1e-6 is as large as their squares, or far larger."""
    return _scaled_keys(inputs, lambda token: torch.where(token % 5 == 4, TINIEST, TINY))


def extreme_betas(inputs: Inputs) -> Inputs:
    """betas of 1 (twice that with allow_neg_eigval), small ones, 0, 1/2, next to 1, and next to 0, in turn."""
    logits, plain = (100.0, -5.5, -100.0, 0.0, 5.0, -12.0), (1.0, 0.004, 0.0, 0.5, 0.996, 1e-5)
    values = logits if inputs.options.beta_is_logit else plain
    token, head = torch.arange(inputs.beta.shape[1]), torch.arange(inputs.beta.shape[2])
    which = (token.view(1, -1, 1) + head) % len(values)
    return dataclasses.replace(inputs, beta=_like(inputs.beta, torch.tensor(values)[which]))


def large_state(inputs: Inputs) -> Inputs:
    """An incoming state of 1e5 N(0,1), which outweighs every token and leaves the range of fp16.

    Where outputs are fp16 it is 1e3 N(0,1), so that they fit.
    """
    if inputs.state is None:
        return inputs
    by = LARGE_STATE / 100 if inputs.v.dtype is torch.float16 else LARGE_STATE
    return dataclasses.replace(inputs, state=inputs.state * by)


def scaled_heads(inputs: Inputs) -> Inputs:
    """Values and states of 1e6 and 1e-9 times the usual in turn from head to head; 1e3 and 1e-3 where v is fp16."""
    large, small = (1e3, 1e-3) if inputs.v.dtype is torch.float16 else (1e6, 1e-9)
    by = torch.where(torch.arange(inputs.v.shape[2], device=inputs.v.device) % 2 == 0, large, small)
    state = None if inputs.state is None else inputs.state * by.view(1, -1, 1, 1).to(inputs.state.dtype)
    return dataclasses.replace(inputs, v=_like(inputs.v, inputs.v.float() * by.view(1, 1, -1, 1)), state=state)


def small_values(inputs: Inputs) -> Inputs:
    """v of 1e-3 N(0,1) beside a state as usual: what is written must not drown in what is there."""
    return dataclasses.replace(inputs, v=_like(inputs.v, inputs.v.float() * 1e-3))


def _axes(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of tokens [1, T, 1, 1] and of channels [1, 1, 1, K]."""
    T, K, device = inputs.g.shape[1], inputs.g.shape[3], inputs.g.device
    return torch.arange(T, device=device).view(1, T, 1, 1), torch.arange(K, device=device).view(1, 1, 1, K)


def _gates(inputs: Inputs, g: torch.Tensor) -> Inputs:
    return dataclasses.replace(inputs, g=_like(inputs.g, g))


def _like(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """`new` in the shape and dtype of `old`, contiguous."""
    return torch.empty(old.shape, dtype=old.dtype, device=old.device).copy_(new)


def _scaled_keys(inputs: Inputs, factor: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
    """q and k times `factor(token)`; unchanged where they come normalised, since then that is a promise."""
    if not inputs.options.qk_l2norm:
        return inputs
    by = factor(_axes(inputs)[0])
    return dataclasses.replace(inputs, q=_like(inputs.q, inputs.q * by), k=_like(inputs.k, inputs.k * by))
