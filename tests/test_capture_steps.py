"""Fused steps of engines as `kda capture` records them: with the convolution, norm and drafts, eager and in a graph.

A stand-in has the parameters of the released function, which a test holds against the sources, and runs ours.
"""

import ast
import dataclasses
import importlib
import sys

import pytest
import torch

from kda_kernels.problem import Op, Options, Parts, Problem
from kda_kernels.reference import plain_recurrent
from kda_kernels.tensors import Inputs
from kdacli import dumps
from kdacli.capture import capture, journal, sites
from kdacli.judge import Reference, judge
from kdacli.synthetic import make_inputs
from kdacli.verify.transforms import serving
from tests import engine_layers, engine_sources
from tests.test_capture_graphs import Graph, captured, no_gpu  # noqa: F401  a fixture

OPS = "sglang.kernels.ops.attention"
_FLASHINFER = (
    "x, weight, conv_state, raw_gate, raw_beta, A_log, dt_bias, state_indices, state, output_gate, norm_weight,"
    " lower_bound, norm_eps, output"
)
_MTP = "x_q, x_k, x_v, w_q, w_k, w_v, cs_q, cs_k, cs_v, g, beta, A_log, dt_bias, recurrent_state, intermediate_ssm"

# Targets, and the parameters that the engine passes, in the order of the released function's.
PARAMETERS = {
    "vllm._custom_ops:fused_kda_decode": "x, weight, bias, conv_state, raw_g, raw_beta, A_log, dt_bias,"
    " state_indices, state, out, lower_bound, output_gate, norm_weight, norm_eps",
    "vllm.utils.flashinfer:flashinfer_fused_kda_decode": _FLASHINFER,
    "vllm.utils.flashinfer:flashinfer_packed_fused_kda_decode": f"{_FLASHINFER}, query_start_loc, num_accepted_tokens",
    f"{OPS}.kda_fused_decode:kda_fused_decode": "mixed_qkv, a, b, conv_states, w_q_t, w_k_t, w_v_t, conv_bias, A_log,"
    " dt_bias, onorm_g, onorm_weight, ssm_states, cache_indices, scale, onorm_eps, lower_bound",
    f"{OPS}.linear.fused_kda_conv_recurrent_verify:fused_kda_conv_gating_verify": "mixed_qkv, conv_weight, conv_bias,"
    " conv_state, conv_state_indices, intermediate_conv_window, intermediate_state_indices, a, b, A_log, dt_bias,"
    " ssm_states, cache_indices, intermediate_states_buffer, scale, T, num_q_heads, num_v_heads, head_k_dim,"
    " head_v_dim, lower_bound",
    f"{OPS}.kda_decode_mtp:fused_kda_decode_mtp_dspark": f"{_MTP}, intermediate_state_indices, intermediate_conv_q,"
    " intermediate_conv_k, intermediate_conv_v, ssm_state_indices, cu_seqlens, lower_bound, scale, onorm_gate,"
    " onorm_weight, onorm_eps",
}
DEFINED = {  # where wrappers of vLLM's lead
    "flashinfer_fused_kda_decode": ("flashinfer", "kda_decode.py", "fused_kda_decode"),
    "flashinfer_packed_fused_kda_decode": ("flashinfer", "kda_decode.py", "packed_fused_kda_decode"),
}
CALLERS = {
    "vllm": "models/kimi_k3/nvidia/kda.py",
    "sglang": "srt/layers/attention/linear/kda_backend.py",
}
SAFE = Options("safe", -5.0)


def parameters(target: str) -> list[str]:
    return PARAMETERS[target].split(", ")


def made(target: str) -> Inputs:
    """What the call computes, with drafts where it takes them, and without NaN where nobody looks."""
    drafts = "packed" in target or "verify" in target or "mtp" in target
    parts = Parts(bias="flashinfer" not in target and "mtp" not in target, norm="verify" not in target)
    problem = Problem("step", (3 if drafts else 1,) * 3, 2, 2, 16, 16, pool_slots=5, options=SAFE, parts=parts)
    x = make_inputs(problem, gates="init")
    x.state_indices.copy_(torch.tensor([3, 4, 1]))  # not 0, which is padding to vLLM
    if drafts:
        x = serving.drafts(x) if "packed" in target else serving.read_only(x)
    conv = dataclasses.replace(x.conv, states=x.conv.states.nan_to_num(0.5), rounded="verify" in target)
    return dataclasses.replace(x, state=x.state.nan_to_num(0.5), conv=conv)


