"""Our kernels at the engines' call sites: what they compute there, and that only what fits is replaced.

What is called are the functions that engines would call, with tensors as their layers make them; SGLang and vLLM are
not needed. Names and parameters of the real ones are held against their released sources, where those are there.
"""

import ast
import dataclasses
import importlib
import json
import logging
import subprocess
import sys
import types
from pathlib import Path
from typing import Annotated

import pytest
import torch
from click.testing import CliRunner

from kda_kernels import registry
from kda_kernels.engines import sglang, sglang_calls, sites, vllm, vllm_calls
from kda_kernels.engines.patches import Patches
from kda_kernels.errors import InputError
from kda_kernels.problem import Gate, Op, Options, Parts, Problem
from kda_kernels.reference.oracle import recurrence
from kda_kernels.tensors import Checkpoints, Inputs
from kdacli.commands.engines import command, survey
from kdacli.synthetic import make_inputs
from tests import engine_sources


@pytest.fixture(autouse=True)
def plain_kernels(monkeypatch):
    """Plain torch in place of the kernels: what is looked at is what is handed to them."""
    monkeypatch.setattr(registry, "kernel_for", lambda op, inputs, out=None: registry.get(f"torch-{op}"))


SAFE, SOFTPLUS, NONE = Options(Gate.SAFE, -5.0), Options(Gate.SOFTPLUS), Options(Gate.NONE, beta_is_logit=False)


def inputs_of(op: Op, lens: tuple[int, ...], options: Options = SAFE) -> Inputs:
    """Packed tokens over a pool, H = 2 heads of 32."""
    made = make_inputs(Problem(op, lens, 2, 2, 32, 32, pool_slots=len(lens) + 3, options=options), gates="init")
    return dataclasses.replace(made, state=made.state.nan_to_num(0.5))


def same(have: torch.Tensor, want: torch.Tensor, allowed: float = 1e-2) -> None:
    assert have.shape == want.shape
    assert ((have.double() - want).norm() / want.norm()).item() < allowed


def mixed(inputs: Inputs) -> torch.Tensor:
    """q, k and v as rows of a wider projection."""
    rows = torch.cat([x.flatten(0, 1).flatten(1) for x in (inputs.q, inputs.k, inputs.v)], dim=1)
    return torch.cat((rows, rows), dim=1)[:, : rows.shape[1]]


def gates(inputs: Inputs) -> dict[str, torch.Tensor]:
    return {"A_log": inputs.A_log, "dt_bias": inputs.dt_bias.flatten()}


def drafts(options: Options = SAFE) -> tuple[Inputs, torch.Tensor]:
    """Two sequences of three tokens, and a pool with a slot for each token; the first has two tokens accepted."""
    made = inputs_of(Op.DECODE, (3, 3), options)
    pool = torch.randn(8, *made.state.shape[1:])
    slots = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int32)
    accepted = torch.tensor([2, 1], dtype=torch.int32)
    inputs = Inputs(
        made.q, made.k, made.v, made.g, made.beta, made.options, made.A_log, made.dt_bias, pool, slots,
        made.cu_seqlens, num_accepted_tokens=accepted, null_slot=0,
    )  # fmt: skip
    return inputs, accepted


# --- vLLM


@pytest.mark.parametrize("options", [SAFE, SOFTPLUS], ids=["safe", "softplus"])
def test_vllm_packed_decode_skips_the_null_slot(options):
    inputs = inputs_of(Op.DECODE, (1, 1, 1), options)
    inputs.state_indices[:] = torch.tensor([2, 0, 4])
    want = recurrence(dataclasses.replace(inputs, null_slot=0))
    o, pool = vllm_calls.k3_packed_decode(
        mixed(inputs), inputs.g, inputs.beta, **gates(inputs), lower_bound=options.lower_bound,
        initial_state=inputs.state, state_indices=inputs.state_indices,
    )  # fmt: skip
    same(o, want.o)
    assert not o[0, 1].any()
    same(pool[[2, 4]], want.final_state[[2, 4]])


