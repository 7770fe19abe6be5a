"""The Triton prefill against the fp64 token recurrence (in Triton's interpreter where there is no GPU).

`kda verify` covers the option space; here is what it does not: the unusual shapes, the pieces, and the ways of calling.
"""

import dataclasses
import itertools

import pytest
import torch
from decode_inputs import make as random_inputs
from decode_inputs import with_state
from prefill_inputs import new_memory_holds_nan

from kda_kernels.api import chunk_kda_fwd
from kda_kernels.errors import InputError
from kda_kernels.problem import CHUNK, Gate, Options
from kda_kernels.reference.oracle import recurrence
from kda_kernels.tensors import Checkpoints, Inputs
from kda_kernels.triton.chunk_factors import chunk_sums
from kda_kernels.triton.chunk_indices import prepare_chunk_indices
from kda_kernels.triton.chunk_inverse import chunk_inverse_kernel
from kda_kernels.triton.prefill import bounded, prefill, workspace_bytes
from kda_kernels.triton.prefill_config import PrefillConfig, chain_shared_bytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SAFE = Options(Gate.SAFE, -5.0)
BOUND = {torch.bfloat16: 8e-3, torch.float16: 2e-3, torch.float32: 2e-3}  # tf32 products for the last two


def make(lens, H=1, HV=None, K=32, V=32, options=SAFE, **given) -> Inputs:
    return with_state(random_inputs(lens=lens, H=H, HV=HV or H, K=K, V=V, options=options, **given))


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def check(inputs: Inputs) -> None:
    got, expected = prefill(inputs), recurrence(inputs)
    assert error(got.o, expected.o) < BOUND[inputs.q.dtype]
    assert error(got.final_state, expected.final_state) < BOUND[inputs.q.dtype]


@pytest.mark.parametrize("options", [SAFE, Options()], ids=str)
def test_lengths_around_every_edge(options):
    check(make([0, 1, 15, 16, 17, 63, 64, 65], options=options))


@pytest.mark.parametrize("options", [Options(Gate.SAFE, -20.0), Options(Gate.NONE)], ids=str)
def test_other_gates(options):
    check(make([66, 3], options=options))


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize(("K", "V"), [(60, 100), (16, 8), (200, 40)])
def test_head_sizes_and_dtypes(K, V, dtype):
    check(make([70], K=K, V=V, dtype=dtype))


def test_two_value_heads_a_key_head():
    check(make([66], H=2, HV=4))


@pytest.mark.parametrize("strong", [-1e4, float("-inf")])
def test_gates_that_forget_everything_next_to_gates_of_one(strong):
    """Nothing may cancel behind a strong gate: the tokens after it decay by their own gates alone."""
    inputs = make([130], options=Options(Gate.NONE))
    g = torch.zeros_like(inputs.g)
    g[:, ::7] = strong
    g[:, 3::7, :, ::2] = -1e-3
    check(dataclasses.replace(inputs, g=g))


