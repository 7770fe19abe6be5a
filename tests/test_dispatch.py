"""Which decode kernel a call gets, and which prefill kernel."""

import dataclasses

import fake_gpu
import fake_prefill
import prefill_inputs
import pytest
import torch
import wrong_tensors
from decode_inputs import DEVICE, close, make, with_pool, with_state

from kda_kernels import registry
from kda_kernels.api import chunk_kda, chunk_kda_fwd, fused_recurrent_kda_fwd
from kda_kernels.cute.decode import host as cute
from kda_kernels.cute.prefill import host as cute_prefill
from kda_kernels.cute.prefill import plan as prefill_plan
from kda_kernels.errors import InputError, UnavailableError
from kda_kernels.problem import Op
from kda_kernels.reference.oracle import recurrence
from kda_kernels.registry import kernel_for
from kda_kernels.serving import kda_decode, kda_prefill
from kda_kernels.tensors import Inputs, Outputs
from kda_kernels.triton import decode as triton
from kda_kernels.triton import prefill as triton_prefill

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="stand-ins are for machines without a GPU")


def pooled(lens=None, **given) -> Inputs:
    return with_pool(make(N=3, **({"H": 2, "HV": 4, "K": 32, "V": 32} | given), lens=lens), [4, 1, 6])


NAMES = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "state", "state_indices", "cu_seqlens")


def call(inputs: Inputs, **given) -> torch.Tensor:
    """`kda_decode` on the tensors of `inputs`."""
    return kda_decode(**{name: getattr(inputs, name) for name in NAMES}, **given)


# --- on the CPU


@no_gpu
def test_on_the_cpu_it_is_triton():
    inputs = pooled()
    assert kernel_for(Op.DECODE, inputs).name == "triton-decode"
    expected = recurrence(inputs)
    close(registry.decode(inputs.fresh()).o, expected.o)
    close(call(inputs.fresh(), kernel="triton-decode"), expected.o)
    close(call(inputs), expected.o)
    close(inputs.state, expected.final_state)


@no_gpu
@pytest.mark.parametrize("run", [registry.decode, call], ids=["registry", "kda_decode"])
def test_cute_by_name_on_the_cpu_says_what_is_missing(run):
    inputs = pooled()
    before = inputs.state.clone()
    reason = "no CUDA GPU: CuTe DSL kernels need|is not installed: pip install|or newer is needed, pip install"
    with pytest.raises(UnavailableError, match=rf"^cute-decode: .*({reason})") as raised:
        run(inputs, kernel="cute-decode")
    assert "\n" not in str(raised.value)
    torch.testing.assert_close(inputs.state, before, rtol=0, atol=0, equal_nan=True)


@no_gpu
def test_cpu_tensors_on_a_machine_that_could(monkeypatch):
    monkeypatch.setattr(cute, "unsupported_here", lambda device=None: None)
    with pytest.raises(UnavailableError, match="^cute-decode: the tensors lie on the CPU$"):
        registry.decode(pooled(), kernel="cute-decode")


@pytest.mark.parametrize("run", [registry.decode, call], ids=["registry", "kda_decode"])
@pytest.mark.parametrize("name", ["x", "triton", "cute-Decode", "fla-decode"])
def test_a_name_that_is_none(run, name):
    with pytest.raises(InputError, match=f"^kernel is {name}: it should be cute-decode or triton-decode or torch-"):
        run(pooled(), kernel=name)


# --- on a pretended GPU


class OnGpu(torch.Tensor):
    """A CPU tensor that says otherwise."""

    is_cuda = True


@pytest.fixture
def gpu(monkeypatch):
    """What was compiled, in order."""
    registry._runs_on.cache_clear()
    yield fake_gpu.install(monkeypatch)
    registry._runs_on.cache_clear()


def on_gpu(inputs: Inputs) -> Inputs:
    return dataclasses.replace(inputs, q=inputs.q.as_subclass(OnGpu))


@no_gpu
@pytest.mark.parametrize("sizes", [{}, {"K": 128, "V": 128}, {"K": 96, "V": 48}, {"V": 16}, {"lens": [2, 0, 3]}])
def test_cute_where_it_can(gpu, sizes):
    inputs = on_gpu(pooled(**sizes))
    assert kernel_for(Op.DECODE, inputs).name == "cute-decode"
    expected = recurrence(inputs)
    close(call(inputs.fresh()), expected.o)
    close(call(inputs), expected.o)
    close(inputs.state, expected.final_state)
    assert [function.calls for function in gpu] == [2]