@pytest.mark.parametrize("model", ["k3", "glm"])
def test_vllm_speculation_starts_from_the_accepted_token(model):
    inputs, accepted = drafts()
    want = recurrence(inputs)
    call = {"initial_state": inputs.state, "cu_seqlens": inputs.cu_seqlens, "num_accepted_tokens": accepted}
    if model == "k3":
        names = {"raw_g": inputs.g, "raw_beta": inputs.beta, "lower_bound": -5.0, **gates(inputs)}
        function = vllm_calls.k3_fused_recurrent_kda
    else:
        names = {"g": inputs.g, "beta": inputs.beta, "a_log": inputs.A_log, "g_bias": inputs.dt_bias}
        names |= {"sigmoid_beta": True, "compute_gate": True}
        function = vllm_calls.glm_fused_recurrent_kda
    more = torch.cat((inputs.state_indices, torch.zeros(2, 3, dtype=torch.int32)))  # the rest of a graph's buffer
    o, pool = function(inputs.q, inputs.k, inputs.v, **names, ssm_state_indices=more, **call)
    same(o, want.o)
    same(pool, want.final_state)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_fused_steps(engine):
    """The second call meets a convolution whose weight was rearranged by the first, and one that was modified since."""
    x = make_inputs(Problem(Op.STEP, (1, 1, 1), 2, 2, 32, 32, pool_slots=5, options=SAFE, parts=Parts(bias=True)))
    x = dataclasses.replace(
        x, state=x.state.nan_to_num(0.5), conv=dataclasses.replace(x.conv, states=x.conv.states.nan_to_num(0.5))
    )
    x.state_indices[:] = torch.tensor([3, -1, 1])
    gate, out = x.norm.gate.reshape(3, 2, 32), torch.empty_like(x.v)
    weight = x.conv.weight.view(3, 64, -1).mT.contiguous()
    for factor in (1.0, 1.0, 0.5):
        weight *= factor
        x.conv.weight.mul_(factor)
        want = recurrence(x)
        if engine == "vllm":
            o = vllm_calls.fused_kda_decode(
                mixed(x), weight, x.conv.bias, x.conv.by_channel, x.g, x.beta, x.A_log, x.dt_bias.flatten(),
                x.state_indices, x.state, out, -5.0, gate, x.norm.weight, x.norm.eps,
            )  # fmt: skip
            assert o is out
        else:
            o = sglang_calls.kda_fused_decode(
                mixed(x), x.g[0].flatten(1), x.beta[0], x.conv.by_channel.mT, *weight, x.conv.bias, x.A_log,
                x.dt_bias.flatten(), gate.flatten(1), x.norm.weight, x.state, x.state_indices, x.scale, x.norm.eps,
                -5.0,
            )  # fmt: skip
        same(o, want.o)
        same(x.state, want.final_state)
        assert torch.equal(x.conv.states, want.conv_states)


def test_vllm_glm_decode_has_one_slot_each():
    inputs = inputs_of(Op.DECODE, (1, 1))
    inputs.state_indices[:] = torch.tensor([3, 1])
    want = recurrence(inputs)
    tokens = (inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta)
    bucket = [torch.cat((x, torch.full_like(x[:, :1], torch.nan)), 1) for x in tokens]  # a row that is of nobody
    o, pool = vllm_calls.glm_fused_recurrent_kda(
        *bucket, initial_state=inputs.state, cu_seqlens=inputs.cu_seqlens, ssm_state_indices=inputs.state_indices,
        sigmoid_beta=True, a_log=inputs.A_log, g_bias=inputs.dt_bias, compute_gate=True,
    )  # fmt: skip
    same(o[:, :2], want.o)
    assert not o[:, 2:].any()
    same(pool, want.final_state)


class Layer:
    """What GLM's method uses of its layer."""

    kda_lower_bound = -5.0

    def __init__(self, inputs: Inputs, N: int) -> None:
        self.A_log, self.dt_bias = inputs.A_log, inputs.dt_bias
        state = inputs.state.new_zeros(N + 1, *inputs.state.shape[1:])
        self._flashkda_buffer_specs = (state, state.clone(), state.new_empty(0), torch.zeros_like(inputs.v))
        self._checkpoint_exporter = self
        self.exported = None

    def get_simultaneous(self, *specs):
        return specs

    def export(self, checkpoint, *, raw_qkv, conv_state, recurrent_checkpoint, recurrent_state, cu_seqlens):
        self.exported = recurrent_checkpoint


