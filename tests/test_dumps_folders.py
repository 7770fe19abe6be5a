"""Folders of dumps: of `kda capture`, of SGLang's dumper and of its forward hooks, written as SGLang writes them."""

import dataclasses

import pytest
import torch
from click.testing import CliRunner

from kda_kernels.errors import InputError
from kda_kernels.problem import Op, Options, Problem
from kda_kernels.reference import plain_recurrent
from kdacli.dumps import join, load, load_all, save, sglang
from kdacli.main import cli
from kdacli.synthetic import make_inputs

OPTIONS = Options(gate="safe", lower_bound=-5.0)
DECODE = Problem(op="decode", seq_lens=(1,) * 3, H=1, HV=2, K=16, V=8, options=OPTIONS, pool_slots=5)


def a_call(seed=0):
    inputs = make_inputs(DECODE, seed=seed)
    inputs.state.nan_to_num_(0.0)
    after = inputs.fresh()
    return inputs, dataclasses.replace(plain_recurrent.run(after), final_state=after.state)


class Dumper:
    """Writes files with the names and contents of sglang.srt.debug_utils.dumper."""

    def __init__(self, folder, rank=0):
        self.folder, self.rank, self.step, self.index = folder, rank, 0, 0
        folder.mkdir(parents=True, exist_ok=True)

    def dump(self, name, value, **tags):
        self.index += 1
        full = {"step": self.step, "rank": self.rank, "dump_index": self.index, "name": name}
        full |= {"recompute_status": "disabled", **tags}
        path = self.folder / ("___".join(f"{k}={v}" for k, v in full.items()) + ".pt")
        torch.save({"value": value, "meta": {**full, "world_rank": self.rank, "world_size": 2}}, path)

    def call(self, inputs, outputs, layer_id, prefix=""):
        self.dump(f"{prefix}hidden_states", torch.zeros(3), layer_id=layer_id)
        names = {"g": "a", "beta": "b", "state": "ssm_states", "state_indices": "cache_indices"}
        names["cu_seqlens"] = "query_start_loc"
        for name, tensor in inputs.tensors().items():
            if name not in ("A_log", "dt_bias"):
                self.dump(prefix + names.get(name, name), tensor, layer_id=layer_id)
        self.dump(f"{prefix}core_attn_out", outputs.o, layer_id=layer_id)
        self.dump(f"{prefix}ssm_states_after", outputs.final_state, layer_id=layer_id)
        self.dump(f"{prefix}lower_bound", -5.0, layer_id=layer_id)

    def parameters(self, inputs, layer):
        for name in ("A_log", "dt_bias"):
            parameter = torch.nn.Parameter(getattr(inputs, name))
            self.dump(f"param__model.layers.{layer}.self_attn.{name}", parameter)


def assert_is(dump, inputs, outputs, op=Op.DECODE):
    for name, tensor in inputs.tensors().items():
        assert torch.equal(dump.inputs.tensors()[name], tensor), name
    assert torch.equal(dump.outputs.o, outputs.o) and torch.equal(dump.outputs.final_state, outputs.final_state)
    assert dump.inputs.options == OPTIONS and dump.op is op


@pytest.mark.parametrize("prefix", ["", "kda_", "attn__"])
def test_a_dumpers_folder(tmp_path, prefix):
    folder = tmp_path / "dump_20261122_050000_000001"
    first, second, other = (a_call(seed) for seed in (0, 1, 2))
    for layer in (3, 4):
        second[0].A_log, second[0].dt_bias = first[0].A_log, first[0].dt_bias
        other[0].A_log, other[0].dt_bias = first[0].A_log, first[0].dt_bias
        for rank in (0, 1):
            dumper = Dumper(folder, rank)
            dumper.index = 100 * layer
            dumper.parameters(first[0], layer)
    dumper = Dumper(folder)
    dumper.call(*first, layer_id=3, prefix=prefix)
    dumper.call(*other, layer_id=3, prefix=prefix)  # the same layer again in one step
    dumper.step = 1
    dumper.call(*second, layer_id=4, prefix=prefix)
    found = {dump.call: dump for dump in load_all(tmp_path)}  # the folder above, which holds one experiment
    assert list(found) == ["rank0.step0.layer3", "rank0.step0.layer3.2", "rank0.step1.layer4"]
    for dump, call in zip(found.values(), (first, other, second), strict=True):
        assert_is(dump, *call)
    assert load(folder, "rank0.step1.layer4").meta["layer"] == "4"


