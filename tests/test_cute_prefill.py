"""The CuTe prefill on a GPU, against the fp64 token recurrence.

pytest tests/test_cute_prefill.py       about three minutes, most of it the compiler and the recurrence
"""

import dataclasses
import functools
import itertools
import threading

import pytest
import torch
from decode_inputs import DEVICE
from prefill_inputs import GIVEN, SAFE, SOFTPLUS, WAYS, new_memory_holds_nan, plain, pooled, split, tokens

from kda_kernels.cute.prefill import functions as prefill_functions
from kda_kernels.cute.prefill import host as module
from kda_kernels.cute.prefill import plan as prefill_plan
from kda_kernels.cute.prefill.config import CHUNK, Part
from kda_kernels.cute.prefill.host import prefill
from kda_kernels.cute.prefill.plan import Split
from kda_kernels.problem import Op
from kda_kernels.reference.oracle import recurrence
from kda_kernels.serving import kda_decode, kda_prefill
from kda_kernels.tensors import Checkpoints, Inputs, Outputs
from kdacli.judge import Reference, judge

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiled_here")]
KERNEL = "cute-prefill"
KEPT = 7.0  # what a buffer held before
NO_BOUND = dataclasses.replace(GIVEN, lower_bound=None)
TWICE = dataclasses.replace(SAFE, allow_neg_eigval=True)
EDGES = [1, 0, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 15, 16, 17, 5 * CHUNK + 3]
TOKENS = ("q", "k", "v", "g", "beta")


every_way = pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))


