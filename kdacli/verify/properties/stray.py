"""A slot, or a row, that is none touches nothing, and shows: on a GPU nobody waits to look at indices beforehand."""

import dataclasses
from collections.abc import Iterator

from kda_kernels.errors import InputError
from kda_kernels.tensors import Inputs
from kdacli.judge.bits import same_bits
from kdacli.judge.layout import Place
from kdacli.verify.properties.subject import NotApplicableError, Subject

REASON = "an index past the pool's end wrote to whatever lay there: memory of other tensors, or of other requests"


def check(subject: Subject) -> Iterator[str]:
    """The first sequence with tokens gets a slot past the end, a little and by far; the others stay as they were.

    Its rows of o are NaN, or the call is refused.
    """
    inputs = subject.inputs
    state, final_state = inputs.state, subject.outputs.final_state
    pooled = inputs.state_indices is not None and state is not None and final_state is not None
    if not pooled or inputs.num_accepted_tokens is not None:
        raise NotApplicableError("there is no pool with one slot a sequence")
    place = Place.whole(inputs, "o")
    slots, lens = place.layout.slots, place.layout.lens
    live = [n for n, slot in enumerate(slots) if slot >= 0 and lens[n]]
    if not live:
        raise NotApplicableError("no sequence has both tokens and a slot")
    assert state is not None and final_state is not None
    state = state.nan_to_num(nan=0.25)  # what is read there must show
    conv = inputs.conv
    if conv is not None:
        conv = dataclasses.replace(conv, states=conv.states.nan_to_num(nan=0.25))
    inputs = dataclasses.replace(inputs, state=state, conv=conv)
    theirs = (place.owner == live[0]).to(inputs.q.device)
    for slot in (len(state), len(state) + 100_000, 2**31 - 1):
        try:
            after = subject.run(_with_slot(inputs, live[0], slot))
        except InputError:
            continue
        rows, before = after.o.flatten(0, 1), subject.outputs.o.flatten(0, 1)
        if not bool(rows[theirs].isnan().all()):
            yield f"slot {slot} of a pool of {len(state)}: the rows of o are not NaN"
        if not same_bits(rows[~theirs].contiguous(), before[~theirs].contiguous()):
            yield f"slot {slot} of a pool of {len(state)}: o of other sequences changed"
        expected, pool = final_state.nan_to_num(nan=0.25), after.final_state
        expected[slots[live[0]]] = state[slots[live[0]]]
        if pool is None or not same_bits(pool.contiguous(), expected.contiguous()):
            yield f"slot {slot} of a pool of {len(state)}: the pool is not as if the sequence were not there"
        if conv is not None and after.conv_states is not None:
            mine, kept = place.layout.conv_slots[live[0]], after.conv_states
            if not same_bits(kept[mine].contiguous(), conv.states[mine].contiguous()):
                yield f"slot {slot} of a pool of {len(state)}: the state of the sequence's convolution was shifted"


def _with_slot(inputs: Inputs, sequence: int, slot: int) -> Inputs:
    assert inputs.state_indices is not None
    indices = inputs.state_indices.clone()
    indices[sequence] = slot
    return dataclasses.replace(inputs, state_indices=indices)