def test_files_of_other_tensors_are_not_even_opened(tmp_path):
    dumper = Dumper(tmp_path)
    dumper.call(*a_call(), layer_id=0)
    dumper.parameters(a_call()[0], 0)
    name = "step=0___rank=0___dump_index=99___name=non_intrusive__model.layers.0.mlp.output___layer_id=0.pt"
    (tmp_path / name).write_bytes(b"damaged")
    assert_is(load(tmp_path), *a_call())


def test_a_forward_hooks_folder(tmp_path):
    inputs, outputs = a_call()
    for rank in (0, 1):
        folder = tmp_path / f"TP{rank}_PP0_Rank{rank}_pid{70 + rank}"
        folder.mkdir()
        layer = {f"model.layers.7.self_attn.{name}": tensor for name, tensor in inputs.tensors().items()}
        layer |= {"model.layers.7.self_attn.attn": [outputs.o, outputs.final_state], "model.norm": torch.zeros(2)}
        layer |= {"model.layers.7.self_attn.q_proj": torch.zeros(4), "model.layers.7.self_attn.lower_bound": -5.0}
        torch.save(layer, folder / "Pass00000.pt")
    assert [dump.call for dump in load_all(tmp_path)] == [f"rank{rank}.Pass00000/layer7" for rank in (0, 1)]
    for dump in (*load_all(tmp_path), load(folder), load(folder / "Pass00000.pt")):
        assert_is(dump, inputs, outputs)


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("q", ("inputs", "q")),
        ("kda__ssm_states", ("inputs", "state")),
        ("non_intrusive__model.layers.3.self_attn.attn.inputs.a", ("inputs", "g")),
        ("non_intrusive__model.layers.3.self_attn.attn.output", ("outputs", "o")),
        ("param__model.layers.3.self_attn.dt_bias", ("inputs", "dt_bias")),
        ("non_intrusive__model.layers.3.mlp.output", None),
        ("non_intrusive__model.layers.3.mlp.output.0", None),
        ("model.layers.3.self_attn.q_proj", None),
        ("model.layers.3.self_attn.q_proj.weight", None),
        ("hidden_states", None),
    ],
)
def test_what_a_name_means(name, meaning):
    assert sglang.meaning(name) == meaning


def test_a_folder_of_dumps(tmp_path):
    (x, out), (y, more) = a_call(0), a_call(1)
    save(tmp_path / "one.pt", x, out, op="decode")
    save(tmp_path / "two.safetensors", y, more, op="decode")
    torch.save({"p": {"inputs": x.tensors(), "options": {"lower_bound": -5.0}}}, tmp_path / "zwei.pt")
    (tmp_path / "capture.jsonl").write_text("{}")
    assert [dump.call for dump in load_all(tmp_path)] == ["one", "two", "zwei/p"]
    assert_is(load(tmp_path, "two"), y, more)


def test_one_broken_file_is_named_and_the_others_compared(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / f"{name}.pt", *a_call(), op="decode")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:-300])
    torch.save({"k": torch.zeros(1)}, tmp_path / "half.pt")
    broken = []
    assert [dump.call for dump in load_all(tmp_path, broken=broken)] == ["a", "b"]
    assert len(broken) == 2 and "call half: q (or query, queries) is missing" in broken[0] and "torn.pt is" in broken[1]
    with pytest.raises(InputError, match=r"torn\.pt is truncated or damaged"):
        load(tmp_path, "torn")
    for words in ([], [str(tmp_path)]):
        result = CliRunner().invoke(
            cli, ["compare", str(tmp_path), *words, *([] if words else ["--kernel", "torch-decode"])]
        )
        assert result.exit_code == 1 and result.stdout.count("FAIL ") == (4 if words else 2), result.output
        assert "torn.pt is truncated or damaged" in result.stdout and "cannot be read" in result.stderr
    for name in ("a", "b"):
        (tmp_path / f"{name}.pt").unlink()
    with pytest.raises(InputError, match="q .* is missing"):
        load_all(tmp_path, broken=[])


