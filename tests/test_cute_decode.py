"""The CuTe decode kernel on a GPU, against the fp64 token recurrence.

pytest tests/test_cute_decode.py        about a minute, most of it the compiler
"""

import dataclasses
import functools
import itertools
import threading
import time

import cute_cases
import pytest
import torch
import wrong_tensors
from decode_inputs import (
    DEVICE,
    SAFE,
    close,
    make,
    states_after_tokens,
    tokens_of,
    with_pool,
    with_state,
)

from kda_kernels.cute import cache
from kda_kernels.cute.decode import host as module
from kda_kernels.cute.decode.config import DecodeConfig
from kda_kernels.cute.decode.host import decode
from kda_kernels.errors import InputError, KdaError
from kda_kernels.problem import Op, Options, Problem
from kda_kernels.reference import plain_recurrent
from kda_kernels.reference.oracle import recurrence
from kda_kernels.serving import kda_decode, kda_prefill
from kda_kernels.tensors import Inputs, Outputs
from kdacli.synthetic import make_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiled_here")]
KERNEL = "cute-decode"
KEPT = 7.0  # what a buffer held before
SLOTS = [4, 1, 6]


def usual(N=3, slots=None, P=None, T=1, gap=0, state_dtype=torch.float32, **given) -> Inputs:
    """K = V = 128, two value heads for each of two heads, a pool with NaN where no sequence lives.

    For a large batch the slots run backwards through a larger pool.
    """
    slots = slots or (SLOTS if N == 3 else list(range(N + 3, 3, -1)))
    tokens = make(N=N, T=T, **({"H": 2, "HV": 4, "K": 128, "V": 128} | given))
    return with_pool(tokens, slots, P=P or max(7, N + 5), gap=gap, dtype=state_dtype)


def bits(x: torch.Tensor) -> torch.Tensor:
    """A copy of all memory that the tensor is a view of: NaN equals NaN, and gaps count."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage()).clone()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer of NaN with 4 KiB of something else on both sides, and the whole."""
    numel, guard = torch.Size(shape).numel(), 4096 // dtype.itemsize
    whole = torch.full((numel + 2 * guard,), KEPT, dtype=dtype, device=DEVICE)
    buffer = whole[guard : guard + numel].view(shape)
    buffer.fill_(float("nan"))
    return buffer, whole


def judge_state(actual: torch.Tensor, exact: torch.Tensor, share: float = 2e-7) -> None:
    """fp32: a `share` of the norm of the exact state. NaN where the exact one has it: the unused slots of a pool."""
    if actual.dtype != torch.float32:
        close(actual, exact)
        return
    assert actual.isnan().equal(exact.isnan())
    error = (actual.double() - exact).nan_to_num()
    assert error.norm() <= share * exact.nan_to_num().norm()


def check(
    inputs: Inputs,
    config: DecodeConfig | None = None,
    token_states: torch.Tensor | None = None,
    share: float = 2e-7,
    **given,
) -> Outputs:
    """Runs the kernel and judges all that it wrote, and that it wrote nothing else."""
    exact = recurrence(inputs)
    exact_states = None if token_states is None else states_after_tokens(inputs)
    o, whole = guarded(tuple(inputs.v.shape), inputs.v.dtype)
    before = None if inputs.state is None else bits(inputs.state)
    if token_states is not None:
        token_states.fill_(KEPT)
    outputs = decode(dataclasses.replace(inputs, token_states=token_states), o, config, **given)
    torch.cuda.synchronize()
    assert outputs.o is o
    close(o, exact.o)
    guard = (whole.numel() - o.numel()) // 2
    assert whole[:guard].eq(KEPT).all() and whole[guard + o.numel() :].eq(KEPT).all(), "guards around o"
    assert (outputs.final_state is None) == (exact.final_state is None)
    if exact.final_state is not None:
        judge_state(outputs.final_state, exact.final_state, share)
    if inputs.state is not None and "final_state" not in given:
        _only_used_slots_changed(inputs, before)
    if token_states is not None:
        padding = exact_states.isnan()
        assert token_states[padding].eq(KEPT).all(), "nothing is written for padding"
        judge_state(token_states.masked_fill(padding, 0), exact_states.masked_fill(padding, 0))
    if inputs.state_indices is not None and inputs.cu_seqlens is None:
        assert o[inputs.state_indices < 0].eq(0).all(), "padding gives zeros, exactly"
    return outputs


