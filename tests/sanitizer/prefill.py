"""A whole and a split prefill of a few tokens, gates with and without a bound, for compute-sanitizer on a Hopper GPU:

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

GATES = (Options(gate=Gate.SAFE, lower_bound=-5.0), Options(gate=Gate.SOFTPLUS))


def run(options: Options, lens: tuple[int, ...], split: Split | None) -> None:
    inputs = make_inputs(Problem(Op.PREFILL, lens, H=1, HV=1, options=options), device="cuda")
    check_inputs(inputs)
    module._split = lambda *shape: split
    outputs = module.prefill(inputs)
    torch.cuda.synchronize()
    print(options.gate, "split" if split else "whole", "finite:", bool(outputs.o.isfinite().all()))


if __name__ == "__main__":
    for options in GATES:
        run(options, (70, 0, 33, 1), None)
        run(options, (200, 20), Split(lead=64, segment=64, limit=256))
