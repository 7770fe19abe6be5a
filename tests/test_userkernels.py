"""Users' own kernels: how a function is found, what it is given by its signature, and what it may return."""

import dataclasses
import importlib.metadata
import inspect
import json
import os
import pickle
import sys
import textwrap

import pytest
import torch
from click.testing import CliRunner

from kda_kernels import api, registry
from kda_kernels.errors import InputError, UnavailableError
from kda_kernels.problem import CHUNK, Gate, Op, Options, Problem
from kda_kernels.reference.oracle import gate_cumsum, recurrence
from kda_kernels.tensors import Inputs
from kdacli import userkernels
from kdacli.main import cli
from kdacli.synthetic import make_inputs
from kdacli.userkernels import UserKernel, resolve
from kdacli.userkernels.kernel import ReturnedError
from kdacli.userkernels.signature import Signature

SAFE, NONE = Options(Gate.SAFE, -5.0), Options(Gate.NONE)
PREFILL = Problem(Op.PREFILL, (5, 0, 3), 1, 1, 16, 16, options=SAFE)
DENSE = dataclasses.replace(PREFILL, seq_lens=(4, 4), packed=False)
POOL = dataclasses.replace(DENSE, op=Op.DECODE, seq_lens=(1, 1), pool_slots=4)

# A user's whole file: the recurrence from the oracle, called by our names.
ORACLE = """
    import torch
    from kda_kernels.problem import Options
    from kda_kernels.reference.oracle import recurrence
    from kda_kernels.tensors import Inputs

    def prefill(q, k, v, g, beta, A_log, dt_bias, initial_state=None, cu_seqlens=None, scale=None, lower_bound=None):
        '''Token by token.

        Slow.'''
        options = Options("softplus" if lower_bound is None else "safe", lower_bound, scale=scale)
        out = recurrence(Inputs(q, k, v, g, beta, options, A_log, dt_bias, initial_state, cu_seqlens=cu_seqlens))
        return out.o.to(v.dtype), out.final_state.float()
    """


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file, in the current folder; what is imported of them is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(name: str, text: str) -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
        return name

    yield write
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def kernel_of(function, op: str = "prefill") -> UserKernel:
    signature = Signature.of(function, Op(op), "fn")
    return UserKernel("fn", Op(op), "user", "here", "", False, function=function, signature=signature)


# --- finding the function


def test_a_function_in_a_file_is_a_kernel(write):
    kernel = resolve(f"{write('mine.py', ORACLE)}:prefill")
    assert (kernel.name, kernel.op, kernel.backend, kernel.ours) == ("mine.py:prefill", Op.PREFILL, "user", False)
    assert kernel.summary == "Token by token."
    assert kernel.unsupported() is None
    inputs = make_inputs(PREFILL)
    outputs, expected = kernel.run(inputs), recurrence(inputs)
    torch.testing.assert_close(outputs.o, expected.o.bfloat16())
    torch.testing.assert_close(outputs.final_state, expected.final_state.float())


def test_a_function_in_a_module_of_the_current_folder(write):
    write("mypackage_of_kernels/__init__.py", "")
    write("mypackage_of_kernels/kda.py", "from .inner import *\n")
    write("mypackage_of_kernels/inner.py", ORACLE)
    kernel = resolve("mypackage_of_kernels.kda:prefill")
    assert kernel.unsupported(PREFILL) is None
    with pytest.raises(InputError, match="mypackage_of_kernels.kda has no function decode"):
        resolve("mypackage_of_kernels.kda:decode")


def test_a_file_shadows_nothing_and_finds_its_neighbours(write):
    write("neighbour_of_mine.py", "LIMIT = 7\n")
    write("torch.py", "raise RuntimeError('the wrong torch')\n")
    name = write(
        "json.py", "import torch, neighbour_of_mine\ndef decode(q, k, v, g, beta): return neighbour_of_mine.LIMIT\n"
    )
    kernel = resolve(f"{name}:decode")
    assert kernel.function(*[None] * 5) == 7
    assert sys.modules["json"] is json
    assert sys.modules["torch"] is torch