def _only_used_slots_changed(inputs: Inputs, before: torch.Tensor) -> None:
    after = bits(inputs.state)
    if inputs.state_indices is not None:
        view = torch.empty(0, dtype=inputs.state.dtype, device=DEVICE)
        view.set_(before.untyped_storage(), inputs.state.storage_offset(), inputs.state.shape, inputs.state.stride())
        used = inputs.state_indices[inputs.state_indices >= 0].long()
        view[used] = inputs.state[used]
    assert before.equal(after), "a plain state, unused slots and the gaps between slots stay as they are"


# --- against the oracle


@pytest.mark.parametrize("row", cute_cases.rows(), ids=cute_cases.name)
def test_every_two_options(row):
    case = cute_cases.case_of(row)
    check(case.inputs, case.config, case.token_states)


@pytest.mark.parametrize("T", [1, 4], ids=["one", "draft"])
@pytest.mark.parametrize("N", [1, 3, 200])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_the_schedule_of_every_batch(N, T, state_dtype):
    check(usual(N, T=T, state_dtype=state_dtype))


@pytest.mark.parametrize("N", [3, 40, 200])
def test_the_states_of_tokens_in_every_schedule(N):
    check(usual(N, T=4), token_states=torch.empty(N, 4, 4, 128, 128, device=DEVICE))


def test_bulk_copies_with_several_tokens():
    """Of so few states they are not chosen by themselves."""
    check(usual(T=3), DecodeConfig(rows=32, bulk=True))
    check(usual(lens=[2, 0, 5]), DecodeConfig(rows=32, bulk=True))


@pytest.mark.parametrize("lens", [[1, 1, 1], [0, 3, 0], [8, 1, 2], [0, 0, 1]])
def test_lengths(lens):
    """An empty sequence leaves its slot alone."""
    check(usual(lens=lens))
    inputs = with_state(make(H=2, HV=4, K=128, V=128, lens=lens))
    final = check(inputs).final_state
    empty = [n for n, length in enumerate(lens) if length == 0]
    assert final[empty].equal(inputs.state[empty]), "a state that is not in place is handed on"


def test_padding_whose_tensors_are_nan():
    """Neither the pool nor what stands in the rows of padding reaches anything."""
    inputs = usual(5, slots=[4, -1, 0, -1, 6])
    for name in ("q", "k", "v", "g", "beta"):
        getattr(inputs, name)[[1, 3]] = float("nan")
    clean = usual(5, slots=[4, -1, 0, -1, 6])
    o = decode(inputs).o
    close(o, recurrence(clean).o)
    assert o[[1, 3]].eq(0).all()
    all_padding = usual(3, slots=[-1, -1, -1])
    assert decode(all_padding).o.eq(0).all()
    assert all_padding.state.isnan().all()


@pytest.mark.parametrize("raw", [-1e4, -50.0, 50.0, 1e4])
@pytest.mark.parametrize("options", [Options(), SAFE], ids=["softplus", "safe"])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_strong_and_weak_gates_stay_finite(options, raw, state_dtype):
    inputs = usual(T=4, options=options, state_dtype=state_dtype)
    check(dataclasses.replace(inputs, g=torch.full_like(inputs.g, raw)))


@pytest.mark.parametrize("N", [3, 200])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_a_small_softplus_times_a_large_rate(N, state_dtype):
    """softplus(-15) is 3.06e-7, and the decay 0.69: as log(1 + e) it would be off by a fifth.

    exp(14) is 2 to the power of a rounded 14 log2(e), so the rate is off by up to 14 * 2**-24.
    """
    inputs = usual(N, state_dtype=state_dtype)
    check(
        dataclasses.replace(
            inputs,
            g=torch.full_like(inputs.g, -15.0),
            A_log=torch.full_like(inputs.A_log, 14.0),
            dt_bias=torch.zeros_like(inputs.dt_bias),
        ),
        share=5e-7,
    )


