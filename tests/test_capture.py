"""`kda capture`: the calls of other programs as dumps, whose results it must not change."""

import dataclasses
import json
import os
import resource
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from kda_kernels.errors import InputError, UnavailableError
from kda_kernels.problem import Op, Options, Problem
from kda_kernels.reference import oracle
from kda_kernels.tensors import Checkpoints
from kdacli import dumps
from kdacli.capture import capture, journal, sites
from kdacli.capture.launch import BOOTSTRAP, environment
from kdacli.capture.settings import Settings
from kdacli.judge import Reference, judge
from kdacli.output import write_json
from kdacli.synthetic import make_inputs

ROOT = Path(__file__).parents[1]
SAFE = Options("safe", -5.0)

# An engine: a kernel over a pool in place, one with FLA's signature, a layer that imported the function by name, and
# one that calls it under another.
ENGINE = '''
import torch
from kda_kernels.problem import Options
from kda_kernels.reference import plain_recurrent
from kda_kernels.tensors import Inputs

OPTIONS = Options(gate="safe", lower_bound=-5.0)


def chunk_kda(q, k, v, g, beta, A_log=None, dt_bias=None, initial_state=None, output_final_state=False,
              use_gate_in_kernel=False, use_qk_l2norm_in_kernel=False, use_beta_sigmoid_in_kernel=False,
              lower_bound=None, state_v_first=False, cu_seqlens=None, **kwargs):
    if kwargs.get("crash"):
        v.fill_(7.0)
        raise ValueError("out of registers")
    out = plain_recurrent.run(Inputs(q, k, v, g, beta, OPTIONS, A_log, dt_bias, initial_state, cu_seqlens=cu_seqlens))
    v.zero_()  # SGLang's chunk kernel writes its output over v
    return out.o, out.final_state


def decode(a, b, ssm_states, cache_indices, q, k, v, A_log, dt_bias, query_start_loc, lower_bound, softplus_beta=1.0):
    """In place; returns o alone."""
    inputs = Inputs(q, k, v, a, b, OPTIONS, A_log, dt_bias, ssm_states, cache_indices, query_start_loc)
    return plain_recurrent.run(inputs).o


class Layer:
    def __init__(self, layer_id):
        self.layer_id = layer_id

    def forward(self, **call):
        return chunk_kda(**call)

    @staticmethod
    def static(q, k, v, g, beta):
        return v + 1
'''

MAKE = """
import torch
from kda_kernels.problem import Options, Problem
from kdacli.synthetic import make_inputs

SAFE = Options(gate="safe", lower_bound=-5.0)
SHAPE = dict(H=1, HV=2, K=16, V=8, options=SAFE)

def prefill(seed=0):
    x = make_inputs(Problem(op="prefill", seq_lens=(5, 9), **SHAPE), seed=seed)
    said = dict(use_gate_in_kernel=True, use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True)
    t = x.tensors()
    t["initial_state"] = t.pop("state")
    return x, {**t, **said, "lower_bound": -5.0, "state_v_first": True, "output_final_state": True}

def decode(seed=0):
    x = make_inputs(Problem(op="decode", seq_lens=(1,) * 3, pool_slots=9, padding=1, **SHAPE), seed=seed)
    t = x.tensors()
    names = dict(g="a", beta="b", state="ssm_states", state_indices="cache_indices", cu_seqlens="query_start_loc")
    return x, {**{names.get(k, k): v for k, v in t.items()}, "lower_bound": -5.0}
"""
exec(MAKE)
prefill, decode = globals()["prefill"], globals()["decode"]


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """The engine as a module that another one imported from before the capture began."""
    (tmp_path / "engine_for_test.py").write_text(ENGINE)
    (tmp_path / "user_for_test.py").write_text("from engine_for_test import chunk_kda as mine, decode\n")
    (tmp_path / "making.py").write_text(MAKE)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("engine_for_test", "user_for_test"):
        sys.modules.pop(name, None)
    import engine_for_test
    import user_for_test  # noqa: F401

    yield engine_for_test
    for name in ("engine_for_test", "user_for_test", "making"):
        sys.modules.pop(name, None)


def user():
    return sys.modules["user_for_test"]


def assert_same(inputs, call):
    for name, tensor in inputs.tensors().items():
        assert torch.equal(call.inputs.tensors()[name], tensor), name


