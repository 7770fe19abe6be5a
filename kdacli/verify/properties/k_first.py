"""V-first = K-first: a state in the other layout gives the same results."""

import dataclasses
from collections.abc import Iterator

from kda_kernels.problem import Problem
from kdacli.verify.properties.subject import Subject

REASON = "engines differ in how they lay out a state; with K = V a swapped one has the right shape and wrong numbers"


def asked(problem: Problem) -> Problem:
    """The same with its state stored the other way round."""
    return dataclasses.replace(problem, state_v_first=not problem.state_v_first)


def check(subject: Subject) -> Iterator[str]:
    """The same call with its state stored the other way round."""
    inputs, v_first = subject.inputs, not subject.inputs.state_v_first
    subject.require(asked(subject.problem))
    state = None if inputs.state is None else inputs.state.mT.contiguous()
    other = dataclasses.replace(inputs, state=state, state_v_first=v_first)
    for wrong in subject.wrong(subject.run(other), other):
        yield f"state stored {'V-first' if v_first else 'K-first'}: {wrong}"
