"""A suite's cases brought within what a kernel supports, where they are about something else.

A case about gaps in a pool says little of a kernel that takes bf16 only if it is refused for its fp16. So what a case
is not about (see `Case.about`) is changed until the kernel supports it: dtypes, head sizes, the gate's activation, one
token per sequence, padding, and so on. The name of the case shows what was changed: decode-pair-05/K=128/dtype=...
A case keeps what it is about, and where that is what a kernel lacks, it is refused for it.
"""

import dataclasses
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from kda_kernels.contract import Contract
from kda_kernels.errors import InputError
from kda_kernels.problem import Gate, Parts, Problem
from kda_kernels.registry import Kernel
from kdacli.verify.cases import spec
from kdacli.verify.cases.case import Case
from kdacli.verify.checks.call import Runner
from kdacli.verify.checks.check import Table, pairs, runner_of
from kdacli.verify.transforms import possible

_MANY = 64  # sequences that take the place of one with as many tokens
_MODEL_HEADS = 12  # Kimi K3's on one of 8 GPUs, where a kernel is compiled for a model's
_SPARE = 2  # slots of a pool that nobody uses
_STATES = {"initial_state": True, "final_state": True}


def adapted(kernels: Iterable[Kernel], cases: Iterable[Case]) -> Table:
    """Each case with the kernels that take it as it is, and after it, changed, for those that do not."""
    table: Table = []
    for case, served in pairs(kernels, cases):
        by_case: dict[Case, list[Kernel]] = {case: []}
        for kernel in served:
            by_case.setdefault(adapt(kernel, case), []).append(kernel)
        table += [(one, chosen) for one, chosen in by_case.items() if chosen]
    return table


def adapt(kernel: Kernel, case: Case) -> Case:
    """The case with the changes that bring it within what the kernel supports, as far as it keeps its point: where that
    is what the kernel lacks, its refusal says so, and not the first thing beside it.
    """
    runner = runner_of(kernel, case.decode_steps)
    fitting, left = case, _hurdles(kernel, runner, case.problem)
    while left:
        found = next((c for c in _one_change(case, fitting) if _hurdles(kernel, runner, c.problem) < left), None)
        if found is None:
            break
        fitting, left = found, _hurdles(kernel, runner, found.problem)
    if left == 1:  # where a kernel names the first hurdle only, a second one may stand behind it
        twice = (two for one in _one_change(case, fitting) for two in _one_change(case, one))
        fitting = next((two for two in twice if runner.unsupported(two.problem) is None), fitting)
    return case if fitting == case else dataclasses.replace(fitting, name=spec.renamed(fitting))


def _one_change(case: Case, fitting: Case) -> Iterator[Case]:
    """`fitting` with one more change each, where that leaves something that `case` is about."""
    for change in _changes(fitting.problem):
        problem = _changed(fitting.problem, change)
        if problem is not None and possible(problem, case.transforms):
            found = dataclasses.replace(fitting, problem=problem)
            if not case.about or any(not spec.changed(case, found, fields) for fields in case.about):
                yield found


def _hurdles(kernel: Kernel, runner: Runner, problem: Problem) -> int:
    """How much keeps a kernel from running a problem: a peer's `CONTRACT` tells all of it at once, others the first."""
    if runner.unsupported(problem) is None:
        return 0
    contract = getattr(sys.modules.get(kernel.module), "CONTRACT", None)  # asked just now, so it is imported
    return max(1, sum(1 for _ in contract.refusals(problem))) if isinstance(contract, Contract) else 1


Change = dict[str, Any]  # fields of a problem or of its options, and their values


def _changes(problem: Problem) -> Iterator[Change]:
    """What may be changed in a problem, the most usual values first."""
    if problem.V != problem.K:
        yield {"K": 128, "V": 64}
    for size in (128, 64):
        yield {"K": size, "V": size}
    if problem.HV != problem.H:
        yield {"HV": problem.H}
    if (parts := problem.parts) is not None:
        yield {"parts": Parts(norm=parts.norm)}
        yield {"parts": Parts(width=0, norm=parts.norm)}
        yield {"H": _MODEL_HEADS, "HV": _MODEL_HEADS}
    for dtype in ("bfloat16", "float16", "float32"):
        yield {"dtype": dtype}
    for dtype in ("bfloat16", "float32"):
        yield {"g_dtype": dtype}
        yield {"beta_dtype": dtype}
    for dtype in ("float32", "bfloat16"):
        yield {"param_dtype": dtype}
        yield {"state_dtype": dtype}
    for gate, bound in ((Gate.SAFE, -5.0), (Gate.SOFTPLUS, None), (Gate.NONE, None)):
        if gate is not problem.options.gate:
            yield {"gate": gate, "lower_bound": bound}
    yield {"allow_neg_eigval": False}
    yield {"beta_is_logit": True}
    for flag in (True, False):
        yield {"qk_l2norm": flag}
    yield {"scale": None}
    yield from _lengths(problem)
    yield {"padding": 0}
    yield {"pool_slots": 0 if problem.pool_slots is None else None, "padding": 0} | _STATES
    for flag in (True, False):
        yield {"state_v_first": flag}
        yield {"packed": flag}


def _lengths(problem: Problem) -> Iterator[Change]:
    """Other sequences, each time less like what they were."""
    lens = problem.seq_lens
    others = [tuple(n for n in lens if n)]
    if problem.op.decodes:
        others += [tuple(min(n, 1) for n in lens)] * (0 in lens) + [(1,) * min(problem.T, _MANY)]
    return ({"seq_lens": other} for other in others if other)


def _changed(problem: Problem, change: Change) -> Problem | None:
    """The problem with those values, padding and pool along with its sequences.

    None if they do not fit together, or are those that it has.
    """
    has = vars(problem) | vars(problem.options)
    if all(has[name] == value for name, value in change.items()):
        return None
    fields = {name: getattr(problem, name) for name in ("seq_lens", "padding", "pool_slots")}
    inside = {name: value for name, value in change.items() if hasattr(problem.options, name)}
    fields |= {name: value for name, value in change.items() if name not in inside}
    count = len(fields["seq_lens"])
    if count < problem.N:
        fields["padding"] = min(fields["padding"], count - 1)
    if fields["pool_slots"] is not None and fields["pool_slots"] < count - fields["padding"]:
        fields["pool_slots"] = count + _SPARE
    try:
        options = dataclasses.replace(problem.options, **inside)
        found = dataclasses.replace(problem, options=options, **fields)
    except InputError:
        return None
    return None if found == problem else found
