"""The public functions: FLA's signatures, what they refuse, and that each of them computes the operation."""

import inspect
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import logsigmoid

from kda_kernels import (
    chunk_kda,
    fused_recurrent_kda,
    fused_recurrent_kda_fwd,
    kda_decode,
    kda_prefill,
)
from kda_kernels.errors import InputError, KdaError
from kda_kernels.problem import Gate, Options
from kda_kernels.reference.oracle import recurrence
from kda_kernels.tensors import Inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, H, HV, K, V = 2, 1, 2, 16, 16

# Parameters in order, as in FLA 0.6.0.
SIGNATURES = {
    chunk_kda: "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel use_gate_in_kernel "
    "use_beta_sigmoid_in_kernel allow_neg_eigval safe_gate lower_bound disable_recompute return_intermediate_states "
    "state_v_first cu_seqlens cu_seqlens_cpu cp_context use_graph max_num_seqs kwargs",
    fused_recurrent_kda: "q k v g beta A_log dt_bias scale initial_state output_final_state use_qk_l2norm_in_kernel "
    "use_gate_in_kernel use_beta_sigmoid_in_kernel allow_neg_eigval lower_bound state_v_first cu_seqlens kwargs",
    fused_recurrent_kda_fwd: "q k v g beta A_log dt_bias initial_state scale output_final_state inplace_final_state "
    "state_v_first cu_seqlens ssm_state_indices num_accepted_tokens use_qk_l2norm_in_kernel use_gate_in_kernel "
    "use_beta_sigmoid_in_kernel allow_neg_eigval lower_bound out kwargs",
}


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def tokens(generator):
    """q, k, v, g, beta of a dense batch, activated: unit-length k, log decays, beta in (0, 1)."""
    q, k = torch.randn(2, N, 3, H, K, generator=generator)
    v, g = torch.randn(N, 3, HV, V, generator=generator), torch.randn(N, 3, HV, K, generator=generator)
    beta = torch.rand(N, 3, HV, generator=generator)
    named = {"q": q, "k": k / k.norm(dim=-1, keepdim=True), "v": v, "g": logsigmoid(g), "beta": beta}
    return {name: x.to(DEVICE) for name, x in named.items()}


@pytest.fixture
def state(generator):
    """K-first, as FLA's default."""
    return torch.randn(N, HV, K, V, generator=generator).to(DEVICE)


def expect(tokens, options=None, **fields):
    options = options or Options(gate=Gate.NONE, beta_is_logit=False, qk_l2norm=False)
    return recurrence(Inputs(**tokens, options=options, state_v_first=fields.pop("state_v_first", False), **fields))


def close(actual, expected, tolerance=1e-5):
    """Largest error against the largest value."""
    assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max()


def prefill_close(actual, expected):
    close(actual, expected, 5e-3)  # tf32 products


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__name__)
def test_signatures(function):
    assert " ".join(inspect.signature(function).parameters) == SIGNATURES[function]


def test_importing_the_package_imports_no_torch():
    code = "import sys, kda_kernels; assert 'torch' not in sys.modules and 'chunk_kda' in dir(kda_kernels)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_unknown_names_of_the_package():
    import kda_kernels

    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        kda_kernels.nonsense  # noqa: B018


@pytest.mark.parametrize("state_v_first", [False, True])
def test_fused_recurrent(tokens, state, state_v_first):
    state = state.mT.contiguous() if state_v_first else state
    before = state.clone()
    o, final = fused_recurrent_kda(**tokens, initial_state=state, output_final_state=True, state_v_first=state_v_first)
    expected = expect(tokens, state=state, state_v_first=state_v_first)
    close(o, expected.o)
    close(final, expected.final_state)
    assert final.dtype is torch.float32
    assert state.equal(before)


@pytest.mark.parametrize("state_v_first", [False, True])
def test_chunk(tokens, state, state_v_first):
    state = state.mT.contiguous() if state_v_first else state
    o, final = chunk_kda(**tokens, initial_state=state, output_final_state=True, state_v_first=state_v_first)
    expected = expect(tokens, state=state, state_v_first=state_v_first)
    prefill_close(o, expected.o)
    prefill_close(final, expected.final_state)


@pytest.mark.parametrize("function", [chunk_kda, fused_recurrent_kda])
def test_defaults_return_no_final_state(tokens, function):
    o, final = function(**tokens)
    assert final is None
    prefill_close(o, expect(tokens).o)