def test_a_broken_file_of_a_dumper_breaks_its_call_alone(tmp_path):
    dumper = Dumper(tmp_path)
    for layer in (0, 1):
        dumper.parameters(a_call()[0], layer)
        dumper.call(*a_call(), layer_id=layer)
    next(tmp_path.glob("*name=k___*layer_id=1*")).write_bytes(b"PK damaged")
    broken = []
    (dump,) = load_all(tmp_path, broken=broken)
    assert_is(dump, *a_call())
    assert dump.call == "rank0.step0.layer0" and len(broken) == 1 and "name=k___" in broken[0]


def test_the_heads_of_ranks_are_joined(tmp_path):
    whole = dataclasses.replace(DECODE, H=2, HV=4)
    inputs = make_inputs(whole)
    inputs.state.nan_to_num_(0.0)
    after = inputs.fresh()
    outputs = dataclasses.replace(plain_recurrent.run(after), final_state=after.state)
    parts, alone = tmp_path / "tp2", tmp_path / "tp1"
    parts.mkdir()
    alone.mkdir()
    save(alone / "decode.rank0.call0000.pt", inputs, outputs, op="decode")
    for rank in (0, 1):
        heads, values = slice(rank, rank + 1), slice(2 * rank, 2 * rank + 2)
        part = {name: getattr(inputs, name)[:, :, heads] for name in ("q", "k")}
        part |= {name: getattr(inputs, name)[:, :, values] for name in ("v", "g", "beta")}
        part |= {"A_log": inputs.A_log[values], "dt_bias": inputs.dt_bias[values], "state": inputs.state[:, values]}
        result = dataclasses.replace(outputs, o=outputs.o[:, :, values], final_state=outputs.final_state[:, values])
        save(parts / f"decode.rank{rank}.call0000.pt", dataclasses.replace(inputs, **part), result, op="decode")
    (dump,) = join(load_all(parts))
    assert_is(dump, inputs, outputs)
    result = CliRunner().invoke(cli, ["compare", str(parts), str(alone), "--join"])
    assert result.exit_code == 0 and "decode.rank0.call0000" in result.output, result.output
    with pytest.raises(InputError, match="--join finds no rank in the name of call x"):
        join([dataclasses.replace(dump, call="x")])
    with pytest.raises(InputError, match="rank 0 of call a.rank0 is missing"):
        join([dataclasses.replace(dump, call="a.rank1")])
    other = dataclasses.replace(dump, call="a.rank1", inputs=dataclasses.replace(inputs, state_v_first=False))
    with pytest.raises(InputError, match="with other options"):
        join([dataclasses.replace(dump, call="a.rank0"), other])
    other.inputs = dataclasses.replace(inputs, state_indices=inputs.state_indices + 1)
    with pytest.raises(InputError, match="state_indices of call a.rank0 is not the same on every rank"):
        join([dataclasses.replace(dump, call="a.rank0"), other])


