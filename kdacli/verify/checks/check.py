"""Runs kernels over cases and judges what comes out: values, and what must hold beside them."""

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator
from typing import Literal

import torch

from kda_kernels.checks import problem_of
from kda_kernels.errors import InputError, one_line
from kda_kernels.problem import Op, Problem
from kda_kernels.registry import Kernel
from kda_kernels.tensors import Inputs, Outputs
from kda_kernels.triton.runtime import interpreted
from kdacli.judge import Reference, Verdict, judge
from kdacli.judge.bits import same_bits
from kdacli.synthetic import make_inputs
from kdacli.userkernels import UserKernel
from kdacli.verify.cases.case import Case
from kdacli.verify.checks import gpu_memory
from kdacli.verify.checks.call import ObservedCall, Runner, call
from kdacli.verify.checks.continuity import OneByOne, PrefillThenDecode
from kdacli.verify.checks.memory import modified
from kdacli.verify.properties import PROPERTIES, NotApplicableError, Remark, Subject
from kdacli.verify.transforms import LAYOUTS, SERVING, transformed

Status = Literal["pass", "fail", "refused", "error"]
_LONGEST = 300  # characters of an error
NO_ROOM = "the GPU has too little memory free for this case"
Table = list[tuple[Case, list[Kernel]]]  # cases, each with the kernels that it is for


