"""Runs kernels on the inputs of a dump, and compares what comes out with the oracle and with what the dump recorded."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from kda_kernels import registry
from kda_kernels.checks import problem_of
from kda_kernels.errors import KdaError, UnavailableError, one_line
from kda_kernels.problem import Op, Problem
from kda_kernels.registry import Kernel
from kda_kernels.tensors import Outputs
from kdacli.comparison.difference import CallDifference, Difference
from kdacli.dumps import Dump
from kdacli.dumps.strides import copy_of
from kdacli.judge import CallJudge, Reference, Verdict, judge
from kdacli.judge.reference import pool_as_final_state
from kdacli.poisoned import poisoned_memory
from kdacli.userkernels import resolve

DUMP = "the dump"  # stands where a kernel's name would, for what the dump recorded

# Seconds for one token and value head at K = V = 128 on one CPU core: plain torch, and Triton's interpreter.
_TORCH_S = 1e-4
_INTERPRETER_S = {Op.PREFILL: 5e-3, Op.DECODE: 0.15, Op.STEP: 0.15, Op.GATE: 3e-3}


@dataclasses.dataclass(frozen=True)
class Row:
    """One output tensor of one kernel, or of the dump (`source` is `DUMP`), on one call.

    `verdict` compares it with the oracle; `vs_dump` is ||kernel - dump|| / ||dump||, None without anything to compare;
    `difference` is the kernel (a) compared with the dump (b) in full, where that was asked for.
    """

    call: str
    source: str
    verdict: Verdict
    vs_dump: float | None = None
    difference: Difference | None = None


@dataclasses.dataclass(frozen=True)
class NotRun:
    """A kernel of the call's op that was not run, and why."""

    call: str
    kernel: str
    reason: str