def arguments(target: str, x: Inputs) -> dict:
    """By the names of the released function; pools and buffers are those of `x`, seen as the engine sees them."""
    rows = [t.flatten(0, 1).flatten(1) for t in (x.q, x.k, x.v)]
    mixed, N = torch.cat(rows, 1), x.q.shape[1]
    g, beta = x.g.reshape(1, N, 2, 16), x.beta.reshape(1, N, 2)
    gate, weight, eps = (x.norm.gate.reshape(N, 2, 16), x.norm.weight, x.norm.eps) if x.norm else (None, None, None)
    by_tap = x.conv.weight.view(3, 32, -1).mT.contiguous()
    states, extra = x.conv.by_channel, {}
    if x.token_states is not None:
        window = torch.zeros(8, 4, 96, 3)
        shared = {"intermediate_state_indices": x.token_state_indices}
        verify = {"conv_weight": x.conv.weight, "conv_state_indices": x.state_indices, "T": 3, "num_q_heads": 2}
        verify |= {"num_v_heads": 2, "head_k_dim": 16, "head_v_dim": 16, "intermediate_conv_window": window}
        mtp = {f"x_{name}": row.view(1, N, 2, 16) for name, row in zip("qkv", mixed.split(32, 1), strict=True)}
        mtp |= {f"w_{name}": part for name, part in zip("qkv", x.conv.weight.split(32), strict=True)}
        mtp |= {f"cs_{name}": part for name, part in zip("qkv", states.split(32, 1), strict=True)}
        mtp |= {f"intermediate_conv_{name}": part for name, part in zip("qkv", window.split(32, 2), strict=True)}
        shared |= {"intermediate_states_buffer": x.token_states, "intermediate_ssm": x.token_states}
        extra = shared | verify | mtp
    taps = {f"w_{name}_t": part for name, part in zip("qkv", by_tap, strict=True)}
    verify = "verify" in target
    every = extra | taps | {
        "x": mixed, "mixed_qkv": mixed, "weight": by_tap, "bias": x.conv.bias, "conv_bias": x.conv.bias,
        "conv_state": states, "conv_states": states.mT, "raw_g": g, "raw_gate": g, "a": g.flatten(2) if verify else
        g.reshape(N, -1), "g": g, "raw_beta": beta, "b": beta if verify else beta[0], "beta": beta, "A_log": x.A_log,
        "dt_bias": x.dt_bias.flatten(), "state_indices": x.state_indices, "cache_indices": x.state_indices,
        "ssm_state_indices": x.state_indices, "state": x.state, "ssm_states": x.state, "recurrent_state": x.state,
        "output_gate": gate, "onorm_gate": None if gate is None else gate.unsqueeze(0),
        "onorm_g": None if gate is None else gate.flatten(1), "norm_weight": weight, "onorm_weight": weight,
        "norm_eps": eps, "onorm_eps": eps, "lower_bound": -5.0, "scale": x.scale, "cu_seqlens": x.cu_seqlens,
        "query_start_loc": x.cu_seqlens, "num_accepted_tokens": x.num_accepted_tokens,
    }  # fmt: skip
    return {name: every.get(name) for name in parameters(target)}


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """Stand-ins for the modules of the targets, which run `x` in place of their own."""

    def make(target: str, x: Inputs):
        module, _, function = target.partition(":")
        parts = module.split(".")
        for i in range(1, len(parts)):
            tmp_path.joinpath(*parts[:i]).mkdir(exist_ok=True)
            (tmp_path.joinpath(*parts[:i]) / "__init__.py").touch()
        wrapped = "flashinfer" in module  # a wrapper of vLLM's, with no parameters of its own
        taken = "*args, **kwargs" if wrapped else f"{PARAMETERS[target]}, replayssm_rawv=None"
        source = f"def {function}({taken}):\n    return RUN()\n"
        tmp_path.joinpath(*parts).with_suffix(".py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        forget()
        return __import__(module, fromlist=[function]), function, lambda: plain_recurrent.run(x).o.view(1, -1, 2, 16)

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("vllm", "sglang")]:
            del sys.modules[name]

    yield make
    forget()


