"""The decode kernel where a convolution comes before the recurrence or a gated norm behind it: what a step launches.

Floor: beside the state, W - 1 inputs a channel read and written, and the gate. H=12, one token: 28 KB per sequence both
ways, beside 1.57 MB of fp32 state.
"""

import dataclasses
from collections.abc import Iterator

from kda_kernels.cute.decode import host as module
from kda_kernels.cute.decode.host import FEATURES, decode, run, unsupported, unsupported_here, unsupported_tensors
from kda_kernels.cute.variant import CuteVariant
from kda_kernels.problem import SAFE_BOUND, Gate, Op, Options, Problem
from kda_kernels.variant import H100, Gpu

__all__ = ["FEATURES", "decode", "run", "unsupported", "unsupported_here", "unsupported_tensors", "variants"]


def variants(problem: Problem | None = None, gpu: Gpu = H100) -> Iterator[CuteVariant]:
    """As those of `decode.host`; the usual problem's gate is safe, and of few and of many sequences."""
    if problem is not None:
        yield from module.variants(problem, gpu)
        return
    safe = Options(gate=Gate.SAFE, lower_bound=SAFE_BOUND)
    usual = Problem(Op.STEP, (1,) * 128, H=32, HV=32, packed=False, pool_slots=256, options=safe)
    few = dataclasses.replace(usual, seq_lens=(1,), pool_slots=2)
    narrow = dataclasses.replace(usual, state_dtype="bfloat16")
    drafts = dataclasses.replace(usual, seq_lens=(4,) * 32)
    for name, one in (("many", usual), ("few", few), ("bf16-state", narrow), ("four tokens", drafts)):
        for variant in module.variants(one, gpu):
            yield dataclasses.replace(variant, name=name)