def test_near_collinear_keys():
    """The inverse must stay exact where the triangular matrix is nearly all ones (a Neumann series fails here)."""
    inputs = make([128], K=64, V=64)
    one = torch.randn(1, 1, 1, 64, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    k = (one + 0.02 * inputs.k.float()).to(torch.bfloat16)
    weak = dataclasses.replace(inputs, k=k, beta=inputs.beta + 4, g=inputs.g * 0.1 - 8, A_log=inputs.A_log * 0)
    got, expected = prefill(weak), recurrence(weak)
    assert error(got.o, expected.o) < 2e-2
    assert error(got.final_state, expected.final_state) < 2e-2


@pytest.mark.parametrize("size", [1.0, 2.0])
def test_inverse_of_a_matrix_of_ones(size):
    """(I + L)^-1 for L all ones (and twos: negative eigenvalues): entries stay small, intermediate powers do not."""
    L = torch.full((1, 1, CHUNK, CHUNK), size, device=DEVICE).tril(-1)
    Z = torch.full_like(L, float("nan"))
    chunk_inverse_kernel[(1, 1)](L, Z, None, None, 1, HV=1, C=CHUNK, num_warps=1)
    expected = torch.linalg.inv(torch.eye(CHUNK, dtype=torch.float64) + L[0, 0].cpu().double()).tril(-1)
    written = torch.arange(CHUNK)[:, None] // 16 >= torch.arange(CHUNK)[None, :] // 16
    got = Z[0, 0].cpu().double()
    assert (got - expected)[written].abs().max() < 2e-3
    assert got[~written].isnan().all(), "blocks above the diagonal are nobody's: they stay untouched"


def test_chunk_sums_say_which_tokens_lie_between():
    """Each level of halving separates each pair of tokens exactly once, and its two factors add up to their decay."""
    sums = chunk_sums(torch.device("cpu")).double()
    step = torch.rand(CHUNK, generator=torch.Generator().manual_seed(0)).double()
    G = step.cumsum(0)
    torch.testing.assert_close(sums[0] @ step, G)
    torch.testing.assert_close(sums[1] @ step, G[-1] - G)
    pairs = torch.zeros(CHUNK, CHUNK)
    for level, size in enumerate((64, 32, 16, 8, 4, 2)):
        part = sums[2 + level] @ step
        for i, j in itertools.product(range(CHUNK), repeat=2):
            if i // size == j // size and i % size >= size // 2 > j % size:
                pairs[i, j] += 1
                assert abs(part[i] + part[j] - (G[i] - G[j])) < 1e-12
    assert torch.equal(pairs, torch.ones(CHUNK, CHUNK).tril(-1))


def test_state_at_the_start_of_each_chunk():
    inputs = make([130, 0, 64, 3], H=2, K=16, V=24)
    _, h = prefill(inputs, return_intermediate_states=True)
    assert h.shape == (1, 3 + 0 + 1 + 1, 2, 16, 24)
    starts = [(0, 0), (0, 64), (0, 128), (2, 0), (3, 0)]
    first = inputs.cu_seqlens.tolist()
    for chunk, (n, begin) in enumerate(starts):
        at = slice(first[n], first[n] + begin)
        part = Inputs(
            inputs.q[:, at], inputs.k[:, at], inputs.v[:, at], inputs.g[:, at], inputs.beta[:, at], inputs.options,
            inputs.A_log, inputs.dt_bias, inputs.state[n : n + 1],
        )  # fmt: skip
        expected = recurrence(part).final_state if begin else inputs.state[n : n + 1].double()
        assert error(h[0, chunk], expected[0].mT) < 8e-3


def test_prepared_table_and_given_output():
    inputs = make([70, 5])
    table = prepare_chunk_indices(inputs.cu_seqlens, 75)
    out = torch.full((1, 75, 1, 32), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    got = prefill(inputs, chunk_indices=table, out=out)
    assert got.o is out
    assert torch.equal(out, prefill(inputs).o)


def test_no_state_in_and_none_out():
    inputs = dataclasses.replace(make([70]), state=None, output_final_state=False)
    got = prefill(inputs)
    assert got.final_state is None
    assert error(got.o, recurrence(inputs).o) < 8e-3


def test_token_stride_too_large_for_the_kernels_is_refused():
    inputs = make([2])
    far = torch.zeros(2**25 + 32, dtype=torch.bfloat16, device=DEVICE).as_strided((1, 2, 1, 32), (1, 2**25, 32, 1))
    with pytest.raises(InputError, match="q has stride 33554432"):
        prefill(dataclasses.replace(inputs, q=far))
    with pytest.raises(InputError, match="out has stride 33554432"):
        prefill(inputs, out=far)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("K", [32, 64, 128, 256])
@pytest.mark.parametrize("shared", [232448, 166912, 101376])
def test_configuration_fits_the_gpu_where_anything_does(K, itemsize, shared):
    config = PrefillConfig.choose(96, K, K, itemsize, 132, shared)
    smallest = chain_shared_bytes(K, 16, 1, itemsize)
    assert chain_shared_bytes(K, config.BV, config.chain_stages, itemsize) <= max(shared, smallest)


def test_the_models_bound_takes_the_fast_path():
    assert bounded(SAFE)
    assert bounded(Options(Gate.NONE, -5.0))
    assert not bounded(Options(Gate.SAFE, -5.1))
    assert not bounded(Options())


@pytest.mark.gpu
def test_bitwise_repeatable_and_capturable():
    inputs = make([300, 70, 0, 64], H=4, K=128, V=128)
    expected = prefill(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = prefill(inputs)
    for _ in range(3):
        got.o.fill_(float("nan"))
        graph.replay()
        assert torch.equal(got.o, expected.o)
        assert torch.equal(got.final_state, expected.final_state)


def test_chunk_kda_fwd_takes_the_gate_as_activated_without_a_log():
    inputs = make([70, 5], options=Options(Gate.NONE), seed=4)
    given = {"beta": inputs.beta, "initial_state": inputs.state, "cu_seqlens": inputs.cu_seqlens, "scale": 0.2}
    flags = {"use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
    expected = recurrence(dataclasses.replace(inputs, options=Options(Gate.NONE, scale=0.2)))
    g = inputs.g.clamp(min=-5)
    for bound in (None, -5.0):  # both ways of making the factors
        o, final = chunk_kda_fwd(inputs.q, inputs.k, inputs.v, g, lower_bound=bound, **given, **flags)
        assert error(o, expected.o) < 8e-3
        assert error(final, expected.final_state) < 8e-3


def test_chunk_kda_fwd_writes_final_states_and_checkpoints_where_it_is_told():
    inputs = make([130, 70], seed=4)
    given = {"A_log": inputs.A_log, "dt_bias": inputs.dt_bias, "lower_bound": inputs.options.lower_bound}
    given |= {"initial_state": inputs.state, "cu_seqlens": inputs.cu_seqlens, "out": torch.empty_like(inputs.v)}
    given |= {"use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
    tokens = (inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta)
    before, final = inputs.state.clone(), torch.full_like(inputs.state, float("nan"))
    rows, offsets = torch.tensor([1, 0], device=DEVICE), torch.tensor([64, 0], device=DEVICE)
    kept = Checkpoints(final.new_full((2, *final.shape[1:]), float("nan")), rows, offsets)
    o, returned = chunk_kda_fwd(*tokens, **given, final_state=final, checkpoints=kept)
    expected = recurrence(inputs)
    assert returned is final and o is given["out"] and torch.equal(inputs.state, before)
    assert error(o, expected.o) < 8e-3 and error(final, expected.final_state) < 8e-3
    first = dataclasses.replace(
        inputs, **{name: getattr(inputs, name)[:, :64] for name in "qkvg"}, beta=inputs.beta[:, :64],
        state=inputs.state[:1], cu_seqlens=None,
    )  # fmt: skip
    assert error(kept.states[1], recurrence(first).final_state[0]) < 8e-3 and kept.states[0].isnan().all()


def test_wrong_arguments_of_chunk_kda_fwd_are_refused_by_name():
    inputs = make([70, 5])
    args = (inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta)
    gate = {"A_log": inputs.A_log, "dt_bias": inputs.dt_bias, "lower_bound": -5.0}
    for table, message in (
        (torch.zeros(3, 3, dtype=torch.int32), r"chunk_indices has shape \[3, 3\]"),
        (torch.zeros(3, 2), "chunk_indices is float32"),
    ):
        with pytest.raises(InputError, match=message):
            chunk_kda_fwd(*args, **gate, cu_seqlens=inputs.cu_seqlens, chunk_indices=table.to(DEVICE))
    for final, more, message in (
        (inputs.state.half(), {"output_final_state": False}, "final_state is given: leave it out"),
        (inputs.state.int(), {}, "final_state is int32"),
        (inputs.state[:1], {}, r"final_state has shape \[1"),
        (inputs.state.mT, {}, "final_state has shape .*, contiguous"),
    ):
        with pytest.raises(InputError, match=message):
            chunk_kda_fwd(*args, **gate, **more, cu_seqlens=inputs.cu_seqlens, final_state=final)
    with pytest.raises(InputError, match="dt_bias is given but the gate is none"):
        chunk_kda_fwd(*args, dt_bias=inputs.dt_bias, cu_seqlens=inputs.cu_seqlens)
    with pytest.raises(InputError, match="without cu_seqlens"):
        chunk_kda_fwd(*args, **gate, chunk_indices=torch.zeros(3, 2, dtype=torch.int32, device=DEVICE))


# --- what engines pass


def from_pool(inputs: Inputs, slots: list[int], P: int = 9, dtype: torch.dtype = torch.float32, **fields) -> Inputs:
    """The same states in a pool, with NaN in the slots that no sequence has."""
    pool = torch.full((P, *inputs.state.shape[1:]), float("nan"), dtype=dtype, device=DEVICE)
    live = [n for n, slot in enumerate(slots) if 0 <= slot < P]
    pool[[slots[n] for n in live]] = inputs.state[live].to(dtype)
    return dataclasses.replace(inputs, state=pool, state_indices=torch.tensor(slots, device=DEVICE), **fields)


def state_after(inputs: Inputs, n: int, tokens: int) -> torch.Tensor:
    """Of sequence n after so many of its tokens, by the oracle, from its plain state."""
    first = int(inputs.cu_seqlens[n])
    at = slice(first, first + tokens)
    return recurrence(
        dataclasses.replace(
            inputs,
            q=inputs.q[:, at],
            k=inputs.k[:, at],
            v=inputs.v[:, at],
            g=inputs.g[:, at],
            beta=inputs.beta[:, at],
            state=inputs.state[n : n + 1],
            cu_seqlens=None,
        )  # fmt: skip
    ).final_state[0]


FORMS = {
    "one offset a sequence": ([3, -1, 5, 2], [64, 64, 0, 64], None, {3: (0, 64), 2: (3, 64)}),
    "several": ([[3, 4], [-1, 0], [5, 1], [2, 6]], [[128, 64], [0, 64], [64, 100], [64, 192]], None,
                {3: (0, 128), 4: (0, 64), 5: (2, 64), 2: (3, 64), 1: None}),
    "every": ([[3, 4, 8], [0, 1, 5], [-1, 2, 0], [9, 6, 7]], None, 64, {3: (0, 64), 4: (0, 128), 6: (3, 128)}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("form", "dtype"), list(zip(FORMS, (torch.float32, torch.bfloat16, torch.float16), strict=True))
)
def test_checkpoints(form, dtype):
    """Sequences of 130, 0, 100 and 128 tokens; rows 9 and above are not there, and a position inside a chunk is NaN."""
    rows, offsets, every, expected = FORMS[form]
    plain = make([130, 0, 100, 128], K=16, V=24)
    memory = torch.full((9, 2, 1, 24, 16), 7.0, dtype=dtype, device=DEVICE)
    states = memory[:, 1]  # slots that lie apart
    given = None if offsets is None else torch.tensor(offsets, device=DEVICE)
    kept = Checkpoints(states, torch.tensor(rows, device=DEVICE), given, every)
    got = prefill(dataclasses.replace(plain, checkpoints=kept))
    assert error(got.final_state, recurrence(plain).final_state) < BOUND[torch.bfloat16]
    for row, where in expected.items():
        if where is None:
            assert states[row].isnan().all()
        else:
            assert error(states[row], state_after(plain, *where)) < BOUND[torch.bfloat16]
    left = [row for row in range(9) if row not in expected]
    assert states[left].eq(7).all() and memory[:, 0].eq(7).all()


def test_a_checkpoint_is_where_a_prefill_that_ends_there_stops():
    """In bits; and from it, in an fp32 pool, the rest of the prompt gives the same bits."""
    whole = make([192], K=16, V=16)
    kept = torch.empty_like(whole.state)
    zero = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    got = prefill(dataclasses.replace(whole, checkpoints=Checkpoints(kept, zero, zero + 128)))
    first, rest = (
        dataclasses.replace(
            whole, cu_seqlens=None, **{x: getattr(whole, x)[:, part] for x in ("q", "k", "v", "g", "beta")}
        )
        for part in (slice(0, 128), slice(128, 192))
    )
    assert prefill(first).final_state.equal(kept)
    again = prefill(dataclasses.replace(rest, state=kept))
    assert again.o.equal(got.o[:, 128:]) and again.final_state.equal(got.final_state)


def test_checkpoints_into_the_pool_itself():
    plain = make([130, 65], K=16, V=16)
    inputs = from_pool(plain, [2, 5])
    rows = torch.tensor([7, 0], device=DEVICE)
    kept = Checkpoints(inputs.state, rows, torch.tensor([128, 64], device=DEVICE))
    prefill(dataclasses.replace(inputs, checkpoints=kept))
    for row, where in ((7, (0, 128)), (0, (1, 64)), (2, (0, 130)), (5, (1, 65))):
        assert error(inputs.state[row], state_after(plain, *where)) < 8e-3


def test_slots_that_are_padding_or_not_there():
    plain = make([3, 65, 2, 4, 1])
    inputs = from_pool(plain, [3, 9, -7, 0, 0], null_slot=0)
    inputs.state[0] = 1.0
    before, expected = inputs.state.clone(), recurrence(plain)
    out = torch.full(inputs.v.shape, 7.0, dtype=inputs.v.dtype, device=DEVICE)
    rows = prefill(inputs, out=out).o.split([3, 65, 2, 4, 1], dim=1)
    assert error(rows[0], expected.o[:, :3]) < 8e-3
    assert error(inputs.state[3], expected.final_state[0]) < 8e-3
    assert rows[1].isnan().all() and not any(row.any() for row in rows[2:])
    untouched = [0, 1, 2, 4, 5, 6, 7, 8]
    torch.testing.assert_close(inputs.state[untouched], before[untouched], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_state_that_is_not_there_yet_and_indices_that_lie_apart(dtype):
    plain = make([70, 3])
    plain.state[1] = 0
    expected = recurrence(plain)
    inputs = from_pool(plain, [4, 1], dtype=dtype)
    inputs.state[1] = float("nan")
    wide = torch.full((4, 3), 99, device=DEVICE)
    wide[:2, 1] = inputs.state_indices
    has = torch.tensor([True, False], device=DEVICE)
    got = prefill(dataclasses.replace(inputs, state_indices=wide[:, 1], has_initial_state=has))
    assert error(got.o, expected.o) < 8e-3
    assert error(got.final_state[[4, 1]], expected.final_state) < 8e-3


@pytest.mark.parametrize("slots", [None, [4, -1]])
def test_rows_behind_the_last_sequence_are_zero(slots):
    """As in a graph that was captured for more tokens; the memory between is not zero by chance."""
    inputs = make([70, 3, 100], K=16, V=16)
    inputs = dataclasses.replace(inputs, cu_seqlens=inputs.cu_seqlens[:3], state=inputs.state[:2])
    inputs = inputs if slots is None else from_pool(inputs, slots)
    out = torch.full(inputs.v.shape, float("nan"), dtype=inputs.v.dtype, device=DEVICE)
    with new_memory_holds_nan():
        prefill(inputs, out=out)
    assert not out[:, 73:].any() and not out.isnan().any()


@pytest.mark.parametrize("packed", [False, True])
def test_sequences_of_no_tokens_hand_their_states_on(packed):
    """Dense ones of no token, and a table of no chunk with tokens behind the last sequence."""
    inputs, table = with_state(random_inputs(N=2, T=0, K=32, V=32, options=SAFE)), None
    if packed:
        inputs = make([0, 0, 5])
        inputs = dataclasses.replace(inputs, cu_seqlens=inputs.cu_seqlens[:3], state=inputs.state[:2])
        table = prepare_chunk_indices(inputs.cu_seqlens, 0)
    with new_memory_holds_nan():
        for has in (None, torch.tensor([True, False], device=DEVICE)):
            got = prefill(dataclasses.replace(inputs, has_initial_state=has), chunk_indices=table)
            expected = inputs.state if has is None else inputs.state * has[:, None, None, None]
            assert got.final_state.equal(expected) and not got.o.any()


def test_workspace():
    inputs = make([66, 5], K=16, V=16)
    size = workspace_bytes(71, 1, 2, K=16)
    memory = torch.zeros(size + 16, dtype=torch.uint8, device=DEVICE)
    got = prefill(dataclasses.replace(inputs, workspace=memory[:size]))
    assert torch.equal(got.o, prefill(inputs).o)
    assert memory[:size].any() and not memory[size:].any()
    for wrong in (memory[: size - 1], memory[1:]):
        with pytest.raises(
            InputError, match=rf"^workspace has .*: it should be at least {size}, from a multiple of 16"
        ):
            prefill(dataclasses.replace(inputs, workspace=wrong))


@pytest.mark.parametrize("options", [SAFE, Options()], ids=str)
def test_a_sequence_gives_the_same_bits_in_any_batch(options):
    inputs = make([2, 66], K=16, options=options)
    together = prefill(dataclasses.replace(inputs, batch_invariant=True))
    part = {x: getattr(inputs, x)[:, 2:] for x in ("q", "k", "v", "g", "beta")}
    alone = dataclasses.replace(inputs, **part, state=inputs.state[1:2], cu_seqlens=None, batch_invariant=True)
    got = prefill(alone)
    assert got.o.equal(together.o[:, 2:]) and got.final_state[0].equal(together.final_state[1])


@pytest.mark.parametrize("causal", [False, True])
def test_bounded_gates_are_causal_in_bits_where_that_is_asked_for(monkeypatch, causal):
    monkeypatch.setattr("kda_kernels.triton.prefill.CAUSAL", causal)
    inputs = make([10], K=16, V=16)
    g = inputs.g.clone()
    g[:, 9:] = 8
    first, second = (prefill(dataclasses.replace(inputs, g=x)).o[:, :9] for x in (inputs.g, g))
    assert first.equal(second) == causal


@pytest.mark.parametrize("A_log", [20.0, 89.0, 200.0])
@pytest.mark.parametrize("options", [SAFE, Options(), Options(Gate.SAFE, -20.0)], ids=str)
def test_no_rate_makes_nan(A_log, options):
    """exp(A_log) may be more than fp32 holds, a gate of 0 a bias away, and one that makes their product 1 as well."""
    inputs = make([20], options=options, dtype=torch.float32)
    bias = torch.tensor([-2.0, 0.7, 0.0, 100.3], device=DEVICE).repeat_interleave(8)
    g = torch.tensor([-8 * A_log, -1.0, 0.0, 1.0]) / 8
    g = g[torch.randint(4, inputs.g.shape, generator=torch.Generator().manual_seed(1))].to(DEVICE) - bias
    check(dataclasses.replace(inputs, g=g, dt_bias=bias, A_log=torch.full((1,), A_log, device=DEVICE)))


def far_heads(t: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """The same values, heads first, so far apart that the last head begins behind 2^31 elements."""
    B, T, H, K = t.shape
    view = memory.as_strided(t.shape, (T * K, K, (2**31 + 64) // (H - 1) // 16 * 16 + 16, 1))
    return view.copy_(t)


@pytest.mark.parametrize("options", [SAFE, Options()], ids=str)
def test_heads_that_lie_far_apart(options):
    """Offsets of heads pass 2^31; memory that nobody touches costs nothing."""
    inputs = make([3], H=3, K=16, V=16, options=options)
    try:
        memory = [torch.empty(2**31 + 2**20, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    except RuntimeError as error:
        pytest.skip(f"no room for 8 GiB that are not touched: {error}")
    expected = prefill(inputs)
    for names in (("q", "v"), ("k",), ("g",)):
        far = {name: far_heads(getattr(inputs, name), memory[i]) for i, name in enumerate(names)}
        out = far_heads(inputs.v, memory[1]) if "v" not in far else None
        got = prefill(dataclasses.replace(inputs, **far), out=out)
        assert got.o.equal(expected.o) and got.final_state.equal(expected.final_state)


@pytest.mark.gpu
def test_more_programs_than_an_axis_of_a_grid_has():
    lens = [1] * 2049
    inputs = make(lens, H=32, K=16, V=16, options=Options())
    got = prefill(inputs)
    assert error(got.o, recurrence(inputs).o) < 8e-3


@pytest.mark.parametrize("generation", [8, 10])
def test_configurations_of_other_gpus(generation):
    """Both ways of making factors are exact for bounded gates, and slices of the chain may have any width.

    On a GPU with head sizes of models, so that what other GPUs are given has run on one.
    """
    size = 32 if DEVICE == "cpu" else 128
    config = PrefillConfig.choose(96, size, size, generation=generation)
    inputs = make([70], K=size, V=size)
    got, expected = prefill(inputs, config=config), recurrence(inputs)
    assert error(got.o, expected.o) < 8e-3 and error(got.final_state, expected.final_state) < 8e-3


@pytest.mark.gpu
def test_the_workspace_lives_as_long_as_the_launches():
    """Memory that is asked for while they run is not that of the workspace."""
    inputs = make([200, 70], H=4, options=Options())
    expected = recurrence(inputs)
    for _ in range(20):
        got = prefill(inputs)
        assert error(got.o, expected.o) < 8e-3
        torch.full((1 << 20,), float("nan"), device=DEVICE)
