"""The CuTe decode kernel with a convolution before the recurrence and a gated norm behind it, against fp64.

pytest tests/test_cute_step.py        about a minute on a GPU, most of it the compiler
"""

import dataclasses

import pytest
import torch
from decode_inputs import DEVICE, SAFE, close

from kda_kernels.cute.decode.config import DecodeConfig
from kda_kernels.cute.decode.host import decode
from kda_kernels.problem import Op, Options, Parts, Problem
from kda_kernels.reference.oracle import recurrence
from kda_kernels.tensors import Inputs, Outputs
from kdacli.synthetic import make_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiled_here")]
KERNEL = "cute-step"


def make(seq_lens=(1,) * 5, device=DEVICE, **given) -> Inputs:
    """A dense batch of one token per sequence with one row of padding, unless something else is given."""
    parts = {name: given.pop(name) for name in list(given) if name in Parts.__dataclass_fields__}
    given |= {"state_dtype": given.pop("pool_dtype")} if "pool_dtype" in given else {}
    usual = {"H": 2, "HV": 2, "padding": 1, "packed": False, "pool_slots": len(seq_lens) + 2, "options": SAFE}
    problem = Problem(Op.STEP, seq_lens, **(usual | given), parts=Parts(**parts))
    return make_inputs(problem, device=device)


def check(inputs: Inputs, config: DecodeConfig | None = None) -> Outputs:
    expected, mine = recurrence(inputs), inputs.fresh()
    outputs = decode(mine, config=config)
    close(outputs.o, expected.o)
    close(outputs.final_state, expected.final_state)
    if inputs.conv is not None:
        assert torch.equal(mine.conv.states.nan_to_num(7), expected.conv_states.nan_to_num(7))
    return outputs


CASES = {
    "one token": {},
    "many sequences": {"seq_lens": (1,) * 300, "H": 8, "HV": 8},
    "no norm": {"norm": False},
    "no convolution": {"width": 0},
    "grouped, width 3, bias, softplus": {"HV": 4, "width": 3, "bias": True, "options": Options(), "g_dtype": "float32"},
    "eight heads a key": {"H": 1, "HV": 8, "tokens_first": False, "weight_dtype": "float32", "norm_dtype": "float32"},
    "width 2, fp32 windows": {"width": 2, "weight_dtype": "float32", "state_dtype": "float32"},
    "bf16 state": {"seq_lens": (1,) * 40, "H": 16, "HV": 16, "pool_dtype": "bfloat16"},
    "small heads, fp16": {"K": 64, "V": 48, "dtype": "float16", "state_dtype": "float16"},
    "packed": {"seq_lens": (1, 3, 0, 2, 1), "packed": True, "bias": True},
    "three tokens": {"seq_lens": (3,) * 4},
}


@pytest.mark.parametrize("given", CASES.values(), ids=list(CASES))
def test_it_is_the_convolution_then_decode_then_the_norm(given):
    check(make(**given))


def test_slots_used_anew_and_slots_of_their_own():
    """A window of a new sequence begins with zeros, whatever its slot holds."""
    inputs = make(padding=0)
    new = torch.tensor([True, False, True, False, True], device=DEVICE)
    slots = torch.tensor([6, 3, -1, 0, 5], device=DEVICE)
    states = inputs.conv.states.clone().nan_to_num(0.5)
    states[slots[1]] = torch.nan
    conv = dataclasses.replace(inputs.conv, states=states, indices=slots)
    outputs = check(dataclasses.replace(inputs, conv=conv, has_initial_state=new))
    assert not outputs.o[2].any()


@pytest.mark.parametrize("tokens_first", [True, False])
def test_drafts(tokens_first):
    """Windows begin where drafts were accepted, and keep what may yet be."""
    inputs = make((3,) * 4, pool_slots=13, tokens_first=tokens_first, padding=0)
    slots = torch.tensor([[1, 2, 3], [4, -1, 6], [-1, 8, 9], [10, 11, 12]], device=DEVICE)
    state = torch.randn(inputs.state.shape, device=DEVICE)
    shape = (13, 5, 768) if tokens_first else (13, 768, 5)
    conv = dataclasses.replace(inputs.conv, states=torch.randn(shape, device=DEVICE).bfloat16())
    accepted = torch.tensor([1, 3, 2, 2], device=DEVICE)
    inputs = dataclasses.replace(inputs, state=state, state_indices=slots, conv=conv, num_accepted_tokens=accepted)
    check(inputs)
    check(dataclasses.replace(inputs, update_state=False))


def test_bits_depend_on_nothing_but_the_sequence():
    """Neither on how a state is split, nor on the other sequences."""
    inputs = make((1,) * 6, padding=0)
    found = []
    for rows in DecodeConfig.fitting(128, 128, 1):
        for bulk in (False, True):
            mine, threads = inputs.fresh(), 128 if rows < 64 else 256
            found.append((decode(mine, config=DecodeConfig(rows, threads, 2, bulk)).o, mine.state))
    mine = inputs.fresh()
    large = DecodeConfig(128, ctas=3, bulk=True, together=2, huge=True)
    found.append((decode(mine, config=large).o, mine.state))
    some = inputs.fresh()
    rows = {name: getattr(some, name)[2:3] for name in ("q", "k", "v", "g", "beta", "state_indices")}
    norm = dataclasses.replace(some.norm, gate=some.norm.gate[2:3])
    alone = decode(dataclasses.replace(some, **rows, norm=norm)).o
    assert all(torch.equal(o, found[0][0]) for o, _ in found) and torch.equal(alone, found[0][0][2:3])
    assert all(torch.equal(state.nan_to_num(), found[0][1].nan_to_num()) for _, state in found)


@pytest.mark.parametrize("offset", [1, 3])
def test_tensors_at_odd_addresses(offset):
    """Whatever is read element by element, and a weight that is not aligned to its rows."""

    def moved(x: torch.Tensor) -> torch.Tensor:
        room = torch.empty(x.numel() + offset, dtype=x.dtype, device=x.device)[offset:]
        return room.view(x.shape).copy_(x)

    inputs = make(bias=True)
    conv = dataclasses.replace(inputs.conv, weight=moved(inputs.conv.weight), bias=moved(inputs.conv.bias))
    conv = dataclasses.replace(conv, states=moved(conv.states))
    norm = inputs.norm.map(moved)
    tokens = {name: moved(getattr(inputs, name)) for name in ("q", "k", "v", "g", "beta")}
    check(dataclasses.replace(inputs, **tokens, conv=conv, norm=norm))


def test_a_graph_replays_with_other_slots():
    inputs = make(padding=0)
    expected = recurrence(inputs)
    mine, out = inputs.fresh(), torch.empty_like(inputs.v)
    slots = mine.state_indices.clone()
    decode(mine, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode(mine, out)
    order = torch.tensor([3, 1, 4, 0, 2], device=DEVICE)
    again = inputs.fresh()
    for target, source in ((mine.state, again.state), (mine.conv.states, again.conv.states)):
        target.copy_(source)
    for name in ("q", "k", "v", "g", "beta"):
        getattr(mine, name).copy_(getattr(again, name)[order])
    mine.norm.gate.copy_(again.norm.gate[order])
    mine.state_indices.copy_(slots[order])
    graph.replay()
    close(out, expected.o[order])
    close(mine.state, expected.final_state)