@pytest.mark.parametrize("model", ["k3", "glm"])
def test_vllm_prefill_writes_final_states_and_checkpoints(model, monkeypatch):
    inputs = inputs_of(Op.PREFILL, (70, 5))
    before = inputs.state[inputs.state_indices.long()].clone()
    offsets = torch.tensor([64, 0], dtype=torch.int32)
    kept = torch.full_like(before, 7.0)
    rows = torch.arange(2, dtype=torch.int32)
    plain = dataclasses.replace(
        inputs, state=before.clone(), state_indices=rows, checkpoints=Checkpoints(kept.clone(), rows, offsets)
    )
    want = recurrence(plain)
    layer = Layer(inputs, 2)
    call = {name: getattr(inputs, name) for name in ("q", "k", "v", "g", "beta", "cu_seqlens")}
    call |= {"initial_state": before, "out": torch.empty_like(inputs.v)}
    if model == "k3":
        final = torch.empty_like(before)
        o, got = vllm_calls.k3_flashkda_prefill(
            **call, **gates(inputs), lower_bound=-5.0, final_state=final, workspace=torch.empty(0),
            checkpoint_state=kept, checkpoint_offsets=offsets,
        )  # fmt: skip
        assert got is final
    else:
        workspace = types.SimpleNamespace(current_workspace_manager=lambda: layer)
        monkeypatch.setitem(sys.modules, "vllm.v1.worker.workspace", workspace)
        checkpoint = types.SimpleNamespace(checkpoint_offsets=offsets)
        o, got = vllm_calls.glm_flashkda_prefill(layer, **call, checkpoint=checkpoint)
        kept = layer.exported
    same(o, want.o)
    same(got, want.final_state)
    same(kept[:1], want.checkpoints[:1])
    assert torch.equal(before, inputs.state[inputs.state_indices.long()]), "the layer's gathered states are its own"


def test_vllm_prefill_without_flashkda():
    """Kimi-Linear's gate has no bound; GLM's layer activates beta itself and says which gate it means."""
    inputs = inputs_of(Op.PREFILL, (9, 3), SOFTPLUS)
    before = inputs.state[inputs.state_indices.long()]
    want = recurrence(dataclasses.replace(inputs, state=before, state_indices=None))
    call = {"initial_state": before, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    call |= {"cu_seqlens": inputs.cu_seqlens, "A_log": inputs.A_log, "g_bias": inputs.dt_bias, "raw_g": inputs.g}
    tokens = (inputs.q, inputs.k, inputs.v)
    for o, final in (
        vllm_calls.k3_chunk_kda_with_fused_gate(*tokens, raw_beta=inputs.beta, **call),
        vllm_calls.glm_chunk_kda_with_fused_gate(*tokens, beta=inputs.beta.float().sigmoid(), **call),
    ):
        same(o, want.o)
        same(final, want.final_state)


def test_vllm_convolution_of_one_of_q_k_and_v():
    """Its states are a slice of the channels of all three; the second sequence is in the null slot."""
    D, device = 16, "cuda" if torch.cuda.is_available() else "cpu"
    windows = torch.randn(4, 3, 3 * D, dtype=torch.bfloat16, device=device)
    before = windows.clone()
    x = torch.randn(8, 2 * D, dtype=torch.bfloat16, device=device)[:, :D]
    weight = torch.randn(D, 4, device=device)
    slots, ends = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([2, 0, 9], [0, 5, 8]))  # a slot too many
    both = torch.tensor([True, True], device=device)
    o = vllm_calls.causal_conv1d_fn(x.mT, weight, None, windows.mT[:, D : 2 * D], ends, slots, both, metadata=object())
    raw = torch.cat((before[2, :, D : 2 * D], x[:5])).mT.double()
    same(o[:, :5], torch.nn.functional.silu(torch.nn.functional.conv1d(raw, weight.double()[:, None], groups=D)))
    assert not o[:, 5:].any()
    before[2, :, D : 2 * D] = x[2:5]
    assert torch.equal(windows, before)
    with pytest.raises(InputError, match="activation"):
        vllm_calls.causal_conv1d_fn(x.mT, weight, None, windows.mT[:, :D], ends, activation="gelu")


