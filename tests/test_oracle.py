"""The oracle against scalar loops written from the definition, its chunk form against it, and the plain kernels."""

import dataclasses
import math

import pytest
import torch
from decode_inputs import make as random_inputs
from decode_inputs import with_pool, with_state
from torch.overrides import TorchFunctionMode

from kda_kernels import registry
from kda_kernels.checks import problem_of
from kda_kernels.errors import InputError
from kda_kernels.problem import Gate, Op, Options
from kda_kernels.reference import oracle
from kda_kernels.reference.chunked import pair_products
from kda_kernels.reference.gate import beta_values, l2norm, log_decay
from kda_kernels.reference.rounding import operand_rounding
from kda_kernels.tensors import Inputs

SOFTPLUS, SAFE, NO_GATE = Options(), Options(Gate.SAFE, lower_bound=-5.0), Options(Gate.NONE)
LENS = (0, 1, 15, 16, 17, 63, 64, 65, 130, 0)


def make(lens=(5, 0, 1, 3), *, packed=True, state="plain", slots=None, state_dtype=torch.float32, **given) -> Inputs:
    """Random inputs on the CPU. `state`: none, plain or pool, as `decode_inputs.with_pool` makes it."""
    shape = {"lens": lens} if packed else {"N": len(lens), "T": lens[0]}
    options = {"options": SOFTPLUS, "dtype": torch.float32, "H": 1, "K": 4, "V": 3, "device": "cpu"}
    inputs = random_inputs(**shape, **(options | given))
    if state == "pool":
        return with_pool(inputs, slots or list(range(len(lens), 0, -1)), len(lens) + 2, 5, state_dtype)
    return with_state(inputs, state_dtype) if state == "plain" else inputs


# --- the definition, in scalars ------------------------------------------------------------------------------------


def scalar_sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def scalar_decay(inputs, raw, head, channel):
    options, K = inputs.options, inputs.q.shape[-1]
    if options.gate is Gate.NONE:
        return math.exp(raw)
    x = raw + (inputs.dt_bias.flatten()[head * K + channel].item() if inputs.dt_bias is not None else 0.0)
    rate = math.exp(inputs.A_log.flatten()[head].item()) if inputs.A_log is not None else 1.0
    if options.gate is Gate.SAFE:
        return math.exp(options.lower_bound * scalar_sigmoid(rate * x))
    return math.exp(-rate * (math.log1p(math.exp(x)) if x < 0 else x + math.log1p(math.exp(-x))))


def scalar_unit(values, on):
    norm = math.sqrt(sum(x * x for x in values) + 1e-6) if on else 1.0
    return [x / norm for x in values]


def scalar_head(inputs, row, tokens, head, S):
    """Runs one value head of one sequence; S[v][k] moves on in place. Returns o[t][v]."""
    options, (K, V) = inputs.options, (inputs.q.shape[-1], inputs.v.shape[-1])
    qk_head = head // (inputs.v.shape[2] // inputs.q.shape[2])
    scale, outs = options.scale if options.scale is not None else 1 / math.sqrt(K), []
    for t in tokens:
        q = scalar_unit(inputs.q[row, t, qk_head].tolist(), options.qk_l2norm)
        k = scalar_unit(inputs.k[row, t, qk_head].tolist(), options.qk_l2norm)
        v, g, beta = inputs.v[row, t, head].tolist(), inputs.g[row, t, head].tolist(), inputs.beta[row, t, head].item()
        if options.beta_is_logit:
            beta = scalar_sigmoid(beta) * (2 if options.allow_neg_eigval else 1)
        for j in range(V):
            for i in range(K):
                S[j][i] *= scalar_decay(inputs, g[i], head, i)
            u = beta * (v[j] - sum(S[j][i] * k[i] for i in range(K)))
            for i in range(K):
                S[j][i] += k[i] * u
        outs.append([scale * sum(S[j][i] * q[i] for i in range(K)) for j in range(V)])
    return outs