def test_a_plain_state_in_place():
    inputs = with_state(make(N=3, H=2, HV=4, K=128, V=128))
    outputs = check(inputs, final_state=inputs.state)
    assert outputs.final_state is inputs.state


@pytest.mark.parametrize("state", [torch.float32, torch.float16])
def test_a_final_state_in_another_dtype(state):
    """It does not go out as it lies in shared memory."""
    inputs = with_state(make(N=3, H=2, HV=4, K=128, V=128))
    final = torch.full_like(inputs.state, float("nan"), dtype=torch.bfloat16)
    inputs = dataclasses.replace(inputs, state=inputs.state.to(state))
    check(inputs, DecodeConfig(rows=128, bulk=True, together=2), final_state=final)


# --- where tensors lie


def test_row_strided_views_of_one_projection():
    """q, k and v as views of one projection, gates head-major, beta a slice of a wider row, o too: read where they lie;
    nothing that is not theirs is read, for it is NaN."""
    base = usual(3, T=2)
    wide = torch.full((3, 2, 2 * 256 + 512 + 5), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    q, k, v, _ = wide.split([256, 256, 512, 5], dim=-1)
    q, k, v = q.view(3, 2, 2, 128), k.view(3, 2, 2, 128), v.view(3, 2, 4, 128)
    g = torch.empty(3, 4, 2, 128, dtype=torch.bfloat16, device=DEVICE).transpose(1, 2)
    beta = torch.full((3, 2, 11), float("nan"), dtype=torch.bfloat16, device=DEVICE)[..., 3:7]
    views = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    for name, view in views.items():
        view.copy_(getattr(base, name))
    assert not any(view.is_contiguous() for view in views.values())
    views = dataclasses.replace(base, **views)
    expected = recurrence(base)
    entries = len(cache.CACHE.entries())
    wide_o = torch.full((3, 2, 4, 192), KEPT, dtype=torch.bfloat16, device=DEVICE)
    same = decode(base.fresh()).o
    decode(views.fresh(), wide_o[..., 32:160])
    close(wide_o[..., 32:160], expected.o)
    assert same_bits(wide_o[..., 32:160], same)
    assert wide_o[..., :32].eq(KEPT).all() and wide_o[..., 160:].eq(KEPT).all()
    assert len(cache.CACHE.entries()) <= entries + 1, "strides compile nothing new"


@pytest.mark.parametrize("offset", [1, 3])
def test_activations_at_any_address(offset):
    """A bf16 tensor may start at any even address: nothing but the state is moved 16 bytes at a time."""
    inputs = usual()

    def shifted(x: torch.Tensor) -> torch.Tensor:
        memory = torch.empty(x.numel() + 8, dtype=x.dtype, device=DEVICE)
        return memory[offset : offset + x.numel()].view(x.shape).copy_(x)

    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias")
    check(dataclasses.replace(inputs, **{name: shifted(getattr(inputs, name)) for name in names}))


@pytest.mark.parametrize("gap", [8, 4096])
@pytest.mark.parametrize("N", [3, 200])
def test_slots_that_lie_apart(N, gap):
    check(usual(N, gap=gap))


@pytest.mark.parametrize(
    ("dtype", "config"),
    [(torch.bfloat16, None), (torch.float32, DecodeConfig(rows=32, bulk=True))],
    ids=["bf16", "bulk"],
)
def test_pool_past_2_31_elements(dtype, config):
    inputs, size, stride = usual(2, slots=[2, 0]), 4 * 128 * 128, 2**30 + 64
    pool = torch.empty_strided((3, 4, 128, 128), (stride, 128 * 128, 128, 1), dtype=dtype, device=DEVICE)
    assert 2 * stride > 2**31
    small = inputs.state[[2, 0]].to(dtype)
    pool[2], pool[0], pool[1] = small[0], small[1], float("nan")
    expected = recurrence(dataclasses.replace(inputs, state=small, state_indices=None))
    o = decode(dataclasses.replace(inputs, state=pool), config=config).o
    close(o, expected.o)
    judge_state(pool[[2, 0]], expected.final_state)
    assert pool[1].isnan().all() and pool[0].numel() == size


def test_activations_past_2_31_elements():
    """The second row of q, g, o and of the states after each token lies beyond 2^31 elements."""
    inputs = usual(2, slots=[5, 3])

    def far(x: torch.Tensor) -> torch.Tensor:
        stride = (2**31 + 64, *x.stride()[1:])
        return torch.empty_strided(x.shape, stride, dtype=x.dtype, device=DEVICE)

    expected, states = recurrence(inputs), states_after_tokens(inputs)
    o = far(inputs.v)
    token_states = far(torch.empty(2, 1, 4, 128, 128, dtype=torch.bfloat16, device=DEVICE))
    for name in ("q", "g"):
        moved = far(getattr(inputs, name)).copy_(getattr(inputs, name))
        decode(dataclasses.replace(inputs.fresh(), **{name: moved}), o)
        close(o, expected.o)
        del moved
    decode(dataclasses.replace(inputs, token_states=token_states), o)
    close(o, expected.o)
    close(token_states, states)


# --- bits


@pytest.mark.parametrize("N", [3, 200])
def test_the_same_bits_in_every_run(N):
    inputs = usual(N, T=2)
    first = inputs.fresh()
    o = decode(first).o
    for _ in range(5):
        again = inputs.fresh()
        assert same_bits(decode(again).o, o)
        assert same_bits(again.state, first.state)


@pytest.mark.parametrize("T", [1, 3], ids=["one", "draft"])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_others(T, state_dtype):
    """The same sequence alone, which small CTAs share, and among 199 others, which stream."""
    batch = usual(200, T=T, state_dtype=state_dtype)
    whole = batch.fresh()
    o = decode(whole).o
    for n in (0, 1, 77, 199):
        alone = dataclasses.replace(
            tokens_of(batch.fresh(), slice(n, n + 1), slice(None)), state_indices=batch.state_indices[n : n + 1]
        )
        slot = int(batch.state_indices[n])
        assert same_bits(decode(alone).o, o[n : n + 1])
        assert same_bits(alone.state[slot], whole.state[slot])


def test_a_row_does_not_depend_on_what_the_others_hold():
    inputs, other = usual(200), usual(200, seed=5)
    o = decode(inputs.fresh()).o
    names = ("q", "k", "v", "g", "beta")
    mixed = {name: torch.cat((getattr(inputs, name)[:100], getattr(other, name)[100:])) for name in names}
    mixed = dataclasses.replace(inputs.fresh(), **mixed)
    mixed.state[inputs.state_indices[100:].long()] *= 3
    assert same_bits(decode(mixed).o[:100], o[:100])


# --- long runs


@pytest.mark.parametrize("gates", ["bench", "weak"])
def test_ten_thousand_steps_drift_no_further_than_torch(gates):
    """The same loop in plain fp32 torch is the measure: errors against fp64, over all steps and over the last 1000."""
    problem = Problem(
        Op.DECODE, (10_000,), H=2, HV=2, packed=False, dtype="float32", g_dtype="float32", beta_dtype="float32"
    )
    inputs = make_inputs(problem, gates=gates).to(DEVICE)
    exact, plain = recurrence(inputs), plain_recurrent.run(inputs)
    pool, index = inputs.state.clone(), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    o = torch.empty_like(inputs.v)
    stepwise = dataclasses.replace(inputs, state=pool, state_indices=index)
    for t in range(10_000):
        token = slice(t, t + 1)
        decode(tokens_of(stepwise, slice(None), token), o[:, token])

    def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
        return float((actual.double() - expected).norm() / expected.norm())

    def holds(ours: torch.Tensor, theirs: torch.Tensor, expected: torch.Tensor) -> None:
        assert error(ours, expected) <= 1.5 * error(theirs, expected)

    holds(o, plain.o, exact.o)
    holds(o[:, -1000:], plain.o[:, -1000:], exact.o[:, -1000:])
    holds(pool, plain.final_state, exact.final_state)


def test_decode_goes_on_where_triton_prefilled():
    """100 tokens of prompt and 20 one by one, on one pool, are one recurrence of 120."""
    prompt, steps, slots = 100, 20, [4, 1, 6]
    inputs = usual(3, T=prompt + steps, slots=slots)
    expected = recurrence(inputs)
    tensors = {name: getattr(inputs, name) for name in ("q", "k", "v", "g", "beta")}
    rest = {name: getattr(inputs, name) for name in ("A_log", "dt_bias", "state", "state_indices")}
    parts = [kda_prefill(**{name: x[:, :prompt] for name, x in tensors.items()}, **rest)]
    for t in range(prompt, prompt + steps):
        token = {name: x[:, t : t + 1] for name, x in tensors.items()}
        parts.append(kda_decode(**token, **rest, kernel="cute-decode"))
    o = torch.cat(parts, 1)
    # the prefill multiplies in tf32
    assert (o.double() - expected.o).abs().max() <= 5e-3 * expected.o.abs().max()
    error = (inputs.state.double() - expected.final_state)[slots]
    assert error.abs().max() <= 5e-3 * expected.final_state[slots].abs().max()
    assert inputs.state[[0, 2, 3, 5]].isnan().all()


def test_back_to_an_accepted_token():
    """Verifying a draft of 4 of which 2 are accepted: the state after the second, put back, is what 2 tokens alone
    leave, bit by bit, and what decoding one by one leaves."""
    inputs = usual(3, T=4)
    draft, short, honest = inputs.fresh(), inputs.fresh(), inputs.fresh()
    token_states = torch.empty(3, 4, 4, 128, 128, device=DEVICE)
    o = decode(dataclasses.replace(draft, token_states=token_states)).o
    draft.state[SLOTS] = token_states[:, 1]
    accepted = tokens_of(short, slice(None), slice(2))
    assert same_bits(
        decode(dataclasses.replace(accepted, token_states=torch.empty_like(token_states[:, :2]))).o, o[:, :2]
    )
    assert same_bits(draft.state[SLOTS], short.state[SLOTS])
    for t in range(2):
        one = decode(tokens_of(honest, slice(None), slice(t, t + 1))).o
        torch.testing.assert_close(one.float(), o[:, t : t + 1].float(), rtol=2**-7, atol=1e-5)
    torch.testing.assert_close(draft.state[SLOTS], honest.state[SLOTS], rtol=1e-5, atol=1e-5)


# --- streams, graphs, threads, devices


def test_a_graph_replays_what_eager_calls_do():
    inputs, eager = usual(200), usual(200)
    static = inputs.fresh()
    o = torch.empty_like(inputs.v)
    decode(static, o)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode(static, o)
    static.state.copy_(inputs.state)
    for step in range(3):
        # other tokens, other slots: a graph reads what lies there when it runs
        tokens = usual(200, seed=step)
        order = torch.randperm(200, generator=torch.Generator().manual_seed(step)).to(DEVICE)
        slots = inputs.state_indices[order]
        for name in ("q", "k", "v", "g", "beta"):
            getattr(static, name).copy_(getattr(tokens, name))
        static.state_indices.copy_(slots)
        graph.replay()
        now = dataclasses.replace(
            tokens, state=eager.state, state_indices=slots, A_log=inputs.A_log, dt_bias=inputs.dt_bias
        )
        assert same_bits(decode(now).o, o)
        assert same_bits(eager.state, static.state)


def test_it_runs_on_the_stream_of_the_caller_and_waits_for_nothing():
    inputs = usual(200)
    expected = decode(inputs.fresh()).o
    late = dataclasses.replace(inputs.fresh(), q=torch.zeros_like(inputs.q))
    o = torch.empty_like(inputs.v)
    decode(late.fresh(), o)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_000_000_000)  # over half a second
        late.q.copy_(inputs.q)
        began = time.perf_counter()
        decode(late, o)
        took = time.perf_counter() - began
        busy = not stream.query()
    assert busy and took < 0.2, "the host did not wait"
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before, "nothing was allocated"
    stream.synchronize()
    assert same_bits(o, expected), "it came after what was on its stream before it"


