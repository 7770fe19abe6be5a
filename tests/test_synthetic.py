"""Synthetic inputs: each regime is what its table says, and a problem's tensors have that problem's shapes."""

import dataclasses
import math

import pytest
import torch

from kda_kernels.checks import problem_of
from kda_kernels.errors import InputError
from kda_kernels.problem import Gate, Op, Options, Problem
from kdacli import synthetic
from kdacli.synthetic import elements, make_inputs

SAFE = Options(gate=Gate.SAFE, lower_bound=-5.0)
MANY = Problem(Op.PREFILL, (64,), H=16, HV=16, K=128, V=16, options=SAFE, g_dtype="float32", initial_state=False)

PROBLEMS = [
    Problem(Op.PREFILL, (5, 0, 17), H=2, HV=4, K=16, V=8, options=SAFE),
    Problem(Op.PREFILL, (6, 6), H=1, HV=1, K=8, V=16, packed=False, dtype="float16", beta_dtype="float32"),
    Problem(Op.PREFILL, (9,), H=2, HV=2, K=8, V=8, initial_state=False, final_state=False, g_dtype="float32"),
    Problem(Op.DECODE, (1,) * 5, H=2, HV=2, K=8, V=16, packed=False, pool_slots=9, padding=2, state_dtype="bfloat16"),
    Problem(Op.DECODE, (1, 1, 1), H=2, HV=2, K=8, V=16, state_v_first=False, param_dtype="bfloat16"),
    Problem(Op.GATE, (7,), H=1, HV=2, K=8, V=8, options=Options(gate=Gate.NONE), param_dtype="float32"),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_the_tensors_pose_the_problem_they_were_made_for(problem):
    inputs = make_inputs(problem)
    assert problem_of(inputs, problem.op) == problem
    drawn = [
        t for name, t in inputs.tensors().items() if name not in ("A_log", "dt_bias", "state_indices", "cu_seqlens")
    ]
    assert elements(problem) == sum(t.numel() for t in drawn)


@pytest.mark.parametrize("gates, low, high", [("init", 1e-3, 1e-1), ("weak", 1e-5, 1e-3)])
def test_dt_is_log_uniform(gates, low, high):
    inputs = make_inputs(MANY, gates=gates)
    dt = torch.nn.functional.softplus(inputs.dt_bias.double())
    assert inputs.A_log.eq(0).all()
    assert low * 0.99 <= dt.min() and dt.max() <= high * 1.01
    logs = dt.log()
    width = math.log(high / low)
    assert logs.mean() == pytest.approx(math.log(low) + width / 2, abs=0.05 * width)
    assert logs.std() == pytest.approx(width / 12**0.5, rel=0.05)


@pytest.mark.parametrize("gates, std", [("bench", 1.0), ("init", 1.0), ("weak", 0.1)])
def test_raw_gates_are_normal(gates, std):
    g = make_inputs(MANY, gates=gates).g
    assert g.mean() == pytest.approx(0.0, abs=0.02 * std)
    assert g.std() == pytest.approx(std, rel=0.02)


def test_bench_parameters_are_uniform():
    inputs = make_inputs(MANY, gates="bench")
    for values, spread in ((inputs.A_log, 0.3), (inputs.dt_bias, 0.05)):
        assert values.min() >= 0 and values.max() <= 1
        assert values.mean() == pytest.approx(0.5, abs=spread)


@pytest.mark.parametrize("gates", synthetic.GATES)
@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_an_activated_gate_is_the_same_draw_after_the_formula(gates, lower_bound):
    gate = Gate.SOFTPLUS if lower_bound is None else Gate.SAFE
    raw = make_inputs(dataclasses.replace(MANY, options=Options(gate, lower_bound)), gates=gates)
    done = make_inputs(dataclasses.replace(MANY, options=Options(Gate.NONE, lower_bound)), gates=gates)
    x, A = (raw.g + raw.dt_bias).double(), raw.A_log.double().exp()[:, None]
    expected = -A * torch.log1p(x.exp()) if lower_bound is None else lower_bound / (1 + torch.exp(-A * x))
    assert done.A_log is None and done.dt_bias is None
    torch.testing.assert_close(done.g.double(), expected, rtol=1e-5, atol=1e-9)
    assert done.g.max() <= 0 and done.g.min() >= (lower_bound or -math.inf)


def test_regimes_differ_in_memory():
    """What the table promises: bench forgets within a few tokens, weak remembers for hundreds."""
    problem = dataclasses.replace(MANY, options=Options(Gate.NONE))
    rate = {gates: -make_inputs(problem, gates=gates).g.mean().item() for gates in synthetic.GATES}
    assert rate["bench"] > 1 > 0.1 > rate["init"] > 0.01 > rate["weak"]


def test_near_collinear_keys():
    inputs = make_inputs(dataclasses.replace(MANY, dtype="float32", beta_dtype="float32"), keys="near-collinear")
    k = inputs.k[0].transpose(0, 1).double()  # [H, T, K]
    assert torch.linalg.vector_norm(k, dim=-1).sub(1).abs().max() < 1e-5
    cosines = k @ k.transpose(1, 2)
    assert cosines.min() > 0.998
    assert cosines.mean() == pytest.approx(1 / (1 + 0.02**2), abs=1e-4)
    assert torch.linalg.vector_norm(k[0, 0] - k[1, 0]) > 0.5, "each head has a direction of its own"
    assert inputs.beta.mean() == pytest.approx(4.0, abs=0.1) and inputs.beta.std() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("qk_l2norm", [True, False])
def test_q_and_k_come_normalised_when_no_kernel_will_do_it(qk_l2norm):
    options = Options(qk_l2norm=qk_l2norm)
    inputs = make_inputs(dataclasses.replace(MANY, dtype="float32", options=options))
    for x in (inputs.q, inputs.k):
        norms = torch.linalg.vector_norm(x, dim=-1)
        assert norms.mean().item() == pytest.approx(128**0.5 if qk_l2norm else 1.0, rel=0.02)


def test_beta_values_are_sigmoids_of_the_logits():
    problem = dataclasses.replace(MANY, beta_dtype="float32")
    logits = make_inputs(problem).beta
    values = make_inputs(dataclasses.replace(problem, options=Options(beta_is_logit=False))).beta
    torch.testing.assert_close(values, 1 / (1 + torch.exp(-logits)))


@pytest.mark.parametrize("slots, padding", [(16, 0), (16, 3), (8, 0), (5, 3)])
def test_a_pool_is_permuted_and_poisoned(slots, padding):
    problem = Problem(Op.DECODE, (1,) * 8, H=1, HV=2, K=4, V=8, packed=False, pool_slots=slots, padding=padding)
    for seed in range(4):
        inputs = make_inputs(problem, seed=seed)
        used = [i for i in inputs.state_indices.tolist() if i >= 0]
        assert len(used) == len(set(used)) == 8 - padding
        assert inputs.state_indices.eq(-1).sum() == padding
        assert used != list(range(len(used)))
        assert inputs.state[used].isfinite().all() and inputs.state[used].std() == pytest.approx(0.1, rel=0.2)
        unused = [i for i in range(slots) if i not in used]
        assert inputs.state[unused].isnan().all()


def test_a_pool_without_initial_state_is_zero_where_it_is_used():
    problem = Problem(Op.DECODE, (1, 1), H=1, HV=1, K=4, V=4, packed=False, pool_slots=4, initial_state=False)
    inputs = make_inputs(problem)
    assert inputs.state[inputs.state_indices.long()].eq(0).all()
    assert inputs.state.isnan().any(dim=(1, 2, 3)).sum() == 2


def test_a_seed_decides_everything_and_each_tensor_alone():
    again, other = make_inputs(MANY, seed=7), make_inputs(MANY, seed=8)
    with_state = make_inputs(dataclasses.replace(MANY, initial_state=True), seed=7)
    for name, tensor in make_inputs(MANY, seed=7).tensors().items():
        assert torch.equal(tensor, getattr(again, name))
        assert torch.equal(tensor, getattr(with_state, name))
        assert name == "cu_seqlens" or not torch.equal(tensor, getattr(other, name))


@pytest.mark.parametrize("wrong", [{"gates": "strong"}, {"keys": "parallel"}])
def test_unknown_names_are_refused(wrong):
    with pytest.raises(InputError, match="should be one of"):
        make_inputs(MANY, **wrong)


@pytest.mark.gpu
def test_small_inputs_are_the_same_on_a_gpu():
    for name, tensor in make_inputs(PROBLEMS[3]).tensors().items():
        torch.testing.assert_close(
            make_inputs(PROBLEMS[3], device="cuda").tensors()[name].cpu(), tensor, equal_nan=True
        )


@pytest.mark.gpu
def test_large_inputs_are_drawn_on_the_gpu():
    problem = Problem(Op.PREFILL, (2048,), H=16, HV=16, options=SAFE)
    assert elements(problem) >= synthetic.LARGE
    first, again = (make_inputs(problem, device="cuda") for _ in range(2))
    assert (
        first.q.is_cuda and torch.equal(first.q, again.q) and first.q.float().std().item() == pytest.approx(1, rel=0.01)
    )
