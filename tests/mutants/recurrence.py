"""Faults in the arithmetic: the order of decay and delta rule, the chunk's matrix, the chunk's ends."""

import torch

from tests.mutants.table import mutant
from tests.mutants.victim import CHUNK, Chunked, GateStage, Recurrent, times


@mutant(Recurrent)
class DecayAfter:
    """The state decays after the delta rule, not before."""

    def step(self, S, q, k, v, g, beta):
        o = super().step(S, q, k, v, torch.zeros_like(g), beta)
        S *= g.exp().unsqueeze(-2)
        return o


@mutant(Recurrent)
class OldPrediction:
    """The prediction S k is made before the decay."""

    def step(self, S, q, k, v, g, beta):
        u = beta.unsqueeze(-1) * (v - times(S, k))
        S *= g.exp().unsqueeze(-2)
        S += u.unsqueeze(-1) * k.unsqueeze(-2)
        return times(S, q)


@mutant(Recurrent)
class NoDeltaRule:
    """Plain gated linear attention: nothing is subtracted."""

    def step(self, S, q, k, v, g, beta):
        S *= g.exp().unsqueeze(-2)
        S += (beta.unsqueeze(-1) * v).unsqueeze(-1) * k.unsqueeze(-2)
        return times(S, q)


@mutant(Recurrent)
class BetaOnValueOnly:
    """beta v - S k instead of beta (v - S k)."""

    def step(self, S, q, k, v, g, beta):
        S *= g.exp().unsqueeze(-2)
        u = beta.unsqueeze(-1) * v - times(S, k)
        S += u.unsqueeze(-1) * k.unsqueeze(-2)
        return times(S, q)


@mutant(Recurrent)
class OutputBeforeUpdate:
    """o is read before the token is written."""

    def step(self, S, q, k, v, g, beta):
        before = S * g.exp().unsqueeze(-2)
        super().step(S, q, k, v, g, beta)
        return times(before, q)


@mutant(Recurrent)
class DecayPerHead:
    """One decay a head, its mean, instead of one a channel."""

    def step(self, S, q, k, v, g, beta):
        return super().step(S, q, k, v, g.mean(-1, keepdim=True).expand_as(g), beta)


@mutant(Recurrent)
class StateInHalf:
    """The state is carried in bf16 although fp32 was asked."""

    def step(self, S, q, k, v, g, beta):
        o = super().step(S, q, k, v, g, beta)
        S.copy_(S.bfloat16())
        return o


@mutant(Recurrent)
class OneTokenOnly:
    """A decode kernel for one token: of more it computes the first and leaves zeros."""

    def sequence(self, S, *rows):
        o = super().sequence(S, *(x[:1] for x in rows))
        return torch.cat([o, o.new_zeros(len(rows[0]) - len(o), *o.shape[1:])])


@mutant(Recurrent)
class OffByOneToken:
    """Each token takes the gate of the one before."""

    def log_decay(self, inputs):
        return super().log_decay(inputs).roll(1, dims=1)


@mutant(Chunked)
class StateBetweenChunksDropped:
    """Every chunk starts from the incoming state: what the chunk before made is lost."""

    def sequence(self, S, *rows):
        first, pieces = S.clone(), []
        for span in self.chunks(len(rows[0])):
            S.copy_(first)
            pieces.append(self.chunk(S, *(x[span].transpose(0, 1) for x in rows)).transpose(0, 1))
        return torch.cat(pieces) if pieces else rows[2]


@mutant(Chunked)
class ForgottenTooEarly:
    """Where a chunk's decay is under e^-8 in every channel the incoming state is dropped."""

    def carried(self, S, last):
        keep = (last > -8.0).any(-1, keepdim=True)
        return torch.where(keep, super().carried(S, last), 0.0)


@mutant(Chunked)
class InverseInHalf:
    """The inverse by its Neumann series in fp16, as a kernel that reached production had it."""

    def inverse(self, L):
        total, power = torch.eye(L.shape[-1]).expand_as(L).half(), -L.half()
        for _ in range(6):
            total = total + (total.float() @ power.float()).half()
            power = (power.float() @ power.float()).half()
        return total.float()


@mutant(Chunked)
class InverseCutShort:
    """The Neumann series stops after the third power."""

    def inverse(self, L):
        eye = torch.eye(L.shape[-1])
        return eye - L + L @ L - L @ L @ L


@mutant(Chunked)
class InverseByBlocks:
    """Blocks of 16 are inverted on their own; what lies between them is left out."""

    def inverse(self, L):
        block = torch.arange(L.shape[-1]) // 16
        return super().inverse(L * (block.unsqueeze(1) == block))


