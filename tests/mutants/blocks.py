"""Faults at the edges of tiles: sub-chunks, single tokens, groups of heads, odd sizes, the last of a kind."""

import torch

from tests.mutants.step import Step
from tests.mutants.table import mutant
from tests.mutants.victim import CHUNK, Chunked, GateStage, Recurrent


@mutant(Chunked)
class FarBlocksLeftOut:
    """Tokens see no token of their chunk that is more than two sub-chunks of 16 before."""

    def pairs(self, x, k, G):
        block = torch.arange(G.shape[1]) // 16
        return super().pairs(x, k, G) * (block[:, None] - block[None, :] < 3)


@mutant(Chunked)
class InverseWithoutPaths:
    """A block of the inverse two below the diagonal lacks the way over the block between."""

    def inverse(self, L):
        exact, C = super().inverse(L), L.shape[-1]
        block = torch.arange(C) // 16
        direct = L * (block[:, None] - block[None, :] != 1)
        two = (block[:, None] - block[None, :]) == 2
        return torch.where(two, super().inverse(direct), exact)


@mutant(Chunked)
class BetaOnColumns:
    """beta of the earlier token, not of the later one, is in the chunk's matrix."""

    def chunk(self, S, q, k, v, g, beta):
        self.columns = beta
        return super().chunk(S, q, k, v, g, beta)

    def inverse(self, L):
        rows = self.columns.unsqueeze(-1)
        return super().inverse(torch.where(rows > 0, L / rows, 0.0) * self.columns.unsqueeze(-2))


@mutant(Chunked)
class FloorUnderPairs:
    """The decay between two tokens is at least e^-8."""

    def pairs(self, x, k, G):
        decay = (G.unsqueeze(2) - G.unsqueeze(1)).clamp(min=-8.0, max=0).exp()
        return (x.unsqueeze(2) * decay * k.unsqueeze(1)).sum(-1)


@mutant(Chunked)
class OneTokenLeft:
    """A last chunk of one token does not change the state."""

    def chunk(self, S, q, k, v, g, beta):
        before = S.clone()
        o = super().chunk(S, q, k, v, g, beta)
        if q.shape[1] == 1 and self.later:
            S.copy_(before)
        return o

    def sequence(self, S, *rows):
        self.later = len(rows[0]) > CHUNK
        return super().sequence(S, *rows)


@mutant(Chunked)
class FullChunkEndsTwice:
    """A sequence that ends with a whole chunk decays once more, by its last token."""

    def sequence(self, S, *rows):
        o = super().sequence(S, *rows)
        if len(o) and len(o) % CHUNK == 0:
            S *= rows[3][-1].exp().unsqueeze(-2)
        return o


@mutant(Chunked)
class FirstGateOfAChunkTwice:
    """The first token of a later chunk decays twice."""

    def sequence(self, S, *rows):
        g = rows[3].clone()
        g[CHUNK::CHUNK] *= 2
        return super().sequence(S, *rows[:3], g, rows[4])


@mutant(Chunked)
class ShortSequencesLoseTheirLast:
    """The final state of a sequence under 16 tokens lacks the last one."""

    def sequence(self, S, *rows):
        o = super().sequence(S.clone(), *rows)
        short = 1 < len(o) < 16
        super().sequence(S, *(x[:-1] if short else x for x in rows))
        return o


