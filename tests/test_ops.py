"""Calls that are traced: torch.compile, torch.export, FakeTensorMode and torch.library.opcheck, with the same bits."""

import dataclasses
import functools

import pytest
import torch
from decode_inputs import DEVICE, SAFE, make, with_pool
from torch._subclasses import FakeTensorMode

from kda_kernels import registry
from kda_kernels.api import (
    Checkpoints,
    chunk_kda,
    chunk_kda_fwd,
    fused_recurrent_kda_fwd,
    kda_decode,
    kda_prefill,
    prefill_workspace_bytes,
)
from kda_kernels.errors import InputError
from kda_kernels.problem import Op, Problem
from kda_kernels.registry import get
from kda_kernels.tensors import Inputs
from kda_kernels.triton.gate import kda_gate_chunk_cumsum
from kdacli.synthetic import make_inputs

TOKENS = ("q", "k", "v", "g", "beta")
POOL = ("A_log", "dt_bias", "state", "state_indices", "cu_seqlens")


def decoding(**given) -> Inputs:
    return with_pool(make(N=2, H=2, HV=4, **given), [4, 1])


def prompts() -> Inputs:
    return with_pool(make(lens=[5, 2], H=1, HV=1, options=SAFE), [4, 1])


def arguments(inputs: Inputs) -> dict[str, torch.Tensor | float | None]:
    given = {name: getattr(inputs, name) for name in (*TOKENS, *POOL)}
    return given | {"lower_bound": inputs.options.lower_bound}


CALLS = {"decode": (kda_decode, decoding), "prefill": (kda_prefill, prompts)}
both = pytest.mark.parametrize("name", list(CALLS))


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Plain torch stands for the kernels, which Triton's interpreter makes slow. Nothing is compiled yet."""
    for op in (Op.DECODE, Op.PREFILL):
        monkeypatch.setitem(registry._FASTEST, op, (get(f"cute-{op}"), get(f"torch-{op}")))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "kernel", "out"),
    [("decode", "triton-decode", True), ("decode", None, False), ("prefill", "triton-prefill", False)],
)
def test_compiled_calls_give_the_same_bits(name, kernel, out):
    function, inputs = CALLS[name][0], CALLS[name][1]()
    compiled = torch.compile(lambda **given: function(**given) * 2, fullgraph=True, backend="aot_eager")
    expected, found = inputs.fresh(), inputs.fresh()
    buffer = {"kernel": kernel} | ({"out": torch.empty_like(inputs.v)} if out else {})
    assert torch.equal(compiled(**arguments(found), **buffer), function(**arguments(expected), kernel=kernel) * 2)
    torch.testing.assert_close(found.state, expected.state, rtol=0, atol=0, equal_nan=True)


def test_compiled_calls_of_flas_functions():
    inputs = dataclasses.replace(prompts(), state_indices=None, state=torch.zeros(2, 1, 16, 16, device=DEVICE))
    tokens = {name: getattr(inputs, name) for name in TOKENS}
    gate = {"A_log": inputs.A_log, "dt_bias": inputs.dt_bias, "cu_seqlens": inputs.cu_seqlens, "lower_bound": -5.0}
    gate |= {"initial_state": inputs.state, "output_final_state": True, "state_v_first": True}
    for function, switches in (
        (chunk_kda, {"use_gate_in_kernel": True, "safe_gate": True}),
        (chunk_kda_fwd, {}),
        (fused_recurrent_kda_fwd, {"use_gate_in_kernel": True, "inplace_final_state": False}),
    ):
        call = functools.partial(function, **switches)
        found = torch.compile(call, fullgraph=True, backend="aot_eager")(**tokens, **gate)
        for one, other in zip(found, call(**tokens, **gate), strict=True):
            assert torch.equal(one, other)


@both
def test_fake_tensors_get_shapes_and_run_nothing(name):
    function, inputs = CALLS[name][0], CALLS[name][1]()
    with FakeTensorMode() as mode:
        o = function(**arguments(inputs.map(mode.from_tensor)))
    assert isinstance(o, torch._subclasses.FakeTensor) and o.shape == inputs.v.shape and o.dtype is inputs.v.dtype
    assert function(**arguments(inputs.to("meta"))).is_meta


@both
def test_export(name):
    function, inputs = CALLS[name][0], CALLS[name][1]()

    class Layer(torch.nn.Module):
        def forward(self, given):
            return function(**given, lower_bound=inputs.options.lower_bound)

    given, expected = inputs.fresh(), inputs.fresh()
    given = {name: tensor for name, tensor in arguments(given).items() if isinstance(tensor, torch.Tensor)}
    program = torch.export.export(Layer(), ({name: tensor.clone() for name, tensor in given.items()},))
    assert torch.equal(program.module()(given), function(**arguments(expected)))
    torch.testing.assert_close(given["state"], expected.state, rtol=0, atol=0, equal_nan=True)