class TestInProcess:
    def test_a_prefill_is_what_went_in_and_came_out(self, engine, tmp_path):
        x, call = prefill()
        wanted = x.fresh()
        wanted.v = x.v.clone()
        with capture("engine_for_test:chunk_kda", out=tmp_path / "d") as files:
            o, state = user().mine(**call)  # imported by name, and under another, before the capture began
        assert [file.name for file in files] == ["chunk_kda.rank0.call0000.pt"]
        dump = dumps.load(files[0])
        assert_same(wanted, dump)  # v was overwritten by the call, and the dump has it as it was
        assert not x.v.any()
        assert torch.equal(dump.outputs.o, o) and torch.equal(dump.outputs.final_state, state)
        assert dump.inputs.options == x.options and dump.op is Op.PREFILL
        assert dump.meta["target"] == "engine_for_test:chunk_kda" and dump.meta["rank"] == 0

    def test_afterwards_everything_is_as_before(self, engine, tmp_path):
        function, attributes = engine.chunk_kda, set(vars(engine))
        with capture("engine_for_test:chunk_kda", out=tmp_path / "d"):
            assert engine.chunk_kda is not function and user().mine is engine.chunk_kda
            assert engine.chunk_kda.__name__ == "chunk_kda"
        assert engine.chunk_kda is function and user().mine is function and set(vars(engine)) == attributes

    def test_a_wrapped_function_that_somebody_kept_records_no_more(self, engine, tmp_path):
        with capture("engine_for_test:chunk_kda", out=tmp_path / "d", calls=9) as files:
            kept = engine.chunk_kda
            kept(**prefill()[1])
        kept(**prefill()[1])
        assert len(files) == 1 and len(list((tmp_path / "d").glob("*.pt"))) == 1

    @pytest.mark.parametrize("whole", [False, True])
    def test_a_pool_in_place(self, engine, tmp_path, whole):
        x, call = decode()
        before = x.state.clone()
        with capture("engine_for_test:decode", out=tmp_path / "d", whole_pool=whole) as files:
            o = user().decode(**call)
        dump = dumps.load(files[0])
        used = [slot for slot in x.state_indices.tolist() if slot >= 0]
        assert dump.inputs.state.shape[0] == (9 if whole else len(used))
        if not whole:
            assert dump.meta["pool_slots"] == 9 and dump.meta["slots"] == sorted(used)
        for n, slot in enumerate(x.state_indices.tolist()):
            ours = int(dump.inputs.state_indices[n])
            assert (ours == -1) == (slot == -1)
            if slot >= 0:
                assert torch.equal(dump.inputs.state[ours], before[slot])
                assert torch.equal(dump.outputs.final_state[ours], x.state[slot])
                assert not torch.equal(before[slot], x.state[slot])
        assert torch.equal(dump.outputs.o, o)
        rows = dump.inputs.state_indices[dump.inputs.state_indices >= 0].long()
        expected = oracle.recurrence(dump.inputs).final_state[rows]
        torch.testing.assert_close(dump.outputs.final_state[rows].double(), expected, rtol=1e-4, atol=1e-5)

    def test_results_are_those_without_it(self, engine, tmp_path):
        (x, call), (y, again) = decode(3), decode(3)
        o = engine.decode(**call)
        with capture("engine_for_test:decode", out=tmp_path / "d"):
            assert torch.equal(engine.decode(**again), o)
        assert torch.equal(x.state.nan_to_num(9.0), y.state.nan_to_num(9.0))  # slots that are not in use hold NaN

    def test_which_calls(self, engine, tmp_path):
        with capture("engine_for_test:chunk_kda", out=tmp_path / "d", calls=2, skip=1, every=3) as files:
            for seed in range(12):
                engine.chunk_kda(**prefill(seed)[1])
        assert [dumps.load(file).meta["call_number"] for file in files] == [1, 4]
        assert torch.equal(dumps.load(files[1]).inputs.q, prefill(4)[0].q)

    def test_layers_have_a_count_of_their_own(self, engine, tmp_path):
        layers = [engine.Layer(i) for i in range(3)]
        with capture("engine_for_test:chunk_kda", out=tmp_path / "d", layers=[0, 2], calls=2) as files:
            for _ in range(4):
                for layer in layers:
                    layer.forward(**prefill()[1])
            engine.chunk_kda(**prefill()[1])  # no layer
        assert [file.name for file in files] == [
            f"chunk_kda.rank0.layer{layer}.call000{call}.pt" for call in (0, 1) for layer in (0, 2)
        ]

    def test_ranks(self, engine, tmp_path, monkeypatch):
        monkeypatch.setenv("RANK", "3")
        with capture("engine_for_test:chunk_kda", out=tmp_path / "d", ranks=[0, 1]) as files:
            engine.chunk_kda(**prefill()[1])
        assert files == []
        with capture("engine_for_test:chunk_kda", out=tmp_path / "d", ranks=[3], force=True) as files:
            engine.chunk_kda(**prefill()[1])
        assert files[0].name == "chunk_kda.rank3.call0000.pt"

    def test_what_the_target_raises_passes_through_with_its_inputs_dumped(self, engine, tmp_path):
        x, call = prefill()
        v = x.v.clone()
        with (
            capture("engine_for_test:chunk_kda", out=tmp_path / "d") as files,
            pytest.raises(ValueError, match="out of registers") as raised,
        ):
            engine.chunk_kda(**call, crash=True)
        assert raised.traceback[-1].name == "chunk_kda"
        dump = dumps.load(files[0])
        assert dump.outputs is None and torch.equal(dump.inputs.v, v)
        assert dump.meta["raised"] == "ValueError: out of registers"

    def test_a_fault_of_the_recorder_stays_inside(self, engine, tmp_path, monkeypatch, capsys):
        from kdacli.capture import taken

        monkeypatch.setattr(taken, "before", lambda *args: 1 / 0)
        with capture("engine_for_test:chunk_kda", out=tmp_path / "d", calls=9) as files:
            for _ in range(3):
                o, _ = engine.chunk_kda(**prefill()[1])
        assert o.any() and files == []
        assert capsys.readouterr().err == "kda capture: not recorded: ZeroDivisionError: division by zero\n"

    def test_a_full_disk_leaves_nothing_behind(self, engine, tmp_path, capsys):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        with capture("engine_for_test:chunk_kda", out=tmp_path / "d", calls=9) as files:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
            try:
                o, _ = engine.chunk_kda(**prefill()[1])
                inputs = prefill()[0]
                for path in (tmp_path / "dump.pt", tmp_path / "dump.safetensors"):
                    with pytest.raises(InputError, match=f"{path} cannot be written: the disk took only a part of it"):
                        dumps.save(path, inputs)
                with pytest.raises(InputError, match="cannot be written: File too large"):
                    write_json({"a": "b" * 9000}, tmp_path / "report.json")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert (
            o.any()
            and files == []
            and [path.name for path in (tmp_path / "d").iterdir()] == [".capture-bytes", journal.NAME]
        )
        assert not {path.suffix for path in tmp_path.iterdir()} & {".pt", ".safetensors", ".json"}
        assert "the disk took only a part of it" in capsys.readouterr().err

    @pytest.mark.parametrize("links", [True, False])
    def test_a_dump_has_its_name_once_it_is_whole(self, engine, tmp_path, monkeypatch, links):
        """So that a process killed at any time leaves whole dumps, and what --force removes."""
        whole = []

        def link(part, path, linked=os.link):
            whole.append(dumps.load(part) is not None and not path.exists())
            if not links:
                raise PermissionError("no links on this file system")
            linked(part, path)

        monkeypatch.setattr(os, "link", link)
        out = tmp_path / "d"
        for force in (False, True):
            with capture("engine_for_test:chunk_kda", out=out, force=force) as files:
                engine.chunk_kda(**prefill()[1])
            begun = out / ".writing-killed"
            assert all(whole) and len(whole) == (1 + force) * (2 - links) and not begun.exists()
            assert [path for path in out.iterdir() if path.suffix == ".pt"] == files and dumps.load(files[0])
            begun.mkdir()
            (begun / "dump.pt").write_bytes(b"torn")
            assert list(dumps.load_all(out)), "a file that was begun is no call"

    def test_bytes(self, engine, tmp_path, capsys):
        with capture("engine_for_test:chunk_kda", out=tmp_path / "d", calls=9, max_bytes=20_000) as files:
            for _ in range(9):
                engine.chunk_kda(**prefill()[1])
        assert 0 < len(files) < 9
        found = [dumps.load(file) for file in files]
        tensors = sum(t.nbytes for dump in found for x in (dump.inputs, dump.outputs) for t in x.tensors().values())
        assert tensors <= 20_000
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "--max-bytes" in line]
        assert "a call of " in line and "would exceed --max-bytes 20 kB" in line

    def test_graph_capture_is_left_out_with_a_note(self, engine, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with capture("engine_for_test:chunk_kda", out=tmp_path / "d") as files:
            engine.chunk_kda(**prefill()[1])
            engine.chunk_kda(**prefill()[1])
            monkeypatch.undo()
            engine.chunk_kda(**prefill()[1])
        assert len(files) == 1
        assert capsys.readouterr().err.count("under CUDA graph capture") == 1

    def test_strides_are_kept(self, engine, tmp_path):
        x, call = prefill()
        wide = torch.randn(1, 14, 3, 24).to(x.q.dtype)
        call["q"] = wide[:, :, 1:2, 4:20]
        with capture("engine_for_test:chunk_kda", out=tmp_path / "d") as files:
            engine.chunk_kda(**call)
        q = dumps.load(files[0]).inputs.q
        assert torch.equal(q, call["q"]) and q.stride()[1] == call["q"].stride()[1]

    def test_methods_and_names_of_the_users_own(self, engine, tmp_path):
        t = prefill()[0].tensors()
        args = [t[name] for name in ("q", "k", "v", "g", "beta")]
        with capture("engine_for_test:Layer.static", out=tmp_path / "d") as files:
            out = engine.Layer(0).static(*args)
            engine.Layer.static(*args)
        assert torch.equal(torch.load(files[0])["outputs"]["o"], out)
        assert isinstance(vars(engine.Layer)["static"], staticmethod)
        (tmp_path / "odd_for_test.py").write_text("def f(one, two, three, four, five, six):\n    return three * 2\n")
        known = {"one": "q", "two": "k", "three": "v", "four": "g", "five": "beta"}
        with capture("odd_for_test:f", out=tmp_path / "e", names=known) as files:
            sys.modules["odd_for_test"].f(*args, torch.zeros(3))
        tree = torch.load(files[0])
        assert tree["meta"]["not_dumped"] == "six" and torch.equal(tree["inputs"]["g"], t["g"])

    def test_a_call_that_lacks_something_is_told(self, engine, tmp_path, capsys):
        (tmp_path / "half_for_test.py").write_text("def f(q, k, x):\n    return q\n")
        with capture("half_for_test:f", out=tmp_path / "d") as files:
            sys.modules["half_for_test"].f(torch.zeros(2), torch.zeros(2), 1)
        assert files == []
        assert "it has no v and no g and no beta (--name THEIRS=OURS" in capsys.readouterr().err

    def test_refusals(self, engine, tmp_path):
        def refused(words, *targets, **settings):
            with pytest.raises(InputError, match=words), capture(*targets, **{"out": tmp_path / "d"} | settings):
                pass

        refused("not module:function", "chunk_kda")
        refused("no target")
        refused("calls is 0", "engine_for_test:chunk_kda", calls=0)
        refused("cannot be imported", "no_such_module_x:f")
        refused("is not there", "engine_for_test:nothing")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "thesis.txt").write_text("precious")
        refused("is not empty", "engine_for_test:chunk_kda", out=tmp_path / "full")
        with capture("engine_for_test:chunk_kda", out=tmp_path / "full", force=True) as files:
            engine.chunk_kda(**prefill()[1])
        with capture("engine_for_test:decode", out=tmp_path / "full", force=True):
            pass
        assert not files[0].exists() and (tmp_path / "full" / "thesis.txt").read_text() == "precious"