@no_gpu
@pytest.mark.parametrize("sizes", [{"K": 48}, {"V": 24}, {"K": 16}, {"K": 60, "V": 100}, {"v_first": False}])
def test_triton_for_what_cute_has_no_code_for(gpu, sizes):
    assert kernel_for(Op.DECODE, on_gpu(pooled(**sizes))).name == "triton-decode"


@no_gpu
@pytest.mark.parametrize("wrong", wrong_tensors.NOT_CUTE.values(), ids=list(wrong_tensors.NOT_CUTE))
def test_triton_for_states_that_cute_cannot_address(gpu, wrong):
    assert kernel_for(Op.DECODE, wrong_tensors.apply(wrong, on_gpu(pooled()))).name == "triton-decode"


@no_gpu
def test_triton_on_an_older_gpu(gpu, monkeypatch):
    monkeypatch.setattr(cute, "unsupported_here", lambda device=None: "the GPU is sm_80: ...")
    assert kernel_for(Op.DECODE, on_gpu(pooled())).name == "triton-decode"


@no_gpu
def test_whoever_names_a_kernel_gets_it(gpu, monkeypatch):
    inputs, expected = on_gpu(pooled()), recurrence(pooled())
    monkeypatch.setattr(triton, "decode", lambda inputs, *_, **__: Outputs("triton"))
    assert call(inputs.fresh(), kernel="triton-decode") == "triton"
    assert call(on_gpu(pooled(K=48))) == "triton"
    assert not gpu
    close(call(inputs.fresh(), kernel="cute-decode"), expected.o)
    assert len(gpu) == 1
    with pytest.raises(InputError, match="^cute-decode: K is 48"):
        call(on_gpu(pooled(K=48)), kernel="cute-decode")


@no_gpu
def test_a_plain_state_in_place(gpu):
    """As vLLM calls it: the final states over the initial ones."""
    inputs = on_gpu(with_state(make(H=2, HV=4, K=32, V=32)))
    expected = recurrence(inputs)
    o, state = fused_recurrent_kda_fwd(
        inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta, inputs.A_log, inputs.dt_bias, inputs.state,
        state_v_first=True, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
    )  # fmt: skip
    assert state is inputs.state and len(gpu) == 1
    close(o, expected.o)
    close(state, expected.final_state)


@no_gpu
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("wrong", wrong_tensors.DENSE.values(), ids=list(wrong_tensors.DENSE))
def test_wrong_tensors_of_kda_decode(gpu, wrong, warm):
    """What CuTe's function refuses comes back in the words of the other kernels, naming the argument."""
    good = on_gpu(pooled())
    if warm:
        call(good.fresh())
    wrong_inputs = wrong_tensors.apply(wrong, good)
    argument = "state" if wrong_inputs.state is None else wrong.argument
    with pytest.raises(InputError, match=rf"^{argument}\b"):
        call(wrong_inputs)


@no_gpu
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("wrong", wrong_tensors.BUFFERS.values(), ids=list(wrong_tensors.BUFFERS))
def test_wrong_buffers_of_kda_decode(gpu, wrong, warm):
    good = on_gpu(pooled())
    if warm:
        call(good.fresh())
    with pytest.raises(InputError, match=rf"^{wrong.argument}\b"):
        call(good, **{wrong.argument: wrong.make(good)})


@pytest.mark.parametrize("wrong", wrong_tensors.BUFFERS.values(), ids=list(wrong_tensors.BUFFERS))
def test_wrong_buffers_of_triton(wrong):
    good = pooled()
    with pytest.raises(InputError, match=rf"^{wrong.argument}\b"):
        call(good, kernel="triton-decode", **{wrong.argument: wrong.make(good)})


# --- prefill


def prompts(**given) -> Inputs:
    return prefill_inputs.pooled(**given)


def call_prefill(inputs: Inputs, **given) -> torch.Tensor:
    """`kda_prefill` on the tensors of `inputs`."""
    tensors = {name: getattr(inputs, name) for name in NAMES}
    return kda_prefill(**tensors, lower_bound=inputs.options.lower_bound, **given)


@no_gpu
def test_prefill_on_the_cpu_is_tritons():
    inputs = prompts()
    assert kernel_for(Op.PREFILL, inputs).name == "triton-prefill"
    reason = "no CUDA GPU: CuTe DSL kernels need|is not installed: pip install|or newer is needed, pip install"
    with pytest.raises(UnavailableError, match=rf"^cute-prefill: .*({reason})"):
        call_prefill(inputs, kernel="cute-prefill")


