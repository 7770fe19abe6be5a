"""Faults in the activations: gate, beta, norm, scale, heads."""

import torch

from kda_kernels.problem import Gate
from tests.mutants.table import mutant
from tests.mutants.victim import Chunked, GateStage, Recurrent


@mutant(Recurrent, GateStage)
class GateSign:
    """The log decay has the wrong sign: states grow."""

    def log_decay(self, inputs):
        return -super().log_decay(inputs)


@mutant(Recurrent, Chunked, GateStage)
class BiasDropped:
    """dt_bias is not added."""

    def bias(self, inputs):
        return torch.zeros_like(super().bias(inputs))


@mutant(Chunked)
class BiasOfFirstHead:
    """dt_bias of head 0 serves all heads."""

    def bias(self, inputs):
        return super().bias(inputs)[:1]


@mutant(Recurrent, GateStage)
class RateDropped:
    """A_log is not read."""

    def rate(self, inputs):
        return torch.ones_like(super().rate(inputs))


@mutant(Chunked)
class RateNotExponentiated:
    """A_log is taken for its exponential."""

    def rate(self, inputs):
        return super().rate(inputs).log()


@mutant(Recurrent, Chunked)
class BoundIgnored:
    """The safe gate is computed as the softplus gate."""

    def log_decay(self, inputs):
        if inputs.options.gate is not Gate.SAFE:
            return super().log_decay(inputs)
        return -self.rate(inputs) * self.softplus(inputs.g.float() + self.bias(inputs))


@mutant(Recurrent, GateStage)
class BoundOfTheModel:
    """The bound is -5 whatever was asked."""

    def log_decay(self, inputs):
        decay = super().log_decay(inputs)
        return decay * (-5.0 / inputs.options.lower_bound) if inputs.options.gate is Gate.SAFE else decay


@mutant(Recurrent, Chunked)
class RateAfterSigmoid:
    """The safe gate multiplies by exp(A_log) outside the sigmoid."""

    def log_decay(self, inputs):
        if inputs.options.gate is not Gate.SAFE:
            return super().log_decay(inputs)
        x = inputs.g.float() + self.bias(inputs)
        return inputs.options.lower_bound * self.rate(inputs) * torch.sigmoid(x)


@mutant(GateStage)
class SoftplusNaive:
    """log(1 + exp(x)): infinite for large x, and coarse for very negative x."""

    def softplus(self, x):
        return torch.log(1 + torch.exp(x))


@mutant(GateStage)
class SoftplusTailCut:
    """A softplus under 1e-4 is flushed to zero."""

    def softplus(self, x):
        y = super().softplus(x)
        return torch.where(y < 1e-4, 0.0, y)


@mutant(Recurrent, Chunked)
class PowerOfTwo:
    """The natural log decay is used as a power of 2."""

    def log_decay(self, inputs):
        return super().log_decay(inputs) * 0.6931471805599453


@mutant(Recurrent)
class GateInHalf:
    """The log decay passes through bf16."""

    def log_decay(self, inputs):
        return super().log_decay(inputs).bfloat16().float()


@mutant(Recurrent, Chunked)
class NeverQuiteOpen:
    """Decays are capped at 0.9999, so that nothing is kept for good."""

    def log_decay(self, inputs):
        return super().log_decay(inputs).clamp(max=-1e-4)


@mutant(Recurrent, Chunked)
class SigmoidMissing:
    """beta's logit is taken for its value."""

    def beta(self, inputs):
        return inputs.beta.float()


@mutant(Recurrent)
class SigmoidAlways:
    """beta's value goes through a sigmoid too."""

    def beta(self, inputs):
        beta = super().beta(inputs)
        return beta if inputs.options.beta_is_logit else torch.sigmoid(beta)


@mutant(Recurrent, Chunked)
class EigvalIgnored:
    """allow_neg_eigval is not looked at."""

    def beta(self, inputs):
        return super().beta(inputs) / (2 if inputs.options.allow_neg_eigval else 1)


@mutant(Chunked)
class BetaClamped:
    """beta is clamped to 1, which is right but for allow_neg_eigval and large logits."""

    def beta(self, inputs):
        return super().beta(inputs).clamp(max=1.0)


@mutant(Recurrent, Chunked)
class NormMissing:
    """q and k are not normalised."""

    def norm(self, x):
        return x


@mutant(Recurrent, Chunked)
class NormAlways:
    """q is normalised although it comes so, or should not be."""

    def q(self, inputs):
        q = self.norm(inputs.q.float()) * 1.01  # a second norm of a unit vector alone would hardly show
        return self.heads(inputs, q * self.scale(inputs)) if not inputs.options.qk_l2norm else super().q(inputs)


@mutant(Recurrent, Chunked)
class EpsilonMissing:
    """No epsilon in the norm: a zero key is 0 / 0."""

    def norm(self, x):
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True))


@mutant(Recurrent)
class EpsilonAsFloor:
    """x / max(|x|, 1e-6), as torch's normalize does it, not x / sqrt(x^2 + 1e-6)."""

    def norm(self, x):
        return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-6)


@mutant(Recurrent)
class NormByMean:
    """An RMS norm: the mean of squares instead of their sum."""

    def norm(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


@mutant(Chunked)
class NormInHalf:
    """The sum of squares is kept in fp16, whose largest number is 65504."""

    def norm(self, x):
        return x * torch.rsqrt(x.half().square().sum(-1, keepdim=True).float() + 1e-6)


@mutant(Recurrent, Chunked)
class ScaleIgnored:
    """scale is always K^-0.5."""

    def scale(self, inputs):
        return inputs.q.shape[-1] ** -0.5


@mutant(Recurrent, Chunked)
class GroupsInterleaved:
    """Value head h takes query head h % H."""

    def heads(self, inputs, x):
        return x.repeat(1, 1, inputs.v.shape[2] // x.shape[2], 1)


@mutant(Chunked)
class FirstChannelsOnly:
    """A tile of 64 channels, and nothing after it: K = 128 loses half."""

    def k(self, inputs):
        k = super().k(inputs).clone()
        k[..., 64:] = 0
        return k
