"""What kind of wrong: what a result would be if its kernel had made one of the usual mistakes.

Each mistake is a change of the inputs under which the fp64 recurrence makes what the kernel made on the real ones.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kda_kernels.problem import Gate, Op
from kda_kernels.tensors import Convolution, GatedNorm, Inputs

Change = Callable[[Inputs], Inputs | None]  # None: this mistake cannot be made on these inputs
LN2 = 0.6931471805599453


def _without_bias(inputs: Inputs) -> Inputs | None:
    return None if inputs.dt_bias is None else dataclasses.replace(inputs, dt_bias=None)


def _without_rate(inputs: Inputs) -> Inputs | None:
    return None if inputs.A_log is None else dataclasses.replace(inputs, A_log=torch.zeros_like(inputs.A_log))


def _without_gate(inputs: Inputs) -> Inputs | None:
    return _activated(inputs, torch.zeros_like(inputs.g))


def _raw_gate(inputs: Inputs) -> Inputs | None:
    return None if inputs.options.gate is Gate.NONE else _activated(inputs, inputs.g)


def _in_log2(inputs: Inputs) -> Inputs | None:
    from kda_kernels.reference.gate import log_decay

    decay = log_decay(inputs.g, inputs.A_log, inputs.dt_bias, inputs.options, torch.float32)
    return _activated(inputs, decay * LN2)


def _gate_of_next_token(inputs: Inputs) -> Inputs | None:
    return None if inputs.g.shape[1] < 2 else dataclasses.replace(inputs, g=inputs.g.roll(-1, 1))


def _gate_of_last_token(inputs: Inputs) -> Inputs | None:
    return None if inputs.g.shape[1] < 2 else dataclasses.replace(inputs, g=inputs.g.roll(1, 1))


def _other_gate(inputs: Inputs) -> Inputs | None:
    """softplus for safe, safe with the usual bound for softplus."""
    if inputs.options.gate is Gate.NONE:
        return None
    safe = inputs.options.gate is Gate.SAFE
    if safe and inputs.A_log is None:
        return None
    gate, bound = (Gate.SOFTPLUS, None) if safe else (Gate.SAFE, -5.0)
    return _options(inputs, gate=gate, lower_bound=bound)


def _no_sigmoid(inputs: Inputs) -> Inputs | None:
    return _options(inputs, beta_is_logit=False, allow_neg_eigval=False) if inputs.options.beta_is_logit else None


def _other_eigval(inputs: Inputs) -> Inputs | None:
    options = inputs.options
    return _options(inputs, allow_neg_eigval=not options.allow_neg_eigval) if options.beta_is_logit else None


def _no_norm(inputs: Inputs) -> Inputs | None:
    return _options(inputs, qk_l2norm=False) if inputs.options.qk_l2norm else None


def _extra_norm(inputs: Inputs) -> Inputs | None:
    return None if inputs.options.qk_l2norm else _options(inputs, qk_l2norm=True)


def _default_scale(inputs: Inputs) -> Inputs | None:
    return None if inputs.options.scale is None else _options(inputs, scale=None)


def _no_state(inputs: Inputs) -> Inputs | None:
    return None if inputs.state is None else dataclasses.replace(inputs, state=torch.zeros_like(inputs.state))


def _transposed_state(inputs: Inputs) -> Inputs | None:
    if inputs.state is None or inputs.state.shape[-1] != inputs.state.shape[-2]:
        return None
    return dataclasses.replace(inputs, state=inputs.state.mT.contiguous())


def _slots_in_order(inputs: Inputs) -> Inputs | None:
    if inputs.state_indices is None or inputs.state is None:
        return None
    order = torch.arange(len(inputs.state_indices), device=inputs.q.device, dtype=inputs.state_indices.dtype)
    return None if len(order) > len(inputs.state) else dataclasses.replace(inputs, state_indices=order)


def _one_sequence(inputs: Inputs) -> Inputs | None:
    """All sequences as the continuation of the first, with no state index."""
    if inputs.cu_seqlens is None or len(inputs.cu_seqlens) < 3 or inputs.state_indices is not None:
        return None
    ends = inputs.cu_seqlens[[0, -1]]
    state = None if inputs.state is None else inputs.state[:1]
    return dataclasses.replace(inputs, cu_seqlens=ends, state=state)


def _groups_interleaved(inputs: Inputs) -> Inputs | None:
    H, HV = inputs.q.shape[2], inputs.v.shape[2]
    if H in (1, HV):
        return None
    repeat = (1, 1, HV // H, 1)
    return dataclasses.replace(inputs, q=inputs.q.repeat(repeat), k=inputs.k.repeat(repeat))


def _contiguous(name: str) -> Change:
    def change(inputs: Inputs) -> Inputs | None:
        t = getattr(inputs, name)
        if t.is_contiguous():
            return None
        strides = torch.empty(t.shape, device="meta").stride()
        return dataclasses.replace(inputs, **{name: t.as_strided(t.shape, strides).nan_to_num()})

    return change


def _no_betas(inputs: Inputs) -> Inputs | None:
    return _options(dataclasses.replace(inputs, beta=torch.ones_like(inputs.beta)), beta_is_logit=False,
                    allow_neg_eigval=False)  # fmt: skip


def _conv(change: Callable[[Convolution], dict[str, torch.Tensor | None] | None]) -> Change:
    """A change of the convolution's tensors; where `change` gives None it cannot be made."""

    def changed(inputs: Inputs) -> Inputs | None:
        if inputs.conv is None or (tensors := change(inputs.conv)) is None:
            return None
        return dataclasses.replace(inputs, conv=Convolution(**{**vars(inputs.conv), **tensors}))

    return changed