@pytest.mark.parametrize("name", ["x", "triton", "cute-decode", "fla-prefill"])
def test_a_name_that_is_no_prefill(name):
    with pytest.raises(InputError, match=f"^kernel is {name}: it should be cute-prefill or triton-prefill or torch"):
        call_prefill(prompts(), kernel=name)


@pytest.fixture
def prefills(monkeypatch):
    """What was compiled for a GPU that is pretended; Triton's outputs are None."""
    registry._runs_on.cache_clear()
    monkeypatch.setattr(triton_prefill, "prefill", lambda inputs, **_: Outputs(None))
    yield fake_prefill.install(monkeypatch)
    registry._runs_on.cache_clear()


@no_gpu
def test_the_fused_prefill_where_it_can(prefills):
    inputs = on_gpu(prompts())
    expected = recurrence(inputs)
    assert kernel_for(Op.PREFILL, inputs).name == "cute-prefill"
    close(call_prefill(inputs), expected.o)
    close(inputs.state, expected.final_state)
    assert [function.calls for function in prefills] == [1]
    inputs = on_gpu(prompts())
    assert call_prefill(inputs, kernel="triton-prefill") is None
    close(call_prefill(inputs, kernel="cute-prefill"), expected.o)


@no_gpu
def test_lengths_on_the_host_are_planned_as_they_are(prefills, monkeypatch):
    """A long sequence beside a short one, through each function that takes them. What it computes is not looked at."""
    monkeypatch.setattr(fake_prefill.FakeFunction, "__call__", lambda *given: None)
    asked = []
    planned = cute_prefill._split_at
    monkeypatch.setattr(cute_prefill, "_split_at", lambda *given: asked.append(given) or planned(*given))
    inputs = on_gpu(prefill_inputs.pooled([2040, 8], slots=[1, 4]))
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "cu_seqlens")
    same = {name: getattr(inputs, name) for name in names} | {"lower_bound": -5.0}
    same["cu_seqlens_cpu"] = inputs.cu_seqlens.clone()
    kda_prefill(**same, state=inputs.state, state_indices=inputs.state_indices)
    chunk_kda_fwd(**same, use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True)
    fla = {"use_gate_in_kernel": True, "safe_gate": True, "use_qk_l2norm_in_kernel": True}
    chunk_kda(**same, **fla, use_beta_sigmoid_in_kernel=True, state_v_first=True)
    assert len(asked) >= 3 and {given[0] for given in asked} == {(0, 2040, 2048)}
    for wrong in (inputs.cu_seqlens[:2], inputs.cu_seqlens[None], inputs.cu_seqlens.tolist()):
        with pytest.raises(InputError, match="^cu_seqlens_cpu "):
            kda_prefill(**same | {"cu_seqlens_cpu": wrong}, state=inputs.state, state_indices=inputs.state_indices)
    assert planned(*asked[0]) == prefill_plan.plan_of((2040, 8), *asked[0][1:]).split
    assert prefill_plan.plan_of((2040, 8), 2, 132) != prefill_plan.plan(2, 2048, 2, 132)


@no_gpu
@pytest.mark.parametrize("function", ["decode", "prefill"])
def test_without_out_a_call_like_the_last_one_is_as_short(gpu, prefills, monkeypatch, function):
    """The long way, which checks tensors and looks for a kernel, takes several times the host time."""
    made, once = (prompts, call_prefill) if function == "prefill" else (pooled, call)
    expected = recurrence(inputs := on_gpu(made()))
    with torch.inference_mode():
        once(dataclasses.replace(inputs, state=inputs.state.clone()))
        monkeypatch.setattr(f"kda_kernels.serving.run_{function}", None)
        close(once(inputs), expected.o)
    close(inputs.state, expected.final_state)


