"""Inputs of the CuTe prefill's tests, on the GPU where there is one: `decode_inputs`', within its contract. And ways to
split them."""

import contextlib
import dataclasses
from collections.abc import Iterator

import pytest
import torch
from decode_inputs import make, with_pool, with_state

from kda_kernels.cute.prefill import host as module
from kda_kernels.cute.prefill.config import CHUNK
from kda_kernels.cute.prefill.plan import Split
from kda_kernels.problem import Gate, Options
from kda_kernels.tensors import Inputs

SAFE = Options(Gate.SAFE, -5.0)
SOFTPLUS = Options()
GIVEN = Options(Gate.NONE, -5.0, beta_is_logit=False, qk_l2norm=False, scale=0.3)
ONE_ROUND = 128 * CHUNK  # longer than any sequence of these tests
SPLITS = {
    "split": Split(2 * CHUNK, 2 * CHUNK, ONE_ROUND),
    "longer first": Split(3 * CHUNK, CHUNK, ONE_ROUND),
    "rounds": Split(2 * CHUNK, CHUNK, 3 * CHUNK),
}
WAYS = {"whole": None, **SPLITS}


def split(monkeypatch: pytest.MonkeyPatch, way: Split | None) -> None:
    """Sequences go this way, whatever the plan would say; whole, as there, where none could have a second segment."""
    monkeypatch.setattr(module, "_split", lambda N, T, HV, sms: way if way and T > way.lead else None)


@contextlib.contextmanager
def new_memory_holds_nan() -> Iterator[None]:
    """What `torch.empty` makes is not zero by chance."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def tokens(lens=(40, 0, 3), N=None, T=None, *, options=SAFE, H=1, HV=2, **given) -> Inputs:
    """Without a state. Packed with these lengths, or, with N and T, dense."""
    shape = {"N": N, "T": T} if N is not None else {"lens": list(lens)}
    inputs = make(H=H, HV=HV, K=128, V=128, options=options, **shape, **given)
    if options.gate is Gate.NONE and options.lower_bound is not None:
        inputs = dataclasses.replace(inputs, g=inputs.g.clamp(min=options.lower_bound))
    return inputs


def plain(*args, state_dtype=torch.float32, **given) -> Inputs:
    """With a state that comes in and is not modified."""
    return with_state(tokens(*args, **given), state_dtype)


def pooled(*args, slots=(4, 1, 6), P=7, gap=0, state_dtype=torch.float32, index_dtype=torch.int32, **given) -> Inputs:
    """On a pool; NaN in its unused slots and in the gaps between slots."""
    return with_pool(tokens(*args, **given), list(slots), P, gap, state_dtype, index_dtype)