def test_sixteen_threads_with_new_keys():
    """Each of four keys is compiled once, and every thread gets its own results."""
    calls = [usual(3, HV=HV, H=1, seed=seed) for seed, HV in enumerate((5, 6, 7, 9) * 4)]
    expected = [recurrence(inputs) for inputs in calls]
    results, failures, barrier = [None] * 16, [], threading.Barrier(16)
    torch.cuda.synchronize()

    def work(i: int) -> None:
        try:
            barrier.wait()
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(3):
                    fresh = calls[i].fresh()
                    results[i] = decode(fresh)
                torch.cuda.current_stream().synchronize()
        except BaseException as error:
            failures.append(error)

    before = len(cache.CACHE.entries())
    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(cache.CACHE.entries()) == before + 4
    for outputs, exact in zip(results, expected, strict=True):
        close(outputs.o, exact.o)
        judge_state(outputs.final_state, exact.final_state)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_tensors_on_another_gpu_than_the_current_one():
    inputs = usual()
    expected = decode(inputs.fresh()).o
    other = inputs.to("cuda:1")
    assert torch.cuda.current_device() == 0
    o = decode(other).o
    assert o.device == torch.device("cuda:1")
    assert same_bits(o.cpu(), expected.cpu())


# --- one call after another


def test_calls_that_alternate_are_not_mixed_up():
    """Each follows one that has the same q and another function; two rounds, so that all are compiled in the second."""
    names = ("as it is", "no norm", "safe", "state in bf16", "no dt_bias", "plain", "g in fp32", "fewer rows")
    calls = cute_cases.unlike(usual())
    for name in (*names, *names, *reversed(names)):
        check(calls[name].fresh())