@mutant(Recurrent, Chunked)
class TailOfValues:
    """Values are in tiles of 32 channels; what is left of V is zero."""

    def rows(self, inputs):
        q, k, v, g, beta = super().rows(inputs)
        v = v.clone()
        v[..., v.shape[-1] // 32 * 32 :] = 0
        return q, k, v, g, beta


@mutant(Recurrent, Chunked)
class GroupsOfTwo:
    """Value head h takes query head h // 2, whatever their number."""

    def heads(self, inputs, x):
        HV = inputs.v.shape[2]
        return x[:, :, [min(h // 2, x.shape[2] - 1) for h in range(HV)]] if HV > x.shape[2] else x


@mutant(Recurrent, Chunked, Step)
class HeadsAfter16:
    """Heads after the 16th are zero."""

    def sequence(self, S, *rows):
        o = super().sequence(S, *rows)
        o[:, 16:] = 0
        return o


@mutant(Chunked)
class FourthChunkStale:
    """The fourth chunk takes the gates of the first."""

    def sequence(self, S, *rows):
        g = rows[3].clone()
        g[3 * CHUNK : 4 * CHUNK] = g[:CHUNK][: len(g[3 * CHUNK : 4 * CHUNK])]
        return super().sequence(S, *rows[:3], g, rows[4])


@mutant(Recurrent, Chunked)
class LastEmptyForgets:
    """A last sequence without tokens ends in zeros."""

    def result(self, inputs, o, final):
        if final is not None and inputs.state_indices is None and inputs.cu_seqlens is not None:
            start, end = self.spans(inputs)[-1]
            if start == end:
                final[-1] = 0
        return super().result(inputs, o, final)


@mutant(Recurrent, Chunked)
class BetaOfTheGroup:
    """beta of the first value head of a group serves the group."""

    def beta(self, inputs):
        beta, group = super().beta(inputs), inputs.v.shape[2] // inputs.q.shape[2]
        return beta[:, :, ::group].repeat_interleave(group, 2)


@mutant(Recurrent, Chunked)
class GateOfTheGroup:
    """The gate of the first value head of a group serves the group."""

    def log_decay(self, inputs):
        g, group = super().log_decay(inputs), inputs.v.shape[2] // inputs.q.shape[2]
        return g[:, :, ::group].repeat_interleave(group, 2)


@mutant(Recurrent, Chunked, GateStage)
class RateOfTheGroup:
    """exp(A_log) of every second head serves the next one too."""

    def rate(self, inputs):
        rate = super().rate(inputs)
        return rate[[h // 2 * 2 for h in range(len(rate))]]


@mutant(Recurrent, Chunked, GateStage)
class BiasByChannel:
    """dt_bias is read with channels first."""

    def bias(self, inputs):
        bias = super().bias(inputs)
        return bias.reshape(bias.shape[1], bias.shape[0]).mT


@mutant(Recurrent, Chunked)
class ScaleBeforeNorm:
    """q is scaled before it is normalised, which undoes it, and again by K^-0.5."""

    def scale(self, inputs):
        return inputs.q.shape[-1] ** -0.5 if inputs.options.qk_l2norm else super().scale(inputs)


@mutant(Recurrent, Chunked)
class ScalePositive:
    """The size of scale is taken."""

    def scale(self, inputs):
        return abs(super().scale(inputs))


@mutant(Recurrent, Chunked)
class SmallStepsSkipped:
    """A token whose beta is under 0.01 is not written."""

    def beta(self, inputs):
        beta = super().beta(inputs)
        return torch.where(beta < 0.01, 0.0, beta)


@mutant(Recurrent, Chunked)
class DecaysNearOne:
    """A log decay above -1e-4 is taken for none."""

    def log_decay(self, inputs):
        g = super().log_decay(inputs)
        return torch.where(g > -1e-4, 0.0, g)


@mutant(Recurrent, Chunked)
class KFirstByView:
    """A K-first state is read as if V came first, with its sizes exchanged."""

    def load(self, inputs, slot):
        if inputs.state is None or inputs.state_v_first:
            return super().load(inputs, slot)
        S = inputs.state[slot].float()
        return S.reshape(S.shape[0], S.shape[2], S.shape[1]).clone()


@mutant(Recurrent, Chunked)
class FlagOfTheFirst:
    """has_initial_state of the first sequence serves all."""

    def starts_empty(self, inputs, n):
        return super().starts_empty(inputs, 0)


@mutant(Recurrent, Chunked)
class PaddingShiftsRows:
    """Outputs of sequences behind a padding row lie one row too early."""

    def run(self, inputs):
        outputs = super().run(inputs)
        if inputs.state_indices is not None and inputs.cu_seqlens is not None:
            ends, slots = inputs.cu_seqlens.tolist(), self.slots(inputs, len(inputs.cu_seqlens) - 1)
            for n, slot in enumerate(slots[:-1]):
                if slot < 0 and ends[n + 2] > ends[n + 1] > 0:
                    outputs.o[0, ends[n + 1] - 1 : ends[n + 2] - 1] = outputs.o[0, ends[n + 1] : ends[n + 2]].clone()
        return outputs


@mutant(Recurrent)
class AtMostTwoAccepted:
    """Of num_accepted_tokens no more than two count."""

    def column(self, accepted):
        return min(accepted, 2) - 1


@mutant(Chunked)
class RowsRoundedUp:
    """Rows of a dense batch lie a whole number of chunks apart."""

    def spans(self, inputs):
        if inputs.cu_seqlens is not None:
            return super().spans(inputs)
        B, T = inputs.q.shape[:2]
        apart = (T + CHUNK - 1) // CHUNK * CHUNK
        return [(min(n * apart, B * T), min(n * apart + T, B * T)) for n in range(B)]


@mutant(Chunked)
class CheckpointAtTheEndForgotten:
    """A checkpoint where a sequence ends is not stored."""

    def is_checkpoint(self, at, length, done):
        return at == done and at < length


@mutant(Chunked)
class CheckpointsOfTheFirst:
    """Checkpoints after the first of a sequence hold what it holds."""

    def keep_checkpoints(self, inputs, n, length, done, S):
        if done <= (inputs.checkpoints.every or CHUNK):
            self.first = S.clone()
        super().keep_checkpoints(inputs, n, length, done, self.first if done > 2 * CHUNK else S)


@mutant(GateStage)
class SumsOfOneTokenChunks:
    """A last chunk of one token holds the raw sum of the chunk before, too."""

    def run(self, inputs):
        outputs = super().run(inputs)
        sums = outputs.o.flatten(0, 1)
        for start, end in self.spans(inputs):
            if end - start > CHUNK and (end - start) % CHUNK == 1:
                sums[end - 1] += sums[end - 2]
        return outputs


@mutant(Step)
class HalfBehindConvolution:
    """Convolved tokens pass through bf16."""

    def activate(self, y, conv):
        return super().activate(y, conv).bfloat16().float()


@mutant(Step)
class NormGateOfFirstHead:
    """The norm's gate of the first head serves all."""

    def gated(self, gate):
        return super().gated(gate)[:, :, :1].expand_as(gate)


@mutant(Step)
class SecondTokenWithoutWindow:
    """A token after the first of a call sees nothing of the window."""

    def sums(self, conv, raw):
        W, y = conv.weight.shape[1], super().sums(conv, raw)
        for t in range(1, len(y)):
            short = torch.cat([torch.zeros_like(raw[: max(0, W - 1 - t)]), raw[W - 1 : W + t]])[-W:]
            y[t] = super().sums(conv, short)[-1]
        return y
