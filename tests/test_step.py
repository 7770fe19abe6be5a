"""The decode step with convolution and gated norm: the oracle against torch's own operations, and the kernels."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from kda_kernels import checks, registry
from kda_kernels.api import kda_step
from kda_kernels.checks import check_inputs, problem_of
from kda_kernels.engines.derived import derived
from kda_kernels.errors import InputError
from kda_kernels.problem import Op, Parts, Problem
from kda_kernels.reference import oracle
from kda_kernels.reference.stored import stored
from kda_kernels.tensors import Convolution, Inputs
from kda_kernels.triton.decode import DecodeConfig
from kda_kernels.triton.decode import decode as triton_decode
from kdacli.judge import judge
from kdacli.judge.reference import Reference, pool_as_final_state
from kdacli.options import problem_from
from kdacli.peers import sglang_step, vllm_step
from kdacli.peers.sglang_packed_decode import rows_of, side_by_side
from kdacli.profile.measuring.outputs import Check
from kdacli.profile.measuring.traffic import traffic
from kdacli.synthetic import make_inputs


def make(seq_lens=(1, 2, 0, 1), **given) -> Inputs:
    """Random inputs of a step on the CPU, with grouped heads and a padding row."""
    parts = {name: given.pop(name) for name in list(given) if name in Parts.__dataclass_fields__}
    usual = {"H": 1, "HV": 2, "K": 16, "V": 8, "pool_slots": len(seq_lens) + 2, "padding": 1, "dtype": "float32"}
    return make_inputs(Problem(Op.STEP, seq_lens, **(usual | given), parts=Parts(**parts)))


def by_torch(inputs: Inputs, rows: slice, window: torch.Tensor) -> dict[str, torch.Tensor]:
    """q, k and v [1, S, ..] of one sequence, by torch's convolution over [D, W - 1 + S] numbers."""
    conv = inputs.conv
    bias = None if conv.bias is None else conv.bias.double()
    y = (
        functional.silu(
            functional.conv1d(window[None].double(), conv.weight.double()[:, None], bias, groups=len(window))
        )[0]
        .T[None]
        .contiguous()
    )
    shapes = {name: getattr(inputs, name)[:, rows].shape for name in "qkv"}
    parts = y.split([shape[2] * shape[3] for shape in shapes.values()], 2)
    return {name: part.reshape(shapes[name]).float() for name, part in zip(shapes, parts, strict=True)}


@pytest.mark.parametrize(
    "parts",
    [
        {"width": 4, "bias": True},
        {"width": 3, "tokens_first": False, "state_dtype": "float32"},
        {"width": 2, "norm": False},
    ],
    ids=str,
)
def test_the_oracle_is_torchs_convolution_then_decode_then_norm(parts):
    inputs = make((1, 5, 0, 2), **parts)
    found, conv, starts = oracle.recurrence(inputs), inputs.conv, inputs.cu_seqlens.tolist()
    mixed = torch.cat([x.flatten(2) for x in (inputs.q, inputs.k, inputs.v)], 2)[0].T
    states = conv.by_channel.clone()
    for n, slot in enumerate(inputs.state_indices.tolist()):
        rows = slice(starts[n], starts[n + 1])
        if slot < 0 or rows.start == rows.stop:
            assert not found.o[0, rows].any()
            continue
        window = torch.cat([conv.by_channel[slot].float(), mixed[:, rows]], 1)
        one = dataclasses.replace(
            inputs, conv=None, norm=None, **by_torch(inputs, rows, window), g=inputs.g[:, rows],
            beta=inputs.beta[:, rows], state_indices=inputs.state_indices[n : n + 1], cu_seqlens=None,
        )  # fmt: skip
        o = oracle.recurrence(one).o[0]
        if (norm := inputs.norm) is not None:
            o = (
                functional.rms_norm(o, o.shape[-1:], norm.weight.double(), norm.eps)
                * norm.gate[0, rows].double().sigmoid()
            )
        torch.testing.assert_close(found.o[0, rows], o, rtol=1e-5, atol=1e-6)
        states[slot] = window[:, 1 - conv.width :].to(states.dtype)
    after = found.conv_states.mT if conv.tokens_first else found.conv_states
    assert torch.equal(after.nan_to_num(7), states.nan_to_num(7))


