"""States of two bytes are rounded as defined: stochastically by seed, slot and token, or to integers with scales."""

import dataclasses
from collections.abc import Iterator

import torch

from kda_kernels.problem import Problem
from kda_kernels.reference.stored import pool_values, stored
from kdacli.judge.bits import bits
from kdacli.judge.layout import Place
from kdacli.verify.properties.subject import NotApplicableError, Subject

REASON = "a state drifts that is rounded to nearest, or by the same random numbers in each step"
# The kernel for fp32 may sum in another order. That moves an element past where it is rounded the other way in one of a
# thousand to one of thirty; another rounding differs in one of four.
MOST = 1 / 16


def asked(problem: Problem) -> Problem:
    """The same with a pool in fp32."""
    return dataclasses.replace(problem, state_dtype="float32", state_rounding="nearest")


def check(subject: Subject) -> Iterator[str]:
    """The kernel's own states, of the same call with a pool in fp32, rounded as `kda_kernels.reference.stored` says."""
    inputs, made = subject.inputs, subject.outputs.final_state
    if inputs.rounding_seed is None and inputs.state_scales is None:
        raise NotApplicableError("states are rounded to nearest")
    subject.require(asked(subject.problem))
    wide = dataclasses.replace(inputs, state=pool_values(inputs, torch.float32), state_scales=None, rounding_seed=None)
    if (kept := inputs.checkpoints) is not None and kept.states is inputs.state:
        assert wide.state is not None
        wide = dataclasses.replace(wide, checkpoints=dataclasses.replace(kept, states=wide.state))
    exact = subject.run(wide).final_state
    if made is None or exact is None:
        raise NotApplicableError("no pool comes out")
    seed = None if inputs.rounding_seed is None else int(inputs.rounding_seed)
    place, differing, elements = Place.whole(inputs, "final_state"), 0, 0
    for target in place.layout.targets["final_state"]:
        if not target.tokens:
            continue
        slot = place.layout.slots[target.sequence]
        want = stored(place.layout.state(exact, target.index), made.dtype, seed, slot, target.tokens - 1)
        have = place.layout.state(made, target.index)
        off = bits(have.contiguous()) != bits(want.state.contiguous())
        if want.scales is not None:
            scales = subject.outputs.state_scales
            assert scales is not None
            off |= ~torch.isclose(scales[target.index], want.scales, rtol=1e-5, atol=0.0).unsqueeze(-1)
        differing, elements = differing + int(off.sum()), elements + off.numel()
    if differing > MOST * elements:
        share = f"{differing} of {elements} elements"
        yield f"{share} of the states are not those of the same call with fp32 states, rounded by seed, slot and token"
