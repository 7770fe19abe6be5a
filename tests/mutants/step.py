"""The decode step and the prefill with convolution in plain torch, and faults around it, its states, and the norm."""

import dataclasses

import torch

from kda_kernels.checks import check_inputs
from kda_kernels.problem import Op
from kda_kernels.tensors import Convolution, Inputs, Outputs
from tests.mutants.table import mutant
from tests.mutants.victim import Chunked, Recurrent, Victim


class Convolving(Victim):
    """Convolution, then the recurrence on what comes out of it."""

    @torch.no_grad()
    def run(self, inputs: Inputs) -> Outputs:
        check_inputs(inputs)
        outputs = super().run(inputs if inputs.conv is None else self.convolve(inputs))
        outputs.o = self.behind(inputs, outputs.o.float()).to(inputs.v.dtype)
        return outputs

    def behind(self, inputs: Inputs, o: torch.Tensor) -> torch.Tensor:
        """What becomes of the recurrence's result, fp32."""
        return o

    def convolve(self, inputs: Inputs) -> Inputs:
        """The same call on q, k and v in fp32 as the recurrence has them; the states are shifted."""
        conv, parts = inputs.conv, (inputs.q, inputs.k, inputs.v)
        x = torch.cat([part.flatten(2) for part in parts], 2).flatten(0, 1)
        y = torch.zeros(x.shape)
        spans = self.spans(inputs)
        for n, ((start, end), slot) in enumerate(zip(spans, self.conv_slots(inputs, len(spans)), strict=True)):
            if slot < 0 or start == end:
                continue
            states = conv.states[slot] if conv.tokens_first else conv.states[slot].mT
            first = 0 if inputs.num_accepted_tokens is None else int(inputs.num_accepted_tokens[n]) - 1
            before = self.before(inputs, n, states, first, x, start)
            raw = torch.cat([before, x[start:end].float()])
            y[start:end] = self.sums(conv, raw)
            if self.shifts(inputs):
                self.shift(inputs, states, raw, y[start:end])
        sizes = [part.shape[2] * part.shape[3] for part in parts]
        named = zip("qkv", self.split(y, sizes), parts, strict=True)
        return dataclasses.replace(inputs, **{name: piece.reshape(part.shape) for name, piece, part in named})

    def split(self, y: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, ...]:
        return y.split(sizes, 1)

    def before(
        self, inputs: Inputs, n: int, states: torch.Tensor, first: int, x: torch.Tensor, start: int
    ) -> torch.Tensor:
        """The W - 1 raw tokens before a sequence's first, fp32 [W - 1, D]."""
        W = inputs.conv.weight.shape[1]
        kept = states[first : first + W - 1].float()
        return torch.zeros_like(kept) if self.starts_empty(inputs, n) else kept

    def sums(self, conv: Convolution, raw: torch.Tensor) -> torch.Tensor:
        """The convolved tokens [S, D] of W - 1 + S raw ones."""
        W = conv.weight.shape[1]
        windows = raw.unfold(0, W, 1)  # [S, D, W]
        return self.activate((windows * self.taps(conv)).sum(-1), conv)

    def taps(self, conv: Convolution) -> torch.Tensor:
        return conv.weight.float()

    def activate(self, y: torch.Tensor, conv: Convolution) -> torch.Tensor:
        y = y if conv.bias is None else y + conv.bias.float()
        return y * torch.sigmoid(y)

    def shifts(self, inputs: Inputs) -> bool:
        return inputs.update_state

    def shift(self, inputs: Inputs, states: torch.Tensor, raw: torch.Tensor, y: torch.Tensor) -> None:
        """Raw tokens, the newest last, to the first entries."""
        W = inputs.conv.weight.shape[1]
        kept = raw[-(W - 1) :] if inputs.num_accepted_tokens is None else raw[1:]
        states[: len(kept)] = kept.to(states.dtype)

    def slots(self, inputs: Inputs, n: int) -> list[int]:
        own = super().slots(inputs, n)
        if inputs.conv is None:
            return own
        named = self.named_slots(inputs, n)
        return [-1 if self.is_padding(inputs, there) else slot for slot, there in zip(own, named, strict=True)]

    def conv_slots(self, inputs: Inputs, n: int) -> list[int]:
        named = self.named_slots(inputs, n)
        return [there if slot >= 0 else -1 for slot, there in zip(self.slots(inputs, n), named, strict=True)]

    def named_slots(self, inputs: Inputs, n: int) -> list[int]:
        indices = inputs.state_indices if inputs.conv.indices is None else inputs.conv.indices
        if indices is None:
            return list(range(n))
        return (indices if indices.ndim == 1 else indices[:, 0])[:n].tolist()