def test_a_file_is_read_again_when_it_changed(write):
    name = write("mine.py", "def decode(q, k, v, g, beta): return 1\n")
    first = resolve(f"{name}:decode")
    assert resolve(f"{name}:decode").function is first.function
    write("mine.py", "def decode(q, k, v, g, beta): return 12\n")
    assert resolve(f"{name}:decode").function(*[None] * 5) == 12


def test_what_a_module_prints_is_not_our_output(write, capsys):
    resolve(f"{write('loud.py', 'print(1234)' + textwrap.dedent(ORACLE))}:prefill")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "1234" in captured.err


@pytest.mark.parametrize(
    ("text", "spec", "error", "message"),
    [
        ("", "other.py:f", InputError, "other.py is not there: it should be a Python file"),
        ("", "mine.py", InputError, "it should be mine.py:FUNCTION"),
        ("def f(): ...\nimport torch\n_g = f", "mine.py:h", InputError, "mine.py has no function h: it has f"),
        ("f = 3", "mine.py:f", InputError, "f of mine.py is of type int: it should be a function"),
        ("import math\n\ndef f():\n    math.sqrt(-1)\nf()\n", "mine.py:f", InputError, "mine.py, line 4: ValueError"),
        ("import math\nx = = 1\n", "mine.py:f", InputError, "mine.py, line 2: SyntaxError: invalid syntax"),
        ("x = 1\nimport no_such_module_at_all\n", "mine.py:f", UnavailableError, "mine.py, line 2: No module named"),
        ("from . import x", "mine.py:f", InputError, "line 1: ImportError.*package.module:function"),
        ("import sys\nsys.exit(3)", "mine.py:f", InputError, "mine.py, line 2: it calls sys.exit"),
        ("", "no_such_module_at_all.x:f", InputError, "there is no module no_such_module_at_all"),
        ("", "no-such-kernel", InputError, "kernel no-such-kernel is unknown: .*triton-decode.*path.py:function"),
        ("def decode(q): ...", "mine.py:decode", InputError, "does not take k, v, g, beta: a decode kernel should"),
        ("def f(q, k, v, g, beta): ...", "mine.py:f", InputError, "does not say which op .* set f.op"),
        ("def chunk_decode(q, k, v, g, beta): ...", "mine.py:chunk_decode", InputError, "does not say which op"),
        ("def decode(q, k, v, g, beta, x): ...", "mine.py:decode", InputError, "takes x without a default"),
        ("def decode(q, k, v, g, beta): ...\ndecode.op = 'encode'", "mine.py:decode", InputError, "has op = 'encode'"),
        ("def decode(q, k, v, g, a, beta): ...", "mine.py:decode", InputError, "g and a, which both mean g"),
    ],
)
def test_what_is_wrong_is_one_line(text, spec, error, message, write):
    write("mine.py", text)
    with pytest.raises(error, match=message) as caught:
        resolve(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("prefill", "prefill"),
        ("chunk_kda", "prefill"),
        ("my_decode", "decode"),
        ("fused_recurrent_kda", "decode"),
        ("fused_sigmoid_gating_kda_update", "decode"),
        ("kda_gate_chunk_cumsum", "gate"),
        ("kda_gate", "gate"),
    ],
)
def test_the_name_says_the_op(name, op, write):
    write("mine.py", f"def {name}({'g' if op == 'gate' else 'q, k, v, g, beta'}): ...\n")
    assert resolve(f"mine.py:{name}").op == op


def test_the_op_of_the_caller_and_the_functions_own_word(write):
    write(
        "mine.py",
        """
        def decode(q, k, v, g, beta): ...
        def f(q, k, v, g, beta): ...
        def h(q, k, v, g, beta): ...
        h.op = "decode"
        """,
    )
    assert resolve("mine.py:decode", "prefill").op is Op.PREFILL  # a recurrent kernel may well run prompts
    assert resolve("mine.py:f", Op.PREFILL).op is Op.PREFILL
    with pytest.raises(InputError, match="serves the op decode, not prefill"):
        resolve("mine.py:h", "prefill")
    with pytest.raises(InputError, match="torch-decode serves the op decode, not prefill"):
        resolve("torch-decode", "prefill")


def test_registered_names_stay_what_they_are():
    assert resolve("triton-decode") is registry.get("triton-decode")


