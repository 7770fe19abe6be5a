"""The host half of the CuTe decode kernel, and its reasons why it cannot run, on a machine without a GPU.

Functions that the compiler would make are stand-ins here (`fake_gpu`); `test_cute_decode` has the real ones.
"""

import dataclasses
import importlib.metadata
import importlib.util
import inspect
import threading

import cute_cases
import fake_gpu
import pytest
import torch
import wrong_tensors
from decode_inputs import GIVEN, SAFE, close, make, with_pool, with_state

from kda_kernels import registry
from kda_kernels.cute import runtime
from kda_kernels.cute.decode import host as module
from kda_kernels.cute.decode.config import DecodeConfig
from kda_kernels.cute.decode.host import decode
from kda_kernels.errors import InputError, UnavailableError
from kda_kernels.problem import Op, Problem
from kda_kernels.reference.oracle import recurrence
from kda_kernels.tensors import Inputs, Outputs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="stand-ins are for machines without a GPU")
PROBLEM = Problem(Op.DECODE, (1, 1), H=2, HV=2, packed=False, pool_slots=4)


@pytest.fixture
def made(monkeypatch):
    """What was compiled, in order."""
    return fake_gpu.install(monkeypatch)


def pooled(N=3, slots=(4, 1, 6), **given) -> Inputs:
    """K = V = 32, and different head counts, so that nothing fits by luck."""
    shape = {"H": 2, "HV": 4, "K": 32, "V": 32}
    pool = {name: given.pop(name) for name in ("P", "gap", "index_dtype") if name in given}
    state_dtype = given.pop("state_dtype", torch.float32)
    return with_pool(make(N=N, **(shape | given)), list(slots), dtype=state_dtype, **pool)


def check(inputs: Inputs, **given) -> Outputs:
    expected = recurrence(inputs)
    outputs = decode(inputs, **given)
    close(outputs.o, expected.o)
    assert (outputs.final_state is None) == (expected.final_state is None)
    if expected.final_state is not None:
        close(outputs.final_state, expected.final_state)
    return outputs


# --- what a call hands to its function


@pytest.mark.skipif(runtime.missing_packages() is not None, reason=str(runtime.missing_packages()))
def test_the_stand_in_takes_what_the_kernel_takes():
    from kda_kernels.cute.decode.kernel import DecodeKernel

    real = list(inspect.signature(DecodeKernel.__call__).parameters)
    assert real[-3:] == ["lower_bound", "eps", "stream"]
    fake = list(inspect.signature(fake_gpu.FakeFunction.__call__).parameters)
    assert len(fake) == len(real) - 1
    alias = {"indices": "state_indices", "offsets": "cu_seqlens", "bound": "lower_bound"}
    assert [alias.get(name, name) for name in fake] == real[:-1]