def test_vllm_ling_has_log_decays():
    inputs = inputs_of(Op.PREFILL, (9, 3), NONE)
    before = inputs.state[inputs.state_indices.long()]
    want = recurrence(dataclasses.replace(inputs, state=before, state_indices=None))
    tokens = ("q", "k", "v", "g", "beta")
    o, final = vllm_calls.ling_chunk_kda(
        *(getattr(inputs, name) for name in tokens), initial_state=before, output_final_state=True,
        use_qk_l2norm_in_kernel=True, cu_seqlens=inputs.cu_seqlens, safe_gate=False, lower_bound=-5.0,
    )  # fmt: skip
    same(o, want.o)
    same(final, want.final_state)
    inputs, accepted = drafts(NONE)
    want = recurrence(inputs)
    o, pool = vllm_calls.ling_fused_recurrent_kda_fwd(
        **{name: getattr(inputs, name) for name in tokens}, scale=inputs.scale, initial_state=inputs.state,
        cu_seqlens=inputs.cu_seqlens, ssm_state_indices=inputs.state_indices, num_accepted_tokens=accepted,
        use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    same(o, want.o)
    same(pool, want.final_state)


# --- SGLang

KERNEL = sglang_calls.KdaKernel()


@pytest.mark.parametrize("packed", [False, True])
def test_sglang_decode(packed):
    inputs = inputs_of(Op.DECODE, (1, 1, 1))
    inputs.state_indices[:] = torch.tensor([2, -1, 4])
    want = recurrence(inputs)
    call = dict(ssm_states=inputs.state, cache_indices=inputs.state_indices, lower_bound=-5.0, **gates(inputs))
    call["A_log"] = inputs.A_log.view(1, 1, -1, 1)
    a, b = inputs.g.flatten(2).transpose(0, 1), inputs.beta
    if packed:
        o = KERNEL.packed_decode(mixed(inputs), a, b, scale=32**-0.5, num_v_heads=2, head_v_dim=32, **call)
        with pytest.raises(NotImplementedError, match="replayssm"):
            KERNEL.packed_decode(mixed(inputs), a, b, scale=1.0, num_v_heads=2, head_v_dim=32, replayssm_d=a, **call)
    else:
        tokens = (inputs.q, inputs.k, inputs.v)
        o = KERNEL.decode(*tokens, a.transpose(0, 1), b, query_start_loc=inputs.cu_seqlens, **call)
    same(o, want.o)
    same(inputs.state[[2, 4]], want.final_state[[2, 4]])


def test_sglang_extend_snapshots_what_comes_before_a_chunk():
    inputs = inputs_of(Op.PREFILL, (70, 5, 3))
    before = inputs.state[inputs.state_indices.long()].clone()
    rows = torch.arange(3, dtype=torch.int32)
    kept = Checkpoints(torch.zeros_like(before), rows, torch.tensor([64, 0, -64], dtype=torch.int32))
    want = recurrence(dataclasses.replace(inputs, checkpoints=kept))
    track = torch.empty_like(before)
    o, states = KERNEL.extend(
        inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta, ssm_states=inputs.state,
        cache_indices=inputs.state_indices, query_start_loc=inputs.cu_seqlens, **gates(inputs), lower_bound=-5.0,
        beta_is_raw=True, return_intermediate_states=True, track_state=track,
        track_chunk_idx=torch.tensor([1, 0, -1], dtype=torch.int32), layer_id=3, is_spec_decode=False,
    )  # fmt: skip
    assert states is None
    same(o, want.o)
    same(inputs.state, want.final_state)
    same(track[:1], want.checkpoints[:1])
    assert torch.equal(track[1], before[1]), "before chunk 0 is the initial state"


def test_sglang_convolves_prompts_where_the_kernel_behind_is_ours():
    """The first prompt goes on with what its slot holds, the second is new."""
    D, device = 16, "cuda" if torch.cuda.is_available() else "cpu"
    windows = torch.randn(4, 3, D, device=device).bfloat16()
    weight, x = torch.randn(D, 4, device=device), torch.randn(8, D + 2, device=device).bfloat16()[:, :D]
    slots, ends, prefixes = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([2, 1], [0, 5, 8], [9, 0]))
    held = (windows[2], torch.zeros_like(windows[1]))
    raw = [torch.cat((state, x[a:b])).mT.double() for state, (a, b) in zip(held, ((0, 5), (5, 8)), strict=True)]
    want = [torch.nn.functional.conv1d(one, weight.double()[:, None], groups=D).mT for one in raw]
    backend = types.SimpleNamespace(
        kernel_dispatcher=types.SimpleNamespace(extend_kernel=KERNEL),
        forward_metadata=types.SimpleNamespace(query_start_loc=ends),
    )
    layer = types.SimpleNamespace(conv_weights=weight, bias=None)
    call = (backend, layer, types.SimpleNamespace(extend_prefix_lens=prefixes), x, windows.mT, slots)
    same(sglang_calls.convolve_prefill(*call, original=None), torch.nn.functional.silu(torch.cat(want)))
    assert torch.equal(windows[slots.long()], torch.stack((x[2:5], x[5:8])))
    backend.kernel_dispatcher.extend_kernel = "theirs"
    assert sglang_calls.convolve_prefill(*call, original=lambda *given: given) == call


