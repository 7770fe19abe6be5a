"""A whole and a split prefill of a few tokens, for compute-sanitizer on a Hopper GPU:

compute-sanitizer --tool memcheck python tests/sanitizer/prefill.py
KDA_SANITIZE=1 compute-sanitizer --tool racecheck --racecheck-report all python tests/sanitizer/prefill.py

racecheck does not see that a lane which arrives at an mbarrier, after its warp has met, does so for all of them
(`arrival.cu`, a minimal program, has 125 errors of that kind); with KDA_SANITIZE=1 each thread arrives by itself.
"""

import torch

from kda_kernels.checks import check_inputs
from kda_kernels.cute import prefill as module
from kda_kernels.cute.prefill_plan import Split
from kda_kernels.problem import Gate, Op, Options, Problem
from kdacli.synthetic import make_inputs

SAFE = Options(gate=Gate.SAFE, lower_bound=-5.0)


def run(lens: tuple[int, ...], split: Split | None) -> None:
    inputs = make_inputs(Problem(Op.PREFILL, lens, H=1, HV=1, options=SAFE), device="cuda")
    check_inputs(inputs)
    module._split = lambda *shape: split
    outputs = module.prefill(inputs)
    torch.cuda.synchronize()
    print("split" if split else "whole", "finite:", bool(outputs.o.isfinite().all()))


if __name__ == "__main__":
    run((70, 0, 33, 1), None)
    run((130, 20), Split(lead=64, segment=64, limit=192))
