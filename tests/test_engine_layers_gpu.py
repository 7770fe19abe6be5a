"""The engines' own KDA layers, from their released sources, leave the same with their kernels and with ours.

KDA_ENGINE_SOURCES=FOLDER pytest tests/test_engine_layers_gpu.py -rs
"""

import pytest
import torch

from tests import engine_layers, engine_sources
from tests.engine_layers import Batch

APART = 2e-2  # relative: two kernels that round to bf16 in different places

BATCHES = {
    "prefill": Batch((200, 3, 64)),
    "prefill of checkpoints": Batch((200, 70), checkpoint=128),
    "decode, padded": Batch((1,) * 7, decode=True, padded=3),
    "speculation": Batch(drafts=4, accepted=(2, 1, 4)),
}
VLLM = BATCHES | {
    "prefill and decode": Batch((1, 130, 1)),
    "speculation and prefill": Batch((70, 5), drafts=3, accepted=(3, 1)),
}


def compare(run, ours) -> None:
    """`run` with the engine's kernels and, inside `ours`, with ours, on the same tensors."""
    left = []
    for context in (None, ours):
        torch.manual_seed(0)
        if context is None:
            left.append(run().results())
        else:
            with context():
                left.append(run().results())
    theirs, mine = left
    assert torch.equal(theirs.pop("conv"), mine.pop("conv")), "the convolution is the engine's own"
    for name, want in theirs.items():
        error = (mine[name].double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)
        assert want.isfinite().all(), f"the engine's own {name} is not finite"
        assert error.item() <= APART, f"{name} is off by {error.item():.1e}"


@pytest.mark.gpu
@pytest.mark.parametrize("bound", [-5.0, None], ids=["safe", "softplus"])
@pytest.mark.parametrize("batch", VLLM.values(), ids=VLLM)
def test_vllm_k3_layer(batch, bound):
    if batch.checkpoint and (bound is None or not engine_layers.flashkda()):
        pytest.skip("vLLM keeps checkpoints with FlashKDA only, which is not here or has no such gate")
    with engine_layers.load("vllm", engine_sources.folder("vllm").parent):
        compare(lambda: engine_layers.k3(batch, bound), engine_layers.ours_in_vllm)


@pytest.mark.gpu
@pytest.mark.parametrize("bound", [-5.0, None], ids=["safe", "softplus"])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_sglang_backend(batch, bound):
    root = engine_sources.folder("sglang").parent
    with engine_layers.load("sglang", root), engine_layers.ours_in_sglang():
        choice = iter((False, True))
        compare(lambda: engine_layers.sglang_layer(batch, next(choice), bound), engine_layers.contextlib.nullcontext)