@dataclasses.dataclass(frozen=True)
class Held:
    """What became of one property: pass (notes: what is worth knowing), fail, refused (it could not be checked; the
    notes say why), or error.
    """

    name: str
    status: Status
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of one kernel in one case.

    Attributes:
        case, kernel: names. op: of the case.
        status: pass; fail: it ran and is wrong; refused: it said beforehand that it cannot; error: it raised.
        verdicts: one for each output tensor, when it ran.
        notes: why it was refused, what it raised, or what is wrong beside the values.
        properties: those of the case, in its order.
        crashed: an error that took the GPU's context, or the process, along.
        seconds: that the check took.
        outputs: of its first call, for a closer look at a failure; else None.
    """

    case: str
    kernel: str
    op: Op
    status: Status
    verdicts: tuple[Verdict, ...] = ()
    notes: tuple[str, ...] = ()
    properties: tuple[Held, ...] = ()
    crashed: bool = False
    seconds: float = dataclasses.field(default=0.0, compare=False)
    outputs: Outputs | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def ok(self) -> bool:
        return self.status in ("pass", "refused")

    @property
    def wrong_values(self) -> bool:
        """Whether it ran and some output is not what it should be."""
        return any(not verdict.passed for verdict in self.verdicts)


@dataclasses.dataclass(frozen=True)
class Bench:
    """One case made ready: everything that its kernels share.

    Attributes:
        name: of the case. problem: what a kernel is asked whether it supports it.
        inputs: of the call. reference: what it should give.
        properties, decode_steps: see `Case`.
        strided: the inputs' memory is laid out unusually: a kernel may refuse it by an `InputError`.
    """

    name: str
    problem: Problem
    inputs: Inputs
    reference: Reference
    properties: tuple[str, ...] = ()
    decode_steps: int = 0
    strided: bool = False

    @classmethod
    def of_case(cls, case: Case, seed: int, device: str) -> "Bench":
        inputs, problem = inputs_of(case, seed, device), case.problem
        if not SERVING.keys().isdisjoint(case.transforms):
            problem = problem_of(inputs, problem.op)
        stepwise = problem.op is Op.DECODE and case.decode_steps > 0
        bench = cls(case.name, problem, inputs, Reference(inputs, problem.op, stepwise=stepwise).computed())
        strided = not LAYOUTS.keys().isdisjoint(case.transforms)
        return dataclasses.replace(bench, properties=case.properties, decode_steps=case.decode_steps, strided=strided)

    @classmethod
    def where_it_fits(cls, case: Case, seed: int, device: str) -> "Bench | None":
        """As `of_case`; None: the GPU has too little memory free."""
        for _ in range(2):
            with contextlib.suppress(torch.OutOfMemoryError):
                return cls.of_case(case, seed, device)
            gpu_memory.give_back(0)
        return None

    @classmethod
    def of_inputs(cls, name: str, problem: Problem, inputs: Inputs) -> "Bench":
        return cls(name, problem, inputs, Reference(inputs, problem.op).computed())


def inputs_of(case: Case, seed: int, device: str) -> Inputs:
    """The tensors of a case."""
    drawn = make_inputs(case.problem, gates=case.gates, keys=case.keys, seed=seed + case.seed, device=device)
    return transformed(drawn, case.transforms)


def pairs(kernels: Iterable[Kernel], cases: Iterable[Case]) -> Table:
    """Each case with the kernels of its op, in order; cases that no kernel serves are left out."""
    kernels = list(kernels)
    table = [(case, [kernel for kernel in kernels if kernel.op is case.problem.op]) for case in cases]
    return [(case, served) for case, served in table if served]


def runner_of(kernel: Kernel, decode_steps: int) -> Runner:
    """What is run for a kernel: itself; or a prefill and then a decode kernel for the last so many tokens; or a decode
    kernel token by token.
    """
    if decode_steps and kernel.op is Op.DECODE:
        return OneByOne(kernel)
    return PrefillThenDecode.of(kernel, decode_steps) if decode_steps else kernel


def check(kernel: Kernel, bench: Bench) -> Result:
    """Checks one kernel on one case. Nothing that the kernel raises gets out.

    Where memory runs out it is checked again with all that torch kept for later. If that does not help, it is the
    kernel's failure, unless others hold the memory.
    """
    start = time.perf_counter()
    try:
        result = _check(kernel, bench)
    except torch.OutOfMemoryError:
        result = None  # its traceback holds tensors: so not here
    if result is None:
        gpu_memory.give_back(0)
        try:
            result = _check(kernel, bench)
        except torch.OutOfMemoryError as error:
            held = gpu_memory.others()
            status: Status = "error" if held is None else "refused"
            note = one_line(error, _LONGEST) if held is None else f"{NO_ROOM}: {held}"
            name = runner_of(kernel, bench.decode_steps).name
            result = Result(bench.name, name, bench.problem.op, status, notes=(note,))
    return dataclasses.replace(result, seconds=round(time.perf_counter() - start, 4))


def _check(kernel: Kernel, bench: Bench) -> Result:
    runner = runner_of(kernel, bench.decode_steps)

    def result(status: Status, notes: Iterable[str] = (), **found) -> Result:
        return Result(bench.name, runner.name, bench.problem.op, status, notes=tuple(notes), **found)

    try:
        if (reason := runner.unsupported(bench.problem)) is not None:
            return result("refused", [reason])
        first = call(runner, bench.inputs, guarded=True)
        # In the interpreter programs run one after the other: nothing can race, and a second call costs seconds.
        again = first if _is_interpreted(kernel) else call(runner, bench.inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the kernel's fault, whatever it is: reported, and the next case runs
        if bench.strided and isinstance(error, InputError):
            return result("refused", [one_line(error, _LONGEST)])
        return result("error", [one_line(error, _LONGEST)])
    outputs = first.outputs
    verdicts = judge(bench.reference.granted(runner.rounded_convolution), outputs, carried_state=runner.carried_state)
    notes = [*_wrong_beside_values(bench, first), *_differences(outputs, again.outputs)]
    passed = not notes and all(verdict.passed for verdict in verdicts)
    held: tuple[Held, ...] = ()
    if passed:  # what is wrong alone need not be asked what else it does wrong
        subject = Subject(
            kernel=runner,
            problem=bench.problem,
            inputs=bench.inputs,
            outputs=outputs,
            reference=bench.reference,
            ours=kernel.ours and not isinstance(kernel, UserKernel),
            interpreted=_is_interpreted(kernel),
        )
        held = tuple(_ask(name, subject) for name in bench.properties)
        passed = all(one.status in ("pass", "refused") for one in held)
    return result(
        "pass" if passed else "fail", notes, verdicts=tuple(verdicts), properties=held,
        outputs=None if passed else outputs,
    )  # fmt: skip


def _ask(name: str, subject: Subject) -> Held:
    """One property of a kernel that is right when alone."""
    found = PROPERTIES[name]
    if found.gpu_only and not subject.inputs.q.is_cuda:
        return Held(name, "refused", ("there is no GPU",))
    try:
        notes = tuple(dict.fromkeys(found.check(subject)))
    except NotApplicableError as error:
        return Held(name, "refused", (one_line(str(error), _LONGEST),))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the kernel's fault, as above
        return Held(name, "error", (one_line(error, _LONGEST),))
    return Held(name, "pass" if all(isinstance(note, Remark) for note in notes) else "fail", notes)


def _is_interpreted(kernel: Kernel) -> bool:
    return kernel.backend == "triton" and interpreted()


def _wrong_beside_values(bench: Bench, made: ObservedCall) -> Iterator[str]:
    """Inputs that the call modified, memory that is nobody's, and outputs of another dtype than they should have."""
    inputs, outputs = bench.inputs, made.outputs
    for name in modified(inputs, made.copy.inputs):
        yield f"{name} was modified: a kernel should write to its outputs and the used slots of a pool only"
    yield from made.strays
    state_dtype = torch.float32 if inputs.state is None else inputs.state.dtype
    dtypes = {"o": torch.float32 if bench.problem.op is Op.GATE else inputs.v.dtype, "final_state": state_dtype}
    for name, dtype in dtypes.items():
        tensor = outputs.tensors().get(name)
        if tensor is not None and tensor.dtype not in (dtype, torch.float32 if name == "final_state" else None):
            yield f"{name} is {tensor.dtype}: it should be {dtype}"


def _differences(first: Outputs, second: Outputs) -> Iterator[str]:
    """Outputs whose bits a second call on the same inputs did not repeat."""
    for name, tensor in first.tensors().items():
        other = second.tensors().get(name)
        if other is None or not same_bits(tensor, other):
            yield f"a second call on the same inputs gave other bits of {name}"