def bits(x: torch.Tensor) -> torch.Tensor:
    """A copy of all memory that the tensor is a view of: NaN equals NaN, and gaps count."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage()).clone()


def cast(inputs: Inputs, *names: str) -> Inputs:
    return dataclasses.replace(inputs, **{name: getattr(inputs, name).half() for name in names})


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def check(inputs: Inputs, clean: Inputs | None = None) -> Outputs:
    """Runs the kernel into a buffer of NaN between guards, judges all that it wrote, and that it wrote nothing else.

    Args:
        clean: what it is judged by, where `inputs` hold NaN that it must not see.
    """
    shape, numel = inputs.v.shape, inputs.v.numel()
    whole = torch.full((numel + 4096,), KEPT, dtype=inputs.v.dtype, device=inputs.v.device)
    o = whole[2048 : 2048 + numel].view(shape).fill_(float("nan"))
    before = None if inputs.state is None else bits(inputs.state)
    reference = (clean or inputs).fresh()
    with new_memory_holds_nan():
        outputs = prefill(inputs, o)
    torch.cuda.synchronize()
    assert whole[:2048].eq(KEPT).all() and whole[2048 + numel :].eq(KEPT).all(), "guards around o"
    for verdict in judge(Reference(reference, Op.PREFILL), outputs):
        assert verdict.passed, verdict
    if inputs.state is not None:
        view = torch.empty(0, dtype=inputs.state.dtype, device=inputs.state.device)
        view.set_(before.untyped_storage(), inputs.state.storage_offset(), inputs.state.shape, inputs.state.stride())
        if inputs.state_indices is not None:
            used = inputs.state_indices[inputs.state_indices >= 0].long()
            view[used] = inputs.state[used]
        assert before.equal(bits(inputs.state)), "a plain state, unused slots and gaps stay as they are"
    return outputs


# --- against the oracle

CASES = {
    "pool": lambda: pooled(EDGES, slots=range(10, 0, -1), P=12),
    "pool, gaps, int64": lambda: pooled(EDGES, slots=range(10), P=10, gap=64, index_dtype=torch.int64),
    "bf16 pool": lambda: pooled(EDGES, slots=range(10), P=10, state_dtype=torch.bfloat16),
    "padding": lambda: pooled([40, 3, 100], slots=[4, -1, 0]),
    "padding with units": lambda: pooled([100, 161, 97], slots=[4, -1, 0]),
    "int64 offsets": lambda: dataclasses.replace((x := plain(EDGES)), cu_seqlens=x.cu_seqlens.long()),
    "dense": lambda: plain(N=3, T=3 * CHUNK + 5),
    "dense, two rounds": lambda: plain(N=2, T=5 * CHUNK + 1),
    "one token": lambda: plain(N=3, T=1),
    "dense pool": lambda: pooled(N=3, T=100),
    "dense, padding": lambda: pooled(N=3, T=100, slots=(4, -1, 0)),
    "no state": lambda: tokens(EDGES),
    "no state, not wanted": lambda: tokens(EDGES, output_final_state=False),
    "no final state": lambda: plain(EDGES, output_final_state=False),
    "K-first": lambda: plain(EDGES, v_first=False),
    "fp16, K-first": lambda: plain(EDGES, v_first=False, dtype=torch.float16),
    "bf16 state": lambda: plain(EDGES, state_dtype=torch.bfloat16),
    "given": lambda: plain(EDGES, options=GIVEN),
    "given in fp32": lambda: (lambda x: dataclasses.replace(x, g=x.g.float(), beta=x.beta.float()))(
        plain(EDGES, options=GIVEN)
    ),
    "fp32 g and beta": lambda: dataclasses.replace((x := plain(EDGES)), g=x.g.float(), beta=x.beta.float()),
    "bf16 parameters": lambda: dataclasses.replace(
        (x := plain(EDGES)), A_log=x.A_log.bfloat16(), dt_bias=x.dt_bias.bfloat16()
    ),
    "no parameters": lambda: dataclasses.replace(plain(EDGES), A_log=None, dt_bias=None),
    "2 sigmoid": lambda: plain(EDGES, options=TWICE),
    "2 sigmoid, fp32 g": lambda: dataclasses.replace((x := plain(EDGES, options=TWICE)), g=x.g.float()),
    "bound and scale": lambda: plain(EDGES, options=dataclasses.replace(SAFE, lower_bound=-1.5, scale=0.2)),
    "softplus": lambda: pooled(EDGES, slots=range(10), P=10, options=SOFTPLUS),
    "softplus, no parameters' bias": lambda: dataclasses.replace(plain(EDGES, options=SOFTPLUS), dt_bias=None),
    "softplus, 2 sigmoid, fp32 g": lambda: dataclasses.replace(
        (x := plain(EDGES, options=dataclasses.replace(SOFTPLUS, allow_neg_eigval=True))), g=x.g.float()
    ),
    "given, no bound": lambda: plain(EDGES, options=NO_BOUND),
    "bound -8": lambda: plain(EDGES, options=dataclasses.replace(SAFE, lower_bound=-8.0)),
    "fp16 gates": lambda: cast(plain(EDGES), "g", "beta"),
    "fp16": lambda: pooled(EDGES, slots=range(10), P=10, dtype=torch.float16),
    "fp16, softplus": lambda: pooled(EDGES, slots=range(10), P=10, options=SOFTPLUS, dtype=torch.float16),
    "fp16, given": lambda: plain(EDGES, options=GIVEN, dtype=torch.float16),
    "fp16, 2 sigmoid, fp32 g": lambda: dataclasses.replace(
        (x := plain(EDGES, options=TWICE, dtype=torch.float16)), g=x.g.float()
    ),
    "as many heads": lambda: plain(EDGES, H=2),
    "one head": lambda: plain([161], HV=1),
    "three heads": lambda: pooled([161, 0, 100], HV=3),
    "48 heads": lambda: pooled([161, 0, 100], HV=48),  # more units than SMs
    "32 of one length": lambda: pooled([CHUNK + 1] * 32, slots=range(32), P=32),
    "32 of many lengths": lambda: pooled([*EDGES, *EDGES, *EDGES, 7, 200], slots=range(31, -1, -1), P=32),
    "33": lambda: pooled([*EDGES, *EDGES, *EDGES, 7, 200, 0], slots=range(33), P=33),
}


@every_way
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_cases(monkeypatch, case, way):
    split(monkeypatch, way)
    check(case())


@pytest.mark.parametrize(
    "case", ["pool", "padding", "bf16 pool", "dense", "given in fp32", "2 sigmoid", "softplus", "fp16", "checkpoints"]
)
def test_ctas_that_stay(monkeypatch, case):
    """Three take all heads of all sequences, also of empty ones and padding; the bits are those of a CTA each."""
    split(monkeypatch, None)
    inputs = CASES["pool" if case == "checkpoints" else case]()
    if case == "checkpoints":
        states, rows = torch.full((20, 2, 128, 128), KEPT, device=DEVICE), ints(range(20)).view(10, 2)
        inputs.checkpoints = Checkpoints(states, rows, every=64)
    written = []
    for sms in (1000, 3):
        monkeypatch.setattr(module, "multiprocessors", lambda device, sms=sms: sms)
        monkeypatch.setattr(module, "_last", module._Last())
        mine = inputs.fresh()
        with new_memory_holds_nan():
            outputs = prefill(mine)
        assert (Part.STAYING in module._last.functions) == (sms == 3)
        kept = mine.checkpoints and mine.checkpoints.states
        written.append([bits(x) for x in (outputs.o, outputs.final_state, kept) if x is not None])
    assert all(map(torch.equal, *written))


@every_way
@pytest.mark.parametrize("raw", [-1e4, -8.0, 8.0, 1e4])
def test_gates_at_both_ends(monkeypatch, raw, way):
    """Nothing is forgotten, or e^-5 is left of a channel with each token."""
    split(monkeypatch, way)
    inputs = plain([5 * CHUNK + 3])
    check(dataclasses.replace(inputs, g=torch.full_like(inputs.g, raw)))


@every_way
def test_gates_of_both_ends_in_turn(monkeypatch, way):
    """The decays within a chunk run through the whole range, channel by channel and token by token."""
    split(monkeypatch, way)
    inputs = plain([5 * CHUNK + 3])
    g = torch.full_like(inputs.g, -1e4)
    g[:, ::2, :, ::2] = 1e4
    g[:, CHUNK : 2 * CHUNK, :, 1::2] = 1e4
    check(dataclasses.replace(inputs, g=g))


@every_way
@pytest.mark.parametrize("A_log", [-7.0, 0.0, 5.3, 89.0])
def test_softplus_gates_of_any_strength(monkeypatch, A_log, way):
    """exp(A_log) up to what real checkpoints have, 201, and past what fp32 holds; raw gates from -30 to 30."""
    split(monkeypatch, way)
    inputs = plain([5 * CHUNK + 3], options=SOFTPLUS)
    g = torch.linspace(-30, 30, inputs.g.numel(), device=DEVICE).view_as(inputs.g)[:, torch.randperm(5 * CHUNK + 3)]
    check(dataclasses.replace(inputs, g=g.to(inputs.g.dtype), A_log=torch.full_like(inputs.A_log, A_log)))


SIZES = {
    "long keys": {"q": 3e3, "k": 3e3},
    "short keys": {"q": 1e-4, "k": 1e-4},
    "large values": {"v": 3e3},
    "small values": {"v": 1e-4, "state": 1e-4},
    "a large state": {"state": 1e5},
}


@every_way
@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
def test_fp16_of_any_size(monkeypatch, sizes, way):
    """Squares and products of what comes in, and states, leave the range of fp16; operands do not."""
    split(monkeypatch, way)
    inputs = plain([5 * CHUNK + 3, 1, 40], options=SOFTPLUS, dtype=torch.float16)
    sized = {name: getattr(inputs, name) * by for name, by in sizes.items()}
    check(dataclasses.replace(inputs, **sized))


@every_way
@pytest.mark.parametrize("size", [2.0**-60, 2.0**60])
def test_states_of_any_size(monkeypatch, size, way):
    """Where segments are joined states are multiplied in fp16, in units of powers of two."""
    split(monkeypatch, way)
    inputs = plain([5 * CHUNK + 3])
    g, v = torch.full_like(inputs.g, -8.0), torch.zeros_like(inputs.v)
    check(dataclasses.replace(inputs, g=g, v=v, state=inputs.state * size))


@every_way
@pytest.mark.parametrize("A_log", [-7.0, 0.0, 5.3, 89.0])
def test_fp16_with_gates_of_any_strength(monkeypatch, A_log, way):
    split(monkeypatch, way)
    inputs = plain([5 * CHUNK + 3], options=SOFTPLUS, dtype=torch.float16)
    g = torch.linspace(-30, 30, inputs.g.numel(), device=DEVICE).view_as(inputs.g)[:, torch.randperm(5 * CHUNK + 3)]
    check(dataclasses.replace(inputs, g=g.to(inputs.g.dtype), A_log=torch.full_like(inputs.A_log, A_log)))


@every_way
@pytest.mark.parametrize("period", [1, 2, 3, 5, 8, 13, 16, 29])
def test_what_a_closed_gate_hides_is_gone(monkeypatch, period, way):
    """Tokens whose log decays are -2661, what real checkpoints reach, between such as forget little."""
    split(monkeypatch, way)
    inputs = plain([5 * CHUNK + 3], options=NO_BOUND)
    g = inputs.g.clamp(min=-0.1)
    g[:, ::period] = -2661.0
    v = inputs.v.clone()
    v[:, period - 1 :: period] *= 2.0**20  # before each closed gate: nothing of it may be seen behind
    outputs = check(dataclasses.replace(inputs, g=g, v=v))
    if period > 1:
        quiet = dataclasses.replace(inputs, g=g, v=v.clone())
        quiet.v[:, period - 1 :: period] = 0
        tokens = [t for t in range(5 * CHUNK + 3) if t % period != period - 1]
        assert same_bits(prefill(quiet).o[:, tokens], outputs.o[:, tokens])


@every_way
@pytest.mark.parametrize("options", ["SOFTPLUS", "NO_BOUND", "SAFE"])
@pytest.mark.parametrize("at", [1, 7, 8, 15, 16, 19, 31, 32, 100])
def test_what_precedes_a_token_does_not_depend_on_it(monkeypatch, options, at, way):
    """In bits; with gates that have a bound, where KDA_CAUSAL asks for it."""
    monkeypatch.setattr(prefill_functions, "CAUSAL", options == "SAFE")
    monkeypatch.setattr(module, "_last", type(module._last)())  # functions of calls that asked for something else
    split(monkeypatch, way)
    inputs, other = (tokens([5 * CHUNK + 3], options=globals()[options], seed=seed) for seed in range(2))
    future = {name: torch.cat([getattr(inputs, name)[:, :at], getattr(other, name)[:, at:]], 1) for name in TOKENS}
    first, second = prefill(inputs).o, prefill(dataclasses.replace(inputs, **future)).o
    assert same_bits(first[:, :at], second[:, :at]) and not same_bits(first[:, at:], second[:, at:])


@every_way
def test_what_the_neighbours_hold_is_not_seen(monkeypatch, way):
    """Each sequence in turn is right while all others, before and behind it, are NaN."""
    split(monkeypatch, way)
    lens = [3, 3 * CHUNK + 1, 1, 5 * CHUNK - 1, 20]
    inputs = plain(lens)
    ends = inputs.cu_seqlens.tolist()
    expected = prefill(inputs)
    for n in range(len(lens)):
        at = slice(ends[n], ends[n + 1])
        poisoned = {name: torch.full_like(getattr(inputs, name), float("nan")) for name in TOKENS}
        for name, x in poisoned.items():
            x[:, at] = getattr(inputs, name)[:, at]
        state = torch.full_like(inputs.state, float("nan"))
        state[n] = inputs.state[n]
        outputs = prefill(dataclasses.replace(inputs, **poisoned, state=state))
        assert same_bits(outputs.o[:, at], expected.o[:, at])
        assert same_bits(outputs.final_state[n], expected.final_state[n])
    check(inputs)


@every_way
def test_padding_is_neither_read_nor_written(monkeypatch, way):
    split(monkeypatch, way)
    clean = pooled([100, 161, 3], slots=[4, -1, 0])
    inputs = clean.fresh()
    tensors = {name: getattr(inputs, name).clone() for name in TOKENS}
    for x in tensors.values():
        x[:, 100:261] = float("nan")
    outputs = check(dataclasses.replace(inputs, **tensors), clean)
    assert outputs.o[:, 100:261].eq(0).all(), "zeros, exactly"


@every_way
def test_an_empty_sequence_hands_its_state_on(monkeypatch, way):
    split(monkeypatch, way)
    inputs = plain([0, 170, 0])
    final = check(inputs).final_state
    assert final[[0, 2]].equal(inputs.state[[0, 2]])


@pytest.mark.parametrize("chunks", range(1, 10))
def test_units_of_any_number_of_chunks(monkeypatch, chunks):
    """Whole ones, and last ones that lack 5 tokens or have just one. An odd number of first segments."""
    size = chunks * CHUNK
    split(monkeypatch, Split(size, size, 16 * size))
    check(plain([3 * size - 5, 2 * size + 1, size], HV=3))


def test_what_the_plan_makes_of_few_heads(monkeypatch):
    """Nothing is pretended: one sequence in segments; and in rounds, had they less memory."""
    inputs = plain([2000], H=4, HV=12)
    shape = (1, 2000, 12, torch.cuda.get_device_properties(0).multi_processor_count)
    assert prefill_plan.plan(*shape).split.rounds(1, 2000, packed=True) == 1
    check(inputs)
    monkeypatch.setattr(prefill_plan, "MOST_BYTES", 3_000_000)
    shorter = prefill_plan._plan.__wrapped__(1, -(-2000 // CHUNK), *shape[2:]).split
    assert shorter.rounds(1, 2000, packed=True) == 3
    split(monkeypatch, shorter)
    check(inputs)


# --- where tensors lie


@every_way
def test_rows_that_lie_apart(monkeypatch, way):
    """q, k and v as views of one projection, gates head-major, beta a slice, o too; what is between them is NaN."""
    split(monkeypatch, way)
    base = plain([170, 3], H=2)
    wide = torch.full((1, 173, 3 * 256 + 8), float("nan"), dtype=torch.bfloat16, device=base.q.device)
    q, k, v = (wide[..., 256 * i : 256 * (i + 1)].view(1, 173, 2, 128) for i in range(3))
    g = torch.empty(1, 2, 173, 128, dtype=torch.bfloat16, device=base.q.device).transpose(1, 2)
    beta = torch.full((1, 173, 11), float("nan"), dtype=torch.bfloat16, device=base.q.device)[..., 3:5]
    views = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    for name, view in views.items():
        view.copy_(getattr(base, name))
    wide_o = torch.full((1, 173, 2, 160), KEPT, dtype=torch.bfloat16, device=base.q.device)
    expected = check(base)
    outputs = prefill(dataclasses.replace(base, **views), wide_o[..., 16:144])
    assert same_bits(wide_o[..., 16:144], expected.o)
    assert same_bits(outputs.final_state, expected.final_state)
    assert wide_o[..., :16].eq(KEPT).all() and wide_o[..., 144:].eq(KEPT).all()


def test_pool_past_2_31_elements():
    inputs, stride = pooled([40, 3], slots=[2, 0]), 2**30 + 64
    pool = torch.empty_strided((3, 2, 128, 128), (stride, 128 * 128, 128, 1), dtype=torch.bfloat16, device=DEVICE)
    small = inputs.state[[2, 0]].bfloat16()
    pool[2], pool[0], pool[1] = small[0], small[1], float("nan")
    expected = prefill(dataclasses.replace(inputs, state=small, state_indices=None))
    o = prefill(dataclasses.replace(inputs, state=pool)).o
    assert same_bits(o, expected.o) and same_bits(pool[[2, 0]], expected.final_state)
    assert pool[1].isnan().all()


# --- bits


@every_way
def test_the_same_bits_in_every_run(monkeypatch, way):
    split(monkeypatch, way)
    inputs = pooled(EDGES, slots=range(10), P=10)
    first = inputs.fresh()
    o = prefill(first).o
    for _ in range(5):
        again = inputs.fresh()
        assert same_bits(prefill(again).o, o) and same_bits(again.state, first.state)


@every_way
def test_a_sequence_does_not_depend_on_the_others(monkeypatch, way):
    """The same alone as between others; where sequences are split, the same with one other, which has units."""
    split(monkeypatch, way)
    batch = plain(EDGES)
    ends = batch.cu_seqlens.tolist()
    whole = prefill(batch)
    other = [] if way is None else [len(EDGES) - 1]
    for n, length in enumerate(EDGES):
        at, of = slice(ends[n], ends[n + 1]), [n, *other]
        tensors = {name: torch.cat([getattr(batch, name)[:, ends[m] : ends[m + 1]] for m in of], 1) for name in TOKENS}
        offsets = torch.tensor([0, *itertools.accumulate(EDGES[m] for m in of)], dtype=torch.int32, device=DEVICE)
        outputs = prefill(dataclasses.replace(batch, **tensors, state=batch.state[of], cu_seqlens=offsets))
        assert same_bits(outputs.o[:, :length], whole.o[:, at])
        assert same_bits(outputs.final_state[0], whole.final_state[n])


@pytest.mark.parametrize("at", [CHUNK, 3 * CHUNK, 37, 1])
def test_two_halves_are_the_whole(monkeypatch, at):
    """On a pool in fp32. Not to the bit: decays before and behind a cut are one factor where nothing is cut."""
    split(monkeypatch, None)
    inputs = pooled([5 * CHUNK + 3], slots=[2])
    whole, halves = inputs.fresh(), inputs.fresh()
    expected = prefill(whole)

    def part(tokens: slice) -> torch.Tensor:
        tensors = {name: getattr(inputs, name)[:, tokens] for name in TOKENS}
        length = tensors["q"].shape[1]
        offsets = torch.tensor([0, length], dtype=torch.int32, device=DEVICE)
        return prefill(dataclasses.replace(halves, **tensors, cu_seqlens=offsets)).o

    o = torch.cat([part(slice(at)), part(slice(at, None))], 1)
    if at % CHUNK == 0:  # else all chunks behind the cut are others
        for cut, one in ((o, expected.o), (halves.state[2], whole.state[2])):
            assert (cut.float() - one.float()).norm() < 2e-3 * one.float().norm()
    for verdict in judge(Reference(inputs, Op.PREFILL), Outputs(o, halves.state)):
        assert verdict.passed, verdict


@pytest.mark.parametrize("call", [
    lambda: plain([130, 0, 64, 3, 65, 1]), lambda: plain(N=2, T=200), lambda: pooled([70, 0, 129], slots=[4, -1, 0]),
    lambda: tokens([CHUNK, 5 * CHUNK + 1]),
], ids=["packed", "dense", "pool", "no state"])  # fmt: skip
def test_states_at_the_start_of_every_64_tokens(call):
    """Of each, the state that the oracle has there; and nothing else is other than without them."""
    inputs = call()
    expected = prefill(inputs.fresh())
    outputs, h = prefill(inputs.fresh(), return_intermediate_states=True)
    assert h.dtype is inputs.k.dtype
    dense = inputs.cu_seqlens is None
    T = inputs.q.shape[1]
    edges = [(n, 0, T) for n in range(len(inputs.q))] if dense else [
        (0, *ends) for ends in itertools.pairwise(inputs.cu_seqlens.tolist())
    ]  # fmt: skip
    chunk = 0
    for n, (row, first, end) in enumerate(edges):
        slot = n if inputs.state_indices is None else int(inputs.state_indices[n])
        for number, start in enumerate(range(first, end, 2 * CHUNK)):
            found = h[n, number] if dense else h[0, chunk]
            chunk += 1
            if slot < 0:
                continue
            before = {name: getattr(inputs, name)[row : row + 1, first:start] for name in TOKENS}
            state = None if inputs.state is None else inputs.state[slot][None]
            one = dataclasses.replace(inputs, **before, state=state, state_indices=None, cu_seqlens=None)
            if start > first:
                exact = recurrence(dataclasses.replace(one, output_final_state=True)).final_state[0]
            else:
                exact = torch.zeros_like(found.mT).double() if state is None else state[0].double()
            assert (found.mT.double() - exact).norm() <= 8e-3 * exact.norm()
    assert dense or chunk == h.shape[1]
    assert same_bits(outputs.o, expected.o) and same_bits(outputs.final_state, expected.final_state)


# --- with the others


def test_decode_goes_on_where_it_ended():
    """100 tokens of prompt and 20 one by one, on one pool, are one recurrence of 120."""
    prompt, steps, slots = 100, 20, [4, 1, 6]
    inputs = pooled(N=3, T=prompt + steps, slots=slots)
    before = inputs.fresh()
    tensors = {name: getattr(inputs, name) for name in TOKENS}
    rest = {name: getattr(inputs, name) for name in ("A_log", "dt_bias", "state", "state_indices")} | {
        "lower_bound": -5.0
    }
    parts = [kda_prefill(**{name: x[:, :prompt] for name, x in tensors.items()}, **rest, kernel="cute-prefill")]
    for t in range(prompt, prompt + steps):
        token = {name: x[:, t : t + 1] for name, x in tensors.items()}
        parts.append(kda_decode(**token, **rest, kernel="cute-decode"))
    for verdict in judge(Reference(before, Op.PREFILL), Outputs(torch.cat(parts, 1), inputs.state)):
        assert verdict.passed, verdict


def test_triton_says_the_same():
    inputs = pooled(EDGES, slots=range(10), P=10)
    names = (*TOKENS, "A_log", "dt_bias", "state_indices", "cu_seqlens")
    found = {}
    for kernel in ("cute-prefill", "triton-prefill"):
        state = inputs.state.clone()
        o = kda_prefill(**{name: getattr(inputs, name) for name in names}, state=state, lower_bound=-5.0, kernel=kernel)
        found[kernel] = o, state
    exact = recurrence(inputs)
    for (ours, theirs), expected in zip(zip(*found.values(), strict=True), (exact.o, exact.final_state), strict=True):
        assert (ours.double() - theirs.double()).norm() < 1e-2 * expected.norm()


# --- graphs, streams, threads


@every_way
def test_a_graph_replays_what_eager_calls_do(monkeypatch, way):
    """Other tokens, lengths and slots: a graph reads what lies there when it runs."""
    split(monkeypatch, way)
    inputs = pooled([40, 0, 100], slots=[4, 1, 6])
    static, o = inputs.fresh(), torch.empty_like(inputs.v)
    prefill(static, o)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prefill(static, o)
    for seed, (lens, slots) in enumerate(
        [([40, 0, 100], [4, 1, 6]), ([3, 137, 0], [0, 5, 2]), ([70, 35, 35], [6, -1, 1])]
    ):
        now = pooled(lens, slots=slots, seed=seed)
        for name in (*TOKENS, "A_log", "dt_bias", "state", "state_indices", "cu_seqlens"):
            getattr(static, name).copy_(getattr(now, name))
        o.fill_(float("nan"))
        graph.replay()
        assert same_bits(prefill(now).o, o)
        assert same_bits(now.state, static.state)


@every_way
def test_two_streams_at_once(monkeypatch, way):
    split(monkeypatch, way)
    calls = [pooled([300, 70], slots=[0, 1], seed=seed) for seed in range(2)]
    expected = [(prefill(x := inputs.fresh()).o, x.state) for inputs in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(10):
        found = []
        for inputs, stream in zip(calls, streams, strict=True):
            with torch.cuda.stream(stream):
                fresh = inputs.fresh()
                found.append((prefill(fresh).o, fresh.state))
        torch.cuda.synchronize()
        for (o, state), (exact_o, exact_state) in zip(found, expected, strict=True):
            assert same_bits(o, exact_o) and same_bits(state, exact_state)


def test_it_comes_after_what_is_on_its_stream():
    inputs = plain([300])
    expected = prefill(inputs).o
    late = dataclasses.replace(inputs, q=torch.zeros_like(inputs.q))
    o = torch.empty_like(inputs.v)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()) as _:
        torch.cuda._sleep(500_000_000)
        late.q.copy_(inputs.q)
        prefill(late, o)
        assert not torch.cuda.current_stream().query(), "the host did not wait"
        torch.cuda.current_stream().synchronize()
    assert same_bits(o, expected)


def test_eight_threads():
    calls = [plain([70, 3], HV=HV, seed=HV) for HV in (1, 2) * 4]
    expected = [prefill(inputs).o for inputs in calls]
    results, failures = [None] * len(calls), []
    torch.cuda.synchronize()

    def work(i: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(3):
                    results[i] = prefill(calls[i]).o
                torch.cuda.current_stream().synchronize()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(same_bits(o, exact) for o, exact in zip(results, expected, strict=True))


# --- what engines ask for


def state_after(inputs: Inputs, n: int, tokens_of: int) -> torch.Tensor:
    """The oracle's state [HV, V, K] after so many tokens of a packed sequence."""
    first, end = inputs.cu_seqlens[n : n + 2].tolist()
    at = slice(first, min(end, first + tokens_of))
    part = {name: getattr(inputs, name)[:, at] for name in TOKENS}
    slot = n if inputs.state_indices is None else int(inputs.state_indices[n])
    state = inputs.state[slot][None]
    if inputs.has_initial_state is not None and not inputs.has_initial_state[n]:
        state = torch.zeros_like(state)
    one = dataclasses.replace(
        inputs, **part, state=state, state_indices=None, cu_seqlens=None, has_initial_state=None, checkpoints=None,
        null_slot=None, batch_invariant=False, output_final_state=True,
    )  # fmt: skip
    return recurrence(one).final_state[0]