def test_another_process_finds_the_kernel_again(write):
    kernel = resolve(f"{write('mine.py', ORACLE)}:prefill")
    assert pickle.loads(pickle.dumps(kernel)) == kernel


# --- entry points


@pytest.fixture
def entry_points(monkeypatch):
    def declare(**values: str) -> None:
        entries = [importlib.metadata.EntryPoint(name, value, "kda.kernels") for name, value in values.items()]
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries if group == "kda.kernels" else [])

    return declare


def test_entry_points_are_kernels_by_name(write, entry_points):
    write("mine_installed.py", ORACLE)
    entry_points(
        **{"my-kernel": "mine_installed:prefill", "broken": "no_such_thing:f", "torch-decode": "mine_installed:prefill"}
    )
    kernel = resolve("my-kernel")
    assert (kernel.name, kernel.op) == ("my-kernel", Op.PREFILL)
    assert kernel.unsupported(PREFILL) is None
    found = dict(userkernels.installed())
    assert found["my-kernel"] == kernel
    assert "there is no module no_such_thing" in found["broken"]
    assert "one of kda's own kernels" in found["torch-decode"]
    with pytest.raises(InputError, match="no_such_thing"):
        resolve("broken")


# --- what the signature says


def plain(q, k, v, g, beta, initial_state=None): ...


def raw(q, k, v, g, beta, A_log, dt_bias, lower_bound=None, cu_seqlens=None): ...


def safe_only(q, k, v, g, beta, A_log, dt_bias, lower_bound, initial_state): ...


def pooled(q, k, v, g, beta, A_log, dt_bias, initial_state, state_indices): ...


def packed_only(q, k, v, g, beta, cu_seqlens, initial_state=None): ...


def either(q, k, v, g, beta, A_log=None, dt_bias=None, initial_state=None, **kwargs): ...


def fixed(q, k, v, g, beta, initial_state=None): ...


fixed.use_qk_l2norm_in_kernel = fixed.state_v_first = False


@pytest.mark.parametrize(
    ("function", "problem", "change", "reason"),
    [
        (plain, DENSE, {"options": NONE}, None),
        (plain, DENSE, {}, "it takes no A_log: not the safe gate"),
        (plain, PREFILL, {"options": NONE}, "no cu_seqlens"),
        (plain, PREFILL, {"options": NONE, "seq_lens": (4,)}, None),
        (plain, DENSE, {"options": NONE, "pool_slots": 4}, "no state_indices"),
        (plain, DENSE, {"options": NONE, "state_v_first": False}, "state_v_first, which is taken as True"),
        (plain, DENSE, {"options": dataclasses.replace(NONE, qk_l2norm=False)}, "use_qk_l2norm_in_kernel"),
        (plain, DENSE, {"options": dataclasses.replace(NONE, beta_is_logit=False)}, "use_beta_sigmoid_in_kernel"),
        (plain, DENSE, {"options": dataclasses.replace(NONE, allow_neg_eigval=True)}, "allow_neg_eigval"),
        (plain, DENSE, {"options": dataclasses.replace(NONE, scale=0.5)}, "no scale"),
        (plain, DENSE, {"options": dataclasses.replace(NONE, scale=0.25)}, None),  # 16 ** -0.5
        (raw, PREFILL, {"initial_state": False}, None),
        (raw, PREFILL, {}, "it takes no initial_state"),
        (raw, PREFILL, {"initial_state": False, "options": NONE}, "its A_log has no default: not the gate none"),
        (raw, PREFILL, {"initial_state": False, "options": Options()}, None),
        (safe_only, DENSE, {"options": Options()}, "its lower_bound has no default: not the gate softplus"),
        (safe_only, DENSE, {"initial_state": False}, "its initial_state has no default"),
        (pooled, POOL, {"options": Options()}, None),
        (pooled, POOL, {}, "no lower_bound: not the safe gate"),
        (pooled, POOL, {"options": Options(), "pool_slots": None}, "its state_indices has no default: pools only"),
        (packed_only, PREFILL, {"options": NONE}, None),
        (packed_only, DENSE, {"options": NONE}, "its cu_seqlens has no default: packed"),
        (either, DENSE, {"options": Options()}, None),
        (either, DENSE, {"options": NONE}, None),
        (fixed, DENSE, {"options": dataclasses.replace(NONE, qk_l2norm=False), "state_v_first": False}, None),
        (fixed, DENSE, {"options": dataclasses.replace(NONE, qk_l2norm=False)}, "which is taken as False"),
    ],
)  # fmt: skip
def test_the_signature_rules_problems_out(function, problem, change, reason):
    answer = kernel_of(function, problem.op).unsupported(dataclasses.replace(problem, **change))
    assert answer is None if reason is None else reason in answer