class TestSites:
    """What engines' arguments mean, against stand-ins with their signatures."""

    def recorded(self, tmp_path, target, source, *args, **kwargs):
        module, _, function = target.partition(":")
        parts = module.split(".")
        for i in range(1, len(parts)):
            folder = tmp_path.joinpath(*parts[:i])
            folder.mkdir(exist_ok=True)
            (folder / "__init__.py").touch()
        tmp_path.joinpath(*parts).with_suffix(".py").write_text(textwrap.dedent(source))
        sys.path.insert(0, str(tmp_path))
        try:
            with capture(target, out=tmp_path / "d") as files:
                thing = sys.modules[module]
                for part in function.split("."):
                    thing = getattr(thing, part)
                thing(*args, **kwargs)
        finally:
            sys.path.remove(str(tmp_path))
            for name in [name for name in sys.modules if name.split(".")[0] == parts[0]]:
                del sys.modules[name]
        return dumps.load(files[0]) if files else None

    def test_sglang_decode_has_raw_gates_and_v_first_pools(self, tmp_path):
        x, call = decode()
        source = """
        class KDAKernelDispatcher:
            def decode(self, q, k, v, a, b, *, A_log, dt_bias, ssm_states, cache_indices, query_start_loc, **kwargs):
                return v.clone()
        """
        target = "sglang.srt.layers.attention.linear.kda_backend:KDAKernelDispatcher.decode"
        dump = self.recorded(tmp_path, target, source, None, **call)
        assert dump.inputs.options == x.options and dump.inputs.state_v_first and dump.op is Op.DECODE
        assert torch.equal(dump.inputs.g, x.g) and torch.equal(dump.inputs.cu_seqlens, x.cu_seqlens)

    def test_sglang_extend_has_ready_betas_unless_told(self, tmp_path):
        x, call = prefill()
        call = {name: call[name] for name in ("q", "k", "v", "A_log", "dt_bias", "lower_bound")}
        call |= {"g": x.g, "beta": torch.sigmoid(x.beta), "query_start_loc": x.cu_seqlens}
        call |= {"ssm_states": torch.cat([x.state] * 2), "cache_indices": torch.tensor([3, 1])}
        source = """
        class KDAKernelDispatcher:
            def extend(self, q, k, v, g, beta, *, ssm_states, cache_indices, query_start_loc, **kwargs):
                return v
        """
        target = "sglang.srt.layers.attention.linear.kda_backend:KDAKernelDispatcher.extend"
        dump = self.recorded(tmp_path, target, source, None, **call)
        assert not dump.inputs.options.beta_is_logit and dump.inputs.options.gate == "safe"
        assert torch.equal(dump.inputs.state[dump.inputs.state_indices.long()], torch.cat([x.state] * 2)[[3, 1]])

    def test_packed_decode_of_vllm(self, tmp_path):
        x, call = decode()
        mixed = torch.cat([x.q.flatten(2), x.k.flatten(2), x.v.flatten(2)], dim=-1).squeeze(0)
        indices = torch.where(x.state_indices < 0, 0, x.state_indices + 1)
        pool = torch.cat([x.state[:1], x.state])
        source = """
        def fused_recurrent_kda_packed_decode(mixed_qkv, raw_g, raw_beta, A_log, dt_bias, lower_bound, initial_state,
                                              state_indices, scale=None):
            H = initial_state.shape[1]
            return mixed_qkv.new_zeros(1, len(mixed_qkv), *initial_state.shape[1:3]), initial_state
        """
        target = "vllm.models.kimi_k3.nvidia.ops.third_party.kda:fused_recurrent_kda_packed_decode"
        dump = self.recorded(tmp_path, target, source, mixed, x.g, x.beta, x.A_log, x.dt_bias, -5.0, pool, indices)
        for name in ("q", "k", "v"):
            assert torch.equal(getattr(dump.inputs, name), getattr(x, name)), name
        assert (dump.inputs.state_indices < 0).tolist() == (x.state_indices < 0).tolist()  # slot 0 is padding there
        assert dump.inputs.options == x.options

    def test_verify_of_sglang_leaves_the_pool_and_writes_states_of_tokens(self, tmp_path):
        x, call = decode()
        call = {name: call[name] for name in ("q", "k", "v", "a", "b", "A_log", "dt_bias", "ssm_states", "lower_bound")}
        call["ssm_states"] = pool = torch.randn(9, 2, 8, 16)
        call |= {"cache_indices": torch.tensor([4, -1, 2, 0]), "query_start_loc": torch.arange(4)}
        buffer = torch.arange(6.0).view(6, 1, 1, 1, 1).expand(6, 2, 2, 8, 16).clone()
        call |= {"intermediate_states_buffer": buffer, "intermediate_state_indices": torch.tensor([5, 1, 3])}
        source = """
        class KDAKernelDispatcher:
            def target_verify(self, A_log, dt_bias, q, k, v, a, b, *, ssm_states, cache_indices, query_start_loc,
                              intermediate_states_buffer, intermediate_state_indices, cache_steps,
                              retrieve_parent_token, lower_bound=None, **kwargs):
                intermediate_states_buffer[5] = 50
                return v + 1
        """
        target = "sglang.srt.layers.attention.linear.kda_backend:KDAKernelDispatcher.target_verify"
        arguments = {**call, "cache_steps": 2, "retrieve_parent_token": None}
        inputs = self.recorded(tmp_path, target, source, None, **arguments).inputs
        assert not inputs.update_state and not inputs.output_final_state and inputs.options == x.options
        assert inputs.state_indices.tolist() == [1, -1, 0] and torch.equal(inputs.state, pool[[2, 4]])
        assert inputs.token_state_indices.tolist() == [2, 0, 1]
        assert inputs.token_states[:, 0, 0, 0, 0].tolist() == [1, 3, 50]  # as the call left them
        for path in (tmp_path / "d").iterdir():
            path.unlink()
        arguments["retrieve_parent_token"] = torch.zeros(1)
        assert self.recorded(tmp_path, target, source, None, **arguments) is None
        (event,) = [event for event in journal.events(tmp_path / "d")[0] if event["event"] == "left out"]
        assert (event["target"], event["reason"], event["calls"]) == (target, "a tree of drafts", 1)

    def test_speculative_decoding_of_vllm(self, tmp_path):
        x, call = decode()
        tensors = {name: call[name] for name in ("q", "k", "v", "A_log", "dt_bias", "lower_bound")}
        slots = torch.tensor([[3, 7], [0, 0], [5, 0]], dtype=torch.int32)
        source = """
        def fused_recurrent_kda(q, k, v, raw_g, raw_beta, A_log, dt_bias, lower_bound, initial_state, cu_seqlens,
                                ssm_state_indices=None, num_accepted_tokens=None, out=None, fuse_gate=True):
            initial_state[7] = 70
            return v + 1, initial_state
        """
        target = "vllm.models.kimi_k3.nvidia.ops.third_party.kda:fused_recurrent_kda"
        tensors |= {"raw_g": x.g, "raw_beta": x.beta, "initial_state": x.state, "cu_seqlens": x.cu_seqlens}
        tensors |= {"ssm_state_indices": slots, "num_accepted_tokens": torch.tensor([2, 0, 1, 0], dtype=torch.int32)}
        before = x.state[[3, 5, 7]]
        dump = self.recorded(tmp_path, target, source, **tensors)
        assert dump.inputs.state_indices.tolist() == [[0, 2], [-1, -1], [1, -1]]
        assert dump.inputs.num_accepted_tokens.tolist() == [2, 1, 1]
        assert torch.equal(dump.inputs.state.nan_to_num(9.0), before.nan_to_num(9.0))
        assert (dump.outputs.final_state[2] == 70).all() and dump.op is Op.DECODE

    def test_checkpoints_of_vllm(self, tmp_path):
        x, call = prefill()
        source = """
        def _flashkda_prefill(q, k, v, g, beta, A_log, dt_bias, lower_bound, initial_state, cu_seqlens, out,
                              final_state, workspace, checkpoint_state=None, checkpoint_offsets=None):
            return out, initial_state
        """
        target = "vllm.models.kimi_k3.nvidia.kda:_flashkda_prefill"
        names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "lower_bound", "initial_state", "cu_seqlens")
        more = {"out": x.v, "final_state": x.state, "workspace": torch.zeros(3), "checkpoint_state": x.state + 3}
        more["checkpoint_offsets"] = torch.tensor([64, 16])  # of FlashKDA's, 16 is no position that ours have
        dump = self.recorded(tmp_path, target, source, **{name: call[name] for name in names}, **more)
        assert torch.equal(dump.inputs.q, x.q)
        kept = dump.inputs.checkpoints
        assert (kept.rows.tolist(), kept.offsets.tolist()) == ([0, -1], [64, 0])
        assert torch.equal(dump.outputs.checkpoints, x.state + 3) and "not_dumped" not in dump.meta

    def test_snapshots_of_sglang_are_judged(self, tmp_path):
        """Row 0 is what the oracle says after its first chunk, row 1 before any is no checkpoint of ours."""
        x = make_inputs(Problem("prefill", (70, 3), 1, 1, 16, 16, pool_slots=4, options=SAFE), gates="init")
        x = dataclasses.replace(x, state=x.state.nan_to_num(0.5))
        rows, offsets = torch.arange(2), torch.tensor([64, 0])
        at = Checkpoints(torch.zeros(2, 1, 16, 16), rows, offsets)
        want = oracle.recurrence(dataclasses.replace(x, checkpoints=at)).checkpoints.float()
        source = """
        class KDAKernelDispatcher:
            def extend(self, q, k, v, g, beta, *, ssm_states, cache_indices, query_start_loc, **kwargs):
                kwargs["track_state"].copy_(kwargs["made"])
                return v
        """
        target = "sglang.srt.layers.attention.linear.kda_backend:KDAKernelDispatcher.extend"
        call = {"A_log": x.A_log, "dt_bias": x.dt_bias, "lower_bound": -5.0, "beta_is_raw": True, "ssm_states": x.state}
        call |= {"cache_indices": x.state_indices, "query_start_loc": x.cu_seqlens, "made": want}
        call |= {"track_state": torch.empty_like(want), "track_chunk_idx": torch.tensor([1, 0], dtype=torch.int32)}
        dump = self.recorded(tmp_path, target, source, None, x.q, x.k, x.v, x.g, x.beta, **call)
        verdicts = {v.tensor: v for v in judge(Reference(dump.inputs, dump.op), dump.outputs, partial=True)}
        assert verdicts["checkpoints"].passed, verdicts["checkpoints"]
        dump.outputs.checkpoints[0] += 0.1
        verdicts = {v.tensor: v for v in judge(Reference(dump.inputs, dump.op), dump.outputs, partial=True)}
        assert not verdicts["checkpoints"].passed

    def test_a_method_keeps_parameters_of_its_own(self, tmp_path):
        x, call = prefill()
        source = """
        class Glm5NextLinearAttention:
            def _flashkda_prefill(self, q, k, v, g, beta, initial_state, cu_seqlens, out, checkpoint=None, raw_qkv=None,
                                  conv_state=None, recurrent_state=None):
                return v + 1, initial_state + 1
        """
        target = "vllm.models.glm5next.common.kda:Glm5NextLinearAttention._flashkda_prefill"
        layer = types.SimpleNamespace(A_log=x.A_log.view(1, 1, -1, 1), dt_bias=x.dt_bias, kda_lower_bound=-5.0)
        tensors = {name: call[name] for name in ("q", "k", "v", "g", "beta", "initial_state", "cu_seqlens")}
        dump = self.recorded(tmp_path, target, source, layer, **tensors, out=None, recurrent_state=torch.zeros(9, 9))
        assert_same(x, dump)
        assert dump.inputs.options == x.options and torch.equal(dump.outputs.final_state, x.state + 1)

    def test_calls_of_other_ops_and_those_no_dump_holds_are_counted_or_passed_over(self, tmp_path, capsys):
        x, call = decode()
        source = """
        def fused_sigmoid_gating_delta_rule_update(A_log, a, dt_bias, q, k, v, b, initial_state_source,
                                                   initial_state_indices, is_kda=False):
            return v
        """
        update = "linear.fused_sigmoid_gating_recurrent:fused_sigmoid_gating_delta_rule_update"
        call = {name: call[name] for name in ("q", "k", "v", "a", "b", "A_log", "dt_bias")}
        call |= {"initial_state_source": x.state, "initial_state_indices": x.state_indices}
        assert self.recorded(tmp_path, f"sglang.kernels.ops.attention.{update}", source, **call) is None
        assert capsys.readouterr().err == ""  # no KDA, so nothing to tell
        (tmp_path / "d" / journal.NAME).unlink()
        name = "kda_recoverssm_verify"
        target, source = f"vllm.models.kimi_k3.nvidia.ops.recoverssm:{name}", f"def {name}(x):\n    return x"
        assert self.recorded(tmp_path, target, source, torch.zeros(1)) is None
        assert capsys.readouterr().err.startswith(
            f"kda capture: calls of {target} are counted and not recorded: its states are kept as records"
        )

    def test_every_site_is_well_formed_and_once(self):
        every = [site.target for group in sites.ENGINES.values() for site in group]
        assert len(every) == len(set(every)) and all(map(sites.well_formed, every))


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """kda capture of a program in a process of its own, from a folder where nothing of kda is importable but by its
    own doing: its exit code, and what both wrote.
    """
    from kdacli.main import cli

    def run(program, *flags):
        path = os.pathsep.join((str(ROOT), str(ROOT / "kernels"), str(tmp_path)))
        monkeypatch.setenv("PYTHONPATH", path)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.chdir(tmp_path)
        ours = CliRunner().invoke(cli, ["capture", *flags, "--out", str(tmp_path / "d"), "--", *program])
        theirs = capfd.readouterr()
        return ours.exit_code, ours.stdout + theirs.out, ours.stderr + theirs.err

    return run