def scalar_reference(inputs):
    """(o, final state) as float64 tensors; the final state of a pool is the whole pool."""
    (B, T, HV, V), K = inputs.v.shape, inputs.q.shape[-1]
    packed = inputs.cu_seqlens is not None
    offsets = inputs.cu_seqlens.tolist() if packed else None
    N = len(offsets) - 1 if packed else B
    o = torch.zeros(B, T, HV, V, dtype=torch.float64)
    if inputs.state is None:
        final = torch.zeros(N, HV, *((V, K) if inputs.state_v_first else (K, V)), dtype=torch.float64)
    else:
        final = inputs.state.double()
    for n in range(N):
        slot = n if inputs.state_indices is None else inputs.state_indices[n].item()
        row, tokens = (0, range(offsets[n], offsets[n + 1])) if packed else (n, range(T))
        if slot < 0 or len(tokens) == 0:
            continue
        for head in range(HV):
            state = final[slot, head] if inputs.state_v_first else final[slot, head].mT
            S = state.tolist()
            o[row, list(tokens), head] = torch.tensor(scalar_head(inputs, row, tokens, head, S), dtype=torch.float64)
            state.copy_(torch.tensor(S, dtype=torch.float64))
    return o, final


# --- the recurrence ------------------------------------------------------------------------------------------------

CASES = {
    "softplus": {},
    "safe": {"options": SAFE, "HV": 4, "H": 2},
    "no gate": {"options": NO_GATE, "H": 2, "HV": 2},
    "beta values": {"options": Options(beta_is_logit=False)},
    "negative eigenvalues": {"options": Options(allow_neg_eigval=True), "HV": 3},
    "no norm, scale": {"options": Options(qk_l2norm=False, scale=0.7)},
    "no state": {"state": "none"},
    "no state, K-first": {"state": "none", "v_first": False},
    "K-first": {"v_first": False, "options": SAFE},
    "pool": {"state": "pool"},
    "pool, padding": {"state": "pool", "slots": [4, -1, 0, -1], "H": 2, "HV": 4},
    "pool, K-first": {"state": "pool", "v_first": False, "slots": [2, 5, -1, 3]},
    "dense": {"lens": (4, 4, 4), "packed": False},
    "dense decode, pool": {"lens": (1, 1, 1), "packed": False, "state": "pool", "slots": [3, -1, 1], "options": SAFE},
    "bf16": {"dtype": torch.bfloat16, "state_dtype": torch.bfloat16, "state": "pool"},
    "fp16": {"dtype": torch.float16, "options": NO_GATE},
    "one value, one key": {"K": 1, "V": 1, "state": "pool"},
    "no tokens": {"lens": (0, 0)},
    "no sequences": {"lens": ()},
}


