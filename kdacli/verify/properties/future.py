"""Causal: what precedes a token does not change when anything at it, or after it, changes."""

import dataclasses
from collections.abc import Iterator

import torch

from kda_kernels.problem import Gate
from kda_kernels.tensors import Inputs
from kdacli.judge.bits import bits
from kdacli.judge.layout import Place
from kdacli.verify.checks.memory import own_memory
from kdacli.verify.properties.subject import NotApplicableError, Remark, Subject
from kdacli.verify.transforms.regimes import FORGET, KEEP

REASON = "a token must not show in what was said before it: decays measured from a later token leave rounding there"


def check(subject: Subject) -> Iterator[str]:
    """Other numbers from the last token of each sequence on, with shut gates; and from its middle on, with open ones.

    A kernel that says that it is causal in bits (`Kernel.causal_in_bits`) must give the same bits before. Of others the
    results must be as good as ever, and how far they change is told.
    """
    inputs = subject.inputs
    place = Place.whole(inputs, "o")
    lens = torch.tensor(place.layout.lens)
    if max(place.layout.lens, default=0) < 2:
        raise NotApplicableError("no sequence has a token before another")
    for cut, gate, what in ((lens - 1, "shut", "from its last token on"), (lens // 2, "open", "from its middle on")):
        later = (place.token >= cut[place.owner]).to(inputs.q.device)
        after = subject.run(_changed(inputs, later, gate)).o.flatten(0, 1)
        before = subject.outputs.o.flatten(0, 1)
        differing = bits(after).ne(bits(before)).flatten(1).any(1) & ~later
        if not bool(differing.any()):
            continue
        mixed = torch.where(later.view(-1, 1, 1), before, after)
        at = place.name(int(differing.byte().argmax()), 0, 0)
        size = ((mixed.double() - before.double()).norm() / before.double().norm()).item()
        said = f"changed (by {size:.1e} of o, first at sequence {at['sequence']}, token {at['token']})"
        said = f"what precedes a token {said} when each sequence held other numbers {what}"
        wrong = list(subject.wrong(dataclasses.replace(subject.outputs, o=mixed.view_as(subject.outputs.o))))
        if getattr(subject.kernel, "causal_in_bits", False) or wrong:
            yield "; ".join([said, *wrong])
        else:
            yield Remark(f"{said}, within rounding")


def _changed(inputs: Inputs, later: torch.Tensor, gate: str) -> Inputs:
    """A copy in which the tokens at `later` are reversed, smaller or larger, and their gates shut or open."""
    copy, options = own_memory(inputs), inputs.options
    where = later.view(inputs.q.shape[:2])
    for name in ("q", "k", "v", "beta"):
        t = getattr(copy, name)
        t[where] = t[where].flip(-1) * (0.5 if gate == "shut" else 64.0)
    if options.gate is not Gate.NONE:
        copy.g[where] = FORGET if gate == "shut" else KEEP
    elif gate == "shut":
        copy.g[where] = -30.0 if options.lower_bound is None else options.lower_bound
    else:
        copy.g[where] = 0.0
    return copy