@pytest.mark.parametrize("replays", [(), (1,)], ids=["eager", "graph"])
@pytest.mark.parametrize("target", PARAMETERS, ids=lambda target: target.partition(":")[2])
def test_what_is_recorded_is_what_the_oracle_makes(engine, no_gpu, tmp_path, target, replays):  # noqa: F811
    x = made(target)
    named = arguments(target, x)
    module, function, module.RUN = engine(target, x)
    with capture(target, out=tmp_path / "d", replays=replays) as files:
        if replays:
            graph = Graph()
            captured(graph, no_gpu, lambda: getattr(module, function)(**named), {})
            graph.replay()
        else:
            getattr(module, function)(**named)
    assert files, journal.events(tmp_path / "d")
    dump = dumps.load(files[0])
    lost = [name for name in named if name.startswith("intermediate_conv")]
    assert dump.op is Op.STEP and dump.meta.get("not_dumped", "") == ", ".join(lost)
    assert (dump.inputs.num_accepted_tokens is not None) == ("packed" in target)
    verdicts = judge(Reference(dump.inputs, dump.op), dump.outputs, partial=True)
    assert all(verdict.passed for verdict in verdicts), verdicts
    left = {"token_states"} if x.token_states is not None else {"final_state", "conv_states"}
    assert {verdict.tensor for verdict in verdicts} == {"o"} | left
    at = "token_states" if x.token_states is not None else "conv_states"
    getattr(dump.outputs, at).nan_to_num_(0.0).add_(0.5)
    verdicts = judge(Reference(dump.inputs, dump.op), dump.outputs, partial=True)
    assert [verdict.tensor for verdict in verdicts if not verdict.passed] == [at]


def test_states_of_a_convolution_that_a_dump_cannot_hold_are_told(engine, tmp_path, capsys):
    """In slots of their own, or of q, k and v in pools of their own."""
    verify, mtp = (target for target in PARAMETERS if "verify" in target or "mtp" in target)
    for target, change, told in (
        (verify, lambda named: {"conv_state_indices": named["cache_indices"].clone()}, "has slots of its own"),
        (mtp, lambda named: {"cs_k": named["cs_k"].clone()}, "do not lie side by side"),
        (mtp, lambda named: {"replayssm_rawv": torch.zeros(1)}, "its states are kept as records"),
    ):
        x = made(target)
        module, function, module.RUN = engine(target, x)
        named = arguments(target, x)
        with capture(target, out=tmp_path / str(len(told))) as files:
            getattr(module, function)(**named | change(named))
        assert files == [] and told in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_engine_layers_gpu.py has it")
def test_the_released_verify_of_sglang_rounds_as_its_dump_says(tmp_path):
    """In Triton's interpreter, and in fp16: there it rounds to nearest, while it cuts bf16."""
    target = next(target for target in PARAMETERS if "verify" in target)
    x = made(target)
    conv = {"weight": x.conv.weight.float(), "bias": x.conv.bias.float(), "states": x.conv.states.half()}
    tokens = {name: getattr(x, name).half() for name in ("q", "k", "v", "g", "beta")}
    x = dataclasses.replace(x, **tokens, conv=dataclasses.replace(x.conv, **conv), token_state_indices=torch.arange(3))
    module, _, function = target.partition(":")
    sources = engine_sources.folder("sglang").parent
    with engine_layers.load("sglang", sources), capture(target, out=tmp_path / "d") as files:
        getattr(importlib.import_module(module), function)(**arguments(target, x))
    dump = dumps.load(files[0])
    verdicts = {
        verdict.tensor: verdict for verdict in judge(Reference(dump.inputs, dump.op), dump.outputs, partial=True)
    }
    assert all(verdict.passed for verdict in verdicts.values()), verdicts
    assert verdicts["token_states"].error > 1e-5, "no rounding of fp32 is so large"


@pytest.mark.parametrize("target", PARAMETERS, ids=lambda target: target.partition(":")[2])
def test_the_parameters_are_those_of_the_release(target):
    module, _, function = target.partition(":")
    engine = module.partition(".")[0]
    package, file, name = DEFINED.get(function, (engine, module.partition(".")[2].replace(".", "/") + ".py", function))
    released = engine_sources.parameters(engine_sources.folder(package) / file, name)
    mine = parameters(target)
    assert [name for name in released if name in mine] == mine
    tree = ast.parse((engine_sources.folder(engine) / CALLERS[engine]).read_text())
    called = {function, "_fused_chain_verify_fn"} if "verify" in function else {function}
    calls = [x for x in ast.walk(tree) if isinstance(x, ast.Call) and ast.unparse(x.func).rpartition(".")[2] in called]
    keywords = {keyword.arg for call in calls for keyword in call.keywords} - {None}
    passed = keywords | set(released[: max(len(call.args) for call in calls)])
    records = {name for name in passed if name.startswith("replayssm")}  # then it is not recorded
    assert passed - records == set(mine), passed ^ set(mine)
    assert not records or "replayssm_rawv" in sites.SITES[target].not_if
