"""Steps of a few heads, for compute-sanitizer on a Hopper GPU:

compute-sanitizer --tool memcheck --report-api-errors no python tests/sanitizer/step.py
compute-sanitizer --tool racecheck --racecheck-report all python tests/sanitizer/step.py

Each says how far it is from the fp64 oracle. Without that option memcheck names calls that look up functions which the
driver lacks.
"""

import torch

from kda_kernels.cute.decode.config import DecodeConfig
from kda_kernels.cute.decode.host import decode
from kda_kernels.problem import SAFE_BOUND, Gate, Op, Options, Problem
from kda_kernels.reference.oracle import recurrence
from kdacli.synthetic import make_inputs

STREAMED = DecodeConfig(rows=128, ctas=3, bulk=True, together=2)
RUNS = {
    "32 rows": (1, "float32", "nearest", DecodeConfig(rows=32)),
    "streamed": (1, "float32", "nearest", STREAMED),
    "int16 stochastic": (1, "int16", "stochastic", STREAMED),
    "six tokens": (6, "float32", "nearest", STREAMED),
    "three tokens in registers": (3, "bfloat16", "stochastic", DecodeConfig(rows=64, threads=256, ctas=2)),
}


def run(name: str, tokens: int, state_dtype: str, rounding: str, config: DecodeConfig) -> None:
    problem = Problem(
        Op.STEP, (tokens,) * 2, H=2, HV=2, packed=False, pool_slots=2 + 2 * tokens, state_dtype=state_dtype,
        state_rounding=rounding, options=Options(gate=Gate.SAFE, lower_bound=SAFE_BOUND),
    )  # fmt: skip
    inputs = make_inputs(problem, device="cuda")
    expected = recurrence(inputs).o
    error = (decode(inputs, config=config).o - expected).norm() / expected.norm()
    print(f"{name}: error of o {float(error):.1e}", flush=True)


if __name__ == "__main__":
    for name, what in RUNS.items():
        run(name, *what)
    torch.cuda.synchronize()