def near(actual: torch.Tensor, exact: torch.Tensor) -> bool:
    return bool((actual.double() - exact).norm() <= 8e-3 * exact.norm())


ints = functools.partial(torch.tensor, dtype=torch.int32, device=DEVICE)


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_checkpoints(monkeypatch, way, dtype):
    """At given positions, in first segments, inside of units and at their ends; nothing else is written."""
    split(monkeypatch, way)
    inputs = pooled([5 * CHUNK + 3, 4 * CHUNK, 70, 8 * CHUNK, 100], slots=[4, 1, 6, 0, -1])
    rows = ints([[0, 1, 2], [3, 4, -1], [5, 6, 7], [8, 99, 9], [10, 10, 10]])
    offsets = ints([[64, 128, 65], [64, 128, 64], [0, -3, 192], [256, 64, 192], [64, 64, 64]])
    states = torch.full((12, 2, 128, 128 + 8), KEPT, dtype=dtype, device=DEVICE)[..., :128].contiguous()
    kept = Checkpoints(states, rows, offsets)
    expected = prefill(inputs.fresh())
    mine = dataclasses.replace(inputs.fresh(), checkpoints=kept)
    outputs = prefill(mine)
    assert same_bits(outputs.o, expected.o) and same_bits(mine.state, expected.final_state)
    for row, (n, at) in {0: (0, 64), 1: (0, 128), 3: (1, 64), 4: (1, 128), 8: (3, 256), 9: (3, 192)}.items():
        assert near(states[row], state_after(inputs, n, at)), row
    assert states[2].isnan().all(), "no chunk ends there"
    assert states[[5, 6, 7, 10, 11]].eq(KEPT).all(), "before the first token, past the end, padding, no row's"


