"""The host half of the CuTe prefill, and its reasons why it cannot run, on a machine without a GPU.

Functions that the compiler would make are stand-ins here (`fake_prefill`); `test_cute_prefill` has the real ones.
"""

import dataclasses
import importlib.metadata
import importlib.util
import inspect

import fake_prefill
import pytest
import torch
from decode_inputs import close
from prefill_inputs import GIVEN, SAFE, SOFTPLUS, SPLITS, WAYS, new_memory_holds_nan, plain, pooled, split, tokens

from kda_kernels import registry
from kda_kernels.api import chunk_kda_fwd
from kda_kernels.cute import runtime
from kda_kernels.cute.prefill import host as module
from kda_kernels.cute.prefill.config import Part
from kda_kernels.cute.prefill.host import prefill
from kda_kernels.errors import InputError, UnavailableError
from kda_kernels.problem import Gate, Op, Options, Problem
from kda_kernels.reference.oracle import recurrence
from kda_kernels.tensors import Checkpoints, Inputs, Outputs
from kda_kernels.triton.prefill import prefill as triton_prefill

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="stand-ins are for machines without a GPU")
PROBLEM = Problem(Op.PREFILL, (70, 0), H=2, HV=4, pool_slots=4, options=SAFE)


@pytest.fixture
def made(monkeypatch):
    """What was compiled, in order."""
    return fake_prefill.install(monkeypatch)


def on_gpu(inputs: Inputs) -> Inputs:
    return dataclasses.replace(inputs, q=inputs.q.as_subclass(fake_prefill.OnGpu))


def check(inputs: Inputs, out: torch.Tensor | None = None) -> Outputs:
    expected = recurrence(inputs)
    outputs = prefill(on_gpu(inputs), out)
    close(outputs.o, expected.o)
    assert (outputs.final_state is None) == (expected.final_state is None)
    if expected.final_state is not None:
        close(outputs.final_state, expected.final_state)
    return outputs


# --- what a call hands to its function


@pytest.mark.skipif(runtime.missing_packages() is not None, reason=str(runtime.missing_packages()))
def test_the_stand_in_takes_what_the_kernel_takes():
    from kda_kernels.cute.prefill.kernel import PrefillKernel

    real = list(inspect.signature(PrefillKernel.__call__).parameters)
    assert list(inspect.signature(fake_prefill.FakeFunction.__call__).parameters) == real[:-1]
    assert real[-1] == "stream"


