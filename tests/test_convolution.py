"""`kda_conv` against torch's convolution in fp64, and what it says of wrong arguments."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from kda_kernels import checks
from kda_kernels.api import Convolution, kda_conv
from kda_kernels.errors import InputError, KdaError
from kda_kernels.problem import Parts, Problem
from kda_kernels.registry import get
from kda_kernels.triton import convolution
from kdacli.options import problem_from
from kdacli.profile.measuring.traffic import traffic
from kdacli.synthetic import make_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENS = (0, 1, 2, 3, 40, 33, 5, 0)  # under, at and over the window, and over what a program takes
D = 96


@dataclasses.dataclass
class Call:
    """Arguments of `kda_conv`: prompts in slices of wider rows, 5 of them behind the last sequence."""

    mixed_qkv: torch.Tensor
    conv: Convolution
    cu_seqlens: torch.Tensor
    has_initial_state: torch.Tensor | None = None
    null_slot: int | None = None
    out: torch.Tensor | None = None

    @classmethod
    def make(
        cls, lens=LENS, width=4, bias=False, tokens_first=True, dtype=torch.bfloat16, states=None, beside=32, **given
    ):
        def random(*shape, dtype=dtype):
            return torch.randn(shape, device=DEVICE).to(dtype)

        slots, length = len(lens) + 3, width + 1  # an entry more than the window has
        order = torch.randperm(slots, device=DEVICE, dtype=torch.int32)[: len(lens)]
        conv = Convolution(
            random(D, width, dtype=torch.float32),
            random(D) if bias else None,
            random(slots, *((length, D) if tokens_first else (D, length)), dtype=states or dtype),
            order,
            tokens_first,
        )
        mixed = random(sum(lens) + 5, D + beside)[:, 16 : 16 + D]
        ends = torch.tensor([0, *lens]).cumsum(0).to(DEVICE, torch.int32)
        return cls(mixed, conv, ends, **given)

    def run(self) -> torch.Tensor:
        return kda_conv(**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})


def by_torch(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The result in fp64 and the states, by torch's convolution of each sequence."""
    conv, W = call.conv, call.conv.width
    o, states = torch.zeros(call.mixed_qkv.shape, dtype=torch.float64, device=DEVICE), conv.states.clone()
    by_channel, ends = states.mT if conv.tokens_first else states, call.cu_seqlens.tolist()
    for n, (slot, start, end) in enumerate(zip(conv.indices.tolist(), ends, ends[1:], strict=False)):
        if slot < 0 or slot == call.null_slot or start == end:
            continue
        if slot >= len(states):
            o[start:end] = torch.nan
            continue
        before = by_channel[slot, :, : W - 1].double()
        if call.has_initial_state is not None and not call.has_initial_state[n]:
            before = torch.zeros_like(before)
        window = torch.cat([before, call.mixed_qkv[start:end].T.double()], 1)
        bias = None if conv.bias is None else conv.bias.double()
        o[start:end] = functional.silu(functional.conv1d(window, conv.weight.double()[:, None], bias, groups=D)).T
        by_channel[slot, :, : W - 1] = window[:, -(W - 1) :].to(states.dtype)
    return o, states


def assert_right(call: Call, bound: float) -> None:
    """`bound` is of an element's error, relative to it or to 1."""
    o, states = by_torch(call)
    made = call.run()
    assert made.dtype is call.mixed_qkv.dtype and torch.equal(made.isnan(), o.isnan())
    off = (made.double() - o).abs() / o.abs().clamp(min=1.0)
    assert off.nan_to_num().max() < bound
    assert torch.equal(call.conv.states, states)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"bias": True, "width": 3, "tokens_first": False},
        {"width": 2, "dtype": torch.float32, "states": torch.float16},
        {"width": 3, "beside": 33},  # rows begin at odd addresses
        {"dtype": torch.float16, "states": torch.float32, "tokens_first": False},
    ],
    ids=str,
)
def test_it_is_torchs_convolution(given):
    bound = {torch.float32: 1e-6, torch.float16: 6e-4}.get(given.get("dtype"), 4.5e-3)
    assert_right(Call.make(**given), bound)