CALLS = {
    "one token": lambda: pooled(),
    "three tokens": lambda: pooled(T=3),
    "packed": lambda: pooled(lens=[2, 0, 3]),
    "packed int64": lambda: dataclasses.replace(
        (x := pooled(lens=[1, 2, 1], index_dtype=torch.int64)), cu_seqlens=x.cu_seqlens.long()
    ),
    "padding": lambda: pooled(slots=(4, -1, 0)),
    "safe": lambda: pooled(options=SAFE),
    "safe, bound -2": lambda: pooled(options=dataclasses.replace(SAFE, lower_bound=-2.0, scale=0.5)),
    "given": lambda: pooled(options=GIVEN),
    "bf16 state": lambda: pooled(state_dtype=torch.bfloat16),
    "flat dt_bias": lambda: dataclasses.replace((x := pooled()), dt_bias=x.dt_bias.flatten()),
    "no dt_bias": lambda: dataclasses.replace(pooled(), dt_bias=None),
    "A_log as FLA's layers have it": lambda: dataclasses.replace((x := pooled()), A_log=x.A_log.view(1, 1, -1, 1)),
    "plain": lambda: with_state(make(H=2, HV=4, K=32, V=32)),
    "no state": lambda: make(H=2, HV=4, K=32, V=32, T=2),
    "no final state": lambda: with_state(make(H=2, HV=4, K=32, V=32, output_final_state=False)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_calls(made, call):
    for _ in range(2):  # the second takes the function of the first
        check(call())
    assert len(made) == 1 and made[0].calls == 2


def test_a_given_buffer_and_final_state(made):
    inputs = with_state(make(H=2, HV=4, K=32, V=32))
    expected = recurrence(inputs)
    out = torch.empty_like(inputs.v)
    outputs = decode(inputs, out, final_state=inputs.state)
    assert outputs.o is out and outputs.final_state is inputs.state
    close(out, expected.o)
    close(inputs.state, expected.final_state)


@pytest.mark.parametrize("lens", [None, [0, 0, 0]])
def test_a_batch_of_nothing_launches_nothing(made, lens):
    inputs = make(N=3, T=0, H=2, HV=4, K=32, V=32, lens=lens)
    assert decode(inputs).final_state.abs().max() == 0
    with_one = with_state(inputs)
    final = decode(with_one).final_state
    assert final.equal(with_one.state) and final is not with_one.state
    pool = with_pool(inputs, [4, 1, 6])
    before = pool.state.clone()
    assert decode(pool).o.shape == inputs.v.shape
    torch.testing.assert_close(pool.state, before, rtol=0, atol=0, equal_nan=True)
    assert decode(make(N=0, H=2, HV=4, K=32, V=32)).final_state.shape == (0, 4, 32, 32)
    assert not made


# --- what is compiled, and what is not compiled again


def test_batch_heads_pool_and_strides_compile_nothing_new(made):
    check(pooled())
    check(pooled(N=1, slots=(2,), P=3))
    check(pooled(N=5, slots=(0, 1, 2, 3, 4), P=40, gap=64))
    inputs = pooled()
    wide = torch.full((3, 1, 11), float("nan"), dtype=torch.bfloat16)
    beta = wide[..., 3:7].copy_(inputs.beta)
    heads_first = inputs.g.transpose(1, 2).contiguous().transpose(1, 2)
    check(dataclasses.replace(inputs, beta=beta, g=heads_first, q=inputs.q.repeat(1, 2, 1, 1)[:, :1]))
    check(pooled(H=3, HV=6))
    assert len(made) == 1


def test_calls_of_other_batches_take_the_short_way(made):
    """An engine's steps, each with another number of sequences, up to another schedule and back."""
    for N in (1, 3, 2, 700, 701, 5):
        inputs = pooled(N=N, slots=range(N), P=N)
        o = torch.empty_like(inputs.v)
        short = module.again(inputs.fresh().fields(), o)
        decode(inputs.fresh(), o)
        assert short == (N not in (1, 700)), N
    assert len(made) == len({function.spec for function in made}) == 2


def test_a_column_of_a_table_is_one_kind_for_any_batch(made):
    """Of one sequence, it would count as contiguous."""
    for N in (1, 3):
        inputs = pooled(N=N, slots=range(N), P=N)
        check(dataclasses.replace(inputs, state_indices=inputs.state_indices[:, None].repeat(1, 2)[:, 0]))
    assert len(made) == 1


def test_heads_that_do_not_fit_are_refused(made):
    """Which the function cannot see, as head counts are no part of what it is compiled for."""
    inputs = pooled()
    decode(inputs.fresh())
    for wrong in (inputs.dt_bias[:2], inputs.dt_bias.flatten()[:-1].contiguous()):
        with pytest.raises(InputError, match="^dt_bias has shape"):
            decode(dataclasses.replace(inputs, dt_bias=wrong))
    with pytest.raises(InputError, match=r"^v has \d heads|^q has"):
        decode(dataclasses.replace(inputs, q=inputs.q[:, :, [0, 0, 1]], k=inputs.k[:, :, [0, 0, 1]]))


def test_lengths_of_several_tokens_compile_nothing_new(made):
    for T in (2, 3, 8):
        check(pooled(T=T))
    assert len(made) == 1
    for lens in ([1, 1, 1], [2, 0, 3], [1]):
        check(pooled(lens=lens, slots=(4, 1, 6)[: len(lens)]))
    assert len(made) == 2


def test_calls_that_alternate_each_get_their_own_function(made):
    """The second round goes through everything that was compiled in the first, each call after one unlike it."""
    for _ in range(2):
        for inputs in cute_cases.unlike(pooled()).values():
            check(inputs.fresh())
            check(inputs.fresh())
    assert len(made) == len({function.spec for function in made}) == len(cute_cases.unlike(pooled()))
    assert {function.calls for function in made} == {4}


def test_scale_and_lower_bound_are_those_of_the_call(made):
    """Values that are no part of what is compiled."""
    for _ in range(2):
        for bound, scale in ((-5.0, None), (-2.0, None), (-2.0, 0.7)):
            check(pooled(options=dataclasses.replace(SAFE, lower_bound=bound, scale=scale)))


def test_a_config_for_one_call_is_not_taken_for_the_next(made):
    check(pooled())
    check(pooled(), config=DecodeConfig(rows=32))
    check(pooled())
    assert [function.calls for function in made] == [2, 1]


def test_sixteen_threads_compile_one_function(made):
    barrier, failures = threading.Barrier(16), []

    def call(seed: int) -> None:
        try:
            inputs = pooled(seed=seed)
            barrier.wait()
            check(inputs)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(made) == 1


# --- wrong tensors


def refuse(good: Inputs, wrong: wrong_tensors.Wrong, warm: bool, **given) -> None:
    if warm:
        decode(good.fresh())
    with pytest.raises(InputError, match=wrong_tensors.message(wrong)):
        decode(wrong_tensors.apply(wrong, good), **given)


def table(wrongs: dict):
    return pytest.mark.parametrize("wrong", wrongs.values(), ids=list(wrongs))


both = pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])