def test_the_functions_own_word(write):
    def decode(q, k, v, g, beta): ...

    problem = dataclasses.replace(POOL, pool_slots=None, initial_state=False, options=NONE)
    for answer, expected in [(None, None), (True, None), (False, "supports"), ("H is 1: too few", "H is 1: too few")]:
        decode.supports = lambda problem, answer=answer: answer
        said = kernel_of(decode, "decode").unsupported(problem)
        assert said is None if expected is None else expected in said
    assert "serves the op decode" in kernel_of(decode, "decode").unsupported(PREFILL)


# --- what it is called with


def call(function, problem: Problem, op: str | None = None) -> tuple[dict, Inputs]:
    """The arguments that a function with this one's signature receives."""
    seen = {}

    def spy(*args, **kwargs):
        seen.update(inspect.signature(function).bind(*args, **kwargs).arguments)
        return args[0] if args else next(iter(kwargs.values()))

    spy.__signature__ = inspect.signature(function)
    inputs = make_inputs(problem)
    kernel_of(spy, op or problem.op).run(inputs)
    return seen, inputs


def test_it_receives_what_it_names_and_nothing_else():
    def prefill(q, k, v, g, beta, h0=None, query_start_loc=None, lower_bound=0, A_log=None, dt_bias=None, unroll=3): ...

    seen, inputs = call(prefill, PREFILL)
    assert set(seen) == {"q", "k", "v", "g", "beta", "h0", "query_start_loc", "lower_bound", "A_log", "dt_bias"}
    assert seen["h0"] is inputs.state
    assert seen["query_start_loc"] is inputs.cu_seqlens
    assert seen["lower_bound"] == -5.0
    seen, _ = call(prefill, dataclasses.replace(DENSE, initial_state=False, options=Options()))
    assert not {"h0", "query_start_loc", "lower_bound"} & set(seen)  # their defaults stand


def test_switches_and_numbers():
    def prefill(
        q, k, v, g, beta, A_log, dt_bias, scale, output_final_state, state_v_first, safe_gate, use_gate_in_kernel,
        use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, initial_state=None, lower_bound=None,
    ): ...  # fmt: skip

    seen, _ = call(prefill, dataclasses.replace(DENSE, state_v_first=False, final_state=False))
    assert seen["scale"] == 0.25
    assert seen["safe_gate"] is seen["use_gate_in_kernel"] is seen["use_qk_l2norm_in_kernel"] is True
    assert seen["output_final_state"] is seen["state_v_first"] is seen["allow_neg_eigval"] is False
    options = Options(Gate.SAFE, -9.0, True, True, False, scale=2.0)
    seen, _ = call(prefill, dataclasses.replace(DENSE, options=options))
    assert (seen["scale"], seen["allow_neg_eigval"], seen["use_qk_l2norm_in_kernel"]) == (2.0, True, False)
    assert seen["safe_gate"] is False  # FLA's promise is about [-5, 0]


def test_pools_buffers_and_positional_parameters():
    def decode(q, k, v, g, beta, /, A_log, dt_bias, state, state_indices, out, lower_bound, inplace_final_state): ...

    seen, inputs = call(decode, POOL)
    assert seen["q"] is inputs.q
    assert seen["state"] is inputs.state
    assert seen["state_indices"] is inputs.state_indices
    assert seen["inplace_final_state"] is True
    assert (seen["out"].shape, seen["out"].dtype) == (inputs.v.shape, inputs.v.dtype)