@no_gpu
def test_the_fused_prefill_behind_flas_functions(prefills):
    inputs = on_gpu(prefill_inputs.plain())
    expected = recurrence(inputs)
    args = (inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta)
    given = {"A_log": inputs.A_log, "dt_bias": inputs.dt_bias, "lower_bound": -5.0, "initial_state": inputs.state}
    given |= {"cu_seqlens": inputs.cu_seqlens, "output_final_state": True}
    given |= {"use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
    fla = {"safe_gate": True, "use_gate_in_kernel": True}
    for o, final in (chunk_kda_fwd(*args, **given), chunk_kda(*args, **given, **fla, state_v_first=True)):
        close(o, expected.o)
        close(final, expected.final_state)
    assert [function.calls for function in prefills] == [2]
    k_first = given | {"initial_state": inputs.state.mT.contiguous()}
    o, final = chunk_kda(*args, **k_first, **fla)
    close(o, expected.o)
    close(final.mT, expected.final_state)
    assert [function.calls for function in prefills] == [2, 1] and final.is_contiguous(), "FLA's own layout"


@no_gpu
@pytest.mark.parametrize(
    "change",
    [
        lambda x: {name: getattr(x, name).float() for name in ("q", "k", "v")},
        lambda x: {
            "q": x.q.repeat_interleave(2, 3)[..., 1 : 2 * 128 : 2].as_strided(x.q.shape, (43 * 129, 129, 129, 1))
        },
        lambda x: {"state_v_first": False},
    ],
    ids=["fp32", "rows of 258 bytes", "a K-first pool"],
)
def test_triton_for_what_the_fused_prefill_does_not_take(prefills, change):
    inputs = prompts()
    inputs = on_gpu(dataclasses.replace(inputs, **change(inputs)))
    assert kernel_for(Op.PREFILL, inputs).name == "triton-prefill"
    with pytest.raises(InputError, match="^cute-prefill: "):
        registry.prefill(inputs, kernel="cute-prefill")
    assert not prefills


@no_gpu
def test_triton_for_a_buffer_that_the_fused_prefill_cannot_write(prefills):
    inputs = on_gpu(prompts())
    out = torch.empty(1, 43, 2, 132, dtype=torch.bfloat16)[..., :128]
    assert kernel_for(Op.PREFILL, inputs, out).name == "triton-prefill"


@no_gpu
def test_triton_for_other_gpus(prefills, monkeypatch):
    inputs = on_gpu(prompts())
    assert kernel_for(Op.PREFILL, inputs).name == "cute-prefill"
    registry._runs_on.cache_clear()
    monkeypatch.setattr(cute_prefill, "unsupported_here", lambda device=None: "the GPU is sm_100: ...")
    assert kernel_for(Op.PREFILL, inputs).name == "triton-prefill"


# --- on a GPU


@pytest.mark.gpu
def test_kda_decode_on_a_gpu(monkeypatch):
    """CuTe's kernel on Hopper and newer, Triton's for the sizes that CuTe's has no code for."""
    if (reason := cute.unsupported()) is not None:
        pytest.skip(reason)
    used = []
    monkeypatch.setattr(cute, "_launch", lambda *args, real=cute._launch: real(*args) or used.append("cute-decode"))
    for sizes, kernel in (({"K": 128, "V": 128}, "cute-decode"), ({"K": 60, "V": 100}, "triton-decode")):
        inputs = pooled(**sizes)
        assert inputs.q.device.type == DEVICE == "cuda"
        expected = recurrence(inputs)
        assert kernel_for(Op.DECODE, inputs).name == kernel
        close(call(inputs.fresh()), expected.o)
        assert used == ["cute-decode"]
    inputs = pooled(K=128, V=128)
    close(call(inputs.fresh(), kernel="triton-decode"), recurrence(inputs).o)
    assert used == ["cute-decode"]


@pytest.mark.gpu
def test_values_are_checked_on_request(monkeypatch):
    if (reason := cute.unsupported()) is not None:
        pytest.skip(reason)
    monkeypatch.setattr("kda_kernels.checks.CHECK_VALUES", "1")
    inputs = pooled(K=128, V=128)
    with pytest.raises(InputError, match="^state_indices holds 7"):
        call(dataclasses.replace(inputs, state_indices=inputs.state_indices + 1))


@pytest.mark.gpu
def test_kda_prefill_on_a_gpu(monkeypatch):
    """The fused kernel on Hopper."""
    if (reason := cute_prefill.unsupported()) is not None:
        pytest.skip(reason)
    used = []
    real = cute_prefill.launch
    monkeypatch.setattr(cute_prefill, "launch", lambda *args: used.append("cute-prefill") or real(*args))
    inputs = prompts()
    expected = recurrence(inputs)
    o = call_prefill(inputs)
    assert (o.double() - expected.o).norm() < 1e-2 * expected.o.norm()
    assert used == ["cute-prefill"]
