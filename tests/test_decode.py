"""The Triton decode kernel against the fp64 token recurrence (in Triton's interpreter where there is no GPU)."""

import dataclasses
import itertools

import pytest
import torch

from kda_kernels.errors import InputError, UnavailableError
from kda_kernels.problem import Gate, Op, Options, Problem
from kda_kernels.reference.oracle import recurrence
from kda_kernels.tensors import Inputs, Outputs
from kda_kernels.triton import decode as module
from kda_kernels.triton.decode import DecodeConfig, decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One rounding: half an ulp, next to sums in fp32.
RTOL = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2e-5}
SAFE = Options(gate=Gate.SAFE, lower_bound=-5.0)
GIVEN = Options(gate=Gate.NONE, beta_is_logit=False, qk_l2norm=False, scale=0.3)


def make(
    N=2, T=1, H=2, HV=2, K=16, V=16, *, options=None, dtype=torch.bfloat16, lens=None, v_first=True, seed=0, **fields
) -> Inputs:
    """Random inputs without a state; packed when `lens` is given."""
    gen = torch.Generator().manual_seed(seed)
    options = options or Options()
    B, T = (1, sum(lens)) if lens is not None else (N, T)

    def normal(*shape):
        return torch.randn(*shape, generator=gen)

    g, beta = normal(B, T, HV, K), normal(B, T, HV)
    raw = options.gate is not Gate.NONE
    inputs = Inputs(
        q=normal(B, T, H, K).to(dtype),
        k=(normal(B, T, H, K) / (1 if options.qk_l2norm else K**0.5)).to(dtype),
        v=normal(B, T, HV, V).to(dtype),
        g=(g if raw else -g.abs()).to(dtype),
        beta=(beta if options.beta_is_logit else beta.sigmoid()).to(dtype),
        options=options,
        A_log=torch.rand(HV, generator=gen) if raw else None,
        dt_bias=normal(HV, K) if raw else None,
        cu_seqlens=None if lens is None else torch.tensor([0, *itertools.accumulate(lens)], dtype=torch.int32),
        state_v_first=v_first,
    )
    return dataclasses.replace(inputs, **fields).to(DEVICE)