def test_a_function_with_kwargs_gets_the_gate_parameters():
    seen, inputs = call(
        lambda q, k, v, g, beta, lower_bound=None, **kwargs: ..., dataclasses.replace(DENSE, initial_state=False)
    )
    assert set(seen["kwargs"]) == {"A_log", "dt_bias"}
    assert seen["kwargs"]["A_log"] is inputs.A_log


def test_the_gate_stage():
    def gate(g, A_log, chunk_size, scale=None, dt_bias=None, cu_seqlens=None, lower_bound=None):
        assert (chunk_size, scale) == (CHUNK, None)
        options = Options(Gate.SOFTPLUS if lower_bound is None else Gate.SAFE, lower_bound)
        q = g[..., :1]
        return gate_cumsum(Inputs(g, g, g, g, q[..., 0], options, A_log, dt_bias, cu_seqlens=cu_seqlens)).float()

    inputs = make_inputs(dataclasses.replace(PREFILL, op=Op.GATE))
    torch.testing.assert_close(kernel_of(gate, "gate").run(inputs).o, gate_cumsum(inputs).float())


@pytest.mark.parametrize("function", [api.chunk_kda, api.fused_recurrent_kda, api.fused_recurrent_kda_fwd])
@pytest.mark.parametrize("change", [{}, {"state_v_first": False}, {"options": NONE}, {"options": Options()}])
def test_functions_with_flas_signature_work_as_they_are(function, change):
    kernel = kernel_of(function, "prefill")
    problem = dataclasses.replace(PREFILL, **change)
    assert kernel.unsupported(problem) is None
    inputs = make_inputs(problem, gates="init")
    outputs, expected, before = kernel.run(inputs), recurrence(inputs), inputs.fresh().state
    for name in ("o", "final_state"):
        want = getattr(expected, name)
        assert (getattr(outputs, name).double() - want).norm() <= 2e-2 * want.norm()
    assert torch.equal(inputs.state, before)


# --- what it returns


def test_what_it_may_return():
    o, state = torch.zeros(2, 4, 1, 16).bfloat16(), torch.zeros(2, 1, 16, 16)
    inputs = make_inputs(dataclasses.replace(DENSE, options=NONE))

    def returning(value):
        return kernel_of(lambda q, k, v, g, beta, initial_state=None: value).run(inputs)

    assert returning((o, state)).final_state is state
    assert returning([o, state, "more"]).o is o
    assert returning(o).final_state is None  # which the judge calls missing
    for wrong in (None, (None, state), 3, (o, 3), ()):
        with pytest.raises(ReturnedError, match="it should return o"):
            returning(wrong)
    without = dataclasses.replace(inputs, output_final_state=False)
    assert kernel_of(lambda q, k, v, g, beta, initial_state=None: (o, state)).run(without).final_state is None


def test_it_may_fill_buffers_and_return_nothing():
    def prefill(q, k, v, g, beta, out, final_state, initial_state=None):
        out.fill_(1)
        if final_state is not None:
            final_state.fill_(2)

    outputs = kernel_of(prefill).run(make_inputs(dataclasses.replace(DENSE, options=NONE)))
    assert (outputs.o == 1).all()
    assert (outputs.final_state == 2).all()
    assert outputs.final_state.shape == (2, 1, 16, 16)
    problem = dataclasses.replace(DENSE, options=NONE, initial_state=False, final_state=False)
    assert kernel_of(prefill).run(make_inputs(problem)).final_state is None


def test_a_pool_is_the_final_state():
    def decode(q, k, v, g, beta, A_log, dt_bias, lower_bound, state, state_indices):
        state[state_indices.long()] = 5
        return v.clone()

    inputs = make_inputs(POOL)
    outputs = kernel_of(decode, "decode").run(inputs)
    assert outputs.final_state is inputs.state
    assert (inputs.state[inputs.state_indices.long()] == 5).all()


