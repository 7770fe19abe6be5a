"""`kda verify --dump` with a capture of several calls: call by call, and decode traces as a whole."""

import dataclasses
import json

import pytest
import torch
from click.testing import CliRunner

from kda_kernels import registry
from kda_kernels.problem import Gate, Op, Options, Parts, Problem
from kdacli.comparison.trace import find
from kdacli.dumps import load_all
from kdacli.dumps.save import save
from kdacli.judge.reference import pool_as_final_state
from kdacli.main import cli
from kdacli.synthetic import make_inputs

STEPS = 12
STEP = Problem(
    Op.DECODE,
    (1, 1),
    1,
    1,
    16,
    16,
    packed=False,
    pool_slots=2,
    state_dtype="bfloat16",
    options=Options(Gate.SAFE, -5.0),
)

# Right from every state that it is given, within what rounding to bf16 makes; but its roundings all go one way.
LEAKING = """
import torch
from kda_kernels.tensors import Inputs
from kda_kernels.problem import Options
from kda_kernels.reference import plain_recurrent

def decode(q, k, v, g, beta, A_log, dt_bias, initial_state, state_indices, lower_bound):
    call = Inputs(q, k, v, g, beta, Options("safe", lower_bound), A_log, dt_bias, initial_state, state_indices)
    out = plain_recurrent.run(call)
    initial_state.mul_(1.0027)
    return out.o, initial_state
"""


@pytest.fixture
def capture(tmp_path):
    return captured(tmp_path / "dumps", STEP)


def captured(folder, problem):
    """A folder of calls, each from the states that the one before left."""
    folder.mkdir()
    shared = make_inputs(problem, gates="weak", seed=0)
    before = None
    for number in range(STEPS):
        inputs = make_inputs(problem, gates="weak", seed=number)
        inputs = dataclasses.replace(inputs, A_log=shared.A_log, dt_bias=shared.dt_bias)
        if inputs.conv is not None:
            inputs.conv = dataclasses.replace(shared.conv, states=inputs.conv.states)
            inputs.norm = dataclasses.replace(inputs.norm, weight=shared.norm.weight)
        inputs.state_indices.copy_(torch.tensor([0, 1]))
        if before is not None:
            inputs.state.copy_(before.state)
            if inputs.conv is not None:
                inputs.conv.states.copy_(before.conv.states)
        before = inputs.fresh()
        outputs = pool_as_final_state(registry.get(f"torch-{problem.op}").run(before), before)
        meta = {"target": f"engine:{problem.op}", "rank": 0, "layer": 3, "call_number": number}
        save(folder / f"{problem.op}.call{number:04d}.pt", inputs, outputs, op=problem.op, meta=meta)
    return folder


def verify(*args, code=0):
    result = CliRunner().invoke(cli, ["verify", "--device", "cpu", "--dump", *map(str, args)])
    assert result.exit_code == code, result.output
    return result


def test_a_capture_is_replayed_call_by_call_and_as_a_trace(capture, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "drift.png"
    found = json.loads(verify(capture, "--kernel", "torch-decode", "--json", "-", "--plot", picture).stdout)
    rows = {(row["kernel"], row["tensor"]): row for row in found["rows"]}
    assert set(rows) == {(kernel, t) for kernel in (None, "torch-decode") for t in ("o", "final_state")}
    assert all(row["calls"] == STEPS and row["failed"] == 0 for row in rows.values())
    (trace,) = found["traces"]
    assert (trace["steps"], trace["passed"], len(trace["o"]), len(trace["states"])) == (STEPS, True, STEPS, STEPS)
    assert trace["states"][-1] > trace["states"][0] > 0, "rounding the states to bf16 adds up"
    assert picture.stat().st_size > 1000
    assert "everything within its bounds" in verify(capture, "--kernel", "torch-decode").output


def test_a_trace_of_fused_steps(tmp_path):
    problem = dataclasses.replace(STEP, op=Op.STEP, parts=Parts())
    found = json.loads(verify(captured(tmp_path / "dumps", problem), "--kernel", "torch-step", "--json", "-").stdout)
    (trace,) = found["traces"]
    assert (trace["steps"], trace["passed"], len(trace["o"])) == (STEPS, True, STEPS)
    assert [verdict["tensor"] for verdict in trace["verdicts"]] == ["o", "final_state", "conv_states"]
    assert max(trace["o"]) < 1e-2, "by the outputs behind the norm"


def test_a_drift_fails_the_trace_though_each_step_passes(capture, tmp_path):
    kernel = tmp_path / "leaking.py"
    kernel.write_text(LEAKING)
    result = verify(capture, "--kernel", f"{kernel}:decode", "--json", "-", code=1)
    found = json.loads(result.stdout)
    assert not [row for row in found["rows"] if row["failed"]]
    assert not found["traces"][0]["passed"]
    assert "by itself" in found["wrong"][0]


def test_a_trace_ends_where_the_states_change(capture):
    path = sorted(capture.iterdir())[5]
    tree = torch.load(path, weights_only=True)
    tree["inputs"]["state"] = tree["inputs"]["state"] * 2
    torch.save(tree, path)
    traces, notes = find(load_all(capture))
    assert [len(trace.dumps) for trace in traces] == [5, STEPS - 5]
    assert len(notes) == 1
    assert "the states change, by calls that were not recorded, between decode.call0004" in notes[0]


def test_what_goes_with_one_call_only_is_refused(capture):
    for flag in (["--junit", "x.xml"], ["--seed", "3"], ["--triton-config", "0"], ["--limit", "5"], ["--shrink", "1"]):
        assert f"{flag[0]} is given with a dump of several calls" in verify(capture, *flag, code=2).output
    call = "decode.call0003"
    assert "1 passed" in verify(capture, "--call", call, "--kernel", "torch-decode").output
    one = capture / f"{call}.pt"
    assert "--plot is given without" in verify(one, "--plot", "x.png", code=2).output


def test_a_broken_file_is_named_and_the_others_are_replayed(capture):
    (capture / "decode.call0001.pt").write_bytes(b"PK")
    result = verify(capture, "--kernel", "torch-decode", code=1)
    assert "decode.call0001.pt" in result.output
    assert "10" in result.output