def test_sizes_that_change_from_call_to_call():
    """Batch, pool, tokens, scale and bound: values, and the function of the call before takes some of them."""
    entries = None
    for _ in range(2):
        for N, slots in itertools.product((1, 3, 5), (None, 40)):
            check(usual(N, P=slots))
        check(usual(2, T=3))
        check(usual(2, T=8))
        for bound, scale in ((-5.0, None), (-2.0, None), (-2.0, 0.5)):
            check(usual(options=dataclasses.replace(SAFE, lower_bound=bound, scale=scale)))
        assert entries in (None, len(cache.CACHE.entries())), "the second round compiles nothing"
        entries = len(cache.CACHE.entries())


def test_gradients_are_refused_where_they_are_asked_for():
    inputs = usual()
    expected = decode(inputs.fresh()).o
    q = inputs.q.clone().requires_grad_()
    A_log = torch.nn.Parameter(inputs.A_log)
    o = kda_decode(
        q, inputs.k, inputs.v, inputs.g, inputs.beta, A_log=A_log, dt_bias=inputs.dt_bias, state=inputs.state,
        state_indices=inputs.state_indices, kernel="cute-decode",
    )  # fmt: skip
    assert same_bits(o.detach(), expected)
    with pytest.raises(KdaError, match="kda has no backward"):
        o.sum().backward()


