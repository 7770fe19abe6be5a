"""The engines' own KDA layers, from their released sources, leave the same with their kernels and with ours.

KDA_ENGINE_SOURCES=FOLDER pytest tests/test_engine_layers_gpu.py -rs
"""

import contextlib
import dataclasses

import pytest
import torch
from triton.runtime.autotuner import Autotuner

from kda_kernels.cute import runtime
from kda_kernels.tensors import Outputs
from kdacli import autotuning
from kdacli.capture import capture
from kdacli.dumps import load_all
from kdacli.dumps.strides import copy_of
from kdacli.judge import Reference, judge
from tests import engine_layers, engine_sources
from tests.engine_layers import Batch

APART = 2e-2  # relative: two kernels that round to bf16 in different places

BATCHES = {
    "prefill": Batch((200, 3, 64)),
    "prefill of checkpoints": Batch((200, 70), checkpoint=128),
    "decode, padded": Batch((1,) * 7, decode=True, padded=3),
    "fused decode, padded": Batch((1,) * 7, decode=True, padded=3, fused=True),
    "speculation": Batch(drafts=4, accepted=(2, 1, 4)),
}
SGLANG = BATCHES | {"fused speculation": Batch(drafts=4, accepted=(2, 1, 4), fused=True)}
VLLM = BATCHES | {
    "prefill and decode": Batch((1, 130, 1)),
    "speculation and prefill": Batch((70, 5), drafts=3, accepted=(3, 1)),
}


@pytest.fixture(autouse=True)
def untuned(monkeypatch):
    """The engines' kernels in their first configuration: to tune each takes minutes."""
    monkeypatch.setattr(autotuning, "_taken", None)
    monkeypatch.setattr(Autotuner, "run", Autotuner.run)
    autotuning.take(0)


def compare(theirs, mine, ours) -> None:
    """`theirs` with the engine's kernels and, inside `ours`, `mine` with ours, on the same tensors."""
    torch.manual_seed(0)
    left = [theirs().results()]
    with ours(), engine_layers.kernels_seen() as seen:
        torch.manual_seed(0)
        left.append(mine().results())
    fast = "cute" if runtime.unsupported_here() is None else "triton"
    assert seen and all(name.startswith(fast) for name in seen), f"{seen or 'none of ours'} ran"
    theirs, mine = left
    for found in left:  # slot 0 is vLLM's null block, which its fused step writes for padded rows
        found |= {name: found[name][1:] for name in ("conv", "pool") if name in found}
    if "conv" in theirs:
        assert torch.equal(theirs.pop("conv"), mine.pop("conv")), "windows are copies"
    for name, want in theirs.items():
        error = (mine[name].double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)
        assert want.isfinite().all(), f"the engine's own {name} is not finite"
        assert error.item() <= APART, f"{name} is off by {error.item():.1e}"


def judge_captured(make, folder, replays=()) -> None:
    """The call of a run of SGLang's, recorded by `kda capture`, against the oracle; with `replays` that of a graph."""
    with capture("sglang", out=folder, calls=1, skip=1 if replays else 0, replays=replays):
        run = make()
        run.go()
        if replays:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run.go()
            graph.replay()
    for dump in load_all(folder):
        outputs = Outputs(**{name: tensor.cuda() for name, tensor in dump.outputs.tensors().items()})
        for verdict in judge(Reference(copy_of(dump.inputs, "cuda"), dump.op), outputs, partial=True):
            assert verdict.passed, f"{verdict.tensor}: {verdict.note}"


@pytest.mark.gpu
@pytest.mark.parametrize("bound", [-5.0, None], ids=["safe", "softplus"])
@pytest.mark.parametrize("batch", VLLM.values(), ids=VLLM)
def test_vllm_k3_layer(batch, bound):
    if batch.checkpoint and (bound is None or not engine_layers.flashkda()):
        pytest.skip("vLLM keeps checkpoints with FlashKDA only, which is not here or has no such gate")
    with engine_layers.load("vllm", engine_sources.folder("vllm").parent):
        theirs = dataclasses.replace(batch, fused=batch.fused and engine_layers.vllm_fused() is None)
        compare(
            lambda: engine_layers.k3(theirs, bound), lambda: engine_layers.k3(batch, bound), engine_layers.ours_in_vllm
        )


@pytest.mark.gpu
@pytest.mark.parametrize("layer", [engine_layers.glm, engine_layers.kimi_linear, engine_layers.ling])
@pytest.mark.parametrize("batch", VLLM.values(), ids=VLLM)
def test_vllm_layers_without_fused_steps(batch, layer):
    flashkda = layer is engine_layers.glm and engine_layers.flashkda()
    if batch.fused or (batch.checkpoint and not flashkda):
        pytest.skip("the layer has no fused step, and keeps checkpoints with FlashKDA only")
    with engine_layers.load("vllm", engine_sources.folder("vllm").parent):
        compare(lambda: layer(batch), lambda: layer(batch), engine_layers.ours_in_vllm)


@pytest.mark.gpu
@pytest.mark.parametrize("bound", [-5.0, None], ids=["safe", "softplus"])
@pytest.mark.parametrize("batch", SGLANG.values(), ids=SGLANG)
def test_sglang_backend(batch, bound, tmp_path):
    root = engine_sources.folder("sglang").parent
    if batch.fused and batch.decode and (reason := engine_layers.sglang_cuda(root)) is not None:
        pytest.skip(f"SGLang's fused step cannot be built: {reason}")
    with engine_layers.load("sglang", root), engine_layers.ours_in_sglang():
        if bound is None and batch.lens and not batch.decode:  # where SGLang's own is off, see docs/peers.md
            torch.manual_seed(0)
            judge_captured(lambda: engine_layers.sglang_layer(batch, True, bound), tmp_path / "dumps")
            return
        compare(
            lambda: engine_layers.sglang_layer(batch, False, bound),
            lambda: engine_layers.sglang_layer(batch, True, bound),
            contextlib.nullcontext,
        )


@pytest.mark.gpu
def test_a_fused_verify_of_sglang_is_recorded_in_a_graph(tmp_path):
    batch = SGLANG["fused speculation"]
    with engine_layers.load("sglang", engine_sources.folder("sglang").parent):
        judge_captured(lambda: engine_layers.sglang_layer(batch, False), tmp_path / "dumps", replays=(1,))
    (dump,) = load_all(tmp_path / "dumps")
    assert dump.op == "step" and dump.inputs.token_states is not None and "graph" in dump.meta