def test_after_accepted_drafts_a_step_goes_on_as_if_they_had_come_one_by_one():
    def speculate(first: Inputs, **others) -> Inputs:
        columns = torch.arange(4)[None] + 1
        return dataclasses.replace(first, state_indices=columns, cu_seqlens=None, **others)

    whole = make((6,), padding=0, pool_slots=6, state_dtype="float32")
    whole = dataclasses.replace(whole, state=whole.state.nan_to_num(), state_indices=torch.tensor([1]))
    D, W = whole.conv.weight.shape
    room = torch.full((6, W + 2, D), torch.nan)
    room[1, : W - 1] = torch.randn(W - 1, D)
    conv = dataclasses.replace(whole.conv, states=room)
    expected = oracle.recurrence(dataclasses.replace(whole, conv=conv)).o

    def tokens(rows: list[int]) -> Inputs:
        cut = {name: getattr(whole, name)[:, rows] for name in ("q", "k", "v", "g", "beta")}
        return dataclasses.replace(whole, **cut, norm=dataclasses.replace(whole.norm, gate=whole.norm.gate[:, rows]))

    drafts = speculate(tokens([0, 1, 5, 5]), conv=conv, num_accepted_tokens=torch.tensor([1]))  # two of four are right
    first = oracle.recurrence(drafts)
    torch.testing.assert_close(first.o[:, :2], expected[:, :2])
    conv = dataclasses.replace(conv, states=first.conv_states)
    state = {"state": first.final_state.float(), "num_accepted_tokens": torch.tensor([2])}
    second = oracle.recurrence(speculate(tokens([2, 3, 4]), conv=conv, **state))
    torch.testing.assert_close(second.o, expected[:, 2:5], rtol=1e-5, atol=1e-6)


def test_a_problem_of_a_step_is_told_from_its_tensors_and_kept_in_json():
    for parts in ({"bias": True}, {"norm": False, "width": 2}, {"width": 0}):
        inputs = make(**parts)
        found = problem_of(inputs, Op.STEP)
        assert found.parts == Parts(**parts) and Problem.from_dict(found.to_dict()) == found
        assert found.features == found.parts.features


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("conv.weight", lambda c: {"weight": c.weight[:-1]}),
        ("conv.bias", lambda c: {"bias": c.weight[:, :2]}),
        ("conv.states", lambda c: {"states": c.states[:, 1:]}),
        ("conv.states", lambda c: {"states": c.states.mT}),
        ("conv.indices", lambda c: {"indices": torch.zeros(4, dtype=torch.int32)}),
    ],
)
def test_a_wrong_convolution_is_told_by_its_name(name, change):
    inputs = make()
    wrong = Convolution(**(vars(inputs.conv) | change(inputs.conv)))
    with pytest.raises(InputError, match=name):
        check_inputs(dataclasses.replace(inputs, conv=wrong), values=True)


def test_no_kernel_overlooks_a_part():
    inputs = make()
    problem = problem_of(inputs, Op.STEP)
    for op in (Op.PREFILL, Op.DECODE):
        for kernel in registry.kernels(op):
            if kernel.ours and not {"conv", "norm"} <= kernel.features:
                with pytest.raises(InputError, match="norm" if "conv" in kernel.features else "conv"):
                    kernel.run(inputs)
    assert registry.get("torch-step").unsupported(problem) is None


def speculating(inputs: Inputs) -> Inputs:
    """The same tokens as drafts after accepted ones; one sequence is padding, each token has a slot."""
    lens = (inputs.cu_seqlens[1:] - inputs.cu_seqlens[:-1]).tolist()
    N, C = len(lens), max(lens) + 1
    table = torch.arange(N * C, dtype=torch.int32).view(N, C).flip(0)
    table[1] = -1
    conv, room = inputs.conv, inputs.conv.width - 2 + C
    size = conv.by_channel.shape[1]
    states = torch.randn(N * C, room, size).to(conv.states.dtype)
    if not conv.tokens_first:
        states = states.mT.contiguous()
    return dataclasses.replace(
        inputs,
        state=torch.randn(N * C, *inputs.state.shape[1:]),
        state_indices=table,
        num_accepted_tokens=torch.tensor([1, 2, 2, 3][:N], dtype=torch.int32),
        conv=dataclasses.replace(conv, states=states),
    )