def test_what_engines_pass(monkeypatch):
    """Padding by both means, new sequences, a slot that is not there, and a buffer for the result."""
    monkeypatch.setattr(checks, "CHECK_VALUES", "0")
    call = Call.make(null_slot=2)
    call.conv.indices[:] = torch.tensor([2, 5, 3, -7, 2, 4, 99, 2])
    call.has_initial_state = torch.tensor([n % 2 == 1 for n in range(8)], device=DEVICE)
    call.conv.states[3, :3] = torch.nan  # the window of a new sequence
    wide = torch.full((*call.mixed_qkv.shape, 2), 7.0, dtype=torch.bfloat16, device=DEVICE).flatten(1)
    call.out = wide[:, :D]
    assert_right(call, 4.5e-3)
    assert (wide[:, D:] == 7).all()


@pytest.mark.parametrize("lens", [(1,) * 17, (0, 0, 40, 0, 0), (33,)], ids=len)
def test_each_program_finds_its_sequence(lens):
    assert_right(Call.make(lens), 4.5e-3)


def test_a_dense_batch_is_the_same_as_a_packed_one():
    call = Call.make((34, 34))
    dense = call.mixed_qkv[:68].unflatten(0, (2, 34))
    before = call.conv.states.clone()
    packed, after = call.run(), call.conv.states.clone()
    call.conv.states.copy_(before)
    assert torch.equal(kda_conv(dense, call.conv).flatten(0, 1), packed[:68])
    assert torch.equal(call.conv.states, after)


