"""The summary of a segment: against the fp64 oracle, from any state, and put together."""

import dataclasses

import pytest
import torch

from kda_kernels import kda_segment_summary
from kda_kernels.errors import InputError
from kda_kernels.problem import Gate, Op, Options, Problem
from kda_kernels.reference.oracle import recurrence
from kdacli.synthetic import make_inputs

BOUNDED = Options(gate=Gate.SAFE, lower_bound=-5.0)
LENS = (66, 0, 17)


def inputs_on(device: str, size: int, options: Options = BOUNDED, H: int = 1, HV: int = 1, dtype: str = "bfloat16"):
    problem = Problem(Op.PREFILL, LENS, H=H, HV=HV, K=size, V=size, dtype=dtype, options=options)
    return make_inputs(problem, gates="weak", seed=3, device=device)


def summary_of(inputs, k=None, cu_seqlens=None, at=slice(None)):
    options = inputs.options
    return kda_segment_summary(
        inputs.k[:, at], inputs.v[:, at], inputs.g[:, at], inputs.beta[:, at], A_log=inputs.A_log,
        dt_bias=inputs.dt_bias, lower_bound=options.lower_bound,
        cu_seqlens=inputs.cu_seqlens if cu_seqlens is None else cu_seqlens,
    )  # fmt: skip


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def check_against_the_oracle(inputs):
    end, transition = summary_of(inputs)
    expected = recurrence(inputs).final_state
    moved = inputs.state.float() @ transition + end
    assert relative(moved, expected) < 4e-3
    assert torch.equal(end[1], torch.zeros_like(end[1]))  # the empty sequence
    assert torch.equal(transition[1], torch.eye(end.shape[-1], device=end.device).expand_as(transition[1]))


def check_halves(inputs):
    """The first sequence in two pieces."""
    cut, end = 32, LENS[0]
    edges = lambda *x: torch.tensor(x, dtype=torch.int32, device=inputs.k.device)  # noqa: E731
    E1, T1 = summary_of(inputs, cu_seqlens=edges(0, cut), at=slice(0, cut))
    E2, T2 = summary_of(inputs, cu_seqlens=edges(0, end - cut), at=slice(cut, end))
    E, T = summary_of(inputs, cu_seqlens=edges(0, end), at=slice(0, end))
    assert relative(E1 @ T2 + E2, E) < 1e-2  # both sides round
    assert relative(T1 @ T2, T) < 1e-2


@pytest.mark.parametrize("options", [BOUNDED, Options()], ids=["safe", "softplus"])
def test_a_summary_moves_any_state(options):
    check_against_the_oracle(inputs_on("cpu", 32, options))


def test_two_halves_make_the_whole():
    check_halves(inputs_on("cpu", 32))


def test_what_does_not_fit_is_refused():
    inputs = inputs_on("cpu", 32, HV=2)
    with pytest.raises(InputError, match="beta"):
        summary_of(dataclasses.replace(inputs, beta=inputs.beta[:, :, :1]))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("size", "dtype"),
    [(64, "bfloat16"), (128, "bfloat16"), (128, "float16")],
    ids=["triton", "cute on Hopper", "cute on Hopper, fp16"],
)
def test_on_a_gpu(size, dtype):
    check_against_the_oracle(inputs_on("cuda", size, HV=2, dtype=dtype))
    check_halves(inputs_on("cuda", size, HV=2, dtype=dtype))
