"""Independent of batch neighbours: others may hold anything, NaN included, and mine stay as they are."""

from collections.abc import Iterator

import torch

from kda_kernels.tensors import Inputs, Outputs
from kdacli.judge.bits import same_bits
from kdacli.judge.layout import Place
from kdacli.verify.checks.memory import own_memory
from kdacli.verify.properties.subject import NotApplicableError, Subject

REASON = "one request's numbers, or its NaN, must not reach another's: tiles cross sequence ends, tails go unmasked"


def check(subject: Subject) -> Iterator[str]:
    """Changes every second sequence that has tokens, to other numbers or NaN, and compares the rest bit for bit."""
    inputs = subject.inputs
    tokens, states = (Place.whole(inputs, field) for field in ("o", "final_state"))
    present = tokens.owner.unique()
    if len(present) < 2:
        raise NotApplicableError("there is one sequence with tokens only")
    for first, value, what in ((0, None, "other numbers"), (1, torch.nan, "NaN")):
        others = present[first::2]
        rows = torch.isin(tokens.owner, others).to(inputs.q.device)
        theirs = torch.isin(states.owner, others).tolist()
        after = subject.run(_changed(inputs, rows, _slots(states, theirs), value))
        kept = _slots(states, [not one for one in theirs])
        mine, now = (_kept(outputs, rows, kept) for outputs in (subject.outputs, after))
        for name, tensor in mine.items():
            if name not in now or not same_bits(tensor, now[name]):
                yield f"{name} of a sequence changed when its neighbours in the batch held {what}"


def _slots(states: Place, chosen: list[bool]) -> list[int]:
    return [index[0] for index, choose in zip(states.index, chosen, strict=True) if choose]


def _changed(inputs: Inputs, rows: torch.Tensor, slots: list[int], value: float | None) -> Inputs:
    """A copy in which the tokens at `rows`, and the states at `slots`, are halved and reversed, or `value`."""
    copy = own_memory(inputs)
    B, T = inputs.q.shape[:2]
    where = rows.view(B, T)

    def change(t: torch.Tensor) -> torch.Tensor:
        old = t[where]
        t[where] = old.flip(-1) * 0.5 if value is None else torch.full_like(old, value)
        return t

    copy.map_tokens(change)
    if copy.state is not None:
        old = copy.state[slots]
        copy.state[slots] = old.flip(-1) * 0.5 if value is None else torch.full_like(old, value)
    return copy


def _kept(outputs: Outputs, rows: torch.Tensor, slots: list[int]) -> dict[str, torch.Tensor]:
    """The outputs of the sequences that were not changed."""
    kept = {"o": outputs.o.flatten(0, 1)[~rows].contiguous()}
    if outputs.final_state is not None:
        kept["final_state"] = outputs.final_state[slots].contiguous()
    return kept