def _norm(change: Callable[[GatedNorm], dict[str, Any]]) -> Change:
    def changed(inputs: Inputs) -> Inputs | None:
        norm = inputs.norm
        return None if norm is None else dataclasses.replace(inputs, norm=dataclasses.replace(norm, **change(norm)))

    return changed


_STEP: dict[str, Change] = {
    "there was no convolution": lambda i: None if i.conv is None else dataclasses.replace(i, conv=None),
    "the convolution's taps were read the other way round": _conv(lambda c: {"weight": c.weight.flip(1)}),
    "the convolution's bias was dropped": _conv(lambda c: None if c.bias is None else {"bias": None}),
    "the convolution started from zeros, not from its state": _conv(lambda c: {"states": torch.zeros_like(c.states)}),
    "the convolution's state was read newest first": _conv(
        lambda c: {"states": c.states.flip(1 if c.tokens_first else 2)}
    ),
    "there was no norm": lambda i: None if i.norm is None else dataclasses.replace(i, norm=None),
    "the norm's weight was dropped": _norm(lambda n: {"weight": torch.ones_like(n.weight)}),
    "the norm had no gate": _norm(lambda n: {"gate": torch.full_like(n.gate, 100.0)}),
}

SUSPECTS: dict[str, Change] = {
    **_STEP,
    "the incoming state was taken as zero": _no_state,
    "the incoming state was read transposed": _transposed_state,
    "state_indices were ignored: sequence n took slot n": _slots_in_order,
    "dt_bias was dropped": _without_bias,
    "A_log was dropped": _without_rate,
    "there was no decay at all": _without_gate,
    "the raw gate was taken as the log decay": _raw_gate,
    "the log decay was taken as a power of 2, not of e": _in_log2,
    "each token had the gate of the next": _gate_of_next_token,
    "each token had the gate of the one before": _gate_of_last_token,
    "the other activation of the gate was used (softplus for safe, or safe for softplus)": _other_gate,
    "beta had no sigmoid": _no_sigmoid,
    "beta was wrong by the factor 2 of allow_neg_eigval": _other_eigval,
    "beta was 1": _no_betas,
    "q and k were not normalised": _no_norm,
    "q and k were normalised although they should not be": _extra_norm,
    "the scale was K^-0.5, not what was asked": _default_scale,
    "sequences ran into one another: cu_seqlens was ignored": _one_sequence,
    "value head h took query head h % H, not h // (HV / H)": _groups_interleaved,
    **{f"{name} was read as if contiguous": _contiguous(name) for name in ("q", "k", "v", "g", "beta")},
}
_GATE_ONLY = {_without_bias, _without_rate, _without_gate, _raw_gate, _in_log2, _other_gate, _gate_of_next_token,
              _gate_of_last_token, _one_sequence, SUSPECTS["g was read as if contiguous"]}  # fmt: skip


def mistakes(inputs: Inputs, op: Op) -> Iterator[tuple[str, Inputs]]:
    """Each mistake that can be made on these inputs, and the inputs on which it would be none."""
    for what, change in SUSPECTS.items():
        if op is Op.GATE and change not in _GATE_ONLY:
            continue
        if (changed := change(inputs)) is not None:
            yield what, changed


def _activated(inputs: Inputs, g: torch.Tensor) -> Inputs:
    """The same call with `g` as its log decay."""
    none = dataclasses.replace(inputs.options, gate=Gate.NONE, lower_bound=None)
    return dataclasses.replace(inputs, g=g, A_log=None, dt_bias=None, options=none)


def _options(inputs: Inputs, **changes) -> Inputs:
    return dataclasses.replace(inputs, options=dataclasses.replace(inputs.options, **changes))