@both
def test_opcheck(name):
    inputs = CALLS[name][1]()
    tensors = [getattr(inputs, name) for name in TOKENS]
    last = [getattr(inputs, name) for name in POOL]
    last[2] = torch.zeros_like(last[2])  # opcheck compares what is written, and a NaN is not equal to itself
    given = {"lower_bound": inputs.options.lower_bound}
    op = getattr(torch.ops.kda, name).default
    torch.library.opcheck(op, (*tensors, torch.zeros_like(inputs.v), *last, None, None, None, None), given)


def test_states_in_int16_with_a_seed():
    """The schema says that scales are written; the operator does what the function does."""
    problem = Problem(Op.DECODE, (1, 2), H=1, HV=1, K=16, V=8, pool_slots=3, state_dtype="int16",
                      state_rounding="stochastic")  # fmt: skip
    inputs = make_inputs(problem)
    inputs.state_scales.nan_to_num_(nan=1.0)  # a NaN is not equal to itself

    def given(x):
        tensors, pool = ([getattr(x, name) for name in names] for names in (TOKENS, POOL))
        return (*tensors, torch.zeros_like(x.v), *pool, None, None, x.state_scales, None)

    more = {"lower_bound": inputs.options.lower_bound, "kernel_name": "torch-decode"}
    more |= {"rounding_seed": inputs.rounding_seed}
    op = torch.ops.kda.decode.default
    torch.library.opcheck(op, given(inputs), more, test_utils=("test_schema", "test_faketensor"))
    one, other = inputs.fresh(), inputs.fresh()
    op(*given(one), **more)
    registry.get("torch-decode").run(other)
    assert torch.equal(one.state, other.state) and torch.equal(one.state_scales, other.state_scales)


def test_what_is_written_has_no_default():
    """torch 2.11 fails where such an argument is as its default, as are all behind it."""
    for name in ("decode", "prefill"):
        arguments = getattr(torch.ops.kda, name).default._schema.arguments
        written = [a for a in arguments if a.alias_info is not None]
        assert written and not any(a.has_default_value() for a in written)


def test_no_argument_has_a_name_that_inductor_takes():
    """`FallbackKernel.create(kernel, *args, **kwargs)`: seen to fail on a GPU, where `test_serving_gpu` compiles."""
    for name in ("decode", "prefill"):
        schema = getattr(torch.ops.kda, name).default._schema
        assert not {"cls", "kernel"} & {argument.name for argument in schema.arguments}


def test_compiled_calls_with_what_engines_pass():
    """A checkpoint into the pool itself: two arguments of the operator are one tensor."""
    inputs = with_pool(make(lens=[70], H=1, HV=1, options=SAFE), [4])
    size = prefill_workspace_bytes(70, 1, 1, device=DEVICE)
    row = torch.tensor([2], dtype=torch.int32, device=DEVICE)

    def call(**given):
        kept = Checkpoints(given["state"], row, every=64)
        memory = torch.empty(size, dtype=torch.uint8, device=DEVICE)
        return kda_prefill(**given, checkpoints=kept, workspace=memory, null_slot=0, kernel="triton-prefill")

    expected, found = inputs.fresh(), inputs.fresh()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**arguments(found)), call(**arguments(expected)))
    torch.testing.assert_close(found.state, expected.state, rtol=0, atol=0, equal_nan=True)
    assert not found.state[2].isnan().any()


def test_other_functions_refuse_tensors_without_memory():
    inputs = decoding()
    fake = inputs.map(FakeTensorMode().from_tensor)
    for refused in (
        lambda: get("triton-decode").run(fake),
        lambda: get("torch-decode").run(inputs.to("meta")),
        lambda: kda_gate_chunk_cumsum(fake.g, fake.A_log, fake.dt_bias),
    ):
        with pytest.raises(InputError, match="^[qg] is a .*Tensor on .*: kernels need memory"):
            refused()
    with FakeTensorMode(), pytest.raises(InputError, match="^q is a Tensor on "):
        get("triton-decode").run(inputs)


@pytest.mark.filterwarnings("ignore:Error detected")
def test_nobody_differentiates_in_silence():
    inputs = decoding()
    compiled = torch.compile(kda_decode, fullgraph=True, backend="aot_eager")
    inputs.q.requires_grad_()
    with torch.no_grad():
        assert not compiled(**arguments(inputs.fresh())).requires_grad
    with pytest.raises(Exception, match="kda has no backward"):
        compiled(**arguments(inputs.fresh())).sum().backward()