def test_one_kernel_serves_every_batch_length_number_of_heads_and_row(monkeypatch):
    """What `launch` compiles separately is told by `kind`: none where Triton looks at the arguments itself."""
    kinds = set()
    monkeypatch.setattr(convolution, "launch", lambda kernel, grid, kind, arguments, **options: kinds.add(kind))
    for lens in ((1,), (7,) * 33, (8192,), (0, 513)):
        for heads, slots in ((1, 40), (12, 600)):
            D = 3 * heads * 128
            x = torch.empty(sum(lens) + 1, D + heads // 12 * 12, dtype=torch.bfloat16, device=DEVICE)  # beta behind it
            conv = Convolution(x.new_empty(D, 4), None, x.new_empty(slots, 3, D), None, True)
            ends = torch.tensor([0, *lens]).cumsum(0).to(DEVICE, torch.int32)
            for rows in (slice(0, D), slice(0, D // 3)):  # q alone
                part = dataclasses.replace(conv, weight=conv.weight[rows], states=conv.states[:, :, rows])
                kda_conv(x[:, rows], part, cu_seqlens=ends)
    assert len(kinds) == 1 and None not in kinds


def test_tokens_of_no_sequence_become_zeros():
    call = Call.make(())
    assert torch.equal(call.run(), torch.zeros_like(call.mixed_qkv)) and len(call.mixed_qkv) == 5
    nothing = call.mixed_qkv[:0]
    assert kda_conv(nothing, call.conv, cu_seqlens=call.cu_seqlens, out=nothing.clone()).shape == (0, D)


@pytest.mark.parametrize("tokens_first", [True, False])
def test_channels_may_come_apart(tokens_first):
    """q, k and v by a call each, as vLLM has them: slices of one weight and of one pool."""
    call, parts = Call.make(tokens_first=tokens_first), D // 3
    alone = dataclasses.replace(call.conv, states=call.conv.states.clone())
    whole = call.run()
    for at in (slice(0, parts), slice(parts, 2 * parts), slice(2 * parts, D)):
        states = alone.states[:, :, at] if tokens_first else alone.states[:, at]
        conv = dataclasses.replace(alone, weight=alone.weight[at], states=states)
        assert torch.equal(kda_conv(call.mixed_qkv[:, at], conv, cu_seqlens=call.cu_seqlens), whole[:, at])
    assert torch.equal(alone.states, call.conv.states)


WRONG = {
    "mixed_qkv": lambda c: {"mixed_qkv": c.mixed_qkv[0]},
    "mixed_qkv has stride": lambda c: {"mixed_qkv": c.mixed_qkv.T.contiguous().T},
    "conv.weight": lambda c: {"conv": dataclasses.replace(c.conv, weight=c.conv.weight[:, :1].contiguous())},
    "conv.states": lambda c: {"conv": dataclasses.replace(c.conv, states=c.conv.states[:, :2])},
    "conv.states have stride 2": lambda c: {
        "conv": dataclasses.replace(c.conv, states=torch.randn(9, 5, 2 * D)[..., ::2])
    },
    "conv.indices": lambda c: {"conv": dataclasses.replace(c.conv, indices=c.conv.indices[:2])},
    "conv.indices holds 99": lambda c: {"conv": dataclasses.replace(c.conv, indices=c.conv.indices * 0 + 99)},
    "conv.indices holds 0 twice": lambda c: {"conv": dataclasses.replace(c.conv, indices=c.conv.indices * 0)},
    "cu_seqlens ends at": lambda c: {"cu_seqlens": c.cu_seqlens + torch.arange(9, dtype=torch.int32)},
    "has_initial_state": lambda c: {"has_initial_state": torch.ones(3, dtype=torch.bool)},
    "out is torch.float32": lambda c: {"out": torch.empty(c.mixed_qkv.shape)},
    "out is mixed_qkv": lambda c: {"out": c.mixed_qkv},
}  # fmt: skip


@pytest.mark.skipif(DEVICE == "cuda", reason="what tensors hold is checked on a CPU only")
@pytest.mark.parametrize("said", WRONG)
def test_wrong_arguments_are_told_by_name(said):
    call = Call.make()
    with pytest.raises(InputError, match=said.partition(" ")[0]) as raised:
        dataclasses.replace(call, **WRONG[said](call)).run()
    assert str(raised.value).startswith(said)


def test_a_traced_call_is_the_operator(monkeypatch):
    call = Call.make((3, 2))
    conv, o = call.conv, torch.empty(call.mixed_qkv.shape, dtype=torch.bfloat16, device=DEVICE)
    torch.library.opcheck(
        torch.ops.kda.conv,
        (call.mixed_qkv, o, conv.weight, conv.bias, conv.states, conv.indices, call.cu_seqlens, None, None, True),
        test_utils="test_schema",
    )
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        made = kda_conv(mode.from_tensor(call.mixed_qkv), call.conv.map(mode.from_tensor), cu_seqlens=call.cu_seqlens)
    assert made.shape == call.mixed_qkv.shape and made.is_contiguous()


def test_nobody_differentiates_in_silence():
    call = Call.make((3,))
    call.conv.weight.requires_grad_()
    with pytest.raises(KdaError, match="no backward"):
        call.run().sum().backward()


def test_a_prefill_has_a_convolution_and_no_norm():
    problem = problem_from({"op": "prefill", "tokens": 8, "heads": 1, "conv_width": 3}, "cpu")
    assert problem.parts == Parts(width=3, norm=False) and problem.features == {"conv"}
    assert problem_from({"op": "prefill", "tokens": 8, "heads": 1}, "cpu").parts is None
    for params in ({"op": "prefill", "no_norm": True}, {"op": "gate", "conv_width": 3}):
        with pytest.raises(InputError, match="only a step"):
            problem_from(params, "cpu")
    with pytest.raises(InputError, match="only a step has one"):
        Problem("prefill", (8,), 1, 1, parts=Parts())
    plain, wide = traffic(dataclasses.replace(problem, parts=None)), traffic(problem)
    assert wide.parameters - plain.parameters == 3 * 128 * 3 * 2 and wide.state - plain.state == 2 * 3 * 128 * 2 * 2


def test_a_prefills_convolution_has_no_slots_of_its_own():
    inputs = make_inputs(Problem("prefill", (3,), 1, 1, K=16, V=16, pool_slots=2, parts=Parts(norm=False)))
    conv = dataclasses.replace(inputs.conv, indices=inputs.state_indices)
    with pytest.raises(InputError, match="conv.indices"):
        get("triton-prefill").run(dataclasses.replace(inputs, conv=conv))


@pytest.mark.gpu
def test_offsets_past_2_to_31():
    """Tokens and slots that lie further apart than 32 bits say."""
    call, apart = Call.make((5, 70_000)), 2**31 // 60_000
    memory = torch.empty(70_010 * apart, dtype=torch.bfloat16, device=DEVICE)
    far = memory.as_strided(call.mixed_qkv.shape, (apart, 1)).copy_(call.mixed_qkv)
    pool = torch.empty(2**31 + 2**20, dtype=torch.bfloat16, device=DEVICE)
    states = pool.as_strided(call.conv.states.shape, (2**31 // 4, *call.conv.states.stride()[1:]))
    states.copy_(call.conv.states)
    near = call.run()
    conv = dataclasses.replace(call.conv, states=states)
    assert torch.equal(kda_conv(far, conv, cu_seqlens=call.cu_seqlens), near)
    assert torch.equal(states, call.conv.states)
