"""Dumps: written and read back, under every alias, with what is inferred, and refused with one clear line."""

import dataclasses
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kda_kernels.errors import InputError
from kda_kernels.problem import Gate, Op, Options, Parts, Problem
from kda_kernels.reference import oracle
from kda_kernels.tensors import Checkpoints, Inputs, Outputs
from kdacli.dumps import load, load_all, names, save
from kdacli.dumps.save import said_options
from kdacli.dumps.strides import copy_of
from kdacli.synthetic import make_inputs

SAFE = Options(gate="safe", lower_bound=-5.0)


def problem(**changes) -> Problem:
    return Problem(**{"op": "prefill", "seq_lens": (5, 9), "H": 1, "HV": 2, "K": 16, "V": 8, "options": SAFE} | changes)


def computed(inputs: Inputs) -> Outputs:
    """The oracle's results, rounded as a kernel rounds them."""
    exact = oracle.recurrence(inputs)
    dtype = torch.float32 if inputs.state is None else inputs.state.dtype
    return Outputs(exact.o.to(inputs.v.dtype), None if exact.final_state is None else exact.final_state.to(dtype))


def flat(inputs: Inputs, op: str = "prefill", outputs: Outputs | None = None) -> dict:
    return {**inputs.tensors(), **(outputs.tensors() if outputs else {}), **said_options(inputs, op)}


def write(path, tree) -> str:
    torch.save(tree, path)
    return path


def assert_same(a: Inputs, b: Inputs) -> None:
    assert a.tensors().keys() == b.tensors().keys()
    for name, tensor in a.tensors().items():
        assert torch.equal(tensor.nan_to_num(7.0), b.tensors()[name].nan_to_num(7.0)), name
        assert tensor.dtype == b.tensors()[name].dtype, name
    assert (a.options, a.state_v_first, a.output_final_state) == (b.options, b.state_v_first, b.output_final_state)


