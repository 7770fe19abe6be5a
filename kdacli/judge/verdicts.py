"""Is a result good enough? Every output tensor against the fp64 token recurrence, with a bound that has a reason.

The bound is not a constant that someone liked. A plain torch implementation that rounds where a kernel of that op must
round (operands of matrix products, the output, the state) runs on the same inputs, eight times where its rounding
errors can be drawn anew, and the kernel may make

    a factor * (the largest error of the plain implementation) + one output rounding + a floor for fp32 sums

and, where products are in tf32, once what cutting operands to it adds to rounding them (`Plain.cut`). That holds at
three levels, because a norm over a large tensor hides what is wrong in one place: the whole tensor, each (sequence,
head) block, and each element. A block and its elements are granted at least what the plain implementation makes of a
typical block: where nearly parallel keys let one rounding grow, what it makes of a single one is the luck of the draw.
What is exactly zero in the reference (padding rows, a state never fed) must be exactly zero. NaN, Inf and unwritten
elements never pass, and neither does a pool whose unused slots changed by a single bit. A float32 state that was
rounded to less on its way fails too, unless the kernel says that it carries states so.
"""

import torch

from kda_kernels.problem import CHUNK, Op
from kda_kernels.reference.fused import shifted_states
from kda_kernels.tensors import Convolution, Outputs
from kdacli.judge.bits import bits
from kdacli.judge.reference import Piece, Reference, rows_of, stored_dtype, written_by
from kdacli.judge.tensor import TensorJudge, Verdict, said


def judge(
    reference: Reference, outputs: Outputs, *, carried_state: str | None = None, partial: bool = False
) -> list[Verdict]:
    """Judges each output tensor of one call. See `CallJudge`."""
    call = CallJudge(reference, outputs, carried_state=carried_state, partial=partial)
    for piece in reference:
        call.add(piece)
    return call.verdicts(reference.usual)


class CallJudge:
    """Judges each output tensor of one call, piece by piece.

    Args:
        reference: of the call; its inputs as they were before: their pool must not be the one that the call updated.
        outputs: what came out, on any device. With a pool, final_state is the pool after the call. final_state is
            judged when it is there, and must be there when it was asked for.
        carried_state: what the kernel says that it carries states in, if not in float32 (see `Contract`): states may
            be rounded to that.
        partial: a missing final_state is no fault, since a dump need not hold it.
    """

    def __init__(
        self, reference: Reference, outputs: Outputs, *, carried_state: str | None = None, partial: bool = False
    ) -> None:
        self.reference, self.outputs, self.layout, self.partial = reference, outputs, reference.layout, partial
        self.found: dict[str, Verdict] = {}  # by the field of `Outputs`: what can be said without its numbers
        self.judges: dict[str, TensorJudge] = {}
        d, gate = self.layout.dims, reference.op is Op.GATE
        for field in ("o",) if gate else ("o", *self.layout.targets):
            tensor, name = getattr(outputs, field), reference.name(field)
            if tensor is None:
                if not partial and (field != "final_state" or reference.inputs.output_final_state):
                    self.found[field] = Verdict.failed(name, "missing: the kernel returned none")
            elif tensor.dtype is torch.int16 and outputs.state_scales is None:
                self.found[field] = Verdict.failed(name, "the scales of its rows, state_scales, are missing")
            elif not reference.fits(field, tensor):
                note = f"shape is {list(tensor.shape)}: it should be {reference.shape(field)}"
                self.found[field] = Verdict.failed(name, note)
            else:
                dtype = stored = torch.float32 if gate else stored_dtype(reference.inputs, field)
                if field != "o" and carried_state is not None and dtype is torch.float32:
                    dtype = getattr(torch, carried_state)
                terms = CHUNK if gate else d.K
                self.judges[field] = TensorJudge(name, d.N, d.HV, reference.plains, stored, dtype, terms)

    def add(self, piece: Piece) -> None:
        """Pieces of the reference, in order."""
        for field, rows in piece.rows.items():
            if field in self.judges:
                self.judges[field].add(rows, rows_of(rows.place, self.outputs, field))

    def verdicts(self, usual: torch.Tensor | None = None) -> list[Verdict]:
        """One for each output tensor, once all pieces were added. `usual`: of the reference whose pieces they were."""
        found = dict(self.found)
        for field, tensor in self.judges.items():
            verdict = tensor.verdict(usual if field == "o" else None)
            if field in (written := written_by(self.reference.inputs)):
                verdict = verdict.with_fault(self._touched(field, written[field]))
                if field == "final_state" and (scales := self.reference.inputs.state_scales) is not None:
                    verdict = verdict.with_fault(self._touched("state_scales", scales))
            found[field] = verdict.with_fault(self._behind()) if field == "o" else verdict
        if (conv := self.reference.inputs.conv) is not None and not (self.partial and self.outputs.conv_states is None):
            found["conv_states"] = self._shifted(conv)
        return [found[field] for field in ("o", *self.layout.targets, "conv_states") if field in found]

    def _shifted(self, conv: Convolution) -> Verdict:
        """The states of the convolution, which are copies: every bit of all slots."""
        name, made = "conv_states", self.outputs.conv_states
        if made is None:
            return Verdict.failed(name, "missing: the kernel returned none")
        expected = shifted_states(self.reference.inputs, self.layout.dims)
        if made.shape != expected.shape or made.dtype is not expected.dtype:
            found = f"{list(made.shape)} {made.dtype}"
            return Verdict.failed(name, f"is {found}: it should be {list(expected.shape)} {expected.dtype}")
        off = bits(made).to(expected.device) != bits(expected)
        if not bool(off.any()):
            return Verdict(name, 0.0, 0.0, 0.0, 0.0, {}, True)
        slot, *inner = (int(x) for x in torch.unravel_index(off.flatten().byte().argmax(), off.shape))
        entry, channel = inner if conv.tokens_first else reversed(inner)
        where = {"slot": str(slot), "channel": str(channel), "entry": str(entry)}
        have, want = (x[slot, *inner].item() for x in (made, expected))
        note = f"{int(off.sum())} of {off.numel()} entries are not the raw tokens that they should be"
        return Verdict.failed(name, f"{note}, first {said(where)}: {have:.4g}, it should be {want:.4g}", where)

    def _behind(self) -> str:
        """Rows of o behind the last sequence that are not zero, in words; "" if there are none."""
        behind = self.outputs.o[0, sum(self.layout.lens) :] if self.layout.packed else self.outputs.o[:0]
        if self.reference.op is Op.GATE or not bool(bits(behind).any()):
            return ""
        return f"{int(bits(behind).flatten(1).any(1).sum())} rows behind the last sequence are not zero"

    def _touched(self, field: str, before: torch.Tensor) -> str:
        """What was written of a pool, or of another tensor that states go to, and should not, in words; "" if nothing.

        A row, such as a slot, at a time.
        """
        after = getattr(self.outputs, field)
        used = {t.index for t in self.layout.targets["final_state" if field == "state_scales" else field]}
        for row in range(len(before)):
            inner = before.ndim == 5  # a row has a state for each token
            mine = [index for index in used if index[0] == row]
            if mine and not inner:
                continue
            was, now = bits(before[row]).cpu(), bits(after[row]).cpu()
            if mine:
                others = torch.ones(before.shape[1], dtype=torch.bool)
                others[[index[1] for index in mine]] = False
                was, now = was[others], now[others]
            if not torch.equal(was, now):
                what = f"slot {row} of the pool" if field == "final_state" else f"row {row} of {field}"
                return f"{what} was written, and no sequence uses it"
        return ""
