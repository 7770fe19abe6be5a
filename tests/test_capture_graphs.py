"""Calls in CUDA graphs: recorded by copies in the graph, replays written by number, results those without it."""

import dataclasses
import functools
import os
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

from kda_kernels import api, registry
from kda_kernels.problem import Op, Options, Problem
from kda_kernels.reference import plain_recurrent
from kda_kernels.tensors import Checkpoints, Inputs
from kdacli import dumps
from kdacli.capture import capture, journal, switched
from kdacli.capture.switched import Copy
from kdacli.dumps.strides import copy_of
from kdacli.judge import Reference, judge
from kdacli.main import cli
from kdacli.synthetic import make_inputs

LOOP = """
from kda_kernels.api import kda_decode


def decode(q, k, v, g, beta, A_log, dt_bias, state, state_indices, cu_seqlens=None, lower_bound=-5.0,
           use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True):
    return kda_decode(q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, lower_bound=lower_bound, state=state,
                      state_indices=state_indices)
"""
TARGET = "loop_for_test:decode"
PROBLEM = Problem(
    op="decode",
    seq_lens=(1,) * 5,
    H=4,
    HV=4,
    packed=False,
    pool_slots=9,
    padding=1,
    options=Options(gate="safe", lower_bound=-5.0),
)

ONE_OF_EACH = ((Op.STEP, (1, 1, 1, 1)), (Op.PREFILL, (70, 5)))


@pytest.fixture
def loop(tmp_path, monkeypatch):
    (tmp_path / "loop_for_test.py").write_text(LOOP)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("loop_for_test", None)
    import loop_for_test

    yield loop_for_test
    sys.modules.pop("loop_for_test", None)


def call_of(inputs):
    named = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "state", "state_indices")
    return {name: getattr(inputs, name) for name in named}


class Graph:
    """Stands for torch.cuda.CUDAGraph where there is no GPU: replays do nothing."""

    def capture_begin(self):
        pass

    def capture_end(self):
        pass

    def replay(self):
        return "replayed"


class Event:
    def record(self):
        pass

    def query(self):
        return True


@pytest.fixture
def no_gpu(monkeypatch):
    """Captures of a stream that is none; `capturing.append(True)` begins one."""
    capturing = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    return capturing


def captured(graph, capturing, function, *calls):
    graph.capture_begin()
    capturing.append(True)
    for call in calls:
        function(**call)
    capturing.clear()
    graph.capture_end()


def test_which_replays_are_written_and_of_what(loop, no_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "kda_decode", lambda q, k, v, g, beta, **rest: plain(q, k, v, g, beta, **rest))
    methods = dict(vars(Graph))
    x = make_inputs(PROBLEM)
    before, slots = x.state.clone(), [slot for slot in x.state_indices.tolist() if slot >= 0]
    with capture(TARGET, out=tmp_path / "d", replays=(1, 3)) as files:
        first, second = Graph(), Graph()
        for graph in (first, second):
            captured(graph, no_gpu, loop.decode, call_of(x), call_of(x))  # of two calls the first is taken
        assert files == []
        assert [graph.replay() for graph in (first, first, first, second)] == ["replayed"] * 4
    assert dict(vars(Graph)) == methods
    names = {f"decode.rank0.graph{g}.replay000{n}.call0000.pt" for g, n in ((0, 1), (0, 3), (1, 1))}
    assert {file.name for file in files} == names
    dump = dumps.load(files[0])
    assert dump.meta["slots"] == slots and torch.equal(dump.inputs.state, before[slots])
    monkeypatch.undo()
    result = CliRunner().invoke(cli, ["compare", str(files[0]), "--kernel", "torch-decode"])
    assert result.exit_code == 0, result.output


