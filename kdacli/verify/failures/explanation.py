"""What a failure means, for a person: the smallest case, what is wrong and where, what it looks like, how to see it."""

import dataclasses
import shlex
from pathlib import Path

import torch

from kda_kernels.problem import Op
from kda_kernels.reference.stored import Stored
from kda_kernels.registry import Kernel
from kda_kernels.tensors import Outputs
from kdacli.judge import expect
from kdacli.verify.cases.case import Case
from kdacli.verify.checks.check import Bench, Result
from kdacli.verify.failures.diagnose import diagnose
from kdacli.verify.failures.error_map import error_map
from kdacli.verify.failures.shrink import shrink


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A failure looked at closely.

    Attributes:
        wrong: what is wrong in the smallest case, a line for each tensor and property.
        looks_like: what kind of wrong it is; empty if nothing known fits.
        maps: lines of maps.
        smallest: the smallest failing case, as a word for `kda verify --case`; None for a dump's tensors.
        complete: whether nothing simpler fails (else the time was up, or it does not fail every time).
        bench, outputs: its tensors, and what the kernel made of them (None if it raised), until they are saved.
    """

    wrong: tuple[str, ...]
    looks_like: tuple[str, ...]
    maps: tuple[str, ...]
    smallest: str | None
    complete: bool
    bench: Bench | None = None
    outputs: Outputs | None = None


def explain_case(kernel: Kernel, case: Case, result: Result, seed: int, device: str, seconds: float) -> Explanation:
    """Shrinks a failing case and explains what is left."""
    found = shrink(kernel, case, result, seed, device, seconds)
    return _explain(found.bench, found.result, found.case.name, found.complete)


def explain_bench(bench: Bench, result: Result) -> Explanation:
    """Explains a failure on given tensors."""
    return _explain(bench, result, None, False)


def _explain(bench: Bench, result: Result, smallest: str | None, complete: bool) -> Explanation:
    looks_like: list[str] = []
    maps: list[str] = []
    outputs = result.outputs
    if outputs is not None and result.wrong_values:
        looks_like = diagnose(bench.inputs, outputs, bench.problem.op, result.verdicts)
        maps = _maps(bench, result, outputs)
    return Explanation(tuple(wrong_lines(result)), tuple(looks_like), tuple(maps), smallest, complete, bench, outputs)


def _maps(bench: Bench, result: Result, outputs: Outputs) -> list[str]:
    """A map of o and of the final state, where they are wrong and of the right shape."""
    lines: list[str] = []
    expected = expect(bench.inputs, bench.problem.op)
    for verdict in result.verdicts:
        if verdict.tensor not in ("o", "g_cumsum", "final_state"):
            continue
        field = "final_state" if verdict.tensor == "final_state" else "o"
        out, ref = getattr(outputs, field), getattr(expected, field)
        if field == "final_state" and out is not None and outputs.state_scales is not None:
            out = Stored(out, outputs.state_scales).values(torch.float32)
        if not verdict.passed and out is not None and out.shape == ref.shape and ref.numel():
            lines += error_map(bench.inputs, field, out, ref, verdict)
    return lines


def command_for(case: str, kernel: str, seed: int, device: str, config: int | None = None) -> str:
    """The command that checks one kernel in one case, and nothing else. `config`: what --triton-config is, if given."""
    words = ["kda", "verify", "--case", case, "--kernel", kernel, "--seed", str(seed), "--device", device]
    words += [] if config is None else ["--triton-config", str(config)]
    return shlex.join(words)


def wrong_lines(result: Result) -> list[str]:
    """What is wrong with a failed result, a line for each tensor and property."""
    lines = [f"{v.tensor}: {v.note}" for v in result.verdicts if not v.passed] + list(result.notes)
    for held in result.properties:
        if held.status in ("fail", "error"):
            lines += [f"{held.name}: {note}" for note in held.notes]
    return lines


def save(folder: Path, kernel: str, case: str, op: Op, found: Explanation, force: bool) -> Path:
    """Writes the smallest case's tensors, and what the kernel made of them, as a dump that `kda compare` opens.

    Raises:
        InputError: the file exists and `force` is not set, or it cannot be written.
    """
    from kdacli import dumps

    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in f"{case}-{kernel}")[:120]
    path = folder / f"{name}.pt"
    meta = {"kernel": kernel, "case": found.smallest or case, "wrong": list(found.wrong)}
    assert found.bench is not None, "a failure that was looked at has its tensors"
    dumps.save(path, found.bench.inputs, found.outputs, op=op, meta=meta, force=force)
    return path