@every_way
def test_checkpoints_at_regular_distances_into_the_pool(monkeypatch, way):
    split(monkeypatch, way)
    inputs = pooled([5 * CHUNK + 3, 130], slots=[4, 1], P=12)
    rows = ints([[7, 8, 9], [10, 11, -1]]).long()
    mine = inputs.fresh()
    mine.checkpoints = Checkpoints(mine.state, rows, every=64)
    expected = prefill(inputs.fresh())
    assert same_bits(prefill(mine).o, expected.o)
    for row, (n, at) in {7: (0, 64), 8: (0, 128), 10: (1, 64), 11: (1, 128)}.items():
        assert near(mine.state[row], state_after(inputs, n, at)), row
    assert mine.state[9].isnan().all(), "there are 163 tokens"


@every_way
def test_slots_that_are_padding_or_not_there(monkeypatch, way):
    """Any negative one and the null slot give zeros, one past the pool NaN; none of them is read or written."""
    split(monkeypatch, way)
    lens, slots = [170, 100, 3, 170, 170, 40], [0, -7, 0, 7, 2, 2**31 - 1]
    inputs = pooled(lens, slots=slots[:1] + [-1] * 3 + [2, -1])
    inputs.state[0] = float("nan")
    alone = prefill(dataclasses.replace(inputs.fresh(), state_indices=ints([-1, -1, -1, -1, 2, -1])))
    mine = dataclasses.replace(inputs.fresh(), state_indices=ints(slots), null_slot=0)
    before = mine.state.clone()
    o = prefill(mine).o[0]
    parts = o.split(lens)
    assert all(parts[n].eq(0).all() for n in (0, 1, 2))
    assert parts[3].isnan().all() and parts[5].isnan().all()
    assert same_bits(parts[4], alone.o[0].split(lens)[4])
    before[2] = mine.state[2]
    assert same_bits(mine.state, before) and mine.state[2].isfinite().all()