# --- wrong tensors


@pytest.fixture
def cold(monkeypatch):
    """As a new process: nothing in memory."""
    monkeypatch.setattr(module, "CACHE", cache.CompileCache())
    monkeypatch.setattr(module, "_last", module._Last())


def refuse(good: Inputs, wrong: wrong_tensors.Wrong, warm: bool) -> None:
    if warm:
        decode(good.fresh())
    bad = wrong_tensors.apply(wrong, good)
    before = None if good.state is None else bits(good.state)
    with pytest.raises(InputError, match=wrong_tensors.message(wrong)):
        decode(bad)
    torch.cuda.synchronize()  # had anything been launched, it would have failed, or written
    if before is not None:
        assert before.equal(bits(good.state))


both = pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])


def small(**given) -> Inputs:
    return usual(3, K=32, V=32, **given)


@both
@pytest.mark.parametrize("name", list(wrong_tensors.DENSE | wrong_tensors.NOT_CUTE))
def test_wrong_tensors(cold, name, warm):
    refuse(small(), (wrong_tensors.DENSE | wrong_tensors.NOT_CUTE)[name], warm)


@both
@pytest.mark.parametrize("name", list(wrong_tensors.PACKED))
def test_wrong_tensors_of_a_packed_batch(cold, name, warm):
    refuse(small(lens=[2, 1, 3]), wrong_tensors.PACKED[name], warm)


