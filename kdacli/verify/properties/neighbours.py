"""Independent of batch neighbours: others may hold anything, NaN included, and mine stay as they are."""

from collections.abc import Iterator

import torch

from kda_kernels.tensors import Inputs, Outputs
from kdacli.judge.bits import same_bits
from kdacli.judge.blocks import Blocks
from kdacli.verify.memory import own_memory
from kdacli.verify.properties.subject import NotApplicableError, Subject

REASON = "one request's numbers, or its NaN, must not reach another's: tiles cross sequence ends, tails go unmasked"


def check(subject: Subject) -> Iterator[str]:
    """Changes every second sequence that has tokens, to other numbers or NaN, and compares the rest bit for bit."""
    inputs = subject.inputs
    tokens, states = Blocks.of_tokens(inputs), Blocks.of_state(inputs)
    present = tokens.owner.unique()
    if len(present) < 2:
        raise NotApplicableError("there is one sequence with tokens only")
    for first, value, what in ((0, None, "other numbers"), (1, torch.nan, "NaN")):
        others = present[first::2]
        rows, slots = torch.isin(tokens.owner, others), torch.isin(states.owner, others)
        after = subject.run(_changed(inputs, rows, states, slots, value))
        mine, now = (_kept(outputs, rows, states, slots) for outputs in (subject.outputs, after))
        for name, tensor in mine.items():
            if name not in now or not same_bits(tensor, now[name]):
                yield f"{name} of a sequence changed when its neighbours in the batch held {what}"


def _changed(inputs: Inputs, rows: torch.Tensor, states: Blocks, slots: torch.Tensor, value: float | None) -> Inputs:
    """A copy in which the tokens at `rows`, and the states at `slots`, are halved and reversed, or `value`."""
    copy = own_memory(inputs)
    B, T = inputs.q.shape[:2]
    where = rows.view(B, T)
    for name in ("q", "k", "v", "g", "beta"):
        t = getattr(copy, name)
        old = t[where]
        t[where] = old.flip(-1) * 0.5 if value is None else torch.full_like(old, value)
    if copy.state is not None:
        index = (states.owner if states.slots is None else states.slots)[slots]
        old = copy.state[index]
        copy.state[index] = old.flip(-1) * 0.5 if value is None else torch.full_like(old, value)
    return copy


def _kept(outputs: Outputs, rows: torch.Tensor, states: Blocks, slots: torch.Tensor) -> dict[str, torch.Tensor]:
    """The outputs of the sequences that were not changed."""
    kept = {"o": outputs.o.flatten(0, 1)[~rows].contiguous()}
    if outputs.final_state is not None:
        index = (states.owner if states.slots is None else states.slots)[~slots]
        kept["final_state"] = outputs.final_state[index].contiguous()
    return kept
