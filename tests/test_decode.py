"""The Triton decode kernel against the fp64 token recurrence (in Triton's interpreter where there is no GPU)."""

import dataclasses

import pytest
import torch
from decode_inputs import DEVICE, GIVEN, SAFE, close, make, states_after_tokens, tokens_of, with_pool, with_state

from kda_kernels.errors import InputError, UnavailableError
from kda_kernels.problem import Gate, Op, Options, Problem
from kda_kernels.reference.oracle import recurrence
from kda_kernels.serving import kda_decode
from kda_kernels.tensors import Inputs, Outputs
from kda_kernels.triton import decode as module
from kda_kernels.triton.decode import DecodeConfig, decode


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


@pytest.mark.parametrize(("K", "V"), [(60, 100), (256, 8), (1, 1), (5, 3)])
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
        token = tokens_of(step, slice(None), slice(t, t + 1))
        torch.testing.assert_close(decode(token).o, o[:, t : t + 1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(step.state, whole.state, rtol=1e-5, atol=1e-6, equal_nan=True)


# --- the state after each token

KEPT = 7.0  # what the buffer held before


def check_token_states(inputs: Inputs, token_states: torch.Tensor, run) -> None:
    """`run` must fill it with the states after every token, and leave alone what belongs to padding; what it leaves
    in the state must be what it would have left there without."""
    expected = states_after_tokens(inputs).to(DEVICE)
    without = decode(inputs.fresh())
    token_states.fill_(KEPT)
    outputs = run(inputs, token_states)
    untouched = expected.isnan()
    assert token_states[untouched].eq(KEPT).all()
    close(token_states.masked_fill(untouched, 0), expected.masked_fill(untouched, 0))
    assert outputs.o.equal(without.o)
    torch.testing.assert_close(outputs.final_state, without.final_state, rtol=0, atol=0, equal_nan=True)


def decode_with(inputs: Inputs, token_states: torch.Tensor) -> Outputs:
    return decode(dataclasses.replace(inputs, token_states=token_states))


def kda_decode_with(inputs: Inputs, token_states: torch.Tensor) -> Outputs:
    """Through the public function."""
    tensors = inputs.tensors()
    tokens = [tensors.pop(name) for name in ("q", "k", "v", "g", "beta")]
    return Outputs(kda_decode(*tokens, **tensors, token_states=token_states, kernel="triton-decode"), inputs.state)


@pytest.mark.parametrize("run", [decode_with, kda_decode_with])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lens", [None, [2, 3, 0, 1]], ids=["dense", "packed"])
def test_token_states_are_those_of_every_prefix(lens, dtype, run):
    inputs = with_pool(make(N=4, T=3, lens=lens, HV=4), [4, -1, 0, 6], gap=16)
    B, T = inputs.q.shape[:2]
    check_token_states(inputs, torch.empty(B, T, 4, 16, 16, dtype=dtype, device=DEVICE), run)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_token_states_hold_what_the_state_has_no_room_for(state_dtype):
    """Both are rounded from the fp32 state: neither from the other."""
    inputs = with_state(make(T=3), state_dtype)
    check_token_states(inputs, torch.empty(2, 3, 2, 16, 16, device=DEVICE), decode_with)


@pytest.mark.parametrize("lens", [None, [2, 1]], ids=["dense", "packed"])
def test_token_states_whose_tokens_lie_apart(lens):
    inputs = with_state(make(N=2, T=3, lens=lens))
    B, T = inputs.q.shape[:2]
    wide = torch.full((B + 1, 2 * T, 3, 16, 16), KEPT, device=DEVICE)
    view = wide[:B, ::2, :2]
    check_token_states(inputs, view, decode_with)
    view.fill_(KEPT)
    assert wide.eq(KEPT).all(), "nothing but the view was written to"


def test_token_states_of_a_k_first_state_and_sizes_that_are_no_power_of_two():
    inputs = with_state(make(T=2, K=24, V=20, v_first=False))
    check_token_states(inputs, torch.empty(2, 2, 2, 24, 20, device=DEVICE), decode_with)


def test_token_states_without_a_state_that_comes_in_or_goes_out():
    inputs = make(T=3, output_final_state=False)
    token_states = torch.empty(2, 3, 2, 16, 16, device=DEVICE)
    assert decode_with(inputs, token_states).final_state is None
    close(token_states, states_after_tokens(inputs))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.empty(2, 3, 2, 16, 8), r"has shape \[2, 3, 2, 16, 8\]: it should be \[2, 3, 2, 16, 16\]"),
        (torch.empty(2, 3, 2, 16, 16, dtype=torch.float64), "is float64: it should be bfloat16 or float16 or float32"),
        (torch.empty(2, 3, 2, 16, 16).transpose(3, 4), "has strides .*: it should be contiguous from HV on"),
        (torch.empty(2, 3, 2, 16, 16, device="meta"), "is on meta: it should be on"),
    ],
    ids=["shape", "dtype", "strides", "device"],
)
def test_wrong_token_states(wrong, message):
    wrong = wrong if wrong.is_meta else wrong.to(DEVICE)
    with pytest.raises(InputError, match=f"^token_states {message}"):
        kda_decode_with(with_pool(make(T=3), [0, 1]), wrong)


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