@every_way
def test_sequences_that_begin_with_nothing(monkeypatch, way):
    split(monkeypatch, way)
    inputs = pooled([170, 3, 100], slots=[4, 1, 6])
    inputs.state[[4, 6]] = float("nan")
    clean = inputs.fresh()
    clean.state[[4, 6]] = 0
    flags = torch.tensor([False, True, False], device=DEVICE)
    mine = dataclasses.replace(inputs, has_initial_state=flags)
    outputs, expected = prefill(mine), prefill(clean)
    assert same_bits(outputs.o, expected.o) and same_bits(mine.state[[4, 1, 6]], clean.state[[4, 1, 6]])


@every_way
def test_tokens_behind_the_last_sequence(monkeypatch, way):
    """Of a graph's bucket: zeros, whatever stands in them."""
    split(monkeypatch, way)
    inputs = pooled([170, 3], slots=[4, 1])
    expected = prefill(inputs.fresh()).o
    wide = {
        name: torch.cat([x := getattr(inputs, name), torch.full_like(x[:, :50], float("nan"))], 1) for name in TOKENS
    }
    o = torch.full_like(wide["v"], KEPT)
    prefill(dataclasses.replace(inputs, **wide), o)
    assert o[:, 173:].eq(0).all()
    if way is None:
        assert same_bits(o[:, :173], expected)