CALLS = {
    "packed": lambda: pooled(),
    "packed int64": lambda: dataclasses.replace((x := pooled(index_dtype=torch.int64)), cu_seqlens=x.cu_seqlens.long()),
    "dense": lambda: plain(N=2, T=5),
    "dense pool": lambda: pooled(N=3, T=2),
    "one token": lambda: plain(lens=[1, 1]),
    "padding": lambda: pooled(slots=(4, -1, 0)),
    "bound -2": lambda: pooled(options=dataclasses.replace(SAFE, lower_bound=-2.0, scale=0.5)),
    "2 sigmoid": lambda: pooled(options=dataclasses.replace(SAFE, allow_neg_eigval=True)),
    "given": lambda: pooled(options=GIVEN),
    "given, closer bound": lambda: pooled(options=dataclasses.replace(GIVEN, lower_bound=-3.0)),
    "softplus": lambda: pooled(options=SOFTPLUS),
    "softplus, 2 sigmoid": lambda: pooled(options=dataclasses.replace(SOFTPLUS, allow_neg_eigval=True)),
    "given, no bound": lambda: pooled(options=dataclasses.replace(GIVEN, lower_bound=None)),
    "fp32 g and beta": lambda: dataclasses.replace((x := pooled()), g=x.g.float(), beta=x.beta.float()),
    "bf16 state": lambda: pooled(state_dtype=torch.bfloat16),
    "bf16 parameters": lambda: dataclasses.replace((x := pooled()), A_log=x.A_log.bfloat16(), dt_bias=x.dt_bias.half()
                                                   .bfloat16()),
    "flat dt_bias": lambda: dataclasses.replace((x := pooled()), dt_bias=x.dt_bias.flatten()),
    "no parameters": lambda: dataclasses.replace(pooled(), A_log=None, dt_bias=None),
    "A_log as FLA's layers have it": lambda: dataclasses.replace((x := pooled()), A_log=x.A_log.view(1, 1, -1, 1)),
    "slots apart": lambda: pooled(gap=64),
    "no state": lambda: tokens(),
    "no state, not wanted": lambda: tokens(output_final_state=False),
    "no final state": lambda: plain(output_final_state=False),
    "K-first, but no state": lambda: tokens(v_first=False, output_final_state=False),
    "K-first": lambda: plain(v_first=False),
    "fp16, K-first": lambda: plain(v_first=False, dtype=torch.float16),
    "K-first, no state comes in": lambda: tokens(v_first=False),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_calls(made, call):
    for _ in range(2):
        check(call())
    assert len(made) == 1 and made[0].calls == 2


@torch.no_grad()
def test_chunk_kda_fwd_goes_the_short_way_again(made, monkeypatch):
    """With and without room for what it returns; wrong room is refused as in a first call."""

    def call(inputs, **given):
        x = on_gpu(inputs)
        return chunk_kda_fwd(
            x.q, x.k, x.v, x.g, x.beta, initial_state=x.state, A_log=x.A_log, dt_bias=x.dt_bias, lower_bound=-5.0,
            use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True, cu_seqlens=x.cu_seqlens, **given,
        )  # fmt: skip

    monkeypatch.setattr(registry, "kernel_for", lambda *_: registry.get("cute-prefill"))
    first, second = plain(lens=[3, 2]), plain(lens=[1, 4, 2])
    call(first)
    with monkeypatch.context() as patch:
        patch.setattr("kda_kernels.run.check", None)  # what a call does that goes the long way
        found = [(final, *call(second, final_state=final)) for final in (None, torch.empty_like(second.state))]
    for final, o, left in found:
        close(o, recurrence(second).o)
        close(left, recurrence(second).final_state)
        assert final is None or left is final
    for wrong in (second.state.mT, second.state[:1].expand(3, -1, -1, -1)):
        with pytest.raises(InputError, match="final_state has shape .*, contiguous"):
            call(second, final_state=wrong)


def test_a_function_for_gates_without_a_bound(made):
    """What has one of -5 or more is prepared in another way than what has not."""
    for options in (
        SAFE,
        dataclasses.replace(SAFE, lower_bound=-5.5),
        GIVEN,
        dataclasses.replace(GIVEN, lower_bound=None),
    ):
        check(pooled(options=options))
    assert [function.spec.bounded for function in made] == [True, False, True, False]


def test_a_given_buffer(made):
    inputs = plain()
    wide = torch.full((1, 43, 2, 160), 7.0, dtype=torch.bfloat16)
    out = wide[..., 16:144]
    assert check(inputs, out).o is out
    assert wide[..., :16].eq(7).all() and wide[..., 144:].eq(7).all()


def test_a_batch_of_nothing_launches_nothing(made):
    for lens in ([0, 0, 0], []):
        assert prefill(on_gpu(tokens(lens))).final_state.eq(0).all()
        inputs = plain(lens)
        final = prefill(on_gpu(inputs)).final_state
        assert final.equal(inputs.state) and final is not inputs.state
    pool = pooled([0, 0, 0])
    before = pool.state.clone()
    assert prefill(on_gpu(pool)).final_state is pool.state
    torch.testing.assert_close(pool.state, before, rtol=0, atol=0, equal_nan=True)
    assert not made


# --- sequences that are split

LENS = [161, 0, 33, 100]  # with `SPLITS`: 2, 0, 0, 1 units; 3, -, 0, 1; and in rounds 1, -, 0, 1, then 1, -, -, 0
SPLIT = {
    "pool": lambda: pooled(LENS, slots=(4, 1, 6, 2)),
    "pool, int64": lambda: dataclasses.replace(
        (x := pooled(LENS, slots=(4, 1, 6, 2), index_dtype=torch.int64)), cu_seqlens=x.cu_seqlens.long()
    ),
    "padding": lambda: pooled([100, 161, 0, 97], slots=(4, -1, -1, 0)),
    "bf16 pool, gaps": lambda: pooled(LENS, slots=(4, 1, 6, 2), state_dtype=torch.bfloat16, gap=64),
    "plain": lambda: plain(LENS),
    "bf16 state": lambda: plain(LENS, state_dtype=torch.bfloat16),
    "no final state": lambda: plain(LENS, output_final_state=False),
    "dense": lambda: plain(N=2, T=161),
    "dense pool": lambda: pooled(N=3, T=133),
    "dense, padding": lambda: pooled(N=3, T=100, slots=(4, -1, 0)),
    "given": lambda: pooled(LENS, slots=(4, 1, 6, 2), options=GIVEN),
    "fp16": lambda: pooled(LENS, slots=(4, 1, 6, 2), dtype=torch.float16),
    "no state": lambda: tokens(LENS),
    "no state, not wanted": lambda: tokens(LENS, output_final_state=False),
    "heads": lambda: plain([97, 65], H=2, HV=4),
}


@pytest.mark.parametrize("way", SPLITS.values(), ids=list(SPLITS))
@pytest.mark.parametrize("call", SPLIT.values(), ids=list(SPLIT))
def test_splits(made, monkeypatch, call, way):
    """Segments, put together by the scan and the sum of outputs, are the recurrence."""
    split(monkeypatch, way)
    inputs = call()
    expected = recurrence(inputs)
    with new_memory_holds_nan():
        outputs = prefill(on_gpu(inputs))
    in_bf16 = inputs.q.dtype is torch.bfloat16
    assert [function.spec.part for function in made] == ([Part.SPLIT, Part.JOIN] if in_bf16 else [Part.CUT])
    longest = max(x.end - x.first for x in fake_prefill.sequences(inputs))
    packed, N, T = inputs.cu_seqlens is not None, len(fake_prefill.sequences(inputs)), inputs.q[..., 0, 0].numel()
    assert made[0].calls == -(-(T if packed else longest) // way.limit)
    assert made[0].workspace == module.workspace_bytes(N, T, inputs.v.shape[2], packed)
    assert (outputs.final_state is None) == (expected.final_state is None)
    for actual, exact in ((outputs.o, expected.o), (outputs.final_state, expected.final_state)):
        if actual is not None:
            # of the state 16 bits take part in products; o is rounded twice, and what it reads of the state before
            rtol, atol = {FP32: (2e-5, 2e-4), FP16: (2**-10, 2**-11)}.get(actual.dtype, (2**-7, 2**-8))
            atol *= float(exact.nan_to_num().abs().max())
            torch.testing.assert_close(actual.double(), exact, rtol=rtol, atol=atol, equal_nan=True)


def test_calls_in_turns_of_dtypes_launch_nothing_twice(made, monkeypatch):
    """A call that the last functions do not take in full is refused before the first of them writes to the pool."""
    split(monkeypatch, SPLITS["split"])
    calls = [pooled(LENS, slots=(4, 1, 6, 2), dtype=dtype) for dtype in (torch.bfloat16, torch.float16)]
    for inputs in (*calls, calls[1], calls[0], calls[1]):
        before = [function.calls for function in made if function.spec.part.splits]
        expected = recurrence(inputs).final_state
        actual = prefill(on_gpu(inputs.fresh())).final_state
        torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-3, equal_nan=True)
        assert sum(f.calls for f in made if f.spec.part.splits) == sum(before) + 1


def test_a_given_buffer_of_a_split(made, monkeypatch):
    split(monkeypatch, SPLITS["rounds"])
    inputs = plain(LENS)
    wide = torch.full((1, sum(LENS), 2, 160), 7.0, dtype=torch.bfloat16)
    out = wide[..., 16:144]
    assert prefill(on_gpu(inputs), out).o is out
    assert out.equal(prefill(on_gpu(inputs)).o)
    assert wide[..., :16].eq(7).all() and wide[..., 144:].eq(7).all()


def test_an_empty_sequence_of_a_split_hands_its_state_on(made, monkeypatch):
    """And a slot of a pool stays as it is, NaN for one."""
    split(monkeypatch, SPLITS["rounds"])
    inputs = plain(LENS)
    assert prefill(on_gpu(inputs)).final_state[1].equal(inputs.state[1])
    pool = pooled(LENS, slots=(4, 1, 6, 2))
    pool.state[1] = float("nan")
    assert prefill(on_gpu(pool)).final_state[1].isnan().all()
    assert [function.calls for function in made] == [4, 4, 4, 4]


def test_what_is_split(made):
    """Few heads of a long sequence; and nothing that fills the GPU."""
    sizes = {(1, 8192, 12), (1, 32768, 16), (64, 65536, 12), (4, 300, 1)}
    assert {size for size in sizes if module.workspace_bytes(*size) > module.COUNTER_BYTES} == {
        (1, 8192, 12),
        (1, 32768, 16),
    }


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
@pytest.mark.parametrize("N", [1, 8])
def test_a_million_tokens_fit(made, N, packed):
    for T in (1_000_000, 1 << 20):
        assert module.workspace_bytes(N, T, 12, packed) < 2e9
    assert module.workspace_bytes(1, 1 << 20, 12, packed) > 1e8, "it is split"


# --- what sequences make of any state


@pytest.mark.parametrize(
    "call",
    [lambda: tokens([70, 0, 33]), lambda: tokens(N=2, T=40, H=2, HV=4), lambda: tokens([20, 3], options=GIVEN)],
    ids=["packed", "dense", "given"],
)
def test_summaries(made, call):
    inputs = call()
    with new_memory_holds_nan():
        end, transition = module.summaries(on_gpu(inputs))
    close(end, recurrence(inputs).final_state)
    identity = torch.eye(128).expand_as(transition).contiguous()
    expected = recurrence(dataclasses.replace(inputs, v=torch.zeros_like(inputs.v), state=identity)).final_state
    close(transition, expected)
    assert [function.spec.part for function in made] == [Part.SUMMARY]


def test_summaries_of_nothing(made):
    end, transition = module.summaries(on_gpu(tokens([0, 0])))
    assert end.eq(0).all() and transition.equal(torch.eye(128).expand_as(transition))
    assert end.shape == transition.shape == (2, 2, 128, 128) and not made


# --- states on the way

ON_THE_WAY = {
    "packed": lambda: plain([66, 0, 64, 3]),
    "dense": lambda: plain(N=2, T=66, HV=1),
    "pool": lambda: pooled([65, 0, 2], HV=1),
    "no state": lambda: tokens([65, 1], output_final_state=False),
    "K-first": lambda: plain([65, 1], v_first=False),
}


@pytest.mark.parametrize("call", ON_THE_WAY.values(), ids=list(ON_THE_WAY))
def test_states_at_the_start_of_every_64_tokens(made, call):
    """As triton-prefill gives them; and sequences are not split, however few there are."""
    inputs = call()
    outputs, h = prefill(on_gpu(inputs.fresh()), return_intermediate_states=True)
    assert [function.spec.every for function in made] == [True]
    expected, expected_h = triton_prefill(inputs.fresh(), return_intermediate_states=True)
    assert h.shape == expected_h.shape and h.dtype is inputs.k.dtype
    torch.testing.assert_close(h.float(), expected_h.float(), rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(outputs.o.float(), expected.o.float(), rtol=2e-2, atol=2e-3)
    close(prefill(on_gpu(inputs.fresh())).o, recurrence(inputs).o)
    assert [function.spec.every for function in made] == [True, False], "a function of its own"


# --- what is compiled, and what is not compiled again


def test_what_changes_from_batch_to_batch_compiles_nothing_new(made):
    """Lengths, pool, strides, scale and bound."""
    check(pooled())
    check(pooled([7], slots=(0,), P=3))
    check(pooled([1, 2, 3, 4], slots=(0, 1, 2, 3), P=40, gap=64))
    check(pooled(options=dataclasses.replace(SAFE, lower_bound=-2.0, scale=0.7)))
    inputs = pooled()
    check(dataclasses.replace(inputs, g=inputs.g.transpose(1, 2).contiguous().transpose(1, 2)))
    assert len(made) == 1


def test_what_it_is_compiled_for(made):
    """Calls that need functions of their own, twice each, in turn."""
    alike = ("padding", "bound -2", "given, closer bound", "flat dt_bias", "A_log as FLA's layers have it",
             "slots apart", "K-first, but no state", "K-first, no state comes in", "one token")  # fmt: skip
    calls = [call for name, call in CALLS.items() if name not in alike]
    for _ in range(2):
        for call in calls:
            check(call())
    check(pooled(HV=3))
    assert len(made) == len({function.spec for function in made}) == len(calls) + 1


# --- what it does not take

FP16, FP32 = torch.float16, torch.float32


def cast(inputs: Inputs, dtype: torch.dtype, *names: str) -> Inputs:
    return dataclasses.replace(inputs, **{name: getattr(inputs, name).to(dtype) for name in names})


REFUSED = {
    "q, k and v are fp32: it takes bf16 or fp16": lambda: cast(pooled(), FP32, "q", "k", "v"),
    "A_log and dt_bias are fp16: it takes fp32 or bf16": lambda: cast(pooled(), FP16, "dt_bias"),
    "it takes V-first pools and checkpoints only": lambda: pooled(v_first=False),
    "a slot of the state is not 16-byte aligned": lambda: pooled(gap=2),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(made, reason):
    inputs = REFUSED[reason]()
    assert module.unsupported_tensors(inputs) == reason
    with pytest.raises(InputError, match=f"^cute-prefill: {reason}$"):
        prefill(on_gpu(inputs))
    assert not made


def shifted(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(x.numel() + 8, dtype=x.dtype)[1 : x.numel() + 1].view(x.shape).copy_(x)


def padded(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(*x.shape[:-1], x.shape[-1] + 2, dtype=x.dtype)[..., : x.shape[-1]].copy_(x)


LAYOUTS = {"shifted": shifted, "padded": padded, "broadcast": lambda x: x[:, :, :1].expand_as(x)}


@pytest.mark.parametrize("change", LAYOUTS)
@pytest.mark.parametrize("name", ["q", "k", "v", "g", "out"])
def test_layouts_that_tma_cannot_move(made, name, change):
    inputs = pooled(H=2)
    good = torch.zeros_like(inputs.v) if name == "out" else getattr(inputs, name)
    bad = LAYOUTS[change](good)
    given = {"out": bad} if name == "out" else {}
    if name != "out":
        inputs = dataclasses.replace(inputs, **{name: bad})
    reason = module.unsupported_tensors(inputs, **given)
    assert reason.startswith(f"{name} has strides ") and reason.endswith(
        "multiples of 16 bytes, as the beginning, and none 0"
    )
    with pytest.raises(InputError, match=f"^cute-prefill: {name} has strides"):
        prefill(on_gpu(inputs), **given)
    assert not made


def test_what_may_lie_anywhere(made):
    """beta and the parameters are not moved by TMA."""
    inputs = pooled()
    names = ("beta", "A_log", "dt_bias")
    check(dataclasses.replace(inputs, **{name: shifted(getattr(inputs, name)) for name in names}))
    check(dataclasses.replace(inputs, beta=padded(inputs.beta)))


def test_wrong_buffers(made):
    inputs = on_gpu(plain())
    for out in (torch.empty_like(inputs.v, dtype=torch.float32), torch.empty_like(inputs.v)[:, :, :1]):
        with pytest.raises(InputError, match="^cute-prefill: Mismatched"):
            prefill(inputs, out)
    with pytest.raises(InputError, match="^cute-prefill: not one for each sequence"):
        module.launch(inputs, torch.empty_like(inputs.v), inputs.state[:1].clone())


def test_run_checks_its_inputs(made):
    inputs = on_gpu(pooled())
    with pytest.raises(InputError, match="^beta has shape"):
        module.run(dataclasses.replace(inputs, beta=inputs.beta[..., :1]))
    expected = recurrence(inputs)
    close(module.run(inputs).o, expected.o)


# --- why it cannot run


@pytest.fixture
def h100(monkeypatch):
    """What torch and the installed packages would say on a machine that has everything."""
    runtime.missing_packages.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.8.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    yield
    runtime.missing_packages.cache_clear()


@pytest.mark.parametrize(
    "change",
    [{}, {"pool_slots": None}, {"packed": False, "seq_lens": (9, 9)}, {"state_dtype": "bfloat16", "padding": 1},
     {"g_dtype": "float32", "beta_dtype": "float32", "param_dtype": "bfloat16"}, {"options": GIVEN},
     {"options": Options()}, {"options": Options(Gate.SAFE, -8.0)}, {"options": Options(Gate.NONE)},
     {"dtype": "float16", "g_dtype": "float16", "beta_dtype": "float16"}],
)  # fmt: skip
def test_a_machine_that_has_everything(h100, change):
    problem = dataclasses.replace(PROBLEM, **change)
    assert module.unsupported() is None
    assert module.unsupported(problem) is None
    assert registry.choose(problem).name == "cute-prefill"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"K": 64, "V": 64}, "K is 64: it takes 128"),
        ({"V": 64}, "V is 64: it takes V = K only"),
        ({"dtype": "float32"}, "q, k and v are fp32: it takes bf16 or fp16"),
        ({"state_v_first": False}, "it takes V-first pools and checkpoints only"),
    ],
)
def test_problems_that_are_left_to_triton(h100, monkeypatch, change, reason):
    problem = dataclasses.replace(PROBLEM, **change)
    assert module.unsupported(problem) == reason
    monkeypatch.setattr("kda_kernels.triton.prefill.unsupported_here", lambda: None)
    assert registry.choose(problem).name == "triton-prefill"


@pytest.mark.parametrize("capability", [(10, 0), (10, 3), (12, 0)])
def test_newer_gpus(h100, monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    name = "sm_{}{}".format(*capability)
    assert module.unsupported(PROBLEM) == f"the GPU is {name}: this kernel is for sm_90a only"


def test_an_older_gpu(h100, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert module.unsupported() == "the GPU is sm_80: CuTe DSL kernels need sm_90a or newer"


def test_nothing_runs_where_there_is_no_gpu():
    with pytest.raises(UnavailableError, match="^cute-prefill: (no CUDA GPU|.* is not installed|.* is needed)"):
        prefill(pooled())
    assert module.unsupported(PROBLEM) is not None


def test_tensors_on_the_cpu_of_a_machine_that_could(made):
    with pytest.raises(UnavailableError, match="^cute-prefill: the tensors lie on the CPU$"):
        prefill(pooled())


# --- checkpoints, and what else engines ask for

KEPT = 7.0


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
@pytest.mark.parametrize("every", [None, 64])
def test_checkpoints(made, monkeypatch, way, every):
    """In first segments, in units and at their ends; where sequences are split, by one more launch a round."""
    split(monkeypatch, way)
    inputs = pooled([161, 64, 70], slots=[4, 1, -1])
    states = torch.full((8, 2, 128, 128), KEPT)
    rows = torch.tensor([[0, 1, 2], [3, -1, 99], [5, 6, 7]], dtype=torch.int32)
    offsets = None if every else torch.tensor([[64, 128, 65], [64, 64, 64], [64, 64, 64]], dtype=torch.int32)
    expected = recurrence(inputs)
    mine = dataclasses.replace(on_gpu(inputs), checkpoints=Checkpoints(states, rows, offsets, every))
    for _ in range(2):  # the second takes the short way
        outputs = prefill(dataclasses.replace(mine, state=inputs.state.clone()))
    torch.testing.assert_close(outputs.o.double(), expected.o, rtol=2**-7, atol=2e-2)
    for row, (n, at) in {0: (0, 64), 1: (0, 128), 3: (1, 64)}.items():
        first = int(inputs.cu_seqlens[n])
        tokens = {name: getattr(inputs, name)[:, first : first + at] for name in ("q", "k", "v", "g", "beta")}
        state = inputs.state[[4, 1][n]][None]
        exact = recurrence(dataclasses.replace(inputs, **tokens, state=state, state_indices=None, cu_seqlens=None))
        torch.testing.assert_close(states[row].double(), exact.final_state[0], rtol=1e-3, atol=1e-3)
    assert states[5:].eq(KEPT).all() and states[4].eq(KEPT).all()
    assert states[2].eq(KEPT).all() if every else states[2].isnan().all()
    parts = {function.spec.part for function in made}
    assert parts == ({Part.WHOLE} if way is None else {Part.SPLIT, Part.JOIN, Part.KEPT})


def test_calls_of_other_lengths_take_the_short_way(made, monkeypatch):
    """Whole and split ones, each from its second on; wrong ones never. What they compute is not looked at."""
    monkeypatch.setattr(fake_prefill, "_run", lambda *given: None)
    for T, short in ((40, False), (70, True), (4000, False), (5000, True), (33, True), (4500, True)):
        inputs = pooled([T], slots=[1])
        assert module.again(on_gpu(inputs.fresh()).fields(), torch.empty_like(inputs.v)) == short, T
        if not short:
            prefill(on_gpu(inputs))
    wrong = [
        {"dt_bias": inputs.dt_bias[:1]}, {"q": inputs.q[:, :, :1].expand(-1, -1, 2, -1)}, {"state_v_first": False},
        {"state_indices": inputs.state_indices[:0]}, {"beta": inputs.beta.float()},
        {"workspace": torch.empty(10**8)}, {"checkpoints": Checkpoints(inputs.state, inputs.state_indices, every=32)},
    ]  # fmt: skip
    for change in wrong:
        bad = dataclasses.replace(inputs, **change)
        assert not module.again(on_gpu(bad).fields(), torch.empty_like(inputs.v)), change


def test_a_workspace_of_the_caller(made, monkeypatch):
    """Taken where it is large enough; else sequences stay whole. Its size is that of the largest call."""
    split(monkeypatch, SPLITS["split"])
    inputs = on_gpu(pooled(LENS, slots=(4, 1, 6, 2)))
    for size, part in ((50_000_000, Part.JOIN), (1000, Part.WHOLE)):
        prefill(dataclasses.replace(inputs, workspace=torch.empty(size, dtype=torch.uint8)))
        assert made[-1].spec.part is part
    monkeypatch.undo()
    most = module.most_workspace_bytes(8192, 12, 8, torch.device("cuda"))
    for N in range(1, 9):
        assert all(module.workspace_bytes(N, T, 12) < most for T in range(100, 8193, 331))


def test_ctas_stay_where_there_are_more_items_than_multiprocessors(made, monkeypatch):
    """A counter is in the workspace; where the caller's has no room for it, each item has a CTA."""
    inputs = on_gpu(pooled(LENS, slots=(4, 1, 6, 2)))
    few = len(LENS) * inputs.v.shape[2] - 1
    monkeypatch.setattr(module, "multiprocessors", lambda device: few)
    for size, stays in (
        (module.workspace_bytes(len(LENS), sum(LENS), inputs.v.shape[2], sms=few) + 16, True),
        (8, False),
    ):
        prefill(dataclasses.replace(inputs, workspace=torch.empty(size, dtype=torch.uint8)))
        assert made[-1].spec.stays is stays
    assert module.workspace_bytes(len(LENS), sum(LENS), inputs.v.shape[2], sms=few + 1) == 0


def test_batch_invariant_calls_stay_whole(made):
    inputs = pooled([2000], slots=[1])
    prefill(on_gpu(dataclasses.replace(inputs, batch_invariant=True)))
    assert [function.spec.part for function in made] == [Part.WHOLE] and made[0].spec.invariant


def test_tokens_and_no_sequence(made):
    none = pooled([3], slots=[1])
    inputs = on_gpu(dataclasses.replace(none, cu_seqlens=none.cu_seqlens[:1], state_indices=none.state_indices[:0]))
    wide = {
        name: torch.ones(1, 5, *getattr(inputs, name).shape[2:], dtype=torch.bfloat16)
        for name in ("q", "k", "v", "g", "beta")
    }
    out = torch.ones(1, 5, 2, 128, dtype=torch.bfloat16)
    prefill(on_gpu(dataclasses.replace(inputs, **wide)), out)
    assert out.eq(0).all() and not made