@both
@table(wrong_tensors.DENSE | wrong_tensors.NOT_CUTE)
def test_wrong_tensors(made, wrong, warm):
    refuse(pooled(), wrong, warm)


@both
@table(wrong_tensors.PACKED)
def test_wrong_tensors_of_a_packed_batch(made, wrong, warm):
    refuse(pooled(lens=[2, 1, 3]), wrong, warm)


@both
@table(wrong_tensors.PLAIN)
@pytest.mark.parametrize("lens", [None, [2, 1, 3]], ids=["dense", "packed"])
@pytest.mark.parametrize("final", [True, False])
def test_wrong_plain_states(made, lens, final, wrong, warm):
    inputs = with_state(make(N=3, H=2, HV=4, K=32, V=32, lens=lens, output_final_state=final))
    refuse(inputs, wrong, warm)


@both
@pytest.mark.parametrize("wrong", wrong_tensors.BUFFERS.values(), ids=list(wrong_tensors.BUFFERS))
def test_wrong_buffers(made, wrong, warm):
    inputs = pooled()
    if warm:
        decode(inputs.fresh())
    with pytest.raises(InputError, match=rf"^{wrong.argument}\b"):
        given = {wrong.argument: wrong.make(inputs)}
        out = given.pop("out", None)
        decode(dataclasses.replace(inputs, **given), out)


@both
def test_wrong_final_state(made, warm):
    inputs = with_state(make(N=3, H=2, HV=4, K=32, V=32, lens=[2, 1, 3]))
    if warm:
        decode(inputs)
    for wrong in (inputs.state[:2].clone(), inputs.state.double(), inputs.state.transpose(2, 3)):
        with pytest.raises(InputError, match=r"^final_state\b"):
            decode(inputs, final_state=wrong)


def test_sizes_it_has_no_code_for(made):
    with pytest.raises(InputError, match="K is 48 and V is 32: K should be a multiple of 32"):
        decode(pooled(K=48))
    assert not made


def test_run_checks_its_inputs(made):
    inputs = pooled()
    with pytest.raises(InputError, match="^beta has shape"):
        module.run(dataclasses.replace(inputs, beta=inputs.beta[..., :1]))
    for wrong in wrong_tensors.NOT_CUTE.values():
        with pytest.raises(InputError, match=wrong_tensors.message(wrong)):
            module.run(wrong_tensors.apply(wrong, inputs))
    expected = recurrence(inputs)
    close(module.run(inputs).o, expected.o)