@both
@pytest.mark.parametrize("name", list(wrong_tensors.PLAIN))
def test_wrong_plain_states(cold, name, warm):
    inputs = with_state(make(N=3, H=2, HV=4, K=32, V=32, lens=[2, 1, 3], output_final_state=False))
    refuse(inputs, wrong_tensors.PLAIN[name], warm)


@both
@pytest.mark.parametrize("name", list(wrong_tensors.BUFFERS))
def test_wrong_buffers(cold, name, warm):
    inputs, wrong = small(), wrong_tensors.BUFFERS[name]
    if warm:
        decode(inputs.fresh())
    given = {wrong.argument: wrong.make(inputs)}
    out = given.pop("out", None)
    with pytest.raises(InputError, match=rf"^{wrong.argument}\b"):
        decode(dataclasses.replace(inputs, **given), out)


# --- what engines ask for

ints = functools.partial(torch.tensor, dtype=torch.int32, device=DEVICE)


def drafts(dtype: torch.dtype, lens=(3, 1, 0, 2, 4)) -> Inputs:
    """Speculative decoding: a pool of 24 slots, 4 columns per sequence, the second of two rows of padding."""
    inputs = make(H=2, HV=4, K=128, V=128, lens=list(lens))
    pool = torch.randn(24, 4, 128, 128, generator=torch.Generator().manual_seed(5)).to(DEVICE, dtype)
    indices = ints([[1, 2, 3, 4], [5, -1, 6, 7], [8, 9, 10, 11], [0, 12, 13, 14], [15, 16, 0, 99]])
    return dataclasses.replace(
        inputs, state=pool, state_indices=indices, num_accepted_tokens=ints([2, 1, 1, 1, 1]), null_slot=0
    )