def with_state(inputs: Inputs, dtype=torch.float32, seed=1) -> Inputs:
    """A plain state."""
    (_, _, HV, K), V = inputs.g.shape, inputs.v.shape[3]
    N = inputs.q.shape[0] if inputs.cu_seqlens is None else len(inputs.cu_seqlens) - 1
    last = (V, K) if inputs.state_v_first else (K, V)
    state = torch.randn(N, HV, *last, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    return dataclasses.replace(inputs, state=state)


def with_pool(inputs: Inputs, slots: list[int], P=7, gap=0, dtype=torch.float32, index_dtype=torch.int32) -> Inputs:
    """A pool whose unused slots, and the gaps between slots, hold NaN."""
    plain = with_state(inputs).state
    size = plain[0].numel()
    memory = torch.full((P, size + gap), float("nan"), dtype=dtype, device=DEVICE)
    pool = memory[:, :size].view(P, *plain.shape[1:])
    for n, slot in enumerate(slots):
        if slot >= 0:
            pool[slot] = plain[n].to(dtype)
    return dataclasses.replace(inputs, state=pool, state_indices=torch.tensor(slots, dtype=index_dtype, device=DEVICE))


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """NaN only where the expected tensor has it, which is in the unused slots of a pool."""
    rtol = RTOL[actual.dtype]
    atol = 1e-5 * float(expected.nan_to_num().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol, equal_nan=True)


def check(inputs: Inputs, config: DecodeConfig | None = None) -> Outputs:
    """Runs the kernel, compares with the recurrence, and returns what came out."""
    expected = recurrence(inputs)
    assert not expected.o.isnan().any()
    out = torch.full(inputs.v.shape, float("nan"), dtype=inputs.v.dtype, device=DEVICE)  # nothing may stay unwritten
    outputs = decode(inputs, out, config)
    assert outputs.o is out
    close(outputs.o, expected.o)
    assert (outputs.final_state is None) == (expected.final_state is None)
    if expected.final_state is not None:
        close(outputs.final_state, expected.final_state)
    return outputs


@pytest.mark.parametrize(
    "options",
    [Options(), SAFE, GIVEN, Options(allow_neg_eigval=True), Options(gate=Gate.SAFE, lower_bound=-2.0, scale=1.0)],
    ids=["softplus", "safe", "given", "neg-eigval", "safe-2"],
)
@pytest.mark.parametrize("T", [1, 3])
def test_options(options, T):
    check(with_state(make(T=T, options=options)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("T", [1, 2, 4])
def test_dtypes_in_a_pool(dtype, T):
    check(with_pool(make(N=3, T=T, dtype=dtype), [4, 1, 6]))


def test_mixed_dtypes_of_gate_beta_and_parameters():
    inputs = with_state(make())
    check(
        dataclasses.replace(
            inputs,
            g=inputs.g.float(),
            beta=inputs.beta.half(),
            A_log=inputs.A_log.bfloat16(),
            dt_bias=inputs.dt_bias.bfloat16().flatten(),
        )
    )


def test_parameters_that_may_be_missing():
    inputs = make(options=SAFE)
    check(dataclasses.replace(inputs, A_log=None, dt_bias=None))
    check(dataclasses.replace(make(), dt_bias=None))


@pytest.mark.parametrize(("K", "V"), [(60, 100), (100, 60), (16, 32), (256, 8), (1, 1), (5, 3)])
@pytest.mark.parametrize("v_first", [True, False])
def test_head_sizes(K, V, v_first):
    check(with_state(make(N=1, T=2, K=K, V=V, v_first=v_first)))


@pytest.mark.parametrize("config", [DecodeConfig(4, 1), DecodeConfig(8, 2), DecodeConfig(32, 4)])
@pytest.mark.parametrize("v_first", [True, False])
def test_configs(config, v_first):
    check(with_pool(make(N=2, T=2, K=24, V=20, v_first=v_first), [2, 0]), config)


@pytest.mark.parametrize(("H", "HV"), [(1, 4), (2, 6), (3, 3)])
def test_grouped_value_heads(H, HV):
    check(with_pool(make(N=2, T=2, H=H, HV=HV), [3, 2]))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("gap", [0, 48, 7])
def test_pool_with_gaps_between_slots(gap, index_dtype):
    inputs = with_pool(make(N=3), [5, 0, 3], gap=gap, index_dtype=index_dtype)
    before = inputs.state.clone()
    outputs = check(inputs)
    assert outputs.final_state is inputs.state
    assert not outputs.final_state[[5, 0, 3]].isnan().any()
    unused = [1, 2, 4, 6]
    torch.testing.assert_close(outputs.final_state[unused], before[unused], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("lens", [None, [2, 1, 3, 0, 2]])
def test_padding_reads_and_writes_nothing_and_gives_zeros(lens):
    inputs = with_pool(make(N=5, T=2, lens=lens), [4, -1, 0, -1, -1])
    inputs.state[4:] = inputs.state[4]  # the last slots are what index -1 would reach
    before = inputs.state.clone()
    o = check(inputs).o
    rows = o[[1, 3, 4]] if lens is None else torch.cat((o[:, 2:3], o[:, 6:]), 1)
    assert rows.abs().max() == 0
    assert inputs.state[5:].equal(before[5:])


@pytest.mark.parametrize("lens", [[1, 1, 1], [0, 3, 0, 1, 0], [4], [0, 0]])
@pytest.mark.parametrize("pool", [False, True])
def test_packed_with_empty_sequences(lens, pool):
    inputs = make(lens=lens)
    inputs = with_pool(inputs, list(range(6, 6 - len(lens), -1))) if pool else with_state(inputs)
    before = inputs.state.clone()
    final = check(inputs).final_state
    empty = [n for n, length in enumerate(lens) if length == 0]
    where = [6 - n for n in empty] if pool else empty
    assert final[where].equal(before[where])
    if not pool:
        assert inputs.state.equal(before), "a plain state is not modified"


def test_packed_int64_offsets():
    inputs = make(lens=[2, 1])
    check(with_state(dataclasses.replace(inputs, cu_seqlens=inputs.cu_seqlens.long())))


def test_no_sequences():
    outputs = decode(make(lens=[]))
    assert outputs.o.shape == (1, 0, 2, 16)
    assert outputs.final_state.shape == (0, 2, 16, 16)


def test_without_initial_state_and_without_final_state():
    assert check(make(T=2)).final_state.dtype is torch.float32
    assert check(make(T=2, output_final_state=False)).final_state is None


@pytest.mark.parametrize("T", [1, 4])
def test_bf16_state_is_rounded_once(T):
    inputs = with_pool(make(N=2, T=T, dtype=torch.float32), [1, 0], dtype=torch.bfloat16)
    final = check(inputs).final_state
    assert final.dtype is torch.bfloat16  # `check` allows one rounding to bf16 for any number of tokens


def test_final_state_keeps_the_dtype_of_the_state():
    assert check(with_state(make(), torch.bfloat16)).final_state.dtype is torch.bfloat16


def test_final_state_into_the_initial_state():
    inputs = with_state(make(T=2))
    expected = recurrence(inputs)
    outputs = decode(inputs, final_state=inputs.state)
    assert outputs.final_state is inputs.state
    close(inputs.state, expected.final_state)


def test_strided_views_of_a_packed_projection():
    """q, k and v as views of one projection, gates head-major, beta a slice of a wider row: read where they lie."""
    base = make(N=2, T=3, H=2, HV=4, K=16, V=24)
    B, T = base.q.shape[:2]
    wide = torch.full((B, T, 2 * 16 * 2 + 4 * 24 + 5), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    q, k, v, _ = wide.split([32, 32, 96, 5], dim=-1)
    q, k, v = q.view(B, T, 2, 16), k.view(B, T, 2, 16), v.view(B, T, 4, 24)
    g = torch.empty(B, 4, T, 16, dtype=torch.bfloat16, device=DEVICE).transpose(1, 2)
    beta = torch.full((B, T, 11), float("nan"), dtype=torch.bfloat16, device=DEVICE)[..., 3:7]
    views = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    for name, view in views.items():
        view.copy_(getattr(base, name))
    assert not any(view.is_contiguous() for view in views.values())
    check(with_state(dataclasses.replace(base, **views)))


def test_strided_output():
    inputs = with_state(make(T=2))
    wide = torch.zeros(2, 2, 2, 40, dtype=torch.bfloat16, device=DEVICE)
    decode(inputs, wide[..., :16])
    close(wide[..., :16], recurrence(inputs).o)
    assert wide[..., 16:].abs().max() == 0


def test_strong_and_weak_gates_stay_finite():
    inputs = with_state(make(T=4, dtype=torch.float32))
    for raw in (-1e4, -50.0, 50.0, 1e4):
        check(dataclasses.replace(inputs, g=torch.full_like(inputs.g, raw)))


def test_decode_continues_where_it_stopped():
    """Four tokens at once and one by one give the same outputs and states."""
    inputs = with_pool(make(N=2, T=4, dtype=torch.float32), [3, 5])
    whole, step = inputs.fresh(), inputs.fresh()
    o = decode(whole).o
    for t in range(4):
        token = {name: getattr(inputs, name)[:, t : t + 1] for name in ("q", "k", "v", "g", "beta")}
        torch.testing.assert_close(decode(dataclasses.replace(step, **token)).o, o[:, t : t + 1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(step.state, whole.state, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_run_checks_its_inputs():
    inputs = with_state(make())
    with pytest.raises(InputError, match=r"^beta has shape"):
        module.run(dataclasses.replace(inputs, beta=inputs.beta[..., :1]))
    close(module.run(inputs).o, recurrence(inputs).o)


def test_unsupported_names_the_reason():
    assert module.unsupported() is None
    assert module.unsupported(Problem(Op.DECODE, (1, 1), H=2, HV=2)) is None
    assert "head size is 512" in module.unsupported(Problem(Op.DECODE, (1,), H=2, HV=2, K=512))


def test_tensors_where_triton_cannot_work(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UnavailableError, match="tensors lie on cpu"):
        decode(make().to("cpu"))


@pytest.mark.parametrize("heads", [1, 8, 96, 96 * 128])
@pytest.mark.parametrize(("K", "V"), [(128, 128), (60, 100), (256, 256), (1, 1)])
@pytest.mark.parametrize("v_first", [True, False])
def test_chosen_configs_are_powers_of_two(heads, K, V, v_first):
    config = DecodeConfig.choose(heads, K, V, v_first, 132)
    assert config.BV in (1, 2, 4, 8, 16, 32)
    assert config.num_warps in (1, 2, 4)


def test_variants_name_every_parameter():
    variants = list(module.variants())
    assert len({v.name for v in variants}) == len(variants) >= 3
    for variant in variants:
        assert set(variant.signature) == set(variant.fn.arg_names)


@pytest.mark.gpu
def test_offsets_past_2_31_elements():
    """A pool whose last slot lies beyond 2^31 elements."""
    inputs = make(N=2, H=1, HV=1, K=128, V=128)
    size, P = 128 * 128, 3
    stride = 2**30 + 64
    memory = torch.empty(2 * stride + size, dtype=torch.bfloat16, device=DEVICE)
    pool = memory.as_strided((P, 1, 128, 128), (stride, size, 128, 1))
    pool.normal_()
    indices = torch.tensor([2, 0], dtype=torch.int32, device=DEVICE)
    small = pool[[2, 0]].float()
    expected = recurrence(dataclasses.replace(inputs, state=small))
    outputs = decode(dataclasses.replace(inputs, state=pool, state_indices=indices))
    close(outputs.o, expected.o)
    close(pool[indices.long()], expected.final_state)


@pytest.mark.gpu
def test_new_batches_compile_nothing_new():
    """Batch, lengths, pool and its stride change; the kernel does not."""
    cache = module.decode_kernel.device_caches[torch.cuda.current_device()][0]
    decode(with_pool(make(N=2, H=2, HV=2), [1, 0]), config=DecodeConfig())
    compiled = len(cache)
    for N, P in ((1, 3), (3, 7), (5, 16), (16, 40)):
        decode(with_pool(make(N=N, H=2, HV=2), list(range(N)), P=P), config=DecodeConfig())
    assert len(cache) == compiled