def test_state_indices_that_lie_apart_and_fp16_pools():
    inputs = pooled([70, 3], slots=[4, 1], state_dtype=torch.float16)
    check(inputs.fresh())
    expected = prefill(inputs.fresh()).o
    apart = ints([[4, 9], [1, 9], [9, 9]])[:, 0]
    assert same_bits(prefill(dataclasses.replace(inputs.fresh(), state_indices=apart)).o, expected)


def test_a_workspace_of_the_caller(monkeypatch):
    split(monkeypatch, WAYS["split"])
    inputs = pooled([170, 300], slots=[4, 1])
    expected = prefill(inputs.fresh())
    room = torch.full((module._split_bytes(WAYS["split"], 2, 8, 2) + 64,), 255, dtype=torch.uint8, device=DEVICE)
    prefill(dataclasses.replace(inputs.fresh(), workspace=room[3:]))  # warm
    torch.cuda.reset_peak_memory_stats()
    before, o = torch.cuda.memory_allocated(), torch.empty_like(inputs.v)
    mine = dataclasses.replace(inputs.fresh(), workspace=room[3:])
    after = torch.cuda.memory_allocated()
    module.launch(mine, o)
    assert torch.cuda.max_memory_allocated() <= max(before, after)
    assert same_bits(o, expected.o) and same_bits(mine.state, expected.final_state)
    small = dataclasses.replace(inputs.fresh(), workspace=room[:100])
    for verdict in judge(Reference(inputs.fresh(), Op.PREFILL), prefill(small)):
        assert verdict.passed, "whole sequences then"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_batch_invariance(dtype):
    """Neither the others, nor where a cached prefix was cut, at 64 tokens and with a state in fp32, nor checkpoints
    change a bit."""
    batch = dataclasses.replace(pooled([500, 64, 37], slots=[4, 1, 6], dtype=dtype), batch_invariant=True)
    whole = batch.fresh()
    expected = prefill(whole).o
    check(batch.fresh())
    alone = batch.fresh()
    parts = []
    for cut in (slice(0, 192), slice(192, 256), slice(256, 500)):
        tensors = {name: getattr(batch, name)[:, cut] for name in TOKENS}
        offsets = ints([0, cut.stop - cut.start])
        parts.append(prefill(dataclasses.replace(alone, **tensors, cu_seqlens=offsets, state_indices=ints([4]))).o)
    assert same_bits(torch.cat(parts, 1), expected[:, :500])
    assert same_bits(alone.state[4], whole.state[4])
    rows = ints([[0, 1, 2, 3, 4, 5, 6], [7] + [-1] * 6, [-1] * 7])
    kept = Checkpoints(torch.empty(8, 2, 128, 128, device=DEVICE), rows, every=64)
    keeping = dataclasses.replace(batch.fresh(), checkpoints=kept)
    assert same_bits(prefill(keeping).o, expected) and same_bits(keeping.state, whole.state)


