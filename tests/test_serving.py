"""What engines pass to the public functions, against calls that do without."""

import dataclasses
import functools

import pytest
import torch
from decode_inputs import DEVICE, SAFE, make, with_pool
from decode_inputs import close as close_to_exact

from kda_kernels.api import (
    Checkpoints,
    checkpoint_alignment,
    fused_recurrent_kda_fwd,
    kda_decode,
    kda_prefill,
    prefill_workspace_bytes,
)
from kda_kernels.errors import InputError
from kda_kernels.tensors import Inputs

TOKENS = ("q", "k", "v", "g", "beta")
NAMES = (*TOKENS, "A_log", "dt_bias", "state", "state_indices", "cu_seqlens")


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    close_to_exact(actual, expected.double())


def ints(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def drafts() -> Inputs:
    """Two sequences of 3 and 2 tokens."""
    return with_pool(make(lens=[3, 2], H=1, HV=2), [4, 1])


def arguments(inputs: Inputs, **changes) -> dict:
    given = {name: getattr(inputs, name) for name in NAMES} | {"lower_bound": inputs.options.lower_bound}
    return given | changes


def every_state(inputs: Inputs) -> list[list[torch.Tensor]]:
    """Of each sequence, the state after each token: one call a token."""
    inputs, found = inputs.fresh(), []
    pool, slots = inputs.pool
    for n, slot in enumerate(slots.tolist()):
        begin, end = inputs.cu_seqlens[n : n + 2].tolist()
        found.append([])
        for t in range(begin, end):
            tokens = {name: getattr(inputs, name)[:, t : t + 1] for name in TOKENS}
            kda_decode(**arguments(inputs, **tokens, state_indices=slots[n : n + 1], cu_seqlens=None))
            found[n].append(pool[slot].clone())
    return found


@pytest.mark.parametrize("fla", [False, True], ids=["kda_decode", "FLA's"])
def test_drafts_start_from_the_accepted_token_and_leave_a_state_for_each(fla):
    inputs = drafts()
    expected, pool = every_state(inputs), inputs.state.nan_to_num()
    slots = torch.stack([ints(0, 4, 2), ints(1, 3, -1)], 1).mT  # strided
    accepted = ints(2, 1)
    if fla:
        given = {name: getattr(inputs, name) for name in (*TOKENS, "A_log", "dt_bias", "cu_seqlens")}
        switches = ("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "state_v_first")
        given |= dict.fromkeys(switches, True) | {"initial_state": pool, "ssm_state_indices": slots}
        o, _ = fused_recurrent_kda_fwd(**given, num_accepted_tokens=accepted)
    else:
        given = arguments(inputs, state=pool, state_indices=slots)
        o = kda_decode(**given, num_accepted_tokens=accepted)
    close(o, kda_decode(**arguments(inputs.fresh())))
    for slot, state in ((0, expected[0][0]), (4, expected[0][1]), (2, expected[0][2]), (1, expected[1][0])):
        close(pool[slot], state)
    close(pool[3], expected[1][1])


def test_a_verify_leaves_the_pool_and_writes_rows():
    inputs = drafts()
    expected, pool = every_state(inputs), inputs.state.clone()
    rows = torch.zeros(3, 3, *pool.shape[1:], device=DEVICE)
    call = arguments(inputs, token_states=rows, token_state_indices=ints(2, -1), update_state=False)
    o = kda_decode(**call)
    close(o, kda_decode(**arguments(inputs.fresh())))
    torch.testing.assert_close(inputs.state, pool, rtol=0, atol=0, equal_nan=True)
    close(rows[2], torch.stack(expected[0]))
    assert not rows[:2].any()


@pytest.mark.parametrize("v_first", [True, False], ids=["V-first", "K-first"])
def test_flas_verify_leaves_the_pool_and_returns_the_state_of_each_token(v_first):
    inputs = drafts()
    expected, o = (
        torch.cat([torch.stack(states) for states in every_state(inputs)]),
        kda_decode(**arguments(inputs.fresh())),
    )
    pool = inputs.state if v_first else inputs.state.mT.contiguous()
    before = pool.clone()
    given = {name: getattr(inputs, name) for name in (*TOKENS, "A_log", "dt_bias", "cu_seqlens")}
    switches = ("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "output_final_state")
    given |= dict.fromkeys(switches, True) | {"inplace_final_state": False, "state_v_first": v_first}
    call = functools.partial(
        fused_recurrent_kda_fwd, **given, initial_state=pool, ssm_state_indices=inputs.state_indices
    )
    compiled = torch.compile(lambda: call(), fullgraph=True, backend="aot_eager")
    for found, states in (call(), compiled()):
        close(found, o)
        close(states if v_first else states.mT, expected)
        torch.testing.assert_close(pool, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("function", [kda_decode, kda_prefill])
def test_null_slots_and_sequences_that_begin_with_nothing(function):
    inputs = with_pool(make(lens=[2, 1, 2, 1], H=1, HV=2, options=SAFE), [4, 1, 0, 0])
    zeroed = inputs.fresh()
    zeroed.state[4] = 0
    expected = function(**arguments(zeroed, state_indices=ints(4, 1, -1, -7)))
    inputs.state[4], kept = torch.nan, inputs.state[0].clone()
    begins = torch.tensor([False, True, True, True], device=DEVICE)
    o = function(**arguments(inputs, null_slot=0, has_initial_state=begins, state_indices=ints(4, 1, 0, 0, 4, 99)))
    close(o, expected)
    assert not o[:, 3:].any() and torch.equal(inputs.state[0], kept)
    close(inputs.state[[1, 4]], zeroed.state[[1, 4]])


@pytest.mark.parametrize("function", [kda_decode, kda_prefill])
def test_ranks_that_engines_have(function):
    inputs = with_pool(make(lens=[2, 1], H=2, HV=2, options=SAFE), [4, 1])
    expected = function(**arguments(inputs.fresh()))
    other = {
        "g": inputs.g.flatten(2),
        "A_log": inputs.A_log.view(1, 1, 2, 1),
        "dt_bias": inputs.dt_bias.view(1, 1, 2, -1),
    }
    assert torch.equal(function(**arguments(inputs, **other)), expected)


def test_checkpoints_workspace_and_tokens_behind_the_end():
    """The state after 64 tokens is where a prefill of 64 tokens ends."""
    inputs = with_pool(make(lens=[70, 3], H=1, HV=1, options=SAFE), [4, 1])
    prefix = inputs.fresh()
    cut = {name: getattr(inputs, name)[:, :64] for name in TOKENS}
    kda_prefill(**arguments(prefix, **cut, state_indices=ints(4), cu_seqlens=ints(0, 64)))
    whole = inputs.fresh()
    expected = kda_prefill(**arguments(whole))
    longer = {name: torch.cat([getattr(inputs, name), getattr(inputs, name)[:, :9]], 1) for name in TOKENS}
    size = prefill_workspace_bytes(82, 1, 2, device=DEVICE)
    given = arguments(inputs, **longer, workspace=torch.empty(size, dtype=torch.uint8, device=DEVICE))
    kept = Checkpoints(inputs.state, ints(6, 5), ints(64, 64))
    o = kda_prefill(**given, checkpoints=kept, batch_invariant=True)
    assert checkpoint_alignment() == 64
    torch.testing.assert_close(inputs.state[6], prefix.state[4], rtol=1e-4, atol=1e-4)
    assert torch.equal(o[:, :73], expected) and not o[:, 73:].any()
    assert torch.equal(inputs.state[[4, 1]], whole.state[[4, 1]]) and inputs.state[5].isnan().all()


def test_what_no_kernel_has_is_refused_by_name():
    inputs = drafts()
    states = torch.zeros(1, 5, 2, 16, 16, device=DEVICE)
    with pytest.raises(InputError, match="^token_states is used: torch-prefill does not support it"):
        from kda_kernels.registry import get

        get("torch-prefill").run(dataclasses.replace(inputs, token_states=states))
    with pytest.raises(InputError, match="^kernel is torch-prefill: it should be cute-prefill or triton-prefill"):
        prefill_workspace_bytes(64, 1, 1, device=DEVICE, kernel="torch-prefill")
    with pytest.raises(InputError, match="^lower_bound is of type Tensor: it should be a number"):
        kda_decode(**arguments(inputs, lower_bound=torch.tensor(-5.0)))
