"""Faults around memory: states and pools, strides, ends of sequences, what is kept between calls."""

import dataclasses
import time

import torch

from kda_kernels.tensors import Outputs
from tests.mutants.table import mutant
from tests.mutants.victim import Chunked, GateStage, Recurrent

INT32 = 1 << 31


@mutant(Recurrent, Chunked)
class StateReadTransposed:
    """The incoming state is read K-first."""

    def load(self, inputs, slot):
        S = super().load(inputs, slot)
        return S.mT.contiguous() if S.shape[-1] == S.shape[-2] else S


@mutant(Recurrent, Chunked)
class StateWrittenTransposed:
    """The outgoing state is written K-first."""

    def store(self, inputs, final, slot, S):
        super().store(inputs, final, slot, S.mT if S.shape[-1] == S.shape[-2] else S)


@mutant(Recurrent)
class KFirstIgnored:
    """state_v_first is not looked at where the sizes allow it."""

    def load(self, inputs, slot):
        square = inputs.q.shape[-1] == inputs.v.shape[-1]
        return inputs.state[slot].float().clone() if square and inputs.state is not None else super().load(inputs, slot)

    def store(self, inputs, final, slot, S):
        if S.shape[-1] == S.shape[-2]:
            final[slot] = S
        else:
            super().store(inputs, final, slot, S)


@mutant(Chunked)
class StateIgnored:
    """The incoming state is taken for zero."""

    def load(self, inputs, slot):
        return torch.zeros_like(super().load(inputs, slot))


@mutant(Recurrent)
class StateNotWritten:
    """The pool is left as it was."""

    def store(self, inputs, final, slot, S):
        if inputs.state_indices is None:
            super().store(inputs, final, slot, S)


@mutant(Recurrent)
class HeadsOfStateReversed:
    """Head h's state is that of head HV - 1 - h."""

    def load(self, inputs, slot):
        return super().load(inputs, slot).flip(0)


@mutant(Chunked)
class FinalStateInHalf:
    """The final state is rounded to bf16 on its way out although fp32 was asked."""

    def store(self, inputs, final, slot, S):
        super().store(inputs, final, slot, S.bfloat16().float())


@mutant(Chunked)
class FinalStateMissing:
    """No final state is returned."""

    def result(self, inputs, o, final):
        return Outputs(o, None)


@mutant(Recurrent)
class OutputInFp32:
    """o comes in fp32 whatever v is."""

    def result(self, inputs, o, final):
        return Outputs(o.float(), super().result(inputs, o, final).final_state)


@mutant(Recurrent, Chunked)
class PaddingWritten:
    """A row with index -1 writes to slot -1, the last one."""

    def padding(self, inputs, o, final, start, end):
        final[-1] = 0.0


@mutant(Recurrent)
class PaddingComputed:
    """A row with index -1 is computed from nothing, and its output is not zero."""

    def padding(self, inputs, o, final, start, end):
        o[start:end] = inputs.v.reshape(-1, *o.shape[1:])[start:end]


@mutant(Recurrent, Chunked)
class PaddingLeftUnwritten:
    """The output of a row with index -1 is whatever the memory held."""

    def allocate_o(self, inputs):
        return torch.empty(inputs.v.shape, dtype=inputs.v.dtype)


@mutant(Recurrent, Chunked)
class IndicesIgnored:
    """Sequence n takes slot n."""

    def slots(self, inputs, n):
        return [i if slot >= 0 else slot for i, slot in enumerate(super().slots(inputs, n))]


@mutant(Recurrent)
class PoolCopied:
    """A pool with gaps is made contiguous first, and the copy is updated."""

    def run(self, inputs):
        state = None if inputs.state is None else inputs.state.contiguous()
        return super().run(dataclasses.replace(inputs, state=state))


