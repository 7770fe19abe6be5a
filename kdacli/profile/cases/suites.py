"""The named sets of cases whose times are recorded, so that two records can be compared row by row."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from kda_kernels.problem import ROUNDINGS, SAFE_BOUND, Gate, Op, Options, Problem

SAFE = Options(gate=Gate.SAFE, lower_bound=SAFE_BOUND)
SOFTPLUS = Options(gate=Gate.SOFTPLUS)


@dataclasses.dataclass(frozen=True)
class TimedCase:
    """One row group of a record.

    Attributes:
        name: stays from record to record.
        gates: the regime of the inputs, or "dump".
        point: where in a sweep it lies, as (axis, value) pairs, the first axis first.
    """

    name: str
    problem: Problem
    gates: str
    point: tuple[tuple[str, int], ...] = ()

    @property
    def label(self) -> str:
        return f"{self.name} {self.gates}"


# Sequence lengths and heads. K = V = 128, bf16, float32 state in (not zero) and out, safe gate with bound -5, L2 norm
# and sigmoids in the kernel, packed with cu_seqlens.
PREFILL_SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "P1": ((8192,), 96),
    "P2": ((8192,), 32),
    "P3": ((2048,), 12),
    "P4": ((8192,), 12),
    "P5": ((1024,) * 8, 96),
    "P6": ((1300, 547, 2048, 963, 271, 3063), 64),
    "P7": ((32768,), 16),
}
# Tokens of each sequence, heads and sequences with which NVIDIA times its Hopper kernel (cudnn-frontend, pull request
# 1017).
NVIDIA_SHAPES = (
    (2048, 12, 1), (2048, 16, 1), (4096, 8, 1), (4096, 12, 1), (8192, 12, 4),
    (8192, 16, 1), (1024, 4, 1), (3072, 10, 1), (8192, 24, 1), (16384, 16, 8),
)  # fmt: skip
DECODE_HEADS, DECODE_SEQS = (32, 96), (1, 8, 32, 128)
STEP_HEADS, STEP_SEQS = (12, 96), (1, 4, 16, 32, 64, 128)
GATE_HEADS, GATE_TOKENS = (32, 96), 8192


def prefill_problems() -> Iterator[tuple[str, Problem]]:
    for name, (seq_lens, heads) in PREFILL_SHAPES.items():
        yield name, Problem(Op.PREFILL, seq_lens, heads, heads, options=SAFE)


def prefill_softplus_problems() -> Iterator[tuple[str, Problem]]:
    """The same with the gate of Kimi-Linear, which has no bound."""
    for name, problem in prefill_problems():
        yield f"{name},softplus", dataclasses.replace(problem, options=SOFTPLUS)


def prefill_nvidia_problems() -> Iterator[tuple[str, Problem]]:
    for tokens, heads, sequences in NVIDIA_SHAPES:
        problem = Problem(Op.PREFILL, (tokens,) * sequences, heads, heads, options=SAFE)
        yield f"V:T={tokens},H={heads},N={sequences}", problem


def decode_problems() -> Iterator[tuple[str, Problem]]:
    """One token per sequence, softplus gate, a float32 pool of twice as many slots, updated in place.

    A_log and dt_bias are bf16, since SGLang's kernel takes nothing else; the times of the others do not depend on it.
    """
    for heads in DECODE_HEADS:
        for n in DECODE_SEQS:
            problem = Problem(
                Op.DECODE, (1,) * n, heads, heads, packed=False, pool_slots=2 * n, options=SOFTPLUS,
                param_dtype="bfloat16",
            )  # fmt: skip
            yield f"D:H={heads},N={n}", problem


def decode_bf16_problems() -> Iterator[tuple[str, Problem]]:
    """The same with a bfloat16 pool."""
    for name, problem in decode_problems():
        yield f"{name},bf16", dataclasses.replace(problem, state_dtype="bfloat16")


def decode_states_problems() -> Iterator[tuple[str, Problem]]:
    """2048 states and more, in all that a pool may hold: what halving their bytes is worth."""
    for heads, n in ((32, 64), (32, 128), (96, 32)):
        wide = Problem(Op.DECODE, (1,) * n, heads, heads, packed=False, pool_slots=2 * n, options=SAFE)
        yield f"D:H={heads},N={n}", wide
        for dtype in ("bfloat16", "float16", "int16"):
            for rounding in ROUNDINGS:
                problem = dataclasses.replace(wide, state_dtype=dtype, state_rounding=rounding)
                yield f"D:H={heads},N={n},{problem.state_name}", problem


def step_problems() -> Iterator[tuple[str, Problem]]:
    """One token per sequence with convolution and gated norm, as Kimi K3 decodes on 8 GPUs and one: a float32 pool."""
    for heads in STEP_HEADS:
        for n in STEP_SEQS:
            yield (
                f"S:H={heads},N={n}",
                Problem(Op.STEP, (1,) * n, heads, heads, packed=False, pool_slots=2 * n, options=SAFE),
            )


def step_bf16_problems() -> Iterator[tuple[str, Problem]]:
    """The same with a bfloat16 pool."""
    for name, problem in step_problems():
        yield f"{name},bf16", dataclasses.replace(problem, state_dtype="bfloat16")


def gate_problems() -> Iterator[tuple[str, Problem]]:
    """The gate stage alone: a bf16 gate in, float32 chunk-local sums out."""
    for heads in GATE_HEADS:
        problem = Problem(Op.GATE, (GATE_TOKENS,), heads, heads, initial_state=False, final_state=False, options=SAFE)
        yield f"G:T={GATE_TOKENS},H={heads}", problem


# The problems, and the gate regimes where none are asked for. Decode and the gate do the same work for any gate, but
# there are prefill kernels whose time hangs on it.
SUITES: dict[str, tuple[Callable[[], Iterator[tuple[str, Problem]]], tuple[str, ...]]] = {
    "prefill": (prefill_problems, ("bench", "init", "weak")),
    "prefill-softplus": (prefill_softplus_problems, ("bench", "init", "weak")),
    "prefill-nvidia": (prefill_nvidia_problems, ("bench", "init")),
    "decode": (decode_problems, ("bench",)),
    "decode-bf16": (decode_bf16_problems, ("bench",)),
    "decode-states": (decode_states_problems, ("bench",)),
    "step": (step_problems, ("bench",)),
    "step-bf16": (step_bf16_problems, ("bench",)),
    "gate": (gate_problems, ("bench",)),
}


def suite(name: str, gates: Sequence[str] = ()) -> list[TimedCase]:
    """The cases of a suite: each problem in each gate regime (`gates`, or the suite's own)."""
    problems, regimes = SUITES[name]
    return [TimedCase(label, problem, regime) for label, problem in problems() for regime in (gates or regimes)]