def test_sglang_verify_leaves_the_pool():
    inputs = inputs_of(Op.DECODE, (3, 3))
    before = inputs.state.clone()
    buffer = torch.zeros(4, 3, *before.shape[1:])
    want = recurrence(inputs)
    call = dict(
        ssm_states=inputs.state, cache_indices=inputs.state_indices, query_start_loc=inputs.cu_seqlens,
        intermediate_states_buffer=buffer, intermediate_state_indices=torch.tensor([2, 0, 1], dtype=torch.int32),
        cache_steps=3, lower_bound=-5.0, q=inputs.q, k=inputs.k, v=inputs.v, a=inputs.g, b=inputs.beta,
        **gates(inputs),
    )  # fmt: skip
    same(KERNEL.target_verify(retrieve_parent_token=None, **call), want.o)
    assert torch.equal(inputs.state, before)
    same(buffer[[2, 0], 2], want.final_state[inputs.state_indices.long()])
    with pytest.raises(NotImplementedError, match="a tree of drafts"):
        KERNEL.target_verify(retrieve_parent_token=torch.zeros(1), **call)


class Backend:
    """SGLang's enum: what it does not know is "custom"."""

    def __init__(self, name: str) -> None:
        self.name = name if name in ("triton", "cutedsl") else "custom"

    def is_custom(self) -> bool:
        return self.name == "custom"


@pytest.mark.parametrize(
    ("decode", "prefill", "verify", "ours"),
    [
        ("kda", None, "kda", {"decode_kernel", "extend_kernel", "verify_kernel"}),
        (None, "kda", None, {"extend_kernel"}),
        ("theirs", None, None, set()),
    ],
)
def test_sglang_gets_ours_for_the_phases_that_chose_it(decode, prefill, verify, ours, monkeypatch):
    mamba = types.SimpleNamespace(
        linear_attn_backend=decode or "triton", linear_attn_decode_backend=None, linear_attn_prefill_backend=prefill,
        linear_attn_verify_backend=verify,
    )  # fmt: skip
    context = types.SimpleNamespace(get_exec=lambda: types.SimpleNamespace(mamba=mamba))
    base = types.SimpleNamespace(LinearAttnKernelBase=object)
    monkeypatch.setitem(sys.modules, "sglang.srt.runtime_context", context)
    monkeypatch.setitem(sys.modules, "sglang.srt.layers.attention.linear.kernels.kernel_backend", base)
    steps = types.SimpleNamespace(kda_fused_decode="theirs")
    monkeypatch.setitem(sys.modules, sglang.STEP.partition(":")[0], steps)
    built = types.SimpleNamespace()

    def original(self, decode_backend, prefill_backend, verify_backend):
        self.given = [x.name for x in (decode_backend, prefill_backend, verify_backend)]
        self.decode_kernel = self.extend_kernel = self.verify_kernel = "theirs"

    chosen = [Backend(name) for name in (decode or "triton", prefill or decode or "triton", verify or "triton")]
    sglang_calls.build_dispatcher(built, *chosen, original=original)
    for name in ("decode_kernel", "extend_kernel", "verify_kernel"):
        assert isinstance(getattr(built, name), sglang_calls.KdaKernel) == (name in ours)
    assert (steps.kda_fused_decode is sglang_calls.kda_fused_decode) == ("decode_kernel" in ours)
    assert ("custom" in built.given) == (decode == "theirs"), "an unknown backend is SGLang's to refuse"


