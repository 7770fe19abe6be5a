"""Whether the call that was timed computes: its outputs after its inputs have changed where they lie.

A kernel that remembers what it returned for an address, or a graph that holds no work, shows here. How accurate a
kernel is, `kda verify` says: the limit here is far over any rounding.
"""

import dataclasses
from collections.abc import Callable

import torch

from kda_kernels.problem import Op
from kda_kernels.reference.oracle import chunk_form, gate_cumsum
from kda_kernels.reference.stored import Stored
from kda_kernels.tensors import Convolution, Inputs, Outputs

LIMIT = 0.1  # relative error; near-collinear keys cost bf16 kernels up to 0.05
TOKENS = 1 << 15  # of each row are looked at


def change(inputs: Inputs) -> None:
    """Changes q, k, v, g and beta in place into others of the same kind: channels change places, values their sign.

    Parameters stay, since a layer's do; so does a tensor whose elements share memory.
    """
    for name in ("q", "k", "v", "g"):
        x = getattr(inputs, name)
        if not any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
            rolled = x.roll(1, -1)
            x.copy_(rolled.neg_() if name == "v" else rolled)
    if inputs.beta.shape[-1] > 1 and 0 not in inputs.beta.stride():
        inputs.beta.copy_(inputs.beta.roll(1, -1))


class Check:
    """Of the timed calls of one case, which share their inputs. Changes the inputs when made."""

    def __init__(self, inputs: Inputs, op: Op) -> None:
        change(inputs)
        self.inputs, self.op = inputs, op
        self.heads = sorted({0, inputs.v.shape[2] - 1})
        self.whole = inputs.q.shape[1] <= TOKENS
        self.expected: Outputs | None = None  # the same for all kernels, but for a pool that each of them goes on from

    def error(self, call: Callable[[], Outputs]) -> float:
        """The largest relative error of an output of `call` against the fp64 oracle, over two heads; NaN is infinite.

        Of a row of more than `TOKENS` tokens the rest is not looked at, nor the final states.
        """
        part = self._part()
        if self.expected is None or self.inputs.state_indices is not None:
            self.expected = Outputs(gate_cumsum(part)) if self.op is Op.GATE else chunk_form(part)
        found, expected = call(), self.expected
        errors = [_relative(found.o[:, :TOKENS, self.heads], expected.o)]
        if self.whole and found.final_state is not None and expected.final_state is not None:
            used = _used(part)
            scales = self.inputs.state_scales
            held = Stored(found.final_state[used], None if scales is None else scales[used])
            errors.append(_relative(held.values(torch.float64)[:, self.heads], expected.final_state[used]))
        if self.inputs.conv is not None and expected.conv_states is not None:
            kept = self.inputs.conv.by_channel[:, self._channels()].nan_to_num()
            errors.append(0.0 if torch.equal(kept, expected.conv_states.nan_to_num()) else float("inf"))
        return max(errors)

    def _channels(self) -> torch.Tensor:
        """Those of the heads, among the ones of the convolution."""
        (H, K), (HV, V) = self.inputs.q.shape[2:], self.inputs.v.shape[2:]
        own = [head * H // HV for head in self.heads]
        starts = [*(h * K for h in own), *((H + h) * K for h in own)]
        spans = [range(at, at + K) for at in starts]
        spans += [range(at, at + V) for at in (2 * H * K + head * V for head in self.heads)]
        return torch.tensor([c for span in spans for c in span], device=self.inputs.q.device)

    def _part(self) -> Inputs:
        """The inputs of the heads, and of the first tokens. Copies, so that the call may write to the state."""
        x, HV = self.inputs, self.inputs.v.shape[2]
        own = [head * x.q.shape[2] // HV for head in self.heads]
        conv, norm = x.conv, x.norm
        if conv is not None:
            at = self._channels()
            bias = None if conv.bias is None else conv.bias[at]
            conv = Convolution(conv.weight[at], bias, conv.by_channel[:, at].contiguous(), conv.indices)
        if norm is not None:
            norm = dataclasses.replace(norm, gate=norm.gate[:, :TOKENS, self.heads])
        tokens = {"q": own, "k": own, "v": self.heads, "g": self.heads, "beta": self.heads}
        return dataclasses.replace(
            x,
            **{name: getattr(x, name)[:, :TOKENS, heads] for name, heads in tokens.items()},
            A_log=None if x.A_log is None else x.A_log.reshape(HV)[self.heads],
            dt_bias=None if x.dt_bias is None else x.dt_bias.reshape(HV, -1)[self.heads],
            state=None if x.state is None else x.state[:, self.heads],
            state_scales=None if x.state_scales is None else x.state_scales[:, self.heads],
            cu_seqlens=None if x.cu_seqlens is None else x.cu_seqlens.clamp(max=TOKENS),
            cu_seqlens_cpu=None,
            token_states=None,
            token_state_indices=None,
            checkpoints=None,
            workspace=None,
            conv=conv,
            norm=norm,
        )


def _used(inputs: Inputs) -> torch.Tensor | slice:
    """The slots whose states are somebody's; of a plain state all."""
    slots = inputs.state_indices
    if slots is None or inputs.state is None:
        return slice(None)
    used = slots[(slots >= 0) & (slots < inputs.state.shape[0])].long()
    return used if inputs.null_slot is None else used[used != inputs.null_slot]


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    size, off = expected.norm().item(), (found.double() - expected).norm().item()
    return float("inf") if off != off else off / size if size else off