@pytest.mark.parametrize("function", [chunk_kda, fused_recurrent_kda])
@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("has_A_log", [True, False])
def test_activations_in_the_kernel(tokens, function, lower_bound, has_A_log):
    A_log, dt_bias = torch.rand(1, 1, HV, 1, device=DEVICE), torch.rand(HV * K, device=DEVICE)
    kwargs = {"A_log": A_log if has_A_log else None, "dt_bias": dt_bias, "lower_bound": lower_bound}
    switches = ("use_gate_in_kernel", "use_qk_l2norm_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval")
    kwargs |= dict.fromkeys(switches, True)
    if not has_A_log and lower_bound is None:
        with pytest.raises(InputError, match="A_log is missing"):
            function(**tokens, **kwargs)
        return
    gate = Gate.SOFTPLUS if lower_bound is None else Gate.SAFE
    options = Options(gate=gate, lower_bound=lower_bound, allow_neg_eigval=True, scale=0.5)
    expected = expect(tokens, options, A_log=kwargs["A_log"], dt_bias=dt_bias)
    prefill_close(function(**tokens, scale=0.5, **kwargs)[0], expected.o)


@pytest.mark.parametrize("function", [chunk_kda, fused_recurrent_kda])
def test_gate_parameters_are_not_looked_at_without_the_gate(tokens, function):
    nonsense = torch.full((7,), float("nan"))
    o, _ = function(**tokens, A_log=nonsense, dt_bias=nonsense)
    prefill_close(o, expect(tokens).o)


def test_safe_gate_promises_bounded_gates(tokens):
    tokens["g"] = tokens["g"].clamp(-5, 0)
    prefill_close(chunk_kda(**tokens, safe_gate=True)[0], expect(tokens).o)


@pytest.mark.parametrize("state_v_first", [False, True])
def test_intermediate_states(tokens, state, state_v_first):
    state = state.mT.contiguous() if state_v_first else state
    o, final, h = chunk_kda(**tokens, initial_state=state, return_intermediate_states=True, state_v_first=state_v_first)
    assert final is None
    assert h.shape == (N, 1, *state.shape[1:])
    assert h.dtype is tokens["k"].dtype
    torch.testing.assert_close(h[:, 0], state)
    prefill_close(o, expect(tokens, state=state, state_v_first=state_v_first).o)


@pytest.mark.parametrize("function", [chunk_kda, fused_recurrent_kda])
def test_deprecated_state_layout(tokens, state, function):
    with pytest.warns(DeprecationWarning, match="state_v_first"):
        _, final = function(
            **tokens, initial_state=state.mT.contiguous(), output_final_state=True, transpose_state_layout=True
        )
    prefill_close(final.mT, expect(tokens, state=state).final_state)
    with pytest.raises(ValueError, match="transpose_state_layout is given next to state_v_first"):
        function(**tokens, state_v_first=True, transpose_state_layout=True)


def test_chunk_sizes(tokens):
    o, _ = chunk_kda(**tokens, chunk_size=32)
    prefill_close(o, expect(tokens).o)
    with pytest.raises(ValueError, match="`chunk_size` must be either 32 or 64"):
        chunk_kda(**tokens, chunk_size=16)
    with pytest.raises(InputError, match="chunk_size is 32: it should be 64 with return_intermediate_states"):
        chunk_kda(**tokens, chunk_size=32, return_intermediate_states=True)


@pytest.mark.parametrize(
    ("function", "wrong", "message"),
    [
        (chunk_kda, {"cp_context": object()}, "^cp_context has no group"),
        (chunk_kda, {"use_graph": True}, "^use_graph is given"),
        (chunk_kda, {"head_first": False}, "^head_first is not an argument of chunk_kda"),
        (chunk_kda, {"safe_gate": True, "use_gate_in_kernel": True}, "^lower_bound is missing"),
        (chunk_kda, {"initial_state": torch.zeros(N, HV, K, V).half()}, "^initial_state is torch.float16"),
        (chunk_kda, {"initial_state": torch.zeros(N + 1, HV, K, V)}, "^initial_state has shape"),
        (chunk_kda, {"allow_neg_eigval": True}, "use_beta_sigmoid_in_kernel"),
        (chunk_kda, {"cu_seqlens": torch.tensor([0, 3])}, "^q has batch size 2"),
        (fused_recurrent_kda, {"chunk_size": 64}, "^chunk_size is not an argument of fused_recurrent_kda"),
        (fused_recurrent_kda, {"q": torch.zeros(N, 3, H, K).double()}, "^q is float64"),
        (fused_recurrent_kda, {"beta": torch.zeros(N, 3, H)}, "^beta has shape"),
        (fused_recurrent_kda_fwd, {}, "^initial_state is missing"),
        (
            fused_recurrent_kda_fwd,
            {"num_accepted_tokens": torch.ones(N).int(), "initial_state": torch.zeros(N, HV, K, V)},
            "^num_accepted_tokens is given without a state pool",
        ),
        (
            fused_recurrent_kda_fwd,
            {"inplace_final_state": False, "ssm_state_indices": torch.tensor([0, 1])},
            "^ssm_state_indices is given without",
        ),
        (
            fused_recurrent_kda_fwd,
            {"initial_state": torch.zeros(5, HV, K, V), "ssm_state_indices": torch.tensor([[0], [1]])},
            "^ssm_state_indices has 1 columns",
        ),
        (
            fused_recurrent_kda_fwd,
            {"initial_state": torch.zeros(N, HV, K, V), "out": torch.zeros(N, 3, HV, V).half()},
            "^out has dtype torch.float16",
        ),
        (
            fused_recurrent_kda_fwd,
            {"initial_state": torch.zeros(N, HV, K, V), "out": torch.zeros(N, 3, V, HV)[..., :1]},
            "^out has shape",
        ),
        (kda_decode, {"state": None, "state_indices": torch.tensor([0, 1])}, "^state is missing"),
        (kda_decode, {"state": torch.zeros(4, HV, V, K), "state_indices": None}, "^state_indices is missing"),
        (kda_prefill, {"state": torch.zeros(4, HV, V, K), "state_indices": None}, "^state_indices is missing"),
    ],
)
def test_refusals_name_the_argument(tokens, function, wrong, message):
    wrong = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in wrong.items()}
    with pytest.raises(InputError, match=message):
        function(**{**tokens, **wrong})