def test_the_heads_of_a_fused_step_are_joined(tmp_path):
    """Channels of a convolution are those of q, of k and of v, so those of a rank lie in three places."""
    whole = make_inputs(Problem(Op.STEP, (1, 1), H=4, HV=4, K=16, V=16, options=OPTIONS, pool_slots=3))
    for pool in (whole.state, whole.conv.states):
        pool.nan_to_num_(0.5)
    after = whole.fresh()
    made = plain_recurrent.run(after)
    outputs = dataclasses.replace(made, final_state=after.state, conv_states=after.conv.states)
    channels = torch.arange(3 * 4 * 16).view(3, 2, -1)
    dim = 2 if whole.conv.tokens_first else 1
    for rank in (0, 1):
        heads, own = slice(2 * rank, 2 * rank + 2), channels[:, rank].flatten()
        part = {name: getattr(whole, name)[:, :, heads] for name in ("q", "k", "v", "g", "beta")}
        part |= {"A_log": whole.A_log[heads], "dt_bias": whole.dt_bias[heads], "state": whole.state[:, heads]}
        states = whole.conv.states.index_select(dim, own)
        bias = None if whole.conv.bias is None else whole.conv.bias[own]
        part["conv"] = dataclasses.replace(whole.conv, weight=whole.conv.weight[own], bias=bias, states=states)
        part["norm"] = dataclasses.replace(whole.norm, gate=whole.norm.gate[:, :, heads])
        result = {"o": outputs.o[:, :, heads], "final_state": outputs.final_state[:, heads]}
        result["conv_states"] = outputs.conv_states.index_select(dim, own)
        inputs = dataclasses.replace(whole, **part)
        save(tmp_path / f"step.rank{rank}.call0000.pt", inputs, dataclasses.replace(outputs, **result), op="step")
    (dump,) = join(load_all(tmp_path))
    assert_is(dump, whole, outputs, Op.STEP)
    for part in ("conv", "norm"):
        for name, tensor in vars(getattr(whole, part)).items():
            assert not isinstance(tensor, torch.Tensor) or torch.equal(vars(getattr(dump.inputs, part))[name], tensor)
    result = CliRunner().invoke(cli, ["compare", str(tmp_path), "--join", "--kernel", "torch-step"])
    assert result.exit_code == 0, result.output


def test_states_in_the_other_layout_are_told(tmp_path):
    inputs = make_inputs(dataclasses.replace(DECODE, V=16))
    inputs.state.nan_to_num_(0.0)
    after = inputs.fresh()
    outputs = dataclasses.replace(plain_recurrent.run(after), final_state=after.state)
    turned = dataclasses.replace(inputs, state=inputs.state.transpose(-1, -2).contiguous())
    turned_after = dataclasses.replace(outputs, final_state=outputs.final_state.transpose(-1, -2).contiguous())
    for before, left, which in (
        (turned, outputs, "first states"), (inputs, turned_after, "final states"), (turned, turned_after, "states"),
    ):  # fmt: skip
        save(tmp_path / "d.pt", before, left, op="decode", force=True)
        result = CliRunner().invoke(cli, ["compare", str(tmp_path / "d.pt"), "--kernel", "torch-decode"])
        assert f"the dump's {which} look K-first" in result.output, result.output
    assert result.exit_code == 1 and "the dump's states look K-first" in result.output, result.output


def test_refusals(tmp_path):
    def refused(words, folder):
        with pytest.raises(InputError, match=words):
            load_all(folder)

    refused("is a directory without dump files", tmp_path)
    for name in ("dump_1", "dump_2"):
        Dumper(tmp_path / name).dump("hidden_states", torch.zeros(1))
    refused("holds the dump folders dump_1, dump_2: name one of them", tmp_path)
    refused("no tensor of a KDA call under a name that kda knows: it holds hidden_states", tmp_path / "dump_1")
    Dumper(tmp_path / "dump_1", rank=5).dump("q", torch.zeros(1))
    refused("call rank5.step0: k .* is missing", tmp_path / "dump_1")
    torch.save([1], next((tmp_path / "dump_1").glob("*name=q*")))
    refused("does not hold what SGLang's dumper writes", tmp_path / "dump_1")
    torch.save({"model.layers.0.mlp": torch.zeros(1)}, tmp_path / "Pass00000.pt")
    refused("under a name that kda knows: it holds model.layers.0.mlp", tmp_path / "Pass00000.pt")
