"""Faults in what engines ask for: padding, drafts, checkpoints, buckets."""

import dataclasses

import torch

from tests.mutants.table import mutant
from tests.mutants.victim import Chunked, Recurrent


@mutant(Recurrent, Chunked)
class MinusOneAlone:
    """-1 is padding, another negative index counts from the pool's end."""

    def slots(self, inputs, n):
        if inputs.state_indices is None or inputs.num_accepted_tokens is not None:
            return super().slots(inputs, n)
        found = zip(super().slots(inputs, n), inputs.state_indices.tolist(), strict=False)
        return [slot if index >= -1 else index % len(inputs.state) for slot, index in found]


@mutant(Recurrent, Chunked)
class NullSlotIgnored:
    """null_slot is read and written like any other."""

    def is_padding(self, inputs, slot):
        return slot < 0


@mutant(Recurrent, Chunked)
class SlotZeroIsNull:
    """Slot 0 is padding, whether the caller says so or not."""

    def is_padding(self, inputs, slot):
        return super().is_padding(inputs, slot) or slot == 0


@mutant(Recurrent, Chunked)
class InitialStateAlways:
    """has_initial_state is not looked at."""

    def starts_empty(self, inputs, n):
        return False


@mutant(Recurrent, Chunked)
class EmptiedByZero:
    """A state that should not be read is multiplied by zero: its NaN stays."""

    def empty(self, S):
        S.mul_(0.0)


@mutant(Recurrent, Chunked)
class IndicesContiguous:
    """state_indices are read one after the other, whatever their stride."""

    def indices(self, inputs):
        indices = inputs.state_indices
        return indices.as_strided(indices.shape, torch.empty(indices.shape).stride())


@mutant(Recurrent, Chunked)
class BucketUnwritten:
    """Rows behind the last sequence are whatever the memory held."""

    def result(self, inputs, o, final):
        if inputs.cu_seqlens is not None:
            o[0, int(inputs.cu_seqlens[-1]) :] = 1.0
        return super().result(inputs, o, final)


@mutant(Recurrent, Chunked)
class BucketComputed:
    """The last sequence goes on to the end of the tokens."""

    def spans(self, inputs):
        spans = super().spans(inputs)
        return [*spans[:-1], (spans[-1][0], inputs.q.shape[0] * inputs.q.shape[1])]


@mutant(Recurrent, Chunked)
class StraySlotClamped:
    """An index past the pool's end takes its last slot."""

    def run(self, inputs):
        if inputs.state_indices is None:
            return super().run(inputs)
        indices = inputs.state_indices.clamp(max=len(inputs.state) - 1)
        return super().run(dataclasses.replace(inputs, state_indices=indices))


@mutant(Recurrent)
class DraftsFromFirstColumn:
    """The state always comes from the first column."""

    def column(self, accepted):
        return 0


@mutant(Recurrent)
class DraftsFromNextColumn:
    """The state comes from column num_accepted_tokens, where there is one."""

    def slots(self, inputs, n):
        if inputs.num_accepted_tokens is None:
            return super().slots(inputs, n)
        columns = inputs.state_indices.shape[1]
        later = inputs.num_accepted_tokens.add(1).clamp(max=columns)
        return super().slots(dataclasses.replace(inputs, num_accepted_tokens=later), n)


@mutant(Recurrent)
class DraftsStoredOnce:
    """Only the last token's state is stored, to the column that it came from."""

    def updates(self, inputs):
        return inputs.update_state

    def keep_draft(self, inputs, slot, S):
        pass


@mutant(Recurrent)
class DraftPaddingWritten:
    """A draft whose column is padding goes to the pool's last slot."""

    def keep_draft(self, inputs, slot, S):
        self.store(inputs, inputs.state, max(slot, -1), S)


@mutant(Recurrent)
class VerifyUpdates:
    """update_state is not looked at."""

    def updates(self, inputs):
        return inputs.num_accepted_tokens is None


@mutant(Recurrent)
class TokenRowsInOrder:
    """token_state_indices are not looked at: sequence n takes row n."""

    def token_row(self, inputs, n):
        return n


@mutant(Recurrent)
class TokenRowsWrap:
    """A negative row counts from the buffer's end."""

    def token_row(self, inputs, n):
        return super().token_row(inputs, n) % len(inputs.token_states)


@mutant(Recurrent)
class TokenStatesOneLate:
    """The state after a token goes to the place of the next."""

    def keep_token(self, inputs, n, start, done, S):
        if inputs.token_state_indices is not None and done < inputs.token_states.shape[1]:
            super().keep_token(inputs, n, start, done + 1, S)
        elif inputs.token_state_indices is None:
            super().keep_token(inputs, n, start, done, S)


@mutant(Chunked)
class CheckpointAtTheEnd:
    """A checkpoint is the final state."""

    def is_checkpoint(self, at, length, done):
        return 0 < at <= length and done == length


@mutant(Chunked)
class CheckpointPastTheEnd:
    """An offset past the sequence's end gets its final state."""

    def is_checkpoint(self, at, length, done):
        return at == done or (at > length and done == length)


@mutant(Chunked)
class CheckpointOneChunkEarly:
    """A checkpoint is taken at the start of the chunk that ends there."""

    def is_checkpoint(self, at, length, done):
        return at == done + 64 or at == done == 64


@mutant(Chunked)
class CheckpointAtTheStart:
    """An offset of 0 gets the state after the first chunk."""

    def is_checkpoint(self, at, length, done):
        return at == done or (at == 0 and done == min(64, length))


@mutant(Chunked)
class CheckpointsInHalf:
    """Checkpoints in fp32 pass through bf16."""

    def keep_checkpoints(self, inputs, n, length, done, S):
        super().keep_checkpoints(inputs, n, length, done, S.bfloat16().float())


@mutant(Chunked)
class CheckpointsVFirst:
    """Checkpoints are stored V-first whatever the state is."""

    def keep_checkpoints(self, inputs, n, length, done, S):
        swap = not inputs.state_v_first and S.shape[-1] == S.shape[-2]
        super().keep_checkpoints(inputs, n, length, done, S.mT if swap else S)


@mutant(Recurrent, Chunked)
class PoolOfFp16AsBf16:
    """Every state of two bytes is rounded to bf16."""

    def store(self, inputs, final, slot, S):
        half = final.dtype is torch.float16
        super().store(inputs, final, slot, S.bfloat16().float() if half else S)


@mutant(Recurrent)
class SumsByBatch:
    """The last bits of values depend on how many sequences there are."""

    def rows(self, inputs):
        q, k, v, g, beta = super().rows(inputs)
        return q, k, v * (1 + len(self.spans(inputs)) * 2.0**-23), g, beta


@mutant(Chunked)
class WorkspaceTakenForZero:
    """The caller's workspace is added to as if it were zero."""

    def log_decay(self, inputs):
        decay, room = super().log_decay(inputs), inputs.workspace
        return decay if room is None else room[: 4 * decay.numel()].view(torch.float32).view_as(decay).add_(decay)
