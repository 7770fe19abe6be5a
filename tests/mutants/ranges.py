"""Faults at the ends of what a kernel is given: gates, rates, biases, values, sizes, counts."""

import dataclasses

import torch

from kda_kernels.problem import Gate
from kda_kernels.tensors import Outputs
from tests.mutants.table import mutant
from tests.mutants.victim import Chunked, GateStage, Recurrent


@mutant(Recurrent, Chunked, GateStage)
class SoftplusLinearAboveFour:
    """softplus is its argument from 4 on, where it is 0.018 more."""

    def softplus(self, x):
        return torch.where(x > 4, x, super().softplus(x))


@mutant(Recurrent, Chunked, GateStage)
class SoftplusLinearAboveEight:
    """softplus is its argument from 8 on, where it is 0.0003 more."""

    def softplus(self, x):
        return torch.where(x > 8, x, super().softplus(x))


@mutant(Recurrent, Chunked, GateStage)
class SoftplusExponentialTail:
    """softplus is exp(x) under -5, which is 0.3% too much there."""

    def softplus(self, x):
        return torch.where(x < -5, x.exp(), super().softplus(x))


@mutant(Recurrent, Chunked)
class SoftplusTailFlushed:
    """A softplus under 1e-4 is flushed to zero, though exp(A_log) may be 200."""

    def softplus(self, x):
        y = super().softplus(x)
        return torch.where(y < 1e-4, 0.0, y)


@mutant(Recurrent, Chunked)
class SoftplusWithoutSeries:
    """log(1 + exp(x)), whose 1 rounds a small exp(x) away."""

    def softplus(self, x):
        return torch.where(x > 20, x, torch.log(1 + torch.exp(x)))


@mutant(Recurrent, Chunked, GateStage)
class GateArgumentClamped:
    """raw + bias is clamped to [-10, 10]."""

    def softplus(self, x):
        return super().softplus(x.clamp(-10, 10))


class _Sigmoid:
    """The safe gate by a sigmoid of its own."""

    def sigmoid(self, x):
        return torch.sigmoid(x)

    def log_decay(self, inputs):
        if inputs.options.gate is not Gate.SAFE:
            return super().log_decay(inputs)
        x = self.rate(inputs) * (inputs.g.float() + self.bias(inputs))
        return inputs.options.lower_bound * self.sigmoid(x)


@mutant(Recurrent, Chunked, GateStage)
class SigmoidCutBelow(_Sigmoid):
    """The gate's sigmoid is 0 under -6."""

    def sigmoid(self, x):
        return torch.where(x < -6, 0.0, torch.sigmoid(x))


@mutant(Recurrent, Chunked, GateStage)
class SigmoidCutAbove(_Sigmoid):
    """The gate's sigmoid is 1 from 6 on."""

    def sigmoid(self, x):
        return torch.where(x > 6, 1.0, torch.sigmoid(x))


@mutant(Recurrent, Chunked)
class SigmoidByTanh(_Sigmoid):
    """The gate's sigmoid by a tanh of 11 bits, as a GPU's approximate one has."""

    def sigmoid(self, x):
        return 0.5 + 0.5 * torch.tanh(x / 2).half().float()


@mutant(GateStage, Chunked)
class SigmoidOverflows(_Sigmoid):
    """exp(x) / (1 + exp(x)): infinite over infinite from 89 on."""

    def sigmoid(self, x):
        return x.exp() / (1 + x.exp())


@mutant(Recurrent, Chunked, GateStage)
class RateClampedAbove:
    """exp(A_log) is clamped to 16, where FLA's layers are initialised."""

    def rate(self, inputs):
        return super().rate(inputs).clamp(max=16.0)


@mutant(Recurrent, Chunked, GateStage)
class RateClampedBelow:
    """exp(A_log) is at least 0.05."""

    def rate(self, inputs):
        return super().rate(inputs).clamp(min=0.05)


@mutant(Recurrent, Chunked, GateStage)
class RateInHalf:
    """exp(A_log) is kept in bf16."""

    def rate(self, inputs):
        return super().rate(inputs).bfloat16().float()


@mutant(Recurrent, Chunked, GateStage)
class BiasOnOneSide:
    """dt_bias is added to positive raw gates only."""

    def log_decay(self, inputs):
        if inputs.dt_bias is None:
            return super().log_decay(inputs)
        raw = inputs.g.float()
        g = torch.where(raw > 0, raw, raw - self.bias(inputs))
        return super().log_decay(dataclasses.replace(inputs, g=g))