class TestPrograms:
    TARGET = ("--target", "engine_for_test:chunk_kda")

    def write(self, tmp_path, body):
        head = "from making import prefill\nimport engine_for_test\n"
        (tmp_path / "serve.py").write_text(head + textwrap.dedent(body))

    def test_a_script_that_spawns_workers(self, engine, tmp_path, run):
        self.write(
            tmp_path,
            """
            import os, sys

            def work(rank):
                os.environ["RANK"] = str(rank)
                from engine_for_test import chunk_kda
                chunk_kda(**prefill(rank)[1])

            if __name__ == "__main__":
                import torch.multiprocessing as mp
                mp.spawn(work, nprocs=2)
                print("arguments", *sys.argv[1:])
            """,
        )
        code, said, complaints = run(["serve.py", "--port", "1"], *self.TARGET, "--ranks", "0,1")
        assert code == 0, complaints
        assert "arguments --port 1" in said and "2 calls, " in said
        names = {f"chunk_kda.rank{rank}.call0000.pt" for rank in (0, 1)}
        assert {path.name for path in (tmp_path / "d").glob("*.pt")} == names
        for rank in (0, 1):
            dump = dumps.load(tmp_path / "d" / f"chunk_kda.rank{rank}.call0000.pt")
            assert torch.equal(dump.inputs.q, prefill(rank)[0].q)

    def test_a_module_and_a_sitecustomize_of_the_users_own(self, engine, tmp_path, run):
        self.write(tmp_path, "engine_for_test.chunk_kda(**prefill()[1])")
        (tmp_path / "sitecustomize.py").write_text("print('mine ran')")
        code, said, complaints = run([sys.executable, "-m", "serve"], *self.TARGET)
        assert code == 0, complaints
        assert "mine ran" in said and len(list((tmp_path / "d").glob("*.pt"))) == 1

    def test_a_sitecustomize_of_the_users_own_runs_where_ours_cannot(self, tmp_path):
        (tmp_path / "sitecustomize.py").write_text("print('mine ran')")
        settings = Settings(targets=("fla",), out=str(tmp_path)).to_environment()  # and no KDA_CAPTURE_ROOTS
        variables = {**os.environ, **settings, "PYTHONPATH": f"{BOOTSTRAP}:{tmp_path}"}
        result = subprocess.run([sys.executable, "-c", ""], env=variables, capture_output=True, text=True)
        assert result.stdout == "mine ran\n" and "cannot record in this process: KeyError" in result.stderr

    def test_the_programs_exit_code_is_passed_on(self, engine, tmp_path, run):
        self.write(tmp_path, "engine_for_test.chunk_kda(**prefill()[1])\nraise SystemExit(7)")
        code, said, _ = run(["serve.py"], *self.TARGET)
        assert code == 7 and "1 call, " in said

    @pytest.mark.parametrize(
        ("target", "words"),
        [
            ("fla", "the program never imported fla"),
            ("light:decode", "light:decode was never called from Python"),
            ("light:nothing", "light:nothing is not there, or is no function"),
        ],
    )
    def test_nothing_recorded_is_a_failure_that_says_why(self, tmp_path, monkeypatch, target, words):
        """The program is a process, the command itself is not."""
        from kdacli.main import cli

        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        (tmp_path / "light.py").write_text("def decode():\n    pass\n")
        (tmp_path / "serve.py").write_text("" if target == "fla" else "import light\n")
        result = CliRunner().invoke(cli, ["capture", "--target", target, "--out", "d", "--", "serve.py"])
        assert result.exit_code == 1
        assert result.stderr == f"Error: nothing was recorded: {words}\n"

    def test_wrong_use(self, tmp_path):
        from kdacli.commands.capture import command

        def refused(words, error, program, *flags):
            result = CliRunner().invoke(command, [*flags, "--out", str(tmp_path / "d"), "--", *program])
            assert isinstance(result.exception, error) and words in f"{result.output}{result.exception}"

        refused("not module:function", InputError, ["x.py"], "--target", "chunk")
        refused("cannot be started: No such file", UnavailableError, ["/no/such/program"], *self.TARGET)
        refused("is not a size", SystemExit, ["x.py"], *self.TARGET, "--max-bytes", "lots")
        refused("is not THEIRS=OURS", InputError, ["x.py"], *self.TARGET, "--name", "a=zzz")