def test_our_own_functions_and_a_padded_step_of_theirs(no_gpu, tmp_path, monkeypatch):
    """Rows of padding between others, as pools and windows of a graph's step are numbered anew."""
    monkeypatch.setattr(registry, "kernel_for", lambda op, inputs, out=None: registry.get(f"torch-{op}"))
    step, prefill = (Problem(op, lens, 2, 2, 16, 16, pool_slots=6, options=PROBLEM.options) for op, lens in ONE_OF_EACH)
    x, p = (make_inputs(problem) for problem in (step, prefill))
    for pool in (x.state, x.conv.states, p.state):
        pool.nan_to_num_(0.5)
    x.state_indices.copy_(torch.tensor([3, 4, -1, 1]))
    rows = [part.flatten(0, 1).flatten(1) for part in (x.q, x.k, x.v)]
    gates = {"A_log": x.A_log, "dt_bias": x.dt_bias, "lower_bound": -5.0}
    kept = Checkpoints(torch.zeros_like(p.state), torch.tensor([5, -1]), torch.tensor([64, 0]))
    norm = dataclasses.replace(x.norm, gate=x.norm.gate.reshape(4, -1))
    with capture("kda", out=tmp_path / "d", replays=(1,)) as files:
        named = {"state": x.state, "state_indices": x.state_indices, "conv": x.conv, "norm": norm, "null_slot": 4}
        graph = Graph()
        captured(graph, no_gpu, lambda: api.kda_step(torch.cat(rows, 1), x.g[0], x.beta[0], **named, **gates), {})
        graph.replay()
        api.kda_prefill(
            p.q, p.k, p.v, p.g, p.beta, state=p.state, state_indices=p.state_indices, cu_seqlens=p.cu_seqlens,
            checkpoints=kept, **gates,
        )  # fmt: skip
    found = {dump.op: dump for dump in map(dumps.load, files)}
    assert found["step"].meta["slots"] == [3, 1]
    assert found["step"].inputs.state_indices.tolist() == [0, -1, -1, 1]
    assert len({getattr(found["step"].inputs, name).untyped_storage().data_ptr() for name in "qkv"}) == 1
    for dump in found.values():
        verdicts = judge(Reference(dump.inputs, dump.op), dump.outputs, partial=True)
        assert all(verdict.passed for verdict in verdicts), verdicts
        extra = "conv_states" if dump.op == "step" else "checkpoints"
        assert {verdict.tensor for verdict in verdicts} == {"o", "final_state", extra}


def test_graphs_that_are_gone_give_their_memory_back(loop, no_gpu, tmp_path, monkeypatch):
    """An engine that captures its graphs anew; each graph has a number of its own."""
    monkeypatch.setattr(loop, "decode", lambda q, k, v, g, beta, A_log, dt_bias, state, state_indices: v)
    call = call_of(make_inputs(PROBLEM))
    with capture(TARGET, out=tmp_path / "d", replays=(1,), graph_bytes=3_000_000) as files:
        for _ in range(4):
            graph = Graph()
            captured(graph, no_gpu, loop.decode, call)
            graph.replay()
    assert {file.name for file in files} == {f"decode.rank0.graph{n}.replay0001.call0000.pt" for n in range(4)}


def plain(q, k, v, g, beta, *, A_log, dt_bias, lower_bound, state, state_indices):
    inputs = Inputs(q, k, v, g, beta, PROBLEM.options, A_log, dt_bias, state, state_indices)
    return plain_recurrent.run(inputs).o


def test_a_limit_on_memory_is_told(loop, no_gpu, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop, "decode", lambda q, k, v, g, beta, A_log, dt_bias, state, state_indices: v)
    with capture(TARGET, out=tmp_path / "d", replays=(1,), graph_bytes=1000) as files:
        graph = Graph()
        captured(graph, no_gpu, loop.decode, call_of(make_inputs(PROBLEM)))
        graph.replay()
    assert files == [] and "in a graph would exceed --graph-bytes 1 kB" in capsys.readouterr().err


def run(loop, steps):
    """A captured decode loop: outputs of all steps, and states before each."""
    x = make_inputs(PROBLEM, device="cuda")
    x.state.nan_to_num_(0.0)
    loop.decode(**call_of(x.fresh()))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = loop.decode(**call_of(x))
    outputs, before = [], []
    for step in range(steps):
        new = make_inputs(PROBLEM, seed=step, device="cuda")
        for name in ("q", "k", "v", "g", "beta"):
            getattr(x, name).copy_(getattr(new, name))
        before.append(x.state.clone())
        graph.replay()
        outputs.append(o.clone())
    return outputs, before, x.state


