"""Two prompts of different length, then four tokens of each, over one state pool. On a GPU if there is one.

python examples/serving_loop.py
"""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from kda_kernels.api import kda_decode, kda_prefill  # noqa: E402

H, SLOTS = 2, 8
K = V = 128 if DEVICE == "cuda" else 32  # Triton's interpreter takes its time
GATE = {"A_log": torch.zeros(H, device=DEVICE), "dt_bias": torch.zeros(H, K, device=DEVICE), "lower_bound": -5.0}


def projections(tokens: int, rows: int = 1) -> list[torch.Tensor]:
    """What a layer's projections would make of hidden states: raw q, k, v, g and the logits of beta."""
    sizes = [(H, K), (H, K), (H, V), (H, K), (H,)]
    return [torch.randn(rows, tokens, *size, dtype=torch.bfloat16, device=DEVICE) for size in sizes]


def main() -> None:
    torch.manual_seed(0)
    pool = torch.zeros(SLOTS, H, V, K, device=DEVICE)  # V-first, fp32
    slots = torch.tensor([5, 2], dtype=torch.int32, device=DEVICE)
    prompts = torch.tensor([0, 70, 100], dtype=torch.int32, device=DEVICE)  # 70 and 30 tokens, packed

    o = kda_prefill(*projections(100), state=pool, state_indices=slots, cu_seqlens=prompts, **GATE)
    print(f"prefill {list(o.shape)}, states in slots {slots.tolist()}")

    # A batch of the engine's size: the third row is padding, which reads and writes nothing.
    slots = torch.tensor([5, 2, -1], dtype=torch.int32, device=DEVICE)
    for step in range(4):
        o = kda_decode(*projections(1, rows=3), state=pool, state_indices=slots, **GATE)
        print(f"step {step}: norms {[round(row.float().norm().item(), 3) for row in o]}")
    assert not o[2].any(), "the output of padding is zero"
    assert pool[[5, 2]].any() and not pool[[0, 1, 3, 4, 6, 7]].any(), "only the slots of the two prompts hold states"


if __name__ == "__main__":
    main()