def test_features_are_what_the_signature_names():
    def plain(q, k, v, g, beta, A_log, dt_bias, state, state_indices):
        return v

    def serving(q, k, v, g, beta, A_log, dt_bias, state, state_indices, null_slot=None, update_state=True):
        seen.append((null_slot, update_state))
        return v

    serving.features, seen = {"tail"}, []
    asked = dataclasses.replace(POOL, options=Options(), features={"null_slot", "tail"})
    inputs = dataclasses.replace(make_inputs(dataclasses.replace(asked, features=())), null_slot=3)
    for function, reason in ((plain, "it does not support null_slot, tail"), (serving, None)):
        kernel = UserKernel("mine", Op.DECODE, "user", "", "", False, function=function, signature=of(function))
        assert kernel.unsupported(asked) == reason
        if reason is None:
            kernel.run(inputs)
        else:
            with pytest.raises(InputError, match="^null_slot is used: mine does not support it"):
                kernel.run(inputs)
    assert seen == [(3, True)]


def of(function) -> Signature:
    return Signature.of(function, Op.DECODE, "mine")


def test_a_call_that_lacks_what_the_function_needs():
    def prefill(q, k, v, g, beta, A_log, dt_bias, lower_bound, initial_state=None): ...

    def biasless(q, k, v, g, beta, initial_state=None): ...

    inputs = make_inputs(DENSE)
    with pytest.raises(InputError, match="the call has no dt_bias"):
        kernel_of(prefill).run(dataclasses.replace(inputs, dt_bias=None))
    with pytest.raises(InputError, match="the call has a dt_bias"):
        kernel_of(biasless).run(inputs)


# --- on the command line


def test_kda_kernels_lists_them(write, entry_points):
    write("mine_installed.py", ORACLE)
    entry_points(**{"my-kernel": "mine_installed:prefill", "my-broken": "no_such_thing:f"})

    def rows(*args: str) -> dict[str, dict]:
        result = CliRunner().invoke(cli, ["kernels", *args, "--json", "-"])
        assert result.exit_code == 0, result.output
        return {row["kernel"]: row for row in json.loads(result.stdout)["rows"]}

    found = rows()
    assert found["my-kernel"]["runs"]
    assert found["my-kernel"]["backend"] == "user"
    assert not found["my-broken"]["runs"]
    assert "no_such_thing" in found["my-broken"]["note"]
    assert "my-kernel" not in rows("--op", "decode")
    row = rows("--kernel", "mine_installed.py:prefill", "--op", "prefill", "--pool", "8")["mine_installed.py:prefill"]
    assert not row["runs"]
    assert row["note"] == "it takes no state_indices: no pools"
    text = CliRunner().invoke(cli, ["kernels", "--kernel", "nothing.py:f"])
    assert text.exit_code == 2
    assert "nothing.py is not there" in text.stderr
    shown = CliRunner(env={**os.environ, "COLUMNS": "80"}).invoke(cli, ["kernels"]).stdout
    assert "not here: my-broken: no_such_thing:f: there is no module no_such_thing" in shown


def test_a_function_that_carries_states_in_bf16_may_say_so(write):
    """Else the rounded float32 state is a fault."""
    rounds = ORACLE.replace("out.final_state.float()", "out.final_state.bfloat16().float()")
    words = ["verify", "--case", "prefill-any/lens=9", "--device", "cpu", "--shrink", "0", "--json", "-", "--kernel"]
    silent = CliRunner().invoke(cli, [*words, write("silent.py", rounds) + ":prefill"])
    assert silent.exit_code == 1
    (row,) = json.loads(silent.stdout)["rows"]
    (state,) = (tensor for tensor in row["tensors"] if tensor["tensor"] == "final_state")
    assert "the kernel declares no carried_state" in state["note"] and state["error"] < state["bound"]
    said = textwrap.dedent(rounds) + 'prefill.carried_state = "bfloat16"\n'
    result = CliRunner().invoke(cli, [*words, write("said.py", said) + ":prefill"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["carried_states"] == {"said.py:prefill": "bfloat16"}
    result = CliRunner().invoke(cli, [*words[:-3], "--kernel", "said.py:prefill"])
    assert "said.py:prefill declares that it carries states in bfloat16: they are judged as such" in result.output
    result = CliRunner().invoke(cli, [*words, write("wrong.py", said.replace('"bfloat16"', '"bf16"')) + ":prefill"])
    assert result.exit_code == 2
    assert "wrong.py:prefill has carried_state = 'bf16': it should be one of bfloat16, float16" in result.stderr
