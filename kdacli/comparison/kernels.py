"""Runs kernels on the inputs of a dump, and compares what comes out with the oracle and with what the dump recorded.

A call whose fp64 copies would not fit into memory is judged in pieces (pair.py), with bounds from one run.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from kda_kernels import registry
from kda_kernels.checks import problem_of
from kda_kernels.errors import KdaError, UnavailableError
from kda_kernels.problem import Op, Problem
from kda_kernels.registry import Kernel
from kda_kernels.tensors import Inputs, Outputs
from kdacli.comparison.difference import Comparing, Difference
from kdacli.comparison.layout import Layout, stack
from kdacli.comparison.pair import beyond, first_token, judge_streamed, state_place, token_place
from kdacli.device import free_memory
from kdacli.dumps import Dump
from kdacli.dumps.strides import copy_with_strides
from kdacli.judge import Verdict, judge
from kdacli.judge.baseline import draws, expect
from kdacli.userkernels import resolve
from kdacli.verify.memory import poisoned_memory
from kdacli.verify.runner import one_line

DUMP = "the dump"  # stands where a kernel's name would, for what the dump recorded

# Seconds for one token and value head at K = V = 128 on one CPU core: plain torch, and Triton's interpreter.
_TORCH_S = 1e-4
_INTERPRETER_S = {Op.PREFILL: 5e-3, Op.DECODE: 0.15, Op.GATE: 3e-3}


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


def plan(dumps: Sequence[Dump], names: Sequence[str] = ()) -> list[Plan]:
    """Chooses kernels for each call: those named that serve its op, or else all of ours that can run it here.

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
    return [_plan(dump, problem_of(dump.inputs, dump.op), asked) for dump in dumps]


def _plan(dump: Dump, problem: Problem, asked: Sequence[Kernel]) -> Plan:
    chosen, not_run = [], []
    for kernel in [kernel for kernel in asked if kernel.op is dump.op] if asked else registry.kernels(dump.op):
        reason = kernel.unsupported(problem)
        if reason and kernel in asked:
            raise UnavailableError(f"{kernel.name} cannot run {_title(dump, problem)} here: {reason}")
        if not reason and not kernel.ours and kernel not in asked:
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
        inputs = dump.inputs.map(lambda tensor: copy_with_strides(tensor, device))
        recorded = None
        if dump.outputs is not None:
            recorded = Outputs(**{name: tensor.to(device) for name, tensor in dump.outputs.tensors().items()})
        against = (_Streamed if _is_large(job.problem, device) else _Against)(dump, inputs, device)
        result = Comparison(dump, job.problem, not_run=list(job.not_run))
        if recorded is not None:
            result.rows += [Row(dump.call, DUMP, verdict) for verdict in against.judge(recorded, partial=True)]
        advance(f"{label}: oracle")
        for kernel in job.kernels:
            try:
                result.rows += _run(kernel, dump, against, recorded, detail)
            except KdaError as refusal:  # such as a layout of tensors that it does not take
                if job.asked:
                    raise UnavailableError(f"{kernel.name} cannot run {label}: {refusal}") from refusal
                result.not_run.append(NotRun(dump.call, kernel.name, str(refusal)))
            advance(f"{label}: {kernel.name}")
        yield result


class _Against:
    """The inputs of a call with what they should give, which is computed once."""

    def __init__(self, dump: Dump, inputs: Inputs, device: str) -> None:
        self.inputs, self.op, self.device = inputs, dump.op, device
        self.expected, self.plain = expect(inputs, dump.op), draws(inputs, dump.op)

    def judge(self, outputs: Outputs, partial: bool = False, carried_state: str | None = None) -> list[Verdict]:
        """`partial`: a missing final_state is no fault (a dump need not hold it). carried_state: of the kernel."""
        wanted = self.inputs.output_final_state and not (partial and outputs.final_state is None)
        inputs = dataclasses.replace(self.inputs, output_final_state=wanted)
        return judge(
            inputs,
            outputs,
            op=self.op,
            expected=self.expected,
            plain_outputs=self.plain,
            carried_state=carried_state,
        )


class _Streamed:
    """The same for a call whose fp64 copies do not fit: the oracle runs anew for each result, a stretch at a time."""

    def __init__(self, dump: Dump, inputs: Inputs, device: str) -> None:
        self.dump, self.inputs, self.op, self.device = dump, inputs, dump.op, device

    def judge(self, outputs: Outputs, partial: bool = False, carried_state: str | None = None) -> list[Verdict]:
        return judge_streamed(self.dump, outputs, self.device, partial=partial, carried_state=carried_state)


def _is_large(problem: Problem, device: str) -> bool:
    """Whether judging in one piece would take more than a quarter of the memory that is free."""
    tokens = problem.T * problem.HV * (4 * problem.K + 6 * problem.V)
    states = 4 * (problem.pool_slots or problem.N) * problem.HV * problem.K * problem.V
    free = free_memory(device)
    return free is not None and 8 * (tokens + states) > free // 4


def _run(
    kernel: Kernel, dump: Dump, against: _Against | _Streamed, recorded: Outputs | None, detail: bool
) -> list[Row]:
    call = against.inputs.fresh()
    try:
        with poisoned_memory():
            outputs = kernel.run(call)
            if call.q.is_cuda:
                torch.cuda.synchronize()
    except (KdaError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a kernel that raises has failed; what the others make of it is still of interest
        nan = float("nan")
        note = f"raised {type(error).__name__}: {one_line(error)}"
        return [Row(dump.call, kernel.name, Verdict("o", nan, nan, nan, nan, {}, False, note))]
    if call.state_indices is not None:
        outputs = dataclasses.replace(outputs, final_state=call.state)
    rows = []
    for verdict in against.judge(outputs, carried_state=kernel.carried_state):
        found = _compared(verdict, against, outputs, recorded)
        apart = None if found is None else found.relative
        rows.append(Row(dump.call, kernel.name, verdict, apart, found if detail else None))
    return rows


def _compared(
    verdict: Verdict, against: _Against | _Streamed, outputs: Outputs, recorded: Outputs | None
) -> Difference | None:
    """The kernel's tensor against the recorded one, over the tokens or the states that sequences use."""
    field = "final_state" if verdict.tensor == "final_state" else "o"
    ours, theirs = (None if x is None else getattr(x, field) for x in (outputs, recorded))
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return None
    inputs, layout = against.inputs, Layout.of(against.inputs)
    states = field == "final_state"
    lens = [1] * layout.dims.N if states else layout.lens
    comparing = Comparing(verdict.tensor, lens, layout.dims.HV, (ours.dtype, theirs.dtype), states)
    for group in layout.groups():
        if not states:
            comparing.add(token_place(group), stack(layout, ours, group), stack(layout, theirs, group))
            continue
        for n in {s.sequence for s in group if s.stop == layout.lens[s.sequence] and layout.slots[s.sequence] >= 0}:
            pooled = inputs.state_indices is not None
            slot = layout.slots[n] if pooled else n
            rows = [x[slot] if inputs.state_v_first else x[slot].mT for x in (ours, theirs)]
            comparing.add(state_place(layout, n, pooled=pooled), *(row.reshape(1, layout.dims.HV, -1) for row in rows))
    found = comparing.result(beyond([verdict]))
    return first_token(found, lambda stretch: (layout.tokens(ours, stretch), layout.tokens(theirs, stretch)))