@mutant(Chunked)
class GapsIgnored:
    """Slots are taken to lie one after the other."""

    def load(self, inputs, slot):
        if inputs.state is None or inputs.state.is_contiguous():
            return super().load(inputs, slot)
        size = inputs.state[0].numel()
        S = inputs.state.as_strided(inputs.state.shape[1:], inputs.state[0].stride(), slot * size).float()
        return S.nan_to_num().contiguous() if inputs.state_v_first else S.nan_to_num().mT.contiguous()


@mutant(Recurrent)
class WritesPastSlot:
    """One element after each slot is written."""

    def store(self, inputs, final, slot, S):
        super().store(inputs, final, slot, S)
        if final.stride(0) > final[0].numel():
            final.as_strided((1,), (1,), final[slot].storage_offset() + final[0].numel()).zero_()


@mutant(Recurrent, gpu_only=True)
class OffsetsOf32Bits:
    """slot * stride wraps at 2^31."""

    def load(self, inputs, slot):
        return super().load(inputs, self.wrapped(inputs, slot))

    def store(self, inputs, final, slot, S):
        super().store(inputs, final, self.wrapped(inputs, slot), S)

    @staticmethod
    def wrapped(inputs, slot):
        if inputs.state is None:
            return slot
        stride = inputs.state.stride(0)
        return (slot * stride) % INT32 // stride


@mutant(Chunked)
class EmptyForgets:
    """A sequence without tokens gets a state of zeros."""

    def sequence(self, S, *rows):
        if not len(rows[0]):
            S.zero_()
        return super().sequence(S, *rows)


@mutant(Recurrent)
class EmptyClearsSlot:
    """A sequence without tokens clears its slot of the pool."""

    def run(self, inputs):
        if inputs.state_indices is not None:
            for (start, end), slot in zip(self.spans(inputs), inputs.state_indices.tolist(), strict=True):
                if start == end and slot >= 0:
                    inputs.state[slot] = 0.0
        return super().run(inputs)


@mutant(Recurrent, Chunked)
class SequencesJoined:
    """A sequence without a state of its own goes on from the one before."""

    def load(self, inputs, slot):
        S = super().load(inputs, slot)
        if inputs.state is None and slot and getattr(self, "last", S).shape == S.shape:
            S = self.last.clone()
        self.last = S
        return S


@mutant(Chunked)
class LastTokenDropped:
    """cu_seqlens ends one too early for the last sequence, where it is longer than a chunk."""

    def spans(self, inputs):
        spans = super().spans(inputs)
        start, end = spans[-1]
        return [*spans[:-1], (start, end - (end - start > 64))]


class _Contiguous:
    """Reads one input as if it were contiguous."""

    name: str

    def run(self, inputs):
        t = getattr(inputs, self.name)
        read = t.as_strided(t.shape, torch.empty(t.shape).stride()).nan_to_num()
        return super().run(dataclasses.replace(inputs, **{self.name: read}))


@mutant(Recurrent, Chunked)
class QContiguous(_Contiguous):
    """q is read as contiguous."""

    name = "q"


@mutant(Chunked)
class VContiguous(_Contiguous):
    """v is read as contiguous."""

    name = "v"


@mutant(Recurrent)
class BetaContiguous(_Contiguous):
    """beta is read as contiguous."""

    name = "beta"


@mutant(GateStage)
class GContiguous(_Contiguous):
    """g is read as contiguous."""

    name = "g"


@mutant(Recurrent, Chunked)
class IndicesOf32Bits:
    """int64 cu_seqlens are read as int32."""

    def spans(self, inputs):
        ends = inputs.cu_seqlens
        if ends is None or ends.dtype is torch.int32:
            return super().spans(inputs)
        ends = ends.view(torch.int32)[: len(ends)].cummax(0).values.tolist()
        return list(zip(ends[:-1], ends[1:], strict=True))


@mutant(Recurrent)
class NormalisedInPlace:
    """q is normalised in its own memory, where it is fp32 already."""

    def q(self, inputs):
        if inputs.options.qk_l2norm and inputs.q.dtype is torch.float32:
            inputs.q.copy_(self.norm(inputs.q))
        return super().q(inputs)