class Step(Convolving, Recurrent):
    """Convolution, recurrence, norm, one after the other."""

    op = Op.STEP

    def behind(self, inputs: Inputs, o: torch.Tensor) -> torch.Tensor:
        return o if inputs.norm is None else self.normed(inputs, o)

    def normed(self, inputs: Inputs, o: torch.Tensor) -> torch.Tensor:
        live = o.abs().amax(-1, keepdim=True) > 0  # gates of padding may be NaN
        norm = inputs.norm
        size = self.mean(o.square()) + self.eps(norm.eps)
        out = o * torch.rsqrt(size) * self.weight(norm.weight) * self.gated(norm.gate.float())
        return torch.where(live, out, 0.0)

    def mean(self, squares: torch.Tensor) -> torch.Tensor:
        return squares.mean(-1, keepdim=True)

    def eps(self, eps: float) -> float:
        return eps

    def weight(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.float()

    def gated(self, gate: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(gate)


class Prompts(Convolving, Chunked):
    """A prefill behind its convolution."""


# --- the convolution


@mutant(Step, Prompts)
class TapsReversed:
    """The weight's first column is for the token itself."""

    def taps(self, conv):
        return super().taps(conv).flip(1)


@mutant(Step, Prompts)
class NotActivated:
    """There is no SiLU behind the convolution."""

    def activate(self, y, conv):
        return y if conv.bias is None else y + conv.bias.float()


@mutant(Step, Prompts)
class ConvBiasForgotten:
    """The convolution's bias is not added."""

    def activate(self, y, conv):
        return super().activate(y, dataclasses.replace(conv, bias=None))


@mutant(Step, Prompts)
class BiasBehindActivation:
    """The bias is added after SiLU."""

    def activate(self, y, conv):
        made = super().activate(y, dataclasses.replace(conv, bias=None))
        return made if conv.bias is None else made + conv.bias.float()


@mutant(Step, Prompts)
class OldestTapForgotten:
    """The oldest token of the window is left out."""

    def taps(self, conv):
        taps = super().taps(conv).clone()
        taps[:, 0] = 0
        return taps


@mutant(Step, Prompts)
class KeysBeforeQueries:
    """The projection's first channels are taken for those of k."""

    def split(self, y, sizes):
        q, k, v = super().split(y, sizes)
        return k, q, v


# --- its states


@mutant(Step, Prompts)
class WindowOfZeros:
    """The window always starts with zeros."""

    def before(self, inputs, n, states, first, x, start):
        return torch.zeros_like(super().before(inputs, n, states, first, x, start))


@mutant(Step, Prompts)
class WindowNewestFirst:
    """The state's entries are taken as the newest first."""

    def before(self, inputs, n, states, first, x, start):
        return super().before(inputs, n, states, first, x, start).flip(0)


@mutant(Step, Prompts)
class WindowOfNeighbour:
    """The window reaches into the rows of the sequence before."""

    def before(self, inputs, n, states, first, x, start):
        kept = super().before(inputs, n, states, first, x, start)
        return x[start - len(kept) : start].float() if start >= len(kept) else kept


@mutant(Step, Prompts)
class OldWindowOfNew:
    """A new sequence's window holds what the slot's last user left."""

    def before(self, inputs, n, states, first, x, start):
        return super().before(dataclasses.replace(inputs, has_initial_state=None), n, states, first, x, start)


@mutant(Step)
class WindowBeforeDrafts:
    """The window starts at the first entry, however many drafts were accepted."""

    def before(self, inputs, n, states, first, x, start):
        return super().before(inputs, n, states, 0, x, start)


@mutant(Step, Prompts)
class NotShifted:
    """The states of the convolution stay as they were."""

    def shift(self, inputs, states, raw, y):
        pass


@mutant(Step, Prompts)
class ConvolvedKept:
    """The states hold convolved tokens."""

    def shift(self, inputs, states, raw, y):
        super().shift(inputs, states, torch.cat([raw[: len(raw) - len(y)], y]), y)


@mutant(Step, Prompts)
class ShiftedByOne:
    """However many tokens there are, the states are shifted by one."""

    def shift(self, inputs, states, raw, y):
        W = inputs.conv.weight.shape[1]
        super().shift(inputs, states, raw if inputs.num_accepted_tokens is not None else raw[:W], y)


@mutant(Step)
class DraftsNotKept:
    """Of drafts the newest tokens are kept only, as if all of them were accepted."""

    def shift(self, inputs, states, raw, y):
        super().shift(dataclasses.replace(inputs, num_accepted_tokens=None), states, raw, y)


@mutant(Step)
class ShiftedInVerify:
    """A verify, which leaves the pool, shifts the convolution's states."""

    def shifts(self, inputs):
        return True


@mutant(Step)
class ConvSlotsIgnored:
    """The convolution's own slots are not looked at."""

    def named_slots(self, inputs, n):
        conv = dataclasses.replace(inputs.conv, indices=None)
        found = super().named_slots(dataclasses.replace(inputs, conv=conv), n)
        return [min(slot, len(conv.states) - 1) for slot in found]


@mutant(Prompts)
class WindowOfProgram:
    """Every 32 tokens the window starts with zeros."""

    def sums(self, conv, raw):
        W = conv.weight.shape[1]
        made = super().sums(conv, raw)
        for first in range(32, len(made), 32):
            part = raw[first : first + 32 + W - 1].clone()
            part[: W - 1] = 0
            made[first : first + 32] = super().sums(conv, part)
        return made


@mutant(Prompts)
class ShortPromptsForget:
    """Behind a sequence shorter than the window the state holds zeros where older tokens belong."""

    def shift(self, inputs, states, raw, y):
        raw = raw.clone()
        raw[: len(raw) - len(y)] = 0
        super().shift(inputs, states, raw, y)


@mutant(Prompts)
class EmptyPromptsForget:
    """A sequence without tokens leaves a state of zeros."""

    def convolve(self, inputs):
        made = super().convolve(inputs)
        spans = self.spans(inputs)
        for (start, end), slot in zip(spans, self.conv_slots(inputs, len(spans)), strict=True):
            if start == end and slot >= 0:
                inputs.conv.states[slot] = 0
        return made


# --- the norm


@mutant(Step)
class NormBySum:
    """The norm is by the sum of squares, not their mean."""

    def mean(self, squares):
        return squares.sum(-1, keepdim=True)


@mutant(Step)
class NormOverHeads:
    """The norm is over all heads together."""

    def mean(self, squares):
        return squares.mean((-1, -2), keepdim=True)


@mutant(Step)
class OtherEpsilon:
    """The norm's epsilon is 1e-3."""

    def eps(self, eps):
        return 1e-3


@mutant(Step)
class NormWeightForgotten:
    """The norm has no weight."""

    def weight(self, weight):
        return torch.ones_like(weight.float())


@mutant(Step)
class GateBySilu:
    """o is multiplied with SiLU of the gate."""

    def gated(self, gate):
        return gate * torch.sigmoid(gate)


@mutant(Step)
class GateAsItIs:
    """o is multiplied with the gate itself."""

    def gated(self, gate):
        return gate
