"""Runs kernels over cases and judges what comes out: values, untouched inputs, and the same bits a second time."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Literal

import torch

from kda_kernels.errors import InputError
from kda_kernels.problem import Op, Problem
from kda_kernels.registry import Kernel
from kda_kernels.tensors import Inputs, Outputs
from kda_kernels.triton.runtime import interpreted
from kdacli.judge import Verdict, judge
from kdacli.synthetic import make_inputs
from kdacli.verify.baseline import expect, plain
from kdacli.verify.cases import Case
from kdacli.verify.continuity import PrefillThenDecode
from kdacli.verify.memory import modified, own_memory, poisoned_memory, same_bits
from kdacli.verify.transforms import TRANSFORMS

Status = Literal["pass", "fail", "refused", "error"]


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of one kernel in one case.

    Attributes:
        case, kernel: names. op: of the case.
        status: pass; fail: it ran and is wrong; refused: it said beforehand that it cannot; error: it raised.
        verdicts: one for each output tensor, when it ran.
        notes: why it was refused, what it raised, or what is wrong beside the values.
    """

    case: str
    kernel: str
    op: Op
    status: Status
    verdicts: tuple[Verdict, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return self.status in ("pass", "refused")


@dataclasses.dataclass(frozen=True)
class Bench:
    """One case made ready: everything that its kernels share.

    Attributes:
        name: of the case. problem: what a kernel is asked whether it supports it.
        inputs, expected, plain_outputs: as `judge` takes them.
        decode_steps: see `Case`.
        strided: the inputs' memory is laid out unusually: a kernel may refuse it by an `InputError`.
    """

    name: str
    problem: Problem
    inputs: Inputs
    expected: Outputs
    plain_outputs: Outputs
    decode_steps: int = 0
    strided: bool = False

    @classmethod
    def of_case(cls, case: Case, seed: int, device: str) -> "Bench":
        inputs = make_inputs(case.problem, gates=case.gates, keys=case.keys, seed=seed, device=device)
        if case.transform is not None:
            inputs = TRANSFORMS[case.transform](inputs)
        bench = cls.of_inputs(case.name, case.problem, inputs)
        return dataclasses.replace(bench, decode_steps=case.decode_steps, strided=case.transform is not None)

    @classmethod
    def of_inputs(cls, name: str, problem: Problem, inputs: Inputs) -> "Bench":
        return cls(name, problem, inputs, expect(inputs, problem.op), plain(inputs, problem.op))


def pairs(kernels: Iterable[Kernel], cases: Iterable[Case]) -> list[tuple[Case, list[Kernel]]]:
    """Each case with the kernels of its op, in order; cases that no kernel serves are left out."""
    kernels = list(kernels)
    table = [(case, [kernel for kernel in kernels if kernel.op is case.problem.op]) for case in cases]
    return [(case, served) for case, served in table if served]


def verify(kernels: Iterable[Kernel], cases: Iterable[Case], device: str, seed: int = 0) -> Iterator[Result]:
    """Checks every kernel in every case of its op, case by case, and yields each result as it is there.

    Args:
        kernels: to check. A kernel that cannot run a case is a result too ("refused").
        cases: see `kdacli.verify.cases`.
        device: "cpu" or "cuda".
        seed: of the synthetic inputs.
    """
    for case, served in pairs(kernels, cases):
        try:
            bench = Bench.of_case(case, seed, device)
        except torch.OutOfMemoryError:
            why = ("the GPU has too little memory free for this case",)
            yield from (Result(case.name, kernel.name, case.problem.op, "refused", notes=why) for kernel in served)
            continue
        for kernel in served:
            yield check(kernel, bench)


def check(kernel: Kernel, bench: Bench) -> Result:
    """Checks one kernel on one case. Nothing that the kernel raises gets out."""
    runner = PrefillThenDecode.of(kernel, bench.decode_steps) if bench.decode_steps else kernel

    def result(status: Status, verdicts: Iterable[Verdict] = (), notes: Iterable[str] = ()) -> Result:
        return Result(bench.name, runner.name, bench.problem.op, status, tuple(verdicts), tuple(notes))

    try:
        if (reason := runner.unsupported(bench.problem)) is not None:
            return result("refused", notes=[reason])
        outputs, call = _run(runner, bench.inputs)
        again = outputs if _is_interpreted(kernel) else _run(runner, bench.inputs)[0]
    except Exception as error:  # the kernel's fault, whatever it is: reported, and the next case runs
        if bench.strided and isinstance(error, InputError):
            return result("refused", notes=[one_line(error)])
        return result("error", notes=[f"{type(error).__name__}: {one_line(error)}"])
    verdicts = judge(
        bench.inputs, outputs, op=bench.problem.op, expected=bench.expected, plain_outputs=bench.plain_outputs
    )
    notes = [*_wrong_beside_values(bench.inputs, call, outputs, bench.problem.op), *_differences(outputs, again)]
    passed = not notes and all(verdict.passed for verdict in verdicts)
    return result("pass" if passed else "fail", verdicts, notes)


def _is_interpreted(kernel: Kernel) -> bool:
    """In Triton's interpreter programs run one after the other: nothing can race, and a second call costs seconds."""
    return kernel.backend == "triton" and interpreted()


def _run(kernel: Kernel | PrefillThenDecode, inputs: Inputs) -> tuple[Outputs, Inputs]:
    """One call on a copy of the inputs: what came out (a pool as final_state, whatever was returned), and the copy."""
    call = own_memory(inputs)
    with poisoned_memory():
        outputs = kernel.run(call)
        if call.q.is_cuda:
            torch.cuda.synchronize()
    if call.state_indices is not None:
        outputs = dataclasses.replace(outputs, final_state=call.state)
    return outputs, call


def _wrong_beside_values(inputs: Inputs, call: Inputs, outputs: Outputs, op: Op) -> Iterator[str]:
    """Inputs that the call modified, and outputs of another dtype than they should have."""
    for name in modified(inputs, call):
        yield f"{name} was modified: a kernel should write to its outputs and the used slots of a pool only"
    state_dtype = torch.float32 if inputs.state is None else inputs.state.dtype
    dtypes = {"o": torch.float32 if op is Op.GATE else inputs.v.dtype, "final_state": state_dtype}
    for name, tensor in outputs.tensors().items():
        if tensor.dtype not in (dtypes[name], torch.float32 if name == "final_state" else None):
            yield f"{name} is {tensor.dtype}: it should be {dtypes[name]}"


def _differences(first: Outputs, second: Outputs) -> Iterator[str]:
    """Outputs whose bits a second call on the same inputs did not repeat."""
    for name, tensor in first.tensors().items():
        other = second.tensors().get(name)
        if other is None or not same_bits(tensor, other):
            yield f"a second call on the same inputs gave other bits of {name}"


def one_line(error: BaseException) -> str:
    """An error's message in one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