@mutant(Chunked)
class DiagonalLeftOut:
    """A token does not see itself: Aqk without its diagonal."""

    diagonal = -1


@mutant(Chunked)
class NotCausal:
    """Aqk has one diagonal too many: a token sees the next."""

    diagonal = 1


@mutant(Chunked)
class DecayFactored:
    """exp(G_i - G_j) as exp(G_i) exp(-G_j), which overflows."""

    def pairs(self, x, k, G):
        return (x * G.exp()) @ (k * (-G).exp()).mT


@mutant(Chunked)
class DecayDivided:
    """exp(G_last - G) as exp(G_last) / exp(G): 0 / 0 once everything is forgotten."""

    def chunk(self, S, q, k, v, g, beta):
        o = super().chunk(S, q, k, v, g, beta)
        decay = self.cumulative(g.clamp(min=-120.0)).exp()
        S.mul_((decay[:, -1:] / decay).sum(1, keepdim=True).div(decay.shape[1]).isfinite().float())
        S += (decay[:, :1] / decay[:, :1] - 1).mean(1, keepdim=True)
        return o


@mutant(Chunked)
class SumsInHalf:
    """The cumulative gate is kept in bf16: three digits of a sum that may reach -300."""

    def cumulative(self, g):
        return super().cumulative(g).bfloat16().float()


@mutant(Chunked)
class GatesClamped:
    """Cumulative gates stop at -20, lest something overflow."""

    def cumulative(self, g):
        return super().cumulative(g).clamp(min=-20.0)


@mutant(Chunked)
class TailDecays:
    """Rows after the end of a partial chunk are zeros before the gate, and so decays after it."""

    def carried(self, S, last):
        return super().carried(S, last) * self.tail

    def chunk(self, S, *rows):
        self.tail = 1.0 if rows[0].shape[1] == CHUNK else 0.5
        return super().chunk(S, *rows)


@mutant(Chunked)
class LastTokenOfChunk:
    """The decay over a chunk leaves out its last token, if the chunk is whole."""

    def carried(self, S, last):
        return super().carried(S, last - self.final)

    def chunk(self, S, q, k, v, g, beta):
        self.final = g[:, -1:] if g.shape[1] == CHUNK else 0.0
        return super().chunk(S, q, k, v, g, beta)


@mutant(Chunked)
class StateOperandsInFp16:
    """The state is an operand in fp16: one of 1e5 is infinite, small ones are lost."""

    def chunk(self, S, *rows):
        S.copy_(S.half().float())
        return super().chunk(S, *rows)


@mutant(Chunked)
class ProductsInHalf:
    """Operands of products are bf16 whatever the activations are."""

    def product(self, a, b):
        return super().product(a.bfloat16().float(), b.bfloat16().float())


@mutant(Chunked)
class ProductsInFp8:
    """Operands of products are fp8, of which bf16 activations have five bits more."""

    def product(self, a, b):
        return super().product(a.to(torch.float8_e4m3fn).float(), b.to(torch.float8_e4m3fn).float())


@mutant(Recurrent, Chunked)
class FloatByNameAlone:
    """The final state of bf16 activations is rounded to bf16, less than their products cost, though it is float32."""

    def unsupported(self, problem):
        return None if problem is None or problem.dtype == "bfloat16" else "bf16 only"

    def store(self, inputs, final, slot, S):
        super().store(inputs, final, slot, S.bfloat16())


@mutant(Chunked)
class StateInHalfBetweenChunks:
    """The state goes from chunk to chunk in bf16 although fp32 was asked."""

    def chunk(self, S, *rows):
        o = super().chunk(S, *rows)
        S.copy_(S.bfloat16())
        return o


@mutant(GateStage)
class ChunkOf32:
    """Sums restart every 32 tokens."""

    size = 32


@mutant(GateStage)
class NoRestart:
    """Sums run through the whole sequence."""

    size = 1 << 20


@mutant(GateStage)
class SumsOfTheBatch:
    """Chunks are counted from the start of the batch, not of the sequence."""

    def spans(self, inputs):
        B, T = inputs.q.shape[:2]
        return [(0, B * T)]


@mutant(GateStage)
class ExclusiveSums:
    """A token's own gate is not in its sum."""

    def run(self, inputs):
        outputs = super().run(inputs)
        outputs.o.sub_(self.log_decay(inputs))
        return outputs


@mutant(GateStage)
class SumsAsTf32:
    """Sums are made by a product with ones on tensor cores: ten bits of each gate."""

    def log_decay(self, inputs):
        decay = super().log_decay(inputs)
        return ((decay.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