@mutant(GateStage)
class ActivatedInPlace:
    """The activated gate is written over g, where that is fp32."""

    def log_decay(self, inputs):
        decay = super().log_decay(inputs)
        if inputs.g.dtype is torch.float32:
            inputs.g.copy_(decay + 0.0 if decay is not inputs.g else decay * 1.0000001)
        return decay


@mutant(Recurrent, GateStage)
class WritesPastEnd:
    """One element after the output is written."""

    def run(self, inputs):
        outputs = super().run(inputs)
        o = outputs.o
        room = o.untyped_storage().nbytes() // o.element_size()
        after = o.storage_offset() + o.numel()
        if after < room:  # else it would be somebody else's memory, in this process
            o.as_strided((1,), (1,), after).zero_()
        return outputs


@mutant(Chunked)
class TailMaskedByZero:
    """The last tile of a sequence reads into the next one and multiplies by zero: its NaN comes along."""

    def run(self, inputs):
        self.next = [(end, inputs.v.flatten(0, 1)) for _, end in self.spans(inputs)]
        return super().run(inputs)

    def sequence(self, S, *rows):
        end, v = self.next.pop(0)
        o = super().sequence(S, *rows)
        beyond = v[end : end + 16].float().sum(0) * 0
        return o + beyond if len(o) % 64 else o


@mutant(Recurrent)
class SharedScale:
    """Values are scaled by the largest of the whole batch, and rounded."""

    def rows(self, inputs):
        q, k, v, g, beta = super().rows(inputs)
        step = v.abs().max() / 2**22 if v.numel() else 1.0
        return q, k, (v / step).round() * step if step else v, g, beta


_calls = iter(range(1 << 62))


@mutant(Recurrent, Chunked)
class LikeARace:
    """The last bit of an element depends on when it is called."""

    def result(self, inputs, o, final):
        if next(_calls) % 2 and o.numel():
            first = o.view(-1)[:1]
            first.copy_(first.nextafter(first + 1))
        return super().result(inputs, o, final)


@mutant(Chunked, GateStage)
class StaleWorkspace:
    """A buffer is kept from call to call and cleared by multiplying it with zero."""

    def log_decay(self, inputs):
        decay = super().log_decay(inputs)
        kept = self.__dict__.setdefault("kept", {})
        work = kept.setdefault(decay.shape, torch.zeros_like(decay))
        work.mul_(0).add_(decay)
        return work


@mutant(Recurrent)
class CachedByShape:
    """What was compiled for bf16 parameters reads fp32 ones of the same shape as bf16, and the other way round."""

    def bias(self, inputs):
        kept, bias = self.__dict__.setdefault("kept", {}), inputs.dt_bias
        if bias is None:
            return super().bias(inputs)
        dtype = kept.setdefault(bias.shape, bias.dtype)
        if dtype is not bias.dtype:
            count, raw = bias.numel(), torch.cat([bias.flatten(), bias.flatten()])
            bias = raw.view(dtype)[:count].view(bias.shape)
        return bias.float().view(inputs.g.shape[2:])


@mutant(Recurrent)
class BrokenByError:
    """A call that raises leaves a flag behind, and the next one returns zeros."""

    busy = False

    def run(self, inputs):
        was, self.busy = self.busy, True
        outputs = super().run(inputs)
        self.busy = False
        if was:
            outputs.o.zero_()
        return outputs


@mutant(Recurrent, Chunked)
class OneBufferForAll:
    """Threads share a buffer."""

    def rows(self, inputs):
        rows = super().rows(inputs)
        kept = self.__dict__.setdefault("kept", {})
        v = kept.setdefault(rows[2].shape, torch.empty_like(rows[2]))
        v.copy_(rows[2])
        time.sleep(0.002)
        return (*rows[:2], v.clone(), *rows[3:])