@pytest.mark.parametrize("case", CASES)
def test_recurrence_is_the_definition(case):
    inputs = make(**CASES[case])
    before = {name: t.clone() for name, t in inputs.tensors().items()}
    out = oracle.recurrence(inputs)
    o, final = scalar_reference(inputs)
    torch.testing.assert_close(out.o, o, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(out.final_state, final, rtol=1e-12, atol=1e-13, equal_nan=True)
    for name, t in inputs.tensors().items():
        torch.testing.assert_close(t, before[name], rtol=0, atol=0, equal_nan=True)


def test_safe_gate_without_A_log_and_bias():
    inputs = dataclasses.replace(make(options=SAFE), A_log=None, dt_bias=None)
    o, final = scalar_reference(inputs)
    out = oracle.recurrence(inputs)
    torch.testing.assert_close(out.o, o, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(out.final_state, final, rtol=1e-12, atol=1e-13)


def test_an_empty_sequence_keeps_its_state_and_padding_gives_zeros():
    inputs = make(lens=(2, 0, 3), state="pool", slots=[1, 3, -1])
    out = oracle.recurrence(inputs)
    assert torch.equal(out.final_state[3], inputs.state[3].double())
    assert not torch.equal(out.final_state[1], inputs.state[1].double())
    assert out.final_state[[0, 2, 4]].isnan().all()
    assert out.o[0, :2].abs().min() > 0
    assert torch.count_nonzero(out.o[0, 2:]) == 0


def test_padding_rows_may_hold_anything():
    inputs = make(lens=(2, 3), state="pool", slots=[0, -1])
    for t in (inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta):
        t[:, 2:] = torch.nan
    for out in (oracle.recurrence(inputs), oracle.chunk_form(inputs)):
        assert torch.count_nonzero(out.o[0, 2:]) == 0
        assert out.o.isfinite().all()


def test_final_state_only_when_asked_for():
    for state in ("none", "plain", "pool"):
        inputs = dataclasses.replace(make(state=state), output_final_state=False)
        assert oracle.recurrence(inputs).final_state is None
        assert oracle.chunk_form(inputs).final_state is None


def test_bad_inputs_are_refused():
    inputs = make()
    inputs.cu_seqlens[-1] += 1
    for function in (oracle.recurrence, oracle.chunk_form, oracle.gate_cumsum):
        with pytest.raises(InputError, match="cu_seqlens ends at 10"):
            function(inputs)


# --- the chunk form ------------------------------------------------------------------------------------------------


def gates(inputs, regime):
    """Overwrites the gates of inputs whose g is the log decay."""
    g = inputs.g
    if regime == "none at all":
        g.zero_()
    elif regime == "weak":
        g.mul_(1e-3)
    elif regime == "strong":
        g.mul_(50)
    elif regime == "resets":  # most channels of some tokens forget everything, the rest nothing
        g.zero_()
        g[:, ::3, :, 1:] = -1000.0
        g[:, 1::7] = -torch.inf
    return inputs


def assert_same(out, expected, tolerance):
    """Every element is within `tolerance` of the largest one expected; NaN (slots nobody uses) stays NaN."""
    for name, t in expected.tensors().items():
        peak = torch.cat([t.nan_to_num().abs().flatten(), t.new_zeros(1)]).max().item()
        torch.testing.assert_close(
            out.tensors()[name].double(), t.double(), rtol=0, atol=tolerance * peak, equal_nan=True
        )


@pytest.mark.parametrize("regime", ["none at all", "weak", "plain", "strong", "resets"])
@pytest.mark.parametrize("chunk", [16, 64])
def test_chunk_form_is_the_recurrence_for_any_gate(regime, chunk):
    inputs = gates(make(LENS, H=1, HV=2, K=8, V=5, options=NO_GATE), regime)
    assert_same(oracle.chunk_form(inputs, chunk=chunk), oracle.recurrence(inputs), 1e-10)


@pytest.mark.parametrize(
    "case",
    [
        {"options": Options(allow_neg_eigval=True), "H": 2, "HV": 4, "state": "pool"},
        {"options": Options(Gate.SAFE, lower_bound=-5.0, qk_l2norm=False, scale=1.5), "v_first": False},
        {"options": Options(Gate.SAFE, lower_bound=-50.0, beta_is_logit=False), "state": "none", "K": 33, "V": 17},
        {"lens": (70,) * 3, "packed": False, "state": "pool", "slots": [2, -1, 0], "v_first": False},
        {"lens": (1,) * 5, "packed": False, "state": "pool", "dtype": torch.bfloat16},
        {"lens": (0, 0)},
        {"lens": ()},
    ],
)
def test_chunk_form_is_the_recurrence_for_any_layout(case):
    inputs = make(**{"lens": LENS, "K": 8, "V": 4, **case})
    assert_same(oracle.chunk_form(inputs), oracle.recurrence(inputs), 1e-10)


@pytest.mark.parametrize("neg_eigval", [False, True])
@pytest.mark.parametrize("strength", [0.0, 1e-3, 1.0])
def test_chunk_form_with_near_collinear_keys(neg_eigval, strength):
    inputs = near_collinear(Options(allow_neg_eigval=neg_eigval), strength)
    assert_same(oracle.chunk_form(inputs), oracle.recurrence(inputs), 1e-10)


def near_collinear(options, strength, dtype=torch.float32):
    """One direction a head plus 2% noise, beta close to its maximum; `strength` scales the gate."""
    inputs = make((130, 64), H=2, HV=2, K=16, V=8, options=dataclasses.replace(options, gate=Gate.NONE), dtype=dtype)
    direction = torch.nn.functional.normalize(inputs.q[0, 0].float(), dim=-1)
    inputs.k = (direction + 0.02 * inputs.k.float()).to(dtype)
    inputs.beta = (inputs.beta.float() + 4).to(dtype)
    inputs.g *= strength
    return inputs


@pytest.mark.parametrize(
    ("operand_dtype", "low", "high"),
    [
        (torch.bfloat16, 1e-4, 2e-2),
        ("tf32", 1e-5, 3e-3),
        ("tf32 cut", 1e-5, 6e-3),
        (torch.float16, 1e-5, 3e-3),
        (torch.float32, 0, 2e-6),
    ],
)
@pytest.mark.parametrize("collinear", [False, True])
def test_rounded_operands_cost_what_their_mantissa_says(operand_dtype, low, high, collinear):
    """The error is neither zero (something is rounded) nor out of proportion to the operands' 8, 11 or 24 bits."""
    options = Options(Gate.NONE)
    inputs = near_collinear(options, 1e-3) if collinear else gates(make(LENS, K=32, V=16, options=options), "weak")
    exact, out = oracle.recurrence(inputs), oracle.chunk_form(inputs, operand_dtype=operand_dtype)
    assert out.o.dtype is torch.float32
    assert out.final_state.dtype is torch.float32
    for name, t in exact.tensors().items():
        error = ((out.tensors()[name].double() - t).norm() / t.norm()).item()
        assert low <= error < high, f"{name}: {error:.2e}"


class OperandsAreRepresentable(TorchFunctionMode):
    """Fails when a matmul is given a number that `dtype` cannot hold; counts the matmuls."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.seen = dtype, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.matmul, torch.Tensor.__matmul__):
            self.seen += 1
            for operand in args:
                assert torch.equal(operand.to(self.dtype).to(operand.dtype), operand)
        return func(*args, **(kwargs or {}))


def test_every_operand_is_rounded():
    """64 tokens: 2 * 3 products between sub-chunks, then W, A v, W S, qg S, Aqk v' and the state's update."""
    inputs = make((128,), K=32, V=16)
    with OperandsAreRepresentable(torch.bfloat16) as mode:
        oracle.chunk_form(inputs, operand_dtype=torch.bfloat16)
    assert mode.seen == 2 * 12


@pytest.mark.parametrize(("i", "j"), [(3, 1), (40, 1), (40, 39)])
def test_both_factors_of_a_pair_are_rounded(i, j):
    """Within a sub-chunk (elementwise there) and across: with one channel and no decay, the product of the two."""
    x = torch.full((64, 1), 1 + 2**-9)
    (product,) = pair_products((x,), x * 3, torch.zeros(64, 1), operand_rounding(torch.bfloat16))
    assert product[i, j] == 1.0 * (x[0] * 3).bfloat16().item() != (x[0] * x[0] * 3).item()


def test_rounded_chunk_form_survives_resets_and_keeps_dtypes():
    inputs = make(LENS, K=8, V=5, options=NO_GATE, dtype=torch.bfloat16, state_dtype=torch.bfloat16, state="pool")
    gates(inputs, "resets")
    out = oracle.chunk_form(inputs, operand_dtype=torch.bfloat16)
    assert out.o.dtype is out.final_state.dtype is torch.bfloat16
    assert_same(out, oracle.recurrence(inputs), 2e-2)


def test_operand_rounding():
    x = torch.tensor(
        [1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-10, -(1 + 2**-11 + 2**-20), 3e38, 1e-30, torch.inf, torch.nan]
    )
    tf32 = operand_rounding("tf32")(x)
    expected = torch.tensor([1.0, 1 + 2**-9, 1 + 2**-10, -(1 + 2**-10)])
    assert torch.equal(tf32[:4], expected)
    assert ((tf32[4:6] - x[4:6]).abs() <= x[4:6] * 2**-11).all()
    assert tf32[6].isinf()
    assert tf32[7].isnan()
    cut = operand_rounding("tf32 cut")(x)
    assert torch.equal(cut[:4], torch.tensor([1.0, 1 + 2**-10, 1 + 2**-10, -1.0]))
    assert ((x[4:6] - cut[4:6]) >= 0).all() and (x[4:6] - cut[4:6] < x[4:6] * 2**-10).all()
    assert cut[6].isinf() and cut[7].isnan()
    assert torch.equal(operand_rounding(torch.bfloat16)(x[:1]), torch.ones(1))
    assert torch.equal(operand_rounding(None)(x[:6]), x[:6])


# --- gates ---------------------------------------------------------------------------------------------------------


def test_softplus_gate_is_exact_where_it_is_hard():
    g = torch.tensor([-700.0, -40.0, 0.0, 19.0, 21.0, 800.0]).view(1, 1, 1, 6)
    got = log_decay(g, torch.zeros(1), None, Options())
    expected = [-math.exp(-700), -math.exp(-40), -math.log(2), -19 - math.log1p(math.exp(-19))]
    expected += [-21 - math.log1p(math.exp(-21)), -800.0]
    torch.testing.assert_close(got.flatten().tolist(), expected, rtol=1e-15, atol=0)


def test_gate_parameters_in_every_shape():
    torch.manual_seed(0)
    g, A_log, bias = torch.randn(1, 3, 2, 4), torch.randn(2), torch.randn(2, 4)
    for options in (Options(), SAFE):
        expected = log_decay(g, A_log, bias, options)
        assert torch.equal(log_decay(g, A_log.view(1, 1, 2, 1), bias.flatten(), options), expected)
        assert log_decay(g, A_log, bias, options, torch.float32).dtype is torch.float32
        assert (expected < 0).all()


def test_beta_and_norm():
    x = torch.tensor([-1.0, 0.0, 30.0])
    assert beta_values(x, Options()).tolist() == pytest.approx([1 / (1 + math.e), 0.5, 1 / (1 + math.exp(-30))])
    assert beta_values(x, Options(allow_neg_eigval=True))[1] == 1.0
    assert torch.equal(beta_values(x, Options(beta_is_logit=False)), x.double())
    assert torch.equal(l2norm(torch.zeros(2, 3)), torch.zeros(2, 3, dtype=torch.float64))
    assert l2norm(torch.tensor([3.0, 4.0])).tolist() == pytest.approx([0.6, 0.8], rel=1e-7)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("chunk", [16, 64])
def test_gate_cumsum_starts_anew_with_every_chunk_and_sequence(packed, chunk):
    lens = LENS if packed else (70, 70)
    inputs = make(lens, options=SAFE, packed=packed)
    got = oracle.gate_cumsum(inputs, chunk)
    decay = log_decay(inputs.g, inputs.A_log, inputs.dt_bias, inputs.options).flatten(0, 1)
    pieces = [piece.cumsum(0) for sequence in decay.split(lens) for piece in sequence.split(chunk)]
    assert got.dtype is torch.float64
    torch.testing.assert_close(got, torch.cat(pieces).view(inputs.g.shape), rtol=1e-14, atol=0)


# --- the plain kernels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torch-decode", "torch-prefill"])
@pytest.mark.parametrize("case", ["safe", "pool, padding", "pool, K-first", "dense", "no state, K-first", "bf16"])
def test_plain_kernels(name, case):
    kernel, inputs = registry.get(name), make(**CASES[case])
    assert kernel.unsupported(problem_of(inputs, kernel.op)) is None
    expected, fresh = oracle.recurrence(inputs), inputs.fresh()
    out = kernel.run(fresh)
    assert out.o.dtype is inputs.v.dtype
    assert out.final_state.dtype is (torch.float32 if inputs.state is None else inputs.state.dtype)
    assert_same(out, expected, 5e-3 if inputs.v.dtype is torch.bfloat16 else 2e-6)
    if inputs.state_indices is not None:
        assert out.final_state is fresh.state
    elif inputs.state is not None:
        assert torch.equal(fresh.state, inputs.state)


@pytest.mark.parametrize("name", ["torch-decode", "torch-prefill"])
def test_plain_kernels_update_a_pool_whether_or_not_it_is_asked_back(name):
    inputs = dataclasses.replace(make(state="pool"), output_final_state=False)
    asked = dataclasses.replace(inputs.fresh(), output_final_state=True)
    kernel = registry.get(name)
    kernel.run(asked)
    assert kernel.run(inputs).final_state is None
    assert torch.equal(inputs.state.nan_to_num(), asked.state.nan_to_num())


def test_decoding_from_a_prefilled_pool_continues_the_sequence():
    """Prefill 20 tokens, then decode 3 more one by one in the same pool: as one sequence of 23 tokens."""
    whole = make((23,), state="pool", options=SAFE)
    pool = whole.fresh().state
    outs = []
    for tokens in (slice(0, 20), slice(20, 21), slice(21, 22), slice(22, 23)):
        part = {name: getattr(whole, name)[:, tokens] for name in ("q", "k", "v", "g", "beta")}
        length = torch.tensor([0, part["q"].shape[1]], dtype=torch.int32)
        op = Op.PREFILL if length[1] > 1 else Op.DECODE
        step = dataclasses.replace(whole, **part, cu_seqlens=length, state=pool)
        outs.append(registry.get(f"torch-{op}").run(step).o)
    expected = oracle.recurrence(whole)
    torch.testing.assert_close(torch.cat(outs, 1).double(), expected.o, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(pool.double(), expected.final_state, rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_oracle_on_a_gpu(case):
    inputs = make(**CASES[case])
    on_gpu = inputs.to("cuda")
    expected = oracle.recurrence(inputs)
    for function in (oracle.recurrence, oracle.chunk_form):
        out = function(on_gpu)
        assert out.o.is_cuda
        for name, t in out.tensors().items():
            torch.testing.assert_close(t.cpu(), expected.tensors()[name], rtol=1e-10, atol=1e-12, equal_nan=True)
