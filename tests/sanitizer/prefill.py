"""A whole and a split prefill of few tokens, one that keeps states on the way, and one whose CTAs stay, gates with and
without a bound, bf16 and fp16, for compute-sanitizer on a Hopper GPU; with words only the runs whose names have them
all:

compute-sanitizer --tool memcheck --report-api-errors no python tests/sanitizer/prefill.py
KDA_SANITIZE=1 compute-sanitizer --tool racecheck --print-limit 0 python tests/sanitizer/prefill.py softplus split

racecheck does not see that a lane which arrives at an mbarrier, after its warp has met, does so for all of them
(`arrival.cu`, a minimal program, has 125 errors of that kind), nor that no lane stores before an mma that all lanes of
its warp take part in. With KDA_SANITIZE=1 each thread arrives by itself, and warps meet once more. What it does not see
then is a meeting that ptxas leaves out, as the warp is whole: one warning where CTAs stay, of the lane that tells of an
item and its own warp.
"""

import sys

import torch

from kda_kernels.checks import check_inputs
from kda_kernels.cute.prefill import host as module
from kda_kernels.cute.prefill.plan import Split
from kda_kernels.problem import Gate, Op, Options, Problem
from kda_kernels.tensors import Checkpoints
from kda_kernels.variant import H100
from kdacli.synthetic import make_inputs

GATES = {"safe": Options(gate=Gate.SAFE, lower_bound=-5.0), "softplus": Options(gate=Gate.SOFTPLUS)}
KINDS = (("safe", "bfloat16"), ("softplus", "bfloat16"), ("softplus", "float16"))
WAYS = {
    "whole": ((70, 0, 33, 1), None),
    "kept": ((200, 64), None),
    "stays": ((70, 0, 33, 1), None),  # two CTAs for four sequences
    "split": ((2300, 20), Split(lead=448, segment=448, limit=2304)),  # all stages of the join, more than once
}


def run(gate: str, dtype: str, way: str) -> None:
    lens, split = WAYS[way]
    dtypes = {"dtype": dtype, "g_dtype": dtype, "beta_dtype": dtype}
    inputs = make_inputs(Problem(Op.PREFILL, lens, H=1, HV=1, options=GATES[gate], **dtypes), device="cuda")
    if way == "kept":
        states = torch.empty(inputs.state_shape(6), dtype=inputs.k.dtype, device="cuda")
        inputs.checkpoints = Checkpoints(states, torch.arange(6, device="cuda").view(2, 3), every=64)
    check_inputs(inputs)
    module._split = lambda *shape: split
    module.multiprocessors = lambda device: 2 if way == "stays" else H100.sms
    module._last = module._Last()
    outputs = module.prefill(inputs)
    torch.cuda.synchronize()
    print(gate, dtype, way, "finite:", bool(outputs.o.isfinite().all()))


if __name__ == "__main__":
    for kind in KINDS:
        for way in WAYS:
            if set(sys.argv[1:]) <= {*kind, way}:
                run(*kind, way)