# --- what engines pass


def each_alone(inputs: Inputs, states: list[torch.Tensor | None]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each sequence by itself, from that state: o, and the states after each of its tokens; by the oracle."""
    ends = range(len(states) + 1) if inputs.cu_seqlens is None else inputs.cu_seqlens.tolist()
    found = []
    for n, state in enumerate(states):
        row, span = (
            (slice(n, n + 1), slice(None)) if inputs.cu_seqlens is None else (slice(0, 1), slice(*ends[n : n + 2]))
        )
        one = dataclasses.replace(
            tokens_of(inputs, row, span), state=None if state is None else state[None], state_indices=None,
            cu_seqlens=None, has_initial_state=None, num_accepted_tokens=None, null_slot=None, update_state=True,
            token_states=None, token_state_indices=None,
        )  # fmt: skip
        found.append((recurrence(one).o[0], states_after_tokens(one)[0]))
    return found


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("lens", [None, [1, 2, 1, 0, 2]])
def test_slots_that_are_padding_or_not_there(lens, index_dtype):
    """A negative index and the null slot, which several carry, are padding; one past the pool is seen: NaN."""
    inputs = with_pool(make(N=5, T=2, lens=lens), [3, -1, -1, -1, -1], index_dtype=index_dtype)
    slots = torch.tensor([3, 7, 0, -9, 0], dtype=index_dtype, device=DEVICE)
    inputs = dataclasses.replace(inputs, state_indices=slots, null_slot=0)
    before = inputs.state.clone()
    rows = decode(inputs).o
    rows = list(rows) if lens is None else [part[0] for part in rows.split(lens, dim=1)]
    ((o, after),) = each_alone(dataclasses.replace(inputs, state=before), [before[3]])
    close(rows[0], o)
    close(inputs.state[3], after[-1])
    assert rows[1].isnan().all()
    assert all(not row.any() for row in rows[2:])
    untouched = [0, 1, 2, 4, 5, 6]
    torch.testing.assert_close(inputs.state[untouched], before[untouched], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("pooled", [True, False])
def test_a_state_that_is_not_there_yet_is_not_read(pooled):
    inputs = make(N=3, T=2)
    inputs = with_pool(inputs, [4, 1, 6]) if pooled else with_state(inputs)
    has = torch.tensor([True, False, True], device=DEVICE)
    slots = [4, 1, 6] if pooled else [0, 1, 2]
    inputs.state[slots[1]] = float("nan")
    before = inputs.state.clone()
    outputs = decode(dataclasses.replace(inputs, has_initial_state=has))
    for n, (o, after) in enumerate(each_alone(inputs, [before[slots[0]], None, before[slots[2]]])):
        close(outputs.o[n], o)
        close(outputs.final_state[slots[n]], after[-1])


@pytest.mark.parametrize("update_state", [True, False])
@pytest.mark.parametrize("lens", [None, [3, 1, 3, 2]])
def test_speculative_decoding(lens, update_state):
    """The state comes from the column of the last accepted token; the state after each token goes to its own column."""
    inputs = make(N=4, T=3, lens=lens)
    table = torch.tensor([[1, 2, 3], [4, 5, 6], [-1, 8, -2], [9, 10, 0]], device=DEVICE)
    wide = torch.full((4, 6), 99, device=DEVICE)
    wide[:, ::2] = table
    accepted = torch.tensor([2, 1, 1, 3], dtype=torch.int32, device=DEVICE)
    inputs = dataclasses.replace(
        inputs, state=torch.randn(11, 2, 16, 16, generator=torch.Generator().manual_seed(2)).to(DEVICE),
        state_indices=wide[:, ::2], num_accepted_tokens=accepted, null_slot=0, update_state=update_state,
    )  # fmt: skip
    before, expected = inputs.state.clone(), inputs.state.double()
    o = decode(inputs).o
    rows = list(o) if lens is None else [part[0] for part in o.split(lens, dim=1)]
    assert not rows[2].any() and not rows[3].any(), "the columns that they load from are padding"
    for n, (row, after) in enumerate(each_alone(dataclasses.replace(inputs, state=before), [before[2], before[4]])):
        close(rows[n], row)
        for t, state in enumerate(after):
            expected[table[n, t]] = state if update_state else before[table[n, t]].double()
    close(inputs.state, expected)


def test_an_accepted_count_without_a_column_is_seen():
    inputs = with_pool(make(N=2, T=1), [1, 2])
    inputs = dataclasses.replace(
        inputs, state_indices=inputs.state_indices[:, None], num_accepted_tokens=torch.tensor([1, 2], device=DEVICE)
    )
    before = inputs.state.clone()
    o = decode(inputs).o
    assert o[1].isnan().all() and not o[0].isnan().any()
    assert inputs.state[2].equal(before[2])


@pytest.mark.parametrize("lens", [None, [2, 3, 1]])
def test_states_of_tokens_go_to_given_rows(lens):
    """An engine's verify: the pool stays as it is; a negative row is nowhere, one past the buffer writes nothing."""
    inputs = with_pool(make(N=3, T=3, lens=lens), [4, 1, 6])
    kept = torch.full((4, 3, 2, 16, 16), KEPT, dtype=torch.float16, device=DEVICE)
    rows = torch.tensor([2, -3, 4], device=DEVICE)
    before = inputs.state.clone()
    asked = dataclasses.replace(inputs, update_state=False, token_states=kept, token_state_indices=rows)
    assert decode(asked).final_state is inputs.state
    torch.testing.assert_close(inputs.state, before, rtol=0, atol=0, equal_nan=True)
    ((_, after),) = each_alone(inputs, [before[4]])
    close(kept[2, : len(after)], after)
    kept[2, : len(after)] = KEPT
    assert kept.eq(KEPT).all()


def test_fp16_pool_and_indices_that_lie_apart():
    inputs = with_pool(make(N=3, T=2), [4, 1, 6], dtype=torch.float16)
    wide = torch.full((5, 2), 99, dtype=torch.int32, device=DEVICE)
    wide[:3, 0] = inputs.state_indices
    expected = recurrence(inputs)
    outputs = decode(dataclasses.replace(inputs, state_indices=wide[:, 0]))
    close(outputs.o, expected.o)
    close(outputs.final_state, expected.final_state)


@pytest.mark.parametrize("slots", [[4, 1], [4, -1], None])
def test_rows_behind_the_last_sequence_are_zero(slots):
    """As in a graph that was captured for more tokens."""
    inputs = make(lens=[2, 1, 3])
    inputs = dataclasses.replace(inputs, cu_seqlens=inputs.cu_seqlens[:3].long())
    inputs = with_state(inputs) if slots is None else with_pool(inputs, slots)
    out = torch.full(inputs.v.shape, float("nan"), dtype=inputs.v.dtype, device=DEVICE)
    decode(inputs, out)
    assert not out[:, 3:].any() and not out[:, :3].isnan().any()


@pytest.mark.parametrize("A_log", [-100.0, 20.0, 89.0, 200.0])
@pytest.mark.parametrize("options", [SAFE, Options()], ids=["safe", "softplus"])
def test_no_rate_makes_nan(A_log, options):
    """exp(A_log) may be more than fp32 holds, a gate of 0 a bias away, and one that makes their product 1 as well."""
    inputs = with_state(make(N=1, T=1, options=options, dtype=torch.float32))
    g = torch.tensor([-abs(A_log), -1e-3, 0.0, 1e-3, 3.0, 0.0, -1.0, 1.0], device=DEVICE).repeat(2).expand_as(inputs.g)
    bias = torch.tensor([-2.0, 0.7, 0.0, 100.3], device=DEVICE).repeat_interleave(4).expand(2, 16)
    A_log = torch.full((2,), A_log, device=DEVICE)
    check(dataclasses.replace(inputs, g=g - bias, dt_bias=bias.contiguous(), A_log=A_log))
