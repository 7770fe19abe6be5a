"""Convolutions of a few prompts, for compute-sanitizer on a GPU: see step.py.

Each says how far it is from torch's convolution in fp64.
"""

import torch
from torch.nn import functional

from kda_kernels.api import Convolution, kda_conv

LENS, D = (1, 2, 0, 70, 5), 200


def run(width: int, dtype: torch.dtype, tokens_first: bool) -> None:
    ends = torch.tensor([0, *LENS]).cumsum(0)
    x = torch.randn(int(ends[-1]), D, device="cuda").to(dtype)
    weight, indices = torch.randn(D, width, device="cuda"), torch.tensor([3, 1, 0, 2, 4], device="cuda")
    states = torch.randn(5, *((width - 1, D) if tokens_first else (D, width - 1)), device="cuda").to(dtype)
    before = states.clone() if tokens_first else states.mT.clone()
    made = kda_conv(x, Convolution(weight, None, states, indices, tokens_first), cu_seqlens=ends.cuda())
    error = 0.0
    for slot, start, end in zip(indices.tolist(), ends.tolist(), ends[1:].tolist(), strict=False):
        window = torch.cat([before[slot], x[start:end]]).T.double()
        if start < end:
            exact = functional.silu(functional.conv1d(window, weight.double()[:, None], groups=D)).T
            error = max(error, float((made[start:end] - exact).abs().max() / exact.abs().max()))
    print(f"{width} {dtype} {tokens_first}: error {error:.1e}", flush=True)


if __name__ == "__main__":
    for width, dtype, tokens_first in ((4, torch.bfloat16, True), (3, torch.float16, False), (2, torch.float32, True)):
        run(width, dtype, tokens_first)
