"""Thousands of single steps: what each loses of the state must not add up."""

from collections.abc import Iterator

import torch

from kdacli.verify.properties.subject import NotApplicableError, Remark, Subject

REASON = "rounding to nearest swallows small updates, step after step: outputs are twice as wrong after a thousand"
WINDOW = 64  # tokens at the start, and at the end, whose outputs are measured
# What the error of o may be at the end; of fp16 if it is rounded stochastically. bf16 is not among them: to nearest it
# drifts, and stochastically its last place alone is more.
LIMITS = {torch.int16: 2.5e-3, torch.float32: 2.5e-3, torch.float16: 6e-3}


def check(subject: Subject) -> Iterator[str]:
    """Outputs of the first and of the last tokens of calls of one token each, against the oracle run by itself."""
    lens, state = subject.reference.layout.lens, subject.inputs.state
    if state is None or min(lens) < 2:
        raise NotApplicableError("no sequence goes on from a state for two tokens or more")
    window = min(WINDOW, max(1, min(lens) // 2))
    sums = torch.zeros(2, 2, dtype=torch.float64)  # of squares, of errors and of o, at the start and at the end
    for piece in subject.reference:
        rows = piece.rows["o"]
        off = rows.place.rows(subject.outputs.o).double().cpu() - rows.exact.cpu()
        left = torch.tensor(lens)[rows.place.owner] - rows.place.token
        for i, here in enumerate((rows.place.token < window, left <= window)):
            sums[i] += torch.stack([x[here].square().sum() for x in (off, rows.exact.cpu())])
    first, last = (sums[:, 0] / sums[:, 1]).sqrt().tolist()
    said = f"error of o {first:.1e} at first, {last:.1e} after {min(lens)} steps"
    limited = subject.inputs.rounding_seed is not None or state.dtype is not torch.float16
    limit = LIMITS.get(state.dtype) if limited else None
    yield said + f", more than {limit:.1e}" if limit is not None and not last <= limit else Remark(said)