@pytest.mark.gpu
def test_a_captured_decode_loop(loop, tmp_path):
    alone = run(loop, 100)
    with capture(TARGET, out=tmp_path / "d", calls=1, skip=1, replays=(1, 10, 100)) as files:
        outputs, before, state = run(loop, 100)
    assert all(torch.equal(a, b) for a, b in zip(alone[0], outputs, strict=True)) and torch.equal(alone[2], state)
    assert len(files) == 3
    for file, step in zip(sorted(files), (0, 9, 99), strict=True):
        dump, x = dumps.load(file), make_inputs(PROBLEM, seed=step)
        assert torch.equal(dump.inputs.q, x.q) and torch.equal(dump.outputs.o, outputs[step].cpu())
        assert torch.equal(dump.inputs.state, before[step].cpu()[dump.meta["slots"]])
    result = CliRunner().invoke(cli, ["compare", str(tmp_path / "d")])
    assert result.exit_code == 0, result.output
    events, torn = journal.events(tmp_path / "d")
    assert torn == 0 and sum(event["event"] == "written" for event in events) == 3


@pytest.mark.gpu
def test_streams_of_their_own_whose_buffers_are_used_again(loop, tmp_path):
    """The copies are made on the stream of the call: after what fills its inputs, and before what comes next there."""
    made = [make_inputs(PROBLEM, seed=seed, device="cuda") for seed in range(3)]
    x = copy_of(made[0], "cuda")
    x.state.nan_to_num_(0.0)
    torch.cuda.synchronize()
    with capture(TARGET, out=tmp_path / "d", calls=3) as files:
        for source in made:
            with torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda._sleep(20_000_000)
                for name in ("q", "k", "v", "g", "beta"):
                    getattr(x, name).copy_(getattr(source, name))
                loop.decode(**call_of(x))
                x.q.fill_(float("nan"))
            torch.cuda.synchronize()
    assert all(torch.equal(dumps.load(file).inputs.q, source.q.cpu()) for file, source in zip(files, made, strict=True))
    result = CliRunner().invoke(cli, ["compare", str(tmp_path / "d")])
    assert result.exit_code == 0, result.output


def test_copies_are_made_where_the_switch_is_on(monkeypatch):
    """Of rows that lie apart, of elements of one and two bytes between others, and of rows that indices name."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(switched, "PARTS", 2)
    made = functools.partial(torch.randn, device=device)
    tokens, odd = made(3, 5, 64).bfloat16()[..., 1:33], made(7, 6).bfloat16()[:, 1]
    pool, slots = made(9, 2, 4, 8), torch.tensor([[3, 7], [-1, 7], [20, 7]], device=device)[:, 0]
    windows = pool.transpose(2, 3)[:, 1]
    sources = [(tokens.unflatten(-1, (2, 16)), None), (odd, None), (odd > 0, None), (made(()), None)]
    sources += [(pool, slots), (pool[:, 1], slots.int()), (windows, slots)]
    copies = [
        Copy(source.new_zeros(source.shape if rows is None else (3, *source.shape[1:])), source, rows)
        for source, rows in sources
    ]
    table = torch.tensor([switched.row_of(copy) for copy in copies], device=device)
    switched.launch(torch.tensor([0, table.data_ptr()], device=device), 0, len(table))
    assert not any(copy.target.any() for copy in copies)
    switched.launch(torch.tensor([1, table.data_ptr()], device=device), 0, len(table))
    for copy in copies:
        inside = None if copy.indices is None else copy.indices.long().clamp(0, 8)
        assert torch.equal(copy.target, copy.source if inside is None else copy.source[inside])
    assert switched.row_of(Copy(made(3, 2, 8, 4), pool.transpose(2, 3), slots)) is None  # one dimension too many


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kdacli.capture.copy_kernel import copy_kernel

types = {"cell": "*i64", "first": "i32", "COLUMNS": "constexpr", "BLOCK": "constexpr"}
source = ASTSource(copy_kernel, types, {"COLUMNS": 16, "BLOCK": 1024})
triton.compile(source, target=GPUTarget("cuda", 90, 32))
"""


def test_what_makes_the_copies_compiles():
    """In Triton's interpreter, which has the tests above, a variable may have two types."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