@dataclasses.dataclass
class Comparison:
    """All results of one call."""

    dump: Dump
    problem: Problem
    rows: list[Row] = dataclasses.field(default_factory=list)
    not_run: list[NotRun] = dataclasses.field(default_factory=list)

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if not row.verdict.passed]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be done for one call."""

    dump: Dump
    problem: Problem
    kernels: list[Kernel]
    not_run: list[NotRun]
    asked: bool = False  # the kernels were named: that one of them does not run is an error


def plan(dumps: Sequence[Dump], names: Sequence[str] = (), *, peers: bool = False) -> list[Plan]:
    """Chooses kernels for each call: those named that serve its op, or else all of ours that can run it here.

    Args:
        peers: other people's kernels, too.

    Raises:
        InputError: a kernel is unknown.
        UnavailableError: a kernel that was asked for cannot run a call of its op, or there is no call of its op; or no
            kernel at all can run a call.
    """
    there = {dump.op for dump in dumps}
    only = next(iter(there)) if len(there) == 1 else None
    asked = [resolve(name, only if ":" in name else None) for name in dict.fromkeys(names)]
    for kernel in asked:
        if kernel.op not in there:
            raise UnavailableError(
                f"{kernel.name} serves the op {kernel.op}: the dump holds {', '.join(sorted(there))}"
            )
    return [_plan(dump, problem_of(dump.inputs, dump.op), asked, peers) for dump in dumps]


def _plan(dump: Dump, problem: Problem, asked: Sequence[Kernel], peers: bool) -> Plan:
    chosen, not_run = [], []
    for kernel in [kernel for kernel in asked if kernel.op is dump.op] if asked else registry.kernels(dump.op):
        reason = kernel.unsupported(problem)
        if reason and kernel in asked:
            raise UnavailableError(f"{kernel.name} cannot run {_title(dump, problem)} here: {reason}")
        if not reason and not (kernel.ours or peers or kernel in asked):
            reason = f"a peer: --kernel {kernel.name} runs it"
        if reason:
            not_run.append(NotRun(dump.call, kernel.name, reason))
        else:
            chosen.append(kernel)
    if not chosen and not asked:
        reasons = "; ".join(f"{skipped.kernel}: {skipped.reason}" for skipped in not_run)
        raise UnavailableError(f"no kernel can run {_title(dump, problem)} here: {reasons}")
    return Plan(dump, problem, chosen, not_run, asked=bool(asked))


def _title(dump: Dump, problem: Problem) -> str:
    return f"{problem.name} ({dump.call})" if dump.call else problem.name


def steps(plans: Iterable[Plan]) -> int:
    """How often `compare` will call `advance`."""
    return sum(1 + len(job.kernels) for job in plans)


def seconds_on_cpu(plans: Iterable[Plan]) -> float:
    """Roughly how long `compare` takes on a CPU."""
    seconds = 0.0
    for job in plans:
        interpreted = any(kernel.backend == "triton" for kernel in job.kernels)
        each = _TORCH_S * (2 + len(job.kernels)) + (_INTERPRETER_S[job.problem.op] if interpreted else 0.0)
        seconds += job.problem.T * job.problem.HV * each
    return seconds


def compare(
    plans: Iterable[Plan], device: str, advance: Callable[[str], None], *, detail: bool = False
) -> Iterator[Comparison]:
    """Yields the results of each call.

    Args:
        device: "cuda" or "cpu", where everything runs.
        advance: called with a label after each step.
        detail: compare kernels with what the dump recorded in full.

    Raises:
        UnavailableError: a kernel that was asked for refuses the tensors when it is called.
    """
    for job in plans:
        dump, label = job.dump, _title(job.dump, job.problem)
        inputs = copy_of(dump.inputs, device)
        recorded = None
        if dump.outputs is not None:
            recorded = Outputs(**{name: tensor.to(device) for name, tensor in dump.outputs.tensors().items()})
        reference = Reference(inputs, dump.op, device)
        result = Comparison(dump, job.problem, not_run=list(job.not_run))
        if recorded is not None:
            verdicts = judge(reference, recorded, carried_state=carried_state(dump), partial=True)
            result.rows += [Row(dump.call, DUMP, verdict) for verdict in verdicts]
            if result.failed and (transposed := _transposed(dump, reference, recorded, device)):
                layout = "K-first" if inputs.state_v_first else "V-first"
                result.dump.notes.append(f"{transposed} {layout}: read so, its results are within their bounds")
        advance(f"{label}: oracle")
        for kernel in job.kernels:
            try:
                result.rows += _run(kernel, dump, reference, recorded, detail)
            except KdaError as refusal:  # such as a layout of tensors that it does not take
                if job.asked:
                    raise UnavailableError(f"{kernel.name} cannot run {label}: {refusal}") from refusal
                result.not_run.append(NotRun(dump.call, kernel.name, str(refusal)))
            advance(f"{label}: {kernel.name}")
        yield result


def _transposed(dump: Dump, reference: Reference, recorded: Outputs, device: str) -> str:
    """Which states of a dump look as if they were in the other layout, as all that it recorded is right then; or ""."""
    inputs, final = reference.inputs, recorded.final_state
    if inputs.q.shape[-1] != inputs.v.shape[-1]:
        return ""
    other = [reference]
    if inputs.state is not None:
        other.append(Reference(dataclasses.replace(inputs, state=inputs.state.mT.contiguous()), dump.op, device))
    for here in other[::-1]:
        for left in (None,) if final is None else (final.mT.contiguous(), final):
            if here is reference and left is final:
                continue  # as it was judged
            outputs = dataclasses.replace(recorded, final_state=left)
            if all(verdict.passed for verdict in judge(here, outputs, partial=True)):
                which = "first states" if left is final else "final states" if here is reference else "states"
                return f"the dump's {which} look"
    return ""


def carried_state(dump: Dump) -> str | None:
    """What the kernel that made a dump, if it says which, carries states in."""
    name = dump.meta.get("kernel")
    kernel = next((k for k in registry.kernels() if k.name == name), None)
    return None if kernel is None else kernel.carried_state


def _run(kernel: Kernel, dump: Dump, reference: Reference, recorded: Outputs | None, detail: bool) -> list[Row]:
    inputs = reference.inputs.fresh()
    try:
        with poisoned_memory():
            outputs = kernel.run(inputs)
            if inputs.q.is_cuda:
                torch.cuda.synchronize()
    except (KdaError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a kernel that raises has failed; what the others make of it is still of interest
        note = f"raised {one_line(error, 300)}"
        return [Row(dump.call, kernel.name, Verdict.failed("o", note))]
    outputs = pool_as_final_state(outputs, inputs)
    reference = reference.granted(kernel.rounded_convolution)
    call = CallJudge(reference, outputs, carried_state=kernel.carried_state)
    difference = None if recorded is None else CallDifference((reference,) * 2, (outputs, recorded))
    for piece in reference:
        call.add(piece)
        if difference is not None:
            difference.add((piece, piece))
    rows = []
    for verdict in call.verdicts(reference.usual):
        found = None if difference is None else difference.of([verdict])
        apart = None if found is None else found.relative
        rows.append(Row(dump.call, kernel.name, verdict, apart, found if detail else None))
    return rows