def test_run_checks_values_on_request(made, monkeypatch):
    """A GPU would have to be waited for, so otherwise nobody looks at what the tensors hold."""
    inputs = pooled()
    decode(inputs.fresh())
    outside = dataclasses.replace(inputs, state_indices=inputs.state_indices + 1)
    monkeypatch.setattr("kda_kernels.checks.CHECK_VALUES", "0")
    with pytest.raises(AssertionError, match="a GPU would have run this: state_indices holds 7"):
        module.run(outside)
    monkeypatch.setattr("kda_kernels.checks.CHECK_VALUES", "1")
    with pytest.raises(InputError, match="^state_indices holds 7"):
        module.run(outside)


# --- why it cannot run


@pytest.mark.parametrize(
    ("K", "V"), [(16, 128), (48, 128), (128, 8), (128, 100), (288, 128), (128, 272), (512, 512), (1, 1)]
)
def test_unsupported_sizes(K, V):
    reason = module.unsupported(dataclasses.replace(PROBLEM, K=K, V=V))
    assert reason.startswith(f"K is {K} and V is {V}: K should be a multiple of 32, V of 16")


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
    "change", [{}, {"K": 256, "V": 16}, {"K": 32, "V": 256}, {"K": 96, "V": 48}, {"pool_slots": None}]
)
def test_a_machine_that_has_everything(h100, change):
    assert module.unsupported() is None
    assert module.unsupported(dataclasses.replace(PROBLEM, **change)) is None
    assert registry.choose(dataclasses.replace(PROBLEM, **change)).name == "cute-decode"


def test_k_first_states(h100):
    k_first = dataclasses.replace(PROBLEM, state_v_first=False)
    assert "the state is K-first" in module.unsupported(k_first)
    none = dataclasses.replace(k_first, pool_slots=None, initial_state=False, final_state=False)
    assert module.unsupported(none) is None


@pytest.mark.parametrize(("absent", "package"), [("cutlass", "nvidia-cutlass-dsl"), ("tvm_ffi", "apache-tvm-ffi")])
def test_missing_packages(h100, monkeypatch, absent, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == absent else object())
    reason = module.unsupported(PROBLEM)
    assert reason == f'{package} is not installed: pip install "kdacli[cute]"'
    (variant,) = module.variants(PROBLEM)
    with pytest.raises(UnavailableError, match=f"^{package} is not installed"):
        variant.build("sm_90a")


@pytest.mark.parametrize("version", ["4.6.2", "4.0", "3.99.0", "4.5.9.dev1"])
def test_a_dsl_that_is_too_old(h100, monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    reason = f'nvidia-cutlass-dsl is {version}: 4.6.3 or newer is needed, pip install "kdacli[cute]"'
    assert module.unsupported() == reason


@pytest.mark.parametrize("version", ["4.6.3", "4.8.0.dev0", "4.10.2", "5.0"])
def test_a_dsl_that_is_new_enough(h100, monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert module.unsupported() is None


def test_a_dsl_of_no_known_version(h100, monkeypatch):
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert "its version is unknown" in module.unsupported()


def test_no_gpu(h100, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert module.unsupported(PROBLEM) == "no CUDA GPU: CuTe DSL kernels need one of sm_90a or newer"


def test_no_nvidia_gpu(h100, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert module.unsupported() == "no CUDA GPU: CuTe DSL kernels need one of sm_90a or newer"


def test_an_older_gpu(h100, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert module.unsupported() == "the GPU is sm_80: CuTe DSL kernels need sm_90a or newer"


def test_nothing_runs_where_there_is_no_gpu():
    with pytest.raises(UnavailableError, match="^cute-decode: (no CUDA GPU|.* is not installed|.* is needed)"):
        decode(pooled())
    assert module.unsupported(PROBLEM) is not None
