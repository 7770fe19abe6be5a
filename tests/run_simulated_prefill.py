"""Runs the compiled CuTe prefill in the simulator of PTX, longer than a test may, and judges it as `kda verify` does.

    python tests/run_simulated_prefill.py [--seed 0] [--seconds 300]
    python tests/run_simulated_prefill.py --suite quick [--seed 0]

The first: sequences of random lengths, gates with and without a bound, whole or on CTAs that stay, half of them with a
checkpoint every 64 tokens, warps in random orders and asynchronous work late at random. The second: the cases of a
suite of `kda verify` whose point a call of one head in bf16 can have, each of up to three heads by itself. Needs no
GPU. The exit code is 1 if anything is wrong.
"""

import argparse
import dataclasses
import functools
import itertools
import random
import time
from collections.abc import Iterator

import torch
from prefill_inputs import SAFE, SOFTPLUS
from ptx import Kernel, PtxError
from test_cute_prefill_simulated import ALIGNMENT, STATE_ERROR, Call, alone, check, error, inputs_of, kept_by, ptx_of

from kda_kernels.cute.prefill.config import Part
from kda_kernels.problem import Op
from kda_kernels.tensors import Inputs, Outputs
from kdacli.judge import Reference, judge
from kdacli.verify.cases.case import Case
from kdacli.verify.cases.suites import suite
from kdacli.verify.checks.check import inputs_of as inputs_of_case
from kdacli.verify.transforms import REGIMES

LENGTHS = (0, 1, 17, 32, 33, 64, 70, 97, 128, 130, 161, 200, 256)
LATE = (0.0, 0.3, 0.5, 0.97)  # of `Kernel.launch`
MOST_TOKENS = 400  # of a case
PER_HEAD = ("q", "k", "v", "g", "beta")

kernel_of = functools.cache(Kernel)  # of its text


def random_runs(seed: int, seconds: float) -> bool:
    """Whether all were right."""
    rng, end = random.Random(seed), time.monotonic() + seconds
    runs = checkpoints = wrong = 0
    while time.monotonic() < end:
        options, part = rng.choice((SAFE, SOFTPLUS)), rng.choice((Part.WHOLE, Part.STAYING))
        lens = [rng.choice(LENGTHS) for _ in range(rng.choice((1, 2, 3)))]
        keeps, order, late = rng.random() < 0.5, rng.randrange(1 << 30), rng.choice(LATE)
        if not sum(lens):
            continue
        inputs = inputs_of(lens, options)
        inputs = dataclasses.replace(inputs, checkpoints=kept_by(lens) if keeps else None)
        try:
            kernel = kernel_of(ptx_of(part, options, inputs.checkpoints and kept_by([1])))
            call = Call(inputs, part, workers=2 if part is Part.STAYING else 0).run(kernel, seed=order, late=late)
            check(call)
            checkpoints += check_kept(call) if keeps else 0
        except (AssertionError, PtxError) as problem:
            wrong += 1
            print(f"wrong: {options.gate} {part} {lens}, checkpoints {keeps}, order {order}, late {late}: {problem}")
        runs += 1
    print(f"{runs} runs, {checkpoints} checkpoints, {wrong} wrong")
    return not wrong


def check_kept(call: Call) -> int:
    """Each checkpoint against the oracle; how many there are."""
    inputs, count = call.inputs, 0
    for n, (first, end) in enumerate(itertools.pairwise(inputs.cu_seqlens.tolist())):
        for at in range(first + ALIGNMENT, end + 1, ALIGNMENT):
            wanted = alone(inputs, slice(first, at), inputs.state[n : n + 1]).final_state[0]
            assert error(call.kept[count], wanted) <= STATE_ERROR, (
                f"checkpoint of sequence {n} after {at - first} tokens"
            )
            count += 1
    return count


def fits(case: Case) -> bool:
    problem, options = case.problem, case.problem.options
    return (
        problem.op is Op.PREFILL
        and not (case.gpu_only or case.decode_steps)
        and set(case.transforms) <= set(REGIMES)
        and problem.H == problem.HV
        and sum(problem.seq_lens) <= MOST_TOKENS
        and (options.gate, options.lower_bound) in {(one.gate, one.lower_bound) for one in (SAFE, SOFTPLUS)}
        and options.beta_is_logit
        and options.scale is None
    )


def heads_of(case: Case, seed: int) -> Iterator[Inputs]:
    """Up to three heads of a case, each as a call of its own: packed, in bf16, with a state that comes in."""
    problem = case.problem
    plain = type(problem)(Op.PREFILL, problem.seq_lens, H=problem.H, HV=problem.HV, options=problem.options)
    given = inputs_of_case(dataclasses.replace(case, problem=plain), seed, "cpu")
    for head in range(min(problem.HV, 3)):
        one = {name: getattr(given, name)[:, :, head : head + 1].contiguous() for name in PER_HEAD}
        one["state"] = given.state[:, head : head + 1].contiguous()
        one["A_log"] = given.A_log.flatten()[head : head + 1]
        one["dt_bias"] = given.dt_bias.view(problem.HV, -1)[head].contiguous()
        yield dataclasses.replace(inputs_of(list(problem.seq_lens), problem.options), **one)


def run_suite(name: str, seed: int) -> bool:
    """Whether all were right."""
    cases = [case for case in suite(name) if case.problem.op is Op.PREFILL]
    fitting, tensors, wrong, largest = [case for case in cases if fits(case)], 0, 0, (0.0, "none")
    for case in fitting:
        for head, inputs in enumerate(heads_of(case, seed)):
            call = Call(inputs).run(kernel_of(ptx_of(Part.WHOLE, inputs.options)), seed=seed)
            for verdict in judge(Reference(inputs, Op.PREFILL), Outputs(call.o, call.ht)):
                share = max(verdict.error / verdict.bound, verdict.worst / verdict.worst_bound)
                largest = max(largest, (share, case.name))
                tensors += 1
                if not verdict.passed:
                    wrong += 1
                    print(f"wrong: {case.name}, head {head}, {verdict.tensor}: {verdict.note or verdict}")
    print(f"{len(fitting)} of {len(cases)} cases of prefill can be a call of one head in bf16")
    print(f"{tensors} tensors, {wrong} wrong; the largest error is {largest[0]:.2f} of its bound, of {largest[1]}")
    return not wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=300.0, help="of random runs")
    parser.add_argument("--suite", choices=["quick", "full"])
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    right = run_suite(options.suite, options.seed) if options.suite else random_runs(options.seed, options.seconds)
    raise SystemExit(0 if right else 1)