FORMS = {
    "grouped heads": ({}, None),
    "bias, no norm, one head each": ({"bias": True, "norm": False, "width": 2, "HV": 1}, None),
    "channels first, odd sizes": (
        {"tokens_first": False, "width": 3, "K": 20, "V": 24, "state_dtype": "float32"},
        None,
    ),
    "norm alone": ({"width": 0, "HV": 4, "H": 2}, None),
    "drafts": ({"bias": True}, speculating),
    "drafts, channels first": ({"width": 3, "tokens_first": False}, speculating),
    "fresh": ({}, lambda i: dataclasses.replace(i, has_initial_state=torch.tensor([True, False, True, False]))),
    "slots of its own": (
        {},
        lambda i: dataclasses.replace(
            i, conv=dataclasses.replace(i.conv, indices=torch.tensor([[0, 9], [5, 9], [2, 9], [1, 9]])[:, 0])
        ),
    ),
    "read only": ({}, lambda i: dataclasses.replace(i, update_state=False)),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kernel", ["triton-step", "torch-step"])
def test_a_kernel_is_as_the_oracle(kernel, name):
    given, change = FORMS[name]
    inputs = make((1, 3, 0, 2), **given)
    conv = inputs.conv
    if conv is not None:  # what is nobody's may not be read, and shows where it is
        conv = dataclasses.replace(conv, states=conv.states.nan_to_num(0.5) if change else conv.states)
    inputs = dataclasses.replace(inputs, conv=conv)
    inputs = inputs if change is None else change(inputs)
    expected, written = oracle.recurrence(inputs), inputs.fresh()
    o = registry.get(kernel).run(written).o
    torch.testing.assert_close(o.double(), expected.o, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(written.state.double(), expected.final_state, rtol=1e-5, atol=1e-5, equal_nan=True)
    if conv is not None:
        assert torch.equal(written.conv.states.nan_to_num(7), expected.conv_states.nan_to_num(7))


def test_triton_takes_states_in_pieces():
    """As at once, but for sums that may run in another order."""
    inputs = make((1, 1, 1), packed=False, K=32, V=64)
    held = stored(inputs.state.nan_to_num().flatten(0, 1), torch.int16)
    pool = {"state": held.state.view(inputs.state.shape), "state_scales": held.scales.view(inputs.state.shape[:3])}
    whole, pieces = (dataclasses.replace(inputs, **pool).fresh() for _ in range(2))
    expected = triton_decode(whole, config=DecodeConfig(64, 2))
    made = triton_decode(pieces, config=DecodeConfig(64, 2, piece=16))
    torch.testing.assert_close(made.o, expected.o, rtol=1e-5, atol=1e-6)
    assert torch.equal(pieces.conv.states.nan_to_num(7), whole.conv.states.nan_to_num(7))
    assert ((pieces.state.int() - whole.state.int()).abs() <= 1).all()
    torch.testing.assert_close(pieces.state_scales, whole.state_scales, rtol=1e-6, atol=0)


# --- the public function -------------------------------------------------------------------------------------------


def arguments(inputs: Inputs) -> tuple[torch.Tensor, dict]:
    """mixed_qkv and the others of a call of `kda_step` with these inputs, one token each, rows longer than they are."""
    rows = [x[:, 0].flatten(1) for x in (inputs.q, inputs.k, inputs.v)]
    wide = torch.cat([*rows, torch.full((len(rows[0]), 3), torch.nan)], 1)
    given = {name: getattr(inputs, name) for name in ("state", "state_indices", "A_log", "dt_bias")}
    given |= {"g": inputs.g[:, 0].flatten(1), "beta": inputs.beta[:, 0], "conv": inputs.conv}
    norm = inputs.norm
    given["norm"] = None if norm is None else dataclasses.replace(norm, gate=norm.gate[:, 0].flatten(1))
    return wide[:, :-3], given


@pytest.mark.parametrize("parts", [{}, {"width": 0}, {"norm": False}, {"width": 0, "norm": False}], ids=str)
def test_kda_step_splits_the_projection_and_runs_what_is_asked_for(parts):
    inputs = make((1, 1, 1), packed=False, **parts)
    expected, copy = oracle.recurrence(inputs), inputs.fresh()
    mixed, given = arguments(copy)
    out = torch.empty(3, 2, 8)
    assert kda_step(mixed, **given, out=out) is out
    torch.testing.assert_close(out.double(), expected.o[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(copy.state.double(), expected.final_state, rtol=1e-5, atol=1e-5, equal_nan=True)
    if copy.conv is not None:
        assert torch.equal(copy.conv.states.nan_to_num(7), expected.conv_states.nan_to_num(7))


def test_a_traced_step_is_the_operator(monkeypatch):
    inputs = make((1, 1, 1), packed=False)
    (mixed, given), (_, again) = arguments(inputs.fresh()), arguments(inputs.fresh())
    eager = kda_step(mixed, **given, kernel="torch-step")
    answers = iter((True,))  # to the public function, not to the operator that it calls
    monkeypatch.setattr(checks, "is_traced", lambda t: next(answers, False))
    with torch.no_grad():
        assert torch.equal(kda_step(mixed, **again, kernel="torch-step"), eager)
    assert torch.equal(given["state"].nan_to_num(7), again["state"].nan_to_num(7))
    assert torch.equal(given["conv"].states.nan_to_num(7), again["conv"].states.nan_to_num(7))
    monkeypatch.undo()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert kda_step(fake.from_tensor(mixed), **again).shape == eager.shape


def test_a_projection_that_is_no_step_is_refused_by_its_name():
    mixed, given = arguments(make((1, 1, 1), packed=False))
    with pytest.raises(InputError, match="mixed_qkv"):
        kda_step(mixed[:, :-1], **given)
    with pytest.raises(InputError, match=r"norm\.gate"):
        kda_step(mixed, **(given | {"norm": dataclasses.replace(given["norm"], gate=mixed)}))


# --- what the profile counts and checks, and a peer's view of the tensors


def test_the_bytes_of_a_step_are_those_of_its_tensors():
    inputs = make((1,) * 4, packed=False, padding=0, initial_state=True)
    problem, conv, norm = problem_of(inputs, Op.STEP), inputs.conv, inputs.norm
    found = traffic(problem)
    tokens = (inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta, norm.gate, inputs.v)  # the last is o
    assert found.activations == sum(x.nbytes for x in (x.contiguous() for x in tokens))
    assert found.parameters == sum(x.nbytes for x in (inputs.A_log, inputs.dt_bias, conv.weight, norm.weight))
    assert found.state == 2 * 4 * (inputs.state[0].nbytes + conv.states[0].nbytes)


@pytest.mark.parametrize("tokens_first", [True, False])
def test_a_timed_step_is_held_against_the_oracle_with_its_convolutions_states(tokens_first):
    inputs = make((1,) * 4, packed=False, H=2, HV=4, tokens_first=tokens_first)
    kernel, check = registry.get("torch-step"), Check(inputs, Op.STEP)
    assert check.error(lambda: kernel.run(inputs)) < 1e-5

    def forgetful():
        kept = inputs.conv.states.clone()
        outputs = kernel.run(inputs)
        inputs.conv.states.copy_(kept)
        return outputs

    assert check.error(forgetful) == float("inf")


def test_who_declares_that_its_convolution_rounds_is_judged_so():
    inputs = make((1, 1), padding=0, dtype="bfloat16", tokens_first=True)
    apart = dataclasses.replace(inputs.fresh(), conv=dataclasses.replace(inputs.fresh().conv, rounded=True))
    outputs = pool_as_final_state(registry.get("torch-step").run(apart), apart)
    reference = Reference(inputs, Op.STEP)
    assert [v.tensor for v in judge(reference.granted(False), outputs) if not v.passed] == ["final_state"]
    assert all(v.passed for v in judge(reference.granted(True), outputs))
    wrong = dataclasses.replace(outputs, final_state=outputs.final_state * 1.05)
    assert not all(v.passed for v in judge(reference.granted(True), wrong))
    assert registry.get("sglang-chain").unsupported() and registry.get("sglang-chain").rounded_convolution


def test_fused_steps_of_engines_are_given_the_projection_itself():
    inputs = make((1,) * 3, packed=False, HV=1, V=16)
    q, k, v = inputs.q, inputs.k, inputs.v
    rows = side_by_side(q, k, v)
    assert rows.data_ptr() == q.data_ptr() and rows.shape == (3, 48)
    assert torch.equal(rows, torch.cat([rows_of(x) for x in (q, k, v)], 1))
    assert torch.equal(side_by_side(q, k.clone(), v), rows)
    weight = inputs.conv.weight
    for _ in range(2):  # each of the two is made once, and neither is taken for the other
        assert torch.equal(derived(weight, sglang_step.by_tap)[1, 2], weight[16:32, 2].float())
        assert torch.equal(derived(weight, sglang_step._apart)[1][2], weight[16:32, 2].float())
    problem = problem_of(inputs, Op.STEP)
    for peer in (vllm_step, sglang_step):
        refusal = peer.CONTRACT.refusal
        assert "H is 1" in str(refusal(dataclasses.replace(problem, **_AS_VLLM, H=1, HV=1)))
        assert refusal(dataclasses.replace(problem, **_AS_VLLM, H=12, HV=12)) is None


_AS_VLLM = {"K": 128, "V": 128, "padding": 0} | dict.fromkeys(("dtype", "g_dtype", "beta_dtype"), "bfloat16")


def test_the_parts_of_a_step_are_flags():
    given = {"op": "step", "heads": 2, "seqs": 2, "conv_width": 2, "conv_bias": True, "channels_first": True}
    assert problem_from(given, "cpu").parts == Parts(width=2, bias=True, tokens_first=False)
    assert problem_from({"op": "step", "conv_width": 0, "no_norm": True}, "cpu").features == set()
    for wrong, said in (({"op": "decode", "no_norm": True}, "--no-norm"), ({**given, "conv_width": 0}, "--conv-bias")):
        with pytest.raises(InputError, match=said):
            problem_from(wrong, "cpu")
    with pytest.raises(InputError, match="width is 1"):
        problem_from({"op": "step", "conv_width": 1}, "cpu")