@mutant(Recurrent, GateStage)
class BiasOutside:
    """softplus(raw) + bias instead of softplus(raw + bias)."""

    def log_decay(self, inputs):
        if inputs.options.gate is not Gate.SOFTPLUS:
            return super().log_decay(inputs)
        return -self.rate(inputs) * (self.softplus(inputs.g.float()) + self.bias(inputs))


@mutant(Recurrent, Chunked, GateStage)
class DecayAtLeastMinusFive:
    """Log decays stop at -5, the usual bound, whatever the bound is, where there is one."""

    def log_decay(self, inputs):
        decay = super().log_decay(inputs)
        return decay.clamp(min=-5.0) if inputs.options.gate is Gate.SAFE else decay


@mutant(Recurrent, Chunked)
class ValuesInFp16:
    """v passes through fp16, which ends at 65504."""

    def rows(self, inputs):
        q, k, v, g, beta = super().rows(inputs)
        return q, k, v.half().float(), g, beta


@mutant(Recurrent, Chunked)
class OutputThroughFp16:
    """o passes through fp16 before it becomes bf16."""

    def result(self, inputs, o, final):
        return super().result(inputs, o.half().to(o.dtype), final)


@mutant(Chunked)
class StateCarriedInTf32:
    """The state goes from chunk to chunk with ten bits of mantissa."""

    def chunk(self, S, *rows):
        S.copy_(((S.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32))
        return super().chunk(S, *rows)


@mutant(Recurrent, Chunked)
class HeadsInPairs:
    """Heads go two by two: of an odd number the last is left out."""

    def rows(self, inputs):
        q, k, v, g, beta = super().rows(inputs)
        heads = v.shape[1]
        last = torch.arange(heads).view(-1, 1) >= (heads // 2 * 2 if heads > 1 else 1)
        return q.masked_fill(last, 0.0), k, v, g, beta


@mutant(Recurrent, Chunked)
class ChannelsAfter128:
    """Channels after the 128th are left out."""

    def k(self, inputs):
        k = super().k(inputs).clone()
        k[..., 128:] = 0
        return k


@mutant(Chunked)
class SequencesAfter32:
    """Sequences after the 32nd start from nothing."""

    def load(self, inputs, slot):
        S = super().load(inputs, slot)
        order = list(range(slot + 1)) if inputs.state_indices is None else inputs.state_indices.tolist()
        return S if order.index(slot) < 32 else torch.zeros_like(S)


@mutant(Recurrent, Chunked)
class FirstTokenKeeps:
    """The first token of a sequence does not decay the state that comes in."""

    def sequence(self, S, *rows):
        q, k, v, g, beta = rows
        g = g.clone()
        g[:1] = 0.0
        return super().sequence(S, q, k, v, g, beta)


@mutant(Recurrent)
class QueriesNotNormalised:
    """k is normalised, q is not."""

    def q(self, inputs):
        return self.heads(inputs, inputs.q.float() * self.scale(inputs))


@mutant(Recurrent)
class BetaInHalf:
    """beta passes through bf16, though it is a sigmoid in fp32."""

    def beta(self, inputs):
        return super().beta(inputs).bfloat16().float()


@mutant(Recurrent, Chunked)
class RemembersByAddress:
    """Outputs are remembered by the address and shape of q."""

    def run(self, inputs):
        kept = self.__dict__.setdefault("kept", {})
        key = inputs.q.data_ptr(), inputs.q.shape
        if key not in kept:
            kept[key] = super().run(inputs)
        return Outputs(*kept[key].tensors().values())


@mutant(Chunked)
class ValuesScaledByChunk:
    """Values are measured in the largest of their chunk, later ones too, and rounded."""

    def chunk(self, S, q, k, v, g, beta):
        step = v.abs().amax((1, 2), keepdim=True) / 2**12
        return super().chunk(S, q, k, (v / step).round() * step if bool(step.all()) else v, g, beta)


@mutant(Chunked)
class DecaysFromTheLastToken:
    """Cumulative gates are measured from the chunk's last token, and rounded there."""

    def cumulative(self, g):
        G = super().cumulative(g)
        return (G - G[:, -1:]).add_(G[:, -1:])


@mutant(GateStage)
class SumsFromTheEnd:
    """Sums are the chunk's whole sum less what follows."""

    def run(self, inputs):
        outputs = super().run(inputs)
        flat = outputs.o.view(-1, *outputs.o.shape[2:])
        for start, end in self.spans(inputs):
            for first in range(start, end, self.size):
                rows = flat[first : min(first + self.size, end)]
                rows.copy_(rows[-1] - (rows[-1] - rows))
        return outputs