CASES = {
    "prefill": problem(),
    "no state": problem(initial_state=False),
    "softplus": problem(options=Options(gate="softplus")),
    "activated gate, beta values": problem(
        options=Options(gate="none", lower_bound=-5.0, beta_is_logit=False, scale=0.3)
    ),
    "negative eigenvalues, no norm": problem(options=dataclasses.replace(SAFE, allow_neg_eigval=True, qk_l2norm=False)),
    "K-first, no final state": problem(state_v_first=False, final_state=False, dtype="float32"),
    "decode pool": problem(op="decode", seq_lens=(1,) * 4, packed=False, pool_slots=6, padding=1),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_loaded(tmp_path, case, suffix):
    inputs = make_inputs(CASES[case])
    outputs = computed(inputs)
    path = tmp_path / f"dump{suffix}"
    save(path, inputs, outputs, op=CASES[case].op, meta={"engine": "none", "layer": "3"})
    dump = load(path)
    assert_same(dump.inputs, inputs)
    assert dump.op is CASES[case].op
    assert dump.meta == {"engine": "none", "layer": "3"}
    assert dump.notes == []  # everything was said
    assert torch.equal(dump.outputs.o, outputs.o)
    assert (dump.outputs.final_state is None) == (outputs.final_state is None)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_strides_survive_in_pt(tmp_path):
    inputs = make_inputs(problem(op="decode", seq_lens=(1, 1, 1), pool_slots=4))
    wide = torch.randn(1, 3, 1, 48, dtype=torch.bfloat16)
    envelope = torch.randn(4, 2 * 8 * 16 + 64)
    pool = envelope.as_strided((4, 2, 8, 16), (2 * 8 * 16 + 64, 128, 16, 1))
    inputs = dataclasses.replace(inputs, q=wide[..., 16:32], state=pool)
    save(tmp_path / "dump.pt", inputs, op="decode")
    back = load(tmp_path / "dump.pt").inputs
    assert back.q.stride() == inputs.q.stride()
    assert back.state.stride() == pool.stride()
    assert torch.equal(back.state, pool)
    assert torch.equal(back.q, inputs.q)
    assert back.q.untyped_storage().nbytes() < wide.untyped_storage().nbytes()  # nothing beside it went along


def test_who_shares_memory_survives_in_pt_and_on_the_way_to_a_device(tmp_path):
    """q, k and v of one projection, at an odd address; the state apart from them."""
    inputs = make_inputs(problem(V=16, HV=1))
    mixed = torch.randn(1, 14, 64, dtype=torch.bfloat16).flatten()[5:].as_strided((1, 14, 3, 16), (64 * 13, 60, 16, 1))
    q, k, v = (mixed[:, :, i : i + 1] for i in range(3))
    inputs = dataclasses.replace(inputs, q=q, k=k, v=v)
    save(tmp_path / "d.pt", inputs, op="prefill")
    loaded = load(tmp_path / "d.pt").inputs
    for back in (loaded, copy_of(loaded, "cpu")):
        assert_same(back, inputs)
        storages = {name: getattr(back, name).untyped_storage().data_ptr() for name in ("q", "k", "v", "state")}
        assert storages["q"] == storages["k"] == storages["v"] != storages["state"]
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            copy = getattr(back, name)
            assert copy.stride() == tensor.stride() and copy.data_ptr() % 64 == tensor.data_ptr() % 64, name
            assert copy.data_ptr() - back.q.data_ptr() == tensor.data_ptr() - q.data_ptr()
    between = loaded.q.as_strided((13,), (60,), loaded.q.storage_offset() + 48)
    assert between.isnan().all()  # what lay between the rows was not dumped


def test_the_file_is_mapped_and_never_written(tmp_path):
    inputs = make_inputs(problem(op="decode", seq_lens=(1, 1), pool_slots=3))
    path = tmp_path / "dump.pt"
    save(path, inputs, op="decode")
    before = path.read_bytes()
    dump = load(path)
    assert str(path) in Path("/proc/self/maps").read_text()
    dump.inputs.state.fill_(3.0)  # what a kernel that updates in place does
    assert path.read_bytes() == before


def test_save_never_overwrites_unless_forced(tmp_path):
    inputs = make_inputs(problem())
    path = tmp_path / "dump.pt"
    path.write_text("precious")
    with pytest.raises(InputError, match="exists: use --force"):
        save(path, inputs)
    assert path.read_text() == "precious"
    save(path, inputs, force=True)
    assert_same(load(path).inputs, inputs)
    with pytest.raises(InputError, match=r"ends in \.npz"):
        save(tmp_path / "dump.npz", inputs)
    with pytest.raises(InputError, match="cannot be written"):
        save(tmp_path / "nowhere" / "dump.pt", inputs)


def speculative() -> Inputs:
    """A call with what engines ask for beyond the operation itself."""
    stored = {"state_dtype": "int16", "state_rounding": "stochastic"}
    inputs = make_inputs(problem(op="decode", seq_lens=(2, 1), pool_slots=7, **stored))
    return dataclasses.replace(
        inputs,
        state_indices=torch.tensor([[1, 3], [5, 0]], dtype=torch.int32),
        num_accepted_tokens=torch.tensor([2, 1], dtype=torch.int32),
        has_initial_state=torch.tensor([True, False]),
        token_states=torch.zeros(3, 2, 2, 8, 16),
        token_state_indices=torch.tensor([2, -1], dtype=torch.int32),
        null_slot=0,
        update_state=False,
    )


def step() -> Inputs:
    """A decode with a convolution and a norm."""
    inputs = make_inputs(problem(op="step", seq_lens=(1, 1), pool_slots=7, parts=Parts(bias=True)))
    return dataclasses.replace(inputs, conv=dataclasses.replace(inputs.conv, indices=inputs.state_indices + 1))


def test_a_step_is_kept(tmp_path):
    inputs = step()
    outputs = Outputs(inputs.v, inputs.state + 1, conv_states=inputs.conv.states + 1)
    save(tmp_path / "d.pt", inputs, outputs)
    back = load(tmp_path / "d.pt")
    assert back.op == "step"
    assert (back.inputs.conv.tokens_first, back.inputs.norm.eps) == (inputs.conv.tokens_first, inputs.norm.eps)
    for part, names_ in (("conv", ("weight", "bias", "states", "indices")), ("norm", ("gate", "weight"))):
        for name in names_:
            have, want = getattr(getattr(back.inputs, part), name), getattr(getattr(inputs, part), name)
            assert torch.equal(have.nan_to_num(9.0), want.nan_to_num(9.0)), name
    assert torch.equal(back.outputs.conv_states.nan_to_num(9.0), outputs.conv_states.nan_to_num(9.0))


def test_what_engines_ask_for_is_kept(tmp_path):
    inputs = speculative()
    save(tmp_path / "d.pt", inputs, op="decode")
    back = load(tmp_path / "d.pt").inputs
    assert_same(back, inputs)
    assert (back.null_slot, back.update_state, back.batch_invariant) == (0, False, False)
    inputs = dataclasses.replace(make_inputs(problem(seq_lens=(70, 64))), batch_invariant=True)
    rows, kept = torch.tensor([[1], [-1]]), torch.zeros(2, 2, 8, 16)
    for more in ({"offsets": torch.tensor([[64], [0]])}, {"every": 64}):
        wanted = Checkpoints(kept, rows, **more)
        save(tmp_path / "c.pt", dataclasses.replace(inputs, checkpoints=wanted), op="prefill", force=True)
        back = load(tmp_path / "c.pt").inputs
        assert torch.equal(back.checkpoints.rows, rows) and back.checkpoints.states.shape == kept.shape
        assert back.checkpoints.every == wanted.every and (back.checkpoints.offsets is None) == ("every" in more)
        assert back.batch_invariant


@pytest.mark.parametrize(
    ("ours", "alias"),
    [
        (k, alias)
        for k, aliases in names.INPUTS.items()
        if k.split("_")[0] not in ("checkpoint", "conv", "norm")
        for alias in aliases
    ],
    ids=lambda x: x,
)
def test_every_alias_of_an_input(tmp_path, ours, alias):
    inputs = speculative()
    tree = flat(inputs, "decode")
    tree[alias] = tree.pop(ours)
    assert_same(load(write(tmp_path / "d.pt", tree)).inputs, inputs)


@pytest.mark.parametrize(
    ("ours", "alias", "nested"),
    [(key, alias, False) for key, aliases in names.OUTPUTS.items() for alias in aliases]
    + [(key, alias, True) for key, aliases in names.OUTPUTS_ALONE.items() if key in names.OUTPUTS for alias in aliases],
)
def test_every_alias_of_an_output(tmp_path, ours, alias, nested):
    inputs = make_inputs(problem())
    outputs = computed(inputs)
    named = {alias if key == ours else key: tensor for key, tensor in outputs.tensors().items()}
    tree = {"inputs": flat(inputs), "outputs": named} if nested else flat(inputs) | named
    dump = load(write(tmp_path / "d.pt", tree))
    assert torch.equal(dump.outputs.tensors()[ours], outputs.tensors()[ours])


@pytest.mark.parametrize("value", [True, 1, torch.tensor(True), torch.tensor(1), "true", "True", "1"])
def test_options_may_be_scalars_tensors_or_text(tmp_path, value):
    tree = flat(make_inputs(problem())) | {"allow_neg_eigval": value, "scale": torch.tensor(0.25), "lower_bound": "-5"}
    options = load(write(tmp_path / "d.pt", tree)).inputs.options
    assert options == dataclasses.replace(SAFE, allow_neg_eigval=True, scale=0.25)


def test_safetensors_of_an_engine(tmp_path):
    """Flat names, options as metadata."""
    inputs = make_inputs(problem(state_v_first=False))
    tensors = {k: v.contiguous() for k, v in inputs.tensors().items()}
    said = {k: str(v) for k, v in said_options(inputs, "prefill").items()}
    save_file(tensors, tmp_path / "d.safetensors", metadata={"format": "pt", "engine": "some", **said})
    dump = load(tmp_path / "d.safetensors")
    assert_same(dump.inputs, inputs)
    assert dump.meta == {"engine": "some"}
    assert dump.outputs is None


def inferred(tmp_path, inputs: Inputs, leave_out: str, op: str = "prefill", **changes):
    tree = flat(inputs, op) | changes
    for name in leave_out.split():
        tree.pop(name, None)
    return load(write(tmp_path / "d.pt", tree))


class TestInferred:
    def test_op_by_lengths_and_state(self, tmp_path):
        one_each = problem(op="decode", seq_lens=(1, 3, 8), pool_slots=5)
        assert inferred(tmp_path, make_inputs(one_each), "op").op is Op.DECODE
        without = inferred(
            tmp_path, make_inputs(dataclasses.replace(one_each, pool_slots=None, initial_state=False)), "op"
        )
        assert without.op is Op.PREFILL
        assert any("op is not said: prefill" in note for note in without.notes)
        assert inferred(tmp_path, make_inputs(problem(seq_lens=(1, 9))), "op").op is Op.PREFILL

    def test_gate_by_its_parameters(self, tmp_path):
        silent = "use_gate_in_kernel safe_gate"
        assert inferred(tmp_path, make_inputs(problem()), silent).inputs.options.gate is Gate.SAFE
        softplus = make_inputs(problem(options=Options(gate="softplus")))
        assert inferred(tmp_path, softplus, silent).inputs.options.gate is Gate.SOFTPLUS
        activated = make_inputs(problem(options=Options(gate="none")))
        assert inferred(tmp_path, activated, silent).inputs.options.gate is Gate.NONE
        with pytest.raises(InputError, match="g holds positive values, so it is raw, but A_log is missing"):
            inferred(tmp_path, softplus, f"{silent} A_log dt_bias")

    def test_parameters_of_an_activated_gate_are_not_used(self, tmp_path):
        inputs = make_inputs(problem(options=Options(gate="none")))
        dump = inferred(tmp_path, inputs, "", A_log=torch.zeros(2), dt_bias=torch.zeros(32))
        assert dump.inputs.A_log is None
        assert "A_log and dt_bias not used: the gate is not computed in the kernel" in dump.notes

    def test_safe_gate_without_parameters_as_fla_has_it(self, tmp_path):
        inputs = dataclasses.replace(make_inputs(problem()), A_log=None, dt_bias=None)
        dump = inferred(tmp_path, inputs, "")
        zeros = dataclasses.replace(inputs, A_log=torch.zeros(2), dt_bias=torch.zeros(2, 16))
        assert torch.equal(oracle.recurrence(dump.inputs).o, oracle.recurrence(zeros).o)
        assert "A_log and dt_bias not there: as zeros" in dump.notes

    def test_beta_by_its_values(self, tmp_path):
        silent = "use_beta_sigmoid_in_kernel allow_neg_eigval"
        many = problem(seq_lens=(20,))
        assert inferred(tmp_path, make_inputs(many), silent).inputs.options.beta_is_logit
        values = make_inputs(dataclasses.replace(many, options=dataclasses.replace(SAFE, beta_is_logit=False)))
        assert not inferred(tmp_path, values, silent).inputs.options.beta_is_logit
        few = dataclasses.replace(values, **{k: getattr(values, k)[:, :3] for k in ("q", "k", "v", "g", "beta")})
        few.cu_seqlens = torch.tensor([0, 3])
        with pytest.raises(InputError, match="use_beta_sigmoid_in_kernel is missing"):
            inferred(tmp_path, few, silent)

    def test_norm_by_the_length_of_the_keys(self, tmp_path):
        silent = "use_qk_l2norm_in_kernel"
        assert inferred(tmp_path, make_inputs(problem()), silent).inputs.options.qk_l2norm
        done = make_inputs(problem(options=dataclasses.replace(SAFE, qk_l2norm=False)))
        assert not inferred(tmp_path, done, silent).inputs.options.qk_l2norm

    def test_layout_by_shape_else_v_first(self, tmp_path):
        k_first = make_inputs(problem(state_v_first=False))
        assert not inferred(tmp_path, k_first, "state_v_first").inputs.state_v_first
        square = inferred(tmp_path, make_inputs(problem(V=16)), "state_v_first")
        assert square.inputs.state_v_first
        assert any("state_v_first is not said: taken as true" in note for note in square.notes)
        with pytest.raises(InputError, match="state has shape"):
            inferred(tmp_path, k_first, "", state_v_first=True)

    def test_no_batch_dimension(self, tmp_path):
        inputs = make_inputs(problem())
        rows = {name: getattr(inputs, name)[0] for name in ("q", "k", "v", "g", "beta")}
        dump = inferred(tmp_path, inputs, "", **rows, o=computed(inputs).o[0])
        assert_same(dump.inputs, inputs)
        assert dump.outputs.o.shape == inputs.v.shape
        assert any("no batch dimension" in note for note in dump.notes)

    def test_one_token_each(self, tmp_path):
        inputs = make_inputs(problem(op="decode", seq_lens=(1, 1, 1), pool_slots=5))
        dump = inferred(tmp_path, inputs, "cu_seqlens", "decode")
        assert_same(dump.inputs, inputs)
        assert "cu_seqlens is not given: one token for each of the 3 states" in dump.notes

    def test_shapes_of_engines(self, tmp_path):
        """Merged heads in the gate, A_log as a broadcastable parameter, the state of the only sequence."""
        inputs = make_inputs(problem(seq_lens=(9,)))
        merged = {"g": inputs.g.flatten(2), "A_log": inputs.A_log.view(1, 1, 2, 1), "state": inputs.state[0]}
        dump = inferred(tmp_path, inputs, "", **merged)
        assert_same(dump.inputs, inputs)
        assert len(dump.notes) == 3

    def test_states_of_a_pool_given_by_sequence(self, tmp_path):
        inputs = make_inputs(problem(op="decode", seq_lens=(1, 1, 1), pool_slots=5, padding=1))
        outputs = computed(inputs)
        rows = outputs.final_state[inputs.state_indices.clamp(min=0).long()]
        spare = torch.cat([inputs.state_indices, torch.tensor([0, 0], dtype=torch.int32)])
        for indices in (inputs.state_indices, spare):
            told = {"state_indices": indices, "o": outputs.o, "final_state": rows}
            dump = inferred(tmp_path, inputs, "", "decode", **told)
        columns = {"state_indices": inputs.state_indices[:, None], "num_accepted_tokens": torch.ones(3).int()}
        with pytest.raises(InputError, match=r"final_state has shape .*: it should be \[5, 2, 8, 16\]"):
            inferred(tmp_path, inputs, "", "decode", o=outputs.o, final_state=rows, **columns)
        assert torch.equal(dump.outputs.final_state.nan_to_num(7.0), outputs.final_state.nan_to_num(7.0))


def test_unknown_names_are_told(tmp_path):
    tree = flat(make_inputs(problem())) | {"conv_state": torch.zeros(3), "conv_states": torch.zeros(3), "layer": 7}
    dump = load(write(tmp_path / "d.pt", tree))
    assert dump.notes[0] == "not used: conv_state"
    assert dump.notes[1].startswith("conv_states not used")
    assert dump.meta == {"layer": 7}


class TestSeveralCalls:
    @pytest.fixture(params=["calls as a list", "calls by name", "names alone", "a list alone"])
    def dump(self, request, tmp_path):
        calls = {
            name: {"inputs": make_inputs(problem(seq_lens=(n,))).tensors(), "outputs": ()}
            for name, n in (("call_0", 9), ("call_1", 12))
        }
        shared = {"options": said_options(make_inputs(problem()), "prefill"), "meta": {"model": "m"}}
        tree = {
            "calls as a list": {"calls": list(calls.values()), **shared},
            "calls by name": {"calls": calls, **shared},
            "names alone": calls | shared,
            "a list alone": [call | shared for call in calls.values()],
        }[request.param]
        return write(tmp_path / "d.pt", tree)

    def test_all_of_them(self, dump):
        first, second = load_all(dump)
        assert (first.call, second.call) == ("call_0", "call_1")
        assert (first.inputs.q.shape[1], second.inputs.q.shape[1]) == (9, 12)
        assert first.meta == second.meta == {"model": "m"}
        assert first.inputs.options == SAFE

    def test_one_of_them(self, dump):
        assert load(dump, "call_1").inputs.q.shape[1] == 12
        assert [d.call for d in load_all(dump, ["call_1"])] == ["call_1"]
        with pytest.raises(InputError, match="holds the calls call_0, call_1: name one of them"):
            load(dump)
        with pytest.raises(InputError, match="has no call decode: it holds the calls call_0, call_1"):
            load_all(dump, ["decode"])


class Evil:
    """Unpickling it would leave a file behind."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def refused(tmp_path, tree, match: str) -> None:
    path = write(tmp_path / "d.pt", tree)
    with pytest.raises(InputError, match=match) as error:
        load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


class TestRefused:
    def test_pickled_objects_are_named_and_not_run(self, tmp_path):
        trap = tmp_path / "sprung"
        refused(tmp_path, {"q": Evil(str(trap))}, r"holds a pickled posix\.mkdir: a dump may hold tensors and plain")
        assert not trap.exists()

    def test_files(self, tmp_path):
        whole = tmp_path / "whole.pt"
        save(whole, make_inputs(problem()))
        (tmp_path / "cut.pt").write_bytes(whole.read_bytes()[:-400])
        (tmp_path / "empty.pt").touch()
        (tmp_path / "text.pt").write_text('{"q": [1, 2]}')
        (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"q": 1}))
        (tmp_path / "dir.pt").mkdir()
        (tmp_path / "text.safetensors").write_text("not a header")
        (tmp_path / "dump.npz").touch()
        torch.save({"q": torch.zeros(1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
        expected = {
            "cut.pt": "truncated or damaged",
            "empty.pt": "is empty",
            "text.pt": "not a zip file",
            "pickle.pt": "not a zip file",
            "old.pt": "not a zip file as torch.save writes",
            "dir.pt": "is a directory",
            "text.safetensors": "cannot be loaded",
            "dump.npz": r"ends in \.npz: a dump ends in \.pt or \.safetensors",
            "none.pt": "does not exist",
        }
        for name, words in expected.items():
            with pytest.raises(InputError, match=words) as error:
                load(tmp_path / name)
            assert str(tmp_path / name) in str(error.value)
            assert "\n" not in str(error.value)

    def test_a_flipped_bit_in_the_pickle(self, tmp_path):
        save(tmp_path / "d.pt", make_inputs(problem()))
        data = bytearray((tmp_path / "d.pt").read_bytes())
        data[data.index(b"use_qk_l2norm")] ^= 1
        (tmp_path / "d.pt").write_bytes(data)
        with pytest.raises(InputError, match="damaged: Bad CRC-32"):
            load(tmp_path / "d.pt")

    @pytest.mark.parametrize("name", names.REQUIRED)
    def test_missing(self, tmp_path, name):
        tree = flat(make_inputs(problem()))
        tree["x_" + name] = tree.pop(name)
        aliases = re.escape(", ".join(names.INPUTS[name][1:]))
        refused(tmp_path, tree, rf"{name} \(or {aliases}\) is missing: the dump holds .*x_{name}")

    def test_contents(self, tmp_path):
        inputs = make_inputs(problem())
        tree, outputs = flat(inputs), computed(inputs)
        q = inputs.q
        tangled = tree | {"o": outputs.o, "final_state": tree["state"]}
        refused(tmp_path, tree | {"query": q}, "q and query both mean q: keep the one")
        refused(tmp_path, {"inputs": tree, "query": q}, "q is given twice, as q and as query")
        refused(tmp_path, tree | {"q": [1.0]}, "q is a list: it should be a tensor")
        refused(tmp_path, tree | {"q": q.to_sparse()}, "holds a pickled .*_rebuild_sparse_tensor: .*only dense tensors")
        refused(tmp_path, tree | {"q": q.to("meta")}, "holds a pickled .*_rebuild_meta_tensor_no_storage")
        refused(tmp_path, tree | {"q": q.to(torch.complex64)}, "q is complex64: no kernel takes")
        refused(tmp_path, tree | {"q": q.float().to(torch.float8_e4m3fn)}, "q is float8_e4m3fn: no kernel takes")
        refused(tmp_path, tree | {"q": q.double()}, "q is float64")
        refused(tmp_path, tree | {"g": q[..., :3]}, r"g has shape .*: it should be \[B, T, HV, K\]")
        refused(tmp_path, tree | {"q": q[0]}, "all should be")
        refused(tmp_path, tree | {"o": outputs.o[..., 1:]}, r"o has shape .*: it should be \[1, 14, 2, 8\]")
        refused(tmp_path, tangled, "final_state is the same memory as state")
        refused(tmp_path, tree | {"scale": "wide"}, "scale is 'wide': it should be a finite number")
        refused(tmp_path, tree | {"allow_neg_eigval": 3}, "allow_neg_eigval is 3: it should be true or false")
        refused(
            tmp_path, tree | {"op": "attention"}, "op is 'attention': it should be one of decode, step, prefill, gate"
        )
        refused(tmp_path, {"inputs": tree, "options": {"use_l2norm": True}}, "option use_l2norm is unknown")
        refused(tmp_path, [1, 2], "call call_0 is a int")
        refused(tmp_path, {0: q}, "a key of the dump is a int")
        refused(tmp_path, q, "holds a Tensor: it should hold a dict")
        refused(tmp_path, {}, "holds nothing")

    def test_contradicting_options(self, tmp_path):
        tree = flat(make_inputs(problem()))
        refused(tmp_path, tree | {"lower_bound": None}, "safe_gate is set but lower_bound is missing")
        refused(tmp_path, tree | {"lower_bound": 5.0}, "lower_bound is 5.0: it should be negative")
        neg = {"allow_neg_eigval": True, "use_beta_sigmoid_in_kernel": False}
        refused(tmp_path, tree | neg, "allow_neg_eigval is set but use_beta_sigmoid_in_kernel is not")
        softplus = {k: v for k, v in tree.items() if k not in ("A_log", "lower_bound", "safe_gate")}
        refused(tmp_path, softplus, "use_gate_in_kernel is set but A_log is missing")