def test_fwd_updates_a_pool_in_place(tokens, state):
    pool = torch.full((5, HV, K, V), float("nan"), device=DEVICE)
    indices = torch.tensor([4, 1], dtype=torch.int32, device=DEVICE)
    pool[[4, 1]] = state
    out = torch.empty_like(tokens["v"])
    expected = expect(tokens, state=state)
    o, final = fused_recurrent_kda_fwd(**tokens, initial_state=pool, ssm_state_indices=indices, out=out)
    assert o is out
    assert final is pool
    close(o, expected.o)
    close(pool[[4, 1]], expected.final_state)
    assert pool[[0, 2, 3]].isnan().all()


def test_fwd_updates_a_plain_state_in_place_or_not(tokens, state):
    expected = expect(tokens, state=state)
    before = state.clone()
    _, final = fused_recurrent_kda_fwd(
        **tokens, initial_state=state, output_final_state=True, inplace_final_state=False
    )
    close(final, expected.final_state)
    assert state.equal(before)
    _, final = fused_recurrent_kda_fwd(**tokens, initial_state=state)
    assert final is state
    close(state, expected.final_state)


def test_decode_continues_a_prefill_on_the_same_pool(tokens, state):
    """The serving forms on raw tensors: two prompt tokens, then one more, no copy of the state between."""
    raw = {**tokens, "g": tokens["g"] + 1, "beta": tokens["beta"] * 4 - 2}
    A_log, dt_bias = torch.rand(HV, device=DEVICE), torch.rand(HV, K, device=DEVICE)
    pool = torch.full((4, HV, V, K), float("nan"), device=DEVICE)
    indices = torch.tensor([2, 0], dtype=torch.int32, device=DEVICE)
    pool[[2, 0]] = state.mT
    serving = {"state": pool, "state_indices": indices, "A_log": A_log, "dt_bias": dt_bias}
    expected = expect(raw, Options(), A_log=A_log, dt_bias=dt_bias, state=state)
    prompt = {name: x[:, :2] for name, x in raw.items()}
    token = {name: x[:, 2:] for name, x in raw.items()}
    prefill_close(kda_prefill(**prompt, **serving), expected.o[:, :2])
    out = torch.empty_like(token["v"])
    o = kda_decode(**token, **serving, out=out)
    assert o is out
    prefill_close(o, expected.o[:, 2:])
    prefill_close(pool[[2, 0]].mT, expected.final_state)
    assert pool[[1, 3]].isnan().all()


def test_serving_forms_of_a_packed_batch(tokens, state):
    packed = {name: x.flatten(0, 1).unsqueeze(0) for name, x in tokens.items()}
    cu_seqlens = torch.tensor([0, 3, 6], dtype=torch.int32, device=DEVICE)
    indices = torch.tensor([1, 0], device=DEVICE)
    switches = dict.fromkeys(("use_gate_in_kernel", "use_qk_l2norm_in_kernel", "use_beta_sigmoid_in_kernel"), False)
    expected = expect(tokens, state=state)
    for function in (kda_decode, kda_prefill):
        pool = state.mT.flip(0).contiguous()
        o = function(**packed, state=pool, state_indices=indices, cu_seqlens=cu_seqlens, **switches)
        prefill_close(o.view_as(expected.o), expected.o)
        prefill_close(pool.flip(0).mT, expected.final_state)


@pytest.mark.parametrize("function", [chunk_kda, fused_recurrent_kda])
def test_tensors_that_require_grad_run_forward_and_say_that_there_is_no_backward(tokens, state, function):
    plain, _ = function(**tokens, initial_state=state, output_final_state=True)
    leaves = {name: x.clone().requires_grad_() for name, x in tokens.items()}
    o, final = function(**leaves, initial_state=state.requires_grad_(), output_final_state=True)
    assert o.equal(plain)
    for result in (o, final):
        with pytest.raises(KdaError, match="no backward"):
            result.sum().backward(retain_graph=True)
    with torch.no_grad():
        assert not function(**leaves)[0].requires_grad