def test_other_processes_pay_next_to_nothing(tmp_path):
    """A Python process that never imports a target must not import torch on our behalf."""
    settings = Settings(targets=("fla", "sglang", "vllm"), out=str(tmp_path))
    code = "import sys; print('torch' in sys.modules, 'kdacli.capture' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], env=environment(settings), capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("False True\n", "")


def test_help_is_quick_and_whole():
    from kdacli.commands.capture import command

    result = CliRunner().invoke(command, ["--help"])
    assert result.exit_code == 0 and "kda capture --target fla.ops.kda:chunk_kda" in result.output


def test_events_survive_many_writers(tmp_path):
    code = """
        import sys
        from kdacli.capture import journal
        for i in range(50):
            journal.reserve(sys.argv[1], 1, 120)
            journal.record(sys.argv[1], "note", text=str(i))
    """
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    words = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    workers = [subprocess.Popen(words, env={**os.environ, "PYTHONPATH": path}) for _ in range(3)]
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    with (tmp_path / journal.NAME).open("ab") as file:
        file.write(b'{"event": "note", "te')  # torn by a full disk
    journal.record(tmp_path, "note", text="after it")
    events, torn = journal.events(tmp_path)
    assert (len(events), torn) == (151, 1) and events[-1]["text"] == "after it"
    assert not journal.reserve(tmp_path, 1, 120) and json.loads((tmp_path / ".capture-bytes").read_text()) == 120