def on_plain_states(inputs: Inputs, slots: list[int]) -> Inputs:
    """The same on states of their own, without features."""
    features = {"num_accepted_tokens": None, "null_slot": None, "has_initial_state": None, "token_states": None}
    features |= {"token_state_indices": None, "update_state": True, "state_indices": None}
    return dataclasses.replace(inputs, state=inputs.state[slots].clone(), **features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_drafts(dtype):
    """Loaded from the column of the last accepted token; each token's state to its own column, if that is a slot."""
    inputs = drafts(dtype)
    plain = on_plain_states(inputs, [2, 5, 8, 1, 15])
    exact, states = recurrence(plain).o, states_after_tokens(plain)[0]
    before = inputs.state.clone()
    o = decode(inputs).o
    ends = inputs.cu_seqlens.tolist()
    padding = slice(ends[3], ends[4])
    assert o[:, padding].eq(0).all(), "its column holds the null slot"
    exact[:, padding] = 0
    close(o, exact)
    written = {1: 0, 2: 1, 3: 2, 5: ends[1], 15: ends[4], 16: ends[4] + 1}
    for slot in range(24):
        if slot in written:
            judge_state(inputs.state[slot], states[written[slot]], 2e-6)
        else:
            assert same_bits(inputs.state[slot], before[slot]), slot


@pytest.mark.parametrize("lens", [None, [3, 1, 0]], ids=["dense", "packed"])
def test_a_pass_that_leaves_the_pool_as_it_is(lens):
    """And writes the states of tokens to the rows of a buffer."""
    inputs = usual(3, T=3, lens=lens)
    buffer = torch.full((6, 4, 4, 128, 128), KEPT, dtype=torch.bfloat16, device=DEVICE)
    mine = dataclasses.replace(
        inputs, update_state=False, token_states=buffer, token_state_indices=ints([5, -1, 99]).long()
    )
    before = bits(inputs.state)
    o = decode(mine).o
    assert before.equal(bits(inputs.state))
    plain = on_plain_states(mine, SLOTS)
    close(o, recurrence(plain).o)
    close(buffer[5, :3], states_after_tokens(plain)[0, :3])
    assert buffer[:5].eq(KEPT).all() and buffer[5, 3].eq(KEPT).all()


@pytest.mark.parametrize("N", [6, 600])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_slots_that_are_padding_or_not_there(N, index):
    """Any negative one and the null slot give zeros, one past the pool NaN; none of them is read or written."""
    inputs = usual(N, slots=list(range(1, N + 1)), P=N + 1)
    slots = inputs.state_indices.to(index, copy=True)
    slots[0], slots[1], slots[2], slots[3], slots[4] = 0, -5, 0, N + 1, 2**31 - 1
    mine = dataclasses.replace(inputs.fresh(), state_indices=slots, null_slot=0)
    o = decode(mine).o
    assert o[:3].eq(0).all() and o[3:5].isnan().all()
    expected = inputs.fresh()
    close(o[5:], recurrence(expected).o[5:])
    assert same_bits(mine.state[:6], inputs.state[:6])
    decode(expected)
    assert same_bits(mine.state[6:], expected.state[6:])


@pytest.mark.parametrize("N", [3, 600])
def test_sequences_that_begin_with_nothing(N):
    inputs = usual(N)
    flags = torch.arange(N, device=DEVICE) % 2 == 0
    first = inputs.state_indices.long()[~flags]
    clean = inputs.fresh()
    inputs.state[first], clean.state[first] = float("nan"), 0
    expected = recurrence(clean)
    close(decode(dataclasses.replace(inputs, has_initial_state=flags)).o, expected.o)
    judge_state(inputs.state[inputs.state_indices.long()], expected.final_state[inputs.state_indices.long()], 2e-6)


def test_tokens_behind_the_last_sequence_and_indices_that_lie_apart():
    inputs = usual(lens=[2, 0, 5])
    expected = recurrence(inputs).o
    wide = {
        name: torch.cat([x := getattr(inputs, name), torch.full_like(x[:, :9], float("nan"))], 1)
        for name in ("q", "k", "v", "g", "beta")
    }
    apart = ints([[slot, 99] for slot in [*SLOTS, 99]])[:, 0]
    o = decode(dataclasses.replace(inputs, **wide, state_indices=apart)).o
    close(o[:, :7], expected)
    assert o[:, 7:].eq(0).all()


def test_more_sequences_than_a_grid_has_room_for():
    N = 66_000
    inputs = make(N=N, H=1, HV=1, K=32, V=16)
    inputs = with_pool(inputs, list(range(N)), P=N)
    expected = on_plain_states(inputs, [0, 65_534, 65_535, N - 1])
    some = [0, 65_534, 65_535, N - 1]
    names = ("q", "k", "v", "g", "beta")
    expected = recurrence(dataclasses.replace(expected, **{name: getattr(inputs, name)[some] for name in names}))
    close(decode(inputs).o[some], expected.o)
    judge_state(inputs.state[some], expected.final_state, 2e-6)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [Options(), SAFE], ids=["softplus", "safe"])
@pytest.mark.parametrize("A_log", [88.0, 95.0, 1000.0, -100.0])
def test_any_rate(A_log, options, state_dtype):
    """Also where raw + bias is 0 and the rate is no number of 32 bits."""
    inputs = usual(options=options, state_dtype=state_dtype)
    bias = inputs.dt_bias.bfloat16().float()
    g = inputs.g.clone()
    g[..., ::2] = -bias.bfloat16()[..., ::2]
    large = dataclasses.replace(inputs, g=g, dt_bias=bias, A_log=torch.full_like(inputs.A_log, A_log))
    exact = recurrence(dataclasses.replace(large, A_log=torch.full_like(inputs.A_log, min(A_log, 60.0))))
    close(decode(large).o, exact.o)