@every_way
def test_long_keys_behind_closed_gates(monkeypatch, way):
    """Up to 1e11; longer ones are seen."""
    split(monkeypatch, way)
    inputs = plain([5 * CHUNK + 3])
    g = torch.full_like(inputs.g, 1e4)
    for size in (1e4, 1e9):
        long = dataclasses.replace(inputs, g=g, k=inputs.k * size, q=inputs.q * size)
        check(long)
    longer = dataclasses.replace(inputs, g=g, k=inputs.k * 1e13)
    assert prefill(longer).o.isnan().any()


@every_way
@pytest.mark.parametrize("A_log", [4.0, 5.3, 10.0, 88.0, 95.0, 1000.0, -100.0])
def test_any_rate(monkeypatch, way, A_log):
    """Also where raw + bias is 0 and the rate is no number of 32 bits."""
    split(monkeypatch, way)
    inputs = plain([3 * CHUNK + 3])
    inputs = dataclasses.replace(inputs, dt_bias=inputs.dt_bias.bfloat16().float())
    g = inputs.g.clone()
    g[:, ::2] = -inputs.dt_bias.view(1, 1, *inputs.g.shape[2:]).bfloat16()
    large = dataclasses.replace(inputs, g=g, A_log=torch.full_like(inputs.A_log, A_log))
    exact = dataclasses.replace(large, A_log=torch.full_like(inputs.A_log, min(A_log, 60.0)))
    outputs = prefill(large)
    for verdict in judge(Reference(exact, Op.PREFILL), outputs):
        assert verdict.passed, verdict


def test_other_head_counts_compile_nothing(monkeypatch):
    prefill(pooled([70, 3], slots=[4, 1], H=2, HV=2))

    def compiled(*_):
        raise AssertionError("compiled again")

    monkeypatch.setattr(prefill_functions, "build", compiled)
    for heads in (1, 3, 12):
        check(pooled([70, 3], slots=[4, 1], H=heads, HV=heads))