@pytest.mark.parametrize("early", [True, False], ids=["python -m sglang.launch_server", "sglang serve"])
def test_sglang_takes_the_choice_wherever_its_flags_were_made(early, monkeypatch):
    """The verify flag has a list of its own, made when the module of the flags is loaded (released 0.5.23)."""
    listed = ["triton"]
    choices = types.SimpleNamespace(add_linear_attn_kernel_backend_choices=listed.extend)
    monkeypatch.setitem(sys.modules, "sglang.srt.arg_groups.choices", choices)
    flags = {"linear_attn_backend": listed, "linear_attn_verify_backend": [*listed, "more"], "attention_backend": ["a"]}
    flags = {name: Annotated[str, types.SimpleNamespace(choices=found)] for name, found in flags.items()}
    if early:
        made = type("ServerArgs", (), {"__annotations__": flags | {"port": int}})
        monkeypatch.setitem(sys.modules, "sglang.srt.server_args", types.SimpleNamespace(ServerArgs=made))
    sglang._add_choice()
    found = [hint.__metadata__[0].choices for hint in flags.values()]
    assert found == [["triton", "kda"], ["triton", "more", *["kda"] * early], ["a"]]


# --- what is replaced


@pytest.mark.parametrize("engine", [sglang, vllm], ids=["sglang", "vllm"])
def test_every_site_is_in_the_released_sources_and_ours_takes_its_arguments(engine):
    root = engine_sources.folder(engine.__name__.rpartition(".")[2]).parent
    for site, reason in sites.reasons(engine.SITES, root).items():
        assert reason == (site.why_not or None), site.target
        module, _, name = site.target.partition(":")
        assert site.ours or name.partition(".")[0] in root.joinpath(*module.split(".")).with_suffix(".py").read_text()


def fake_vllm(folder: Path, functions: str) -> None:
    """A package with one module of vLLM's table, which a layer imports from."""
    path = folder / "vllm" / "models" / "kimi_k3" / "nvidia" / "ops" / "third_party"
    path.mkdir(parents=True)
    for parent in (path, *path.parents[:5]):
        (parent / "__init__.py").touch()
    (path / "kda.py").write_text(functions)


OLD = "def fused_recurrent_kda(q, k, v, raw_g, raw_beta): return 'theirs'\n"
NEW = "def fused_recurrent_kda(q, k, v, raw_g, raw_beta, plan): return 'theirs'\n"


@pytest.mark.parametrize(
    ("functions", "asked", "said"),
    [(OLD, "1", None), (OLD, "0", None), (NEW, "1", "passes plan, which ours does not know"), ("", "1", "has no")],
    ids=["replaced", "not asked", "another signature", "not there"],
)
def test_vllm_functions_are_replaced_where_they_fit_and_are_asked_for(
    functions, asked, said, tmp_path, monkeypatch, caplog
):
    module = "vllm.models.kimi_k3.nvidia.ops.third_party.kda"
    fake_vllm(tmp_path, functions)
    table = (
        sites.Site(
            "K3", "speculation", f"{module}:fused_recurrent_kda", f"{vllm_calls.__name__}:k3_fused_recurrent_kda"
        ),
        sites.Site("K3", "records", f"{module}:other", why_not="nothing of ours does that"),
    )
    monkeypatch.setattr(vllm, "SITES", table)
    monkeypatch.setattr(vllm, "_patches", [])
    monkeypatch.setenv(vllm.VARIABLE, asked)
    monkeypatch.syspath_prepend(tmp_path)
    with caplog.at_level(logging.INFO, logger="vllm.kda"):
        vllm.install()
        vllm.install()
        loaded = importlib.import_module(module)
    try:
        replaced = getattr(loaded, "fused_recurrent_kda", None) is vllm_calls.k3_fused_recurrent_kda
        assert replaced == (asked == "1" and said is None)
        expected = [] if asked == "0" else [said or "is replaced"]
        assert [message.count(text) for message, text in zip(caplog.messages, expected, strict=True)] == [1] * len(
            expected
        )
    finally:
        for patches in vllm._patches:
            patches.remove()
        for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
            del sys.modules[name]


def test_a_capture_sees_what_replaces(tmp_path, monkeypatch):
    """Whichever began first: the recorder wraps ours."""
    monkeypatch.syspath_prepend(tmp_path)
    for order in (0, 1):
        (tmp_path / f"engine_{order}.py").write_text("def function(): return 'theirs'\n")
        target = f"engine_{order}:function"
        recorder = Patches([target], lambda original, _: lambda: f"recorded {original()}", print, outermost=True)
        replacing = Patches([target], lambda original, _: lambda: "ours", print)
        for patches in (recorder, replacing)[:: 1 - 2 * order]:
            patches.install()
        try:
            assert importlib.import_module(f"engine_{order}").function() == "recorded ours"
        finally:
            recorder.remove()
            replacing.remove()


def test_what_other_models_call_too_is_replaced_in_one_module_alone(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "engine_ops.py").write_text("def function(x): return 'theirs'\n")
    for name in ("kda", "mamba"):
        (tmp_path / f"engine_{name}.py").write_text("from engine_ops import function\n")
    target, ours = "engine_kda:function", f"{sites.__name__}:absence"
    other = importlib.import_module("engine_mamba")
    patches = Patches([target], lambda original, _: lambda: "ours", print, only_there=[target])
    patches.install()
    try:
        assert importlib.import_module("engine_kda").function() == "ours"
        assert other.function(0) == other.function(1) == "theirs"
    finally:
        patches.remove()
    found = [
        sites.Site("K3", "convolution", f"{module}:function", ours, defined="engine_ops")
        for module in ("engine_kda", "engine_ops")
    ]
    monkeypatch.setattr(sites, "absence", lambda engine, root: None)
    monkeypatch.setattr(sites, "version", lambda package: "1.0")
    reasons = [site.reason(tmp_path, lambda file: ast.parse(file.read_text()).body) for site in found]
    assert "passes x, which ours does not know" in reasons[0]
    assert "has no engine_ops:function" in reasons[1], "it imports none"


def test_a_model_is_not_replaced_by_halves(tmp_path):
    fake_vllm(tmp_path, OLD)
    module = "vllm.models.kimi_k3.nvidia.ops.third_party.kda"
    ours = f"{vllm_calls.__name__}:k3_fused_recurrent_kda"
    there = sites.Site("K3", "speculation", f"{module}:fused_recurrent_kda", ours)
    gone = sites.Site("K3", "decode", f"{module}:packed", ours)
    other = sites.Site("GLM", "speculation", f"{module}:fused_recurrent_kda", ours)
    found = sites.reasons((there, gone, other), tmp_path)
    assert found[there] == "not without packed, which cannot be replaced"
    assert "has no" in found[gone]
    assert found[other] is None


def test_entry_points_import_no_torch():
    code = "import sys, kda_kernels.engines.vllm as v, kda_kernels.engines.sglang as s; v.install(); s.install()"
    code += "; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("sglang is not installed")) == (0, 1), done.stderr


def test_kda_engines_lists_each_call_with_its_reason(tmp_path):
    result = CliRunner().invoke(command, ["--json", "-"])
    assert result.exit_code == 0
    rows = json.loads(result.stdout)["rows"]
    assert len(rows) == len(sglang.SITES) + len(vllm.SITES)
    assert all(row["note"] for row in rows if not row["replaced"])
    assert "vllm is not installed: --sources" in CliRunner().invoke(command).output
    fake_vllm(tmp_path, OLD)
    note = next(
        row["note"] for row in survey(tmp_path) if row["target"].endswith("third_party.kda:fused_recurrent_kda")
    )
    assert note.startswith("not without")
    said = CliRunner().invoke(command, ["--sources", str(tmp_path)]).output
    assert "vllm, with KDA_VLLM=1" in said and f"sglang is not in {tmp_path}" in said.replace("\n", "")
    nothing = CliRunner().invoke(command, ["--sources", str(tmp_path / "vllm")])
    assert isinstance(nothing.exception, InputError) and "it holds none of sglang, vllm" in str(nothing.exception)
