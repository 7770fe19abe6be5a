"""What is to be timed: from what is wanted to cases, and to the inputs of each."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kda_kernels.errors import InputError
from kda_kernels.problem import Op, Problem
from kdacli import options
from kdacli.flags import SHAPE_FLAGS, flag
from kdacli.profile.cases import axes
from kdacli.profile.cases.suites import TimedCase, suite
from kdacli.profile.wanted import Wanted
from kdacli.userkernels import resolve

if TYPE_CHECKING:
    from kda_kernels.tensors import Inputs

Load = Callable[[TimedCase], "Inputs"]
_WITH_SUITE = {"gates", "keys", "seed"}  # the shape flags that a suite leaves open
_WITH_LAYER = _WITH_SUITE | {"tp", "tokens", "seqs", "state_dtype", "state_rounding"}
LAYER_GATES = ("init",)  # what a model starts from: a layer's cost should not rest on gates that forget at once


def cases_of(wanted: Wanted) -> tuple[list[TimedCase], Load]:
    """The cases that are wanted, and what makes the inputs of one on the GPU.

    Raises:
        InputError: flags contradict each other, or a dump is not as it should be.
    """
    if wanted.dump:
        return _dump_case(wanted)
    if wanted.shape["call"]:
        raise InputError("--call is given without --dump: it names a call of a dump")
    load, regimes = _synthetic(options.regime_from(wanted.shape)), wanted.regimes
    if wanted.suite:
        return _suite_cases(wanted.suite, wanted), load
    if _asks_for_decode(wanted):
        return suite(str(wanted.op), regimes), load
    if wanted.layer:
        return _layer_cases(wanted.layer, wanted), load
    if wanted.sweep:
        cases = sweep_cases(wanted)
        return cases, narrowing(cases, load)
    problem = options.problem_from(wanted.shape, default_op=_default_op(wanted))
    return [TimedCase(_short(problem), problem, gates) for gates in regimes or ("bench",)], load


def _asks_for_decode(wanted: Wanted) -> bool:
    """Whether nothing is said but --op decode or step: one batch size says little of it, so that is its suite."""
    shaped = any(wanted.shape.get(name) for name in SHAPE_FLAGS if name not in _WITH_SUITE)
    return wanted.op in (Op.DECODE, Op.STEP) and not shaped and not wanted.sweep and not wanted.layer


def _default_op(wanted: Wanted) -> Op:
    return resolve(wanted.kernels[0], op=wanted.op).op if wanted.kernels else Op.PREFILL


def _suite_cases(name: str, wanted: Wanted) -> list[TimedCase]:
    _leave_open(wanted.shape, _WITH_SUITE, "--suite, which sets the shapes")
    if wanted.op not in (None, name.removesuffix("-bf16").removesuffix("-states")):
        raise InputError(f"--op is {wanted.op} with --suite {name}: leave one out")
    return suite(name, wanted.regimes)


def _leave_open(shape: Mapping[str, Any], allowed: set[str], what: str) -> None:
    for other in SHAPE_FLAGS:
        if shape.get(other) is not None and other not in allowed:
            raise InputError(f"{flag(other, shape[other])} is given with {what}: leave one out")


def _layer_cases(model: str, wanted: Wanted) -> list[TimedCase]:
    """A prefill of one sequence of -T tokens, and decode of -N sequences, with a model's heads and gate: the recurrence
    alone, and a step with its convolution and gated norm.
    """
    _leave_open(wanted.shape, _WITH_LAYER, "--layer, which sets the layer")
    ops = [Op(wanted.op)] if wanted.op else [Op.PREFILL, Op.DECODE, Op.STEP]
    if wanted.kernels and not wanted.op:
        ops = list(dict.fromkeys(resolve(name).op for name in wanted.kernels))
    if Op.GATE in ops:
        raise InputError("--layer is of prefill and decode: the gate stage is a part of prefill")
    found = []
    for op in ops:
        other = "seqs" if op is Op.PREFILL else "tokens"
        problem = options.problem_from({**wanted.shape, "model": model, "op": op, other: None}, default_op=op)
        found += [TimedCase(_short(problem), problem, gates) for gates in wanted.regimes or LAYER_GATES]
    return found


def sweep_cases(wanted: Wanted) -> list[TimedCase]:
    """One case for each point. Where N is swept over a pool, all share one of twice the most sequences."""
    for axis in wanted.sweep:
        name = axes.PARAMETERS[axis.name]
        for other in (name, *(("lens",) if name != "heads" else ("model",))):
            if wanted.shape.get(other) is not None:
                raise InputError(f"{flag(other)} is given with --sweep {axis.name}: leave one out")
    op = _default_op(wanted)
    found = []
    for gates in wanted.regimes or ("bench",):
        for point in axes.points(wanted.sweep):
            problem = options.problem_from({**wanted.shape, **axes.flags_of(point)}, default_op=op)
            found.append(TimedCase(_short(problem), problem, gates, tuple(point.items())))
    most = max(case.problem.N for case in found)
    if wanted.shape.get("pool") is None and found[0].problem.pool_slots is not None:
        found = [dataclasses.replace(c, problem=dataclasses.replace(c.problem, pool_slots=2 * most)) for c in found]
    return found


def _synthetic(regime: Mapping[str, Any]) -> Load:
    def load(case: TimedCase) -> "Inputs":
        from kdacli.synthetic import make_inputs

        options.require_memory(case.problem, "cuda")
        return make_inputs(case.problem, **{**regime, "gates": case.gates}, device="cuda")

    return load


def narrowing(cases: Sequence[TimedCase], load: Load) -> Load:
    """A `load` that makes the tensors of the most sequences once, and hands each smaller case its first rows.

    Making a pool of some GB takes longer than timing a kernel on it. Only dense batches over one pool are cut so: their
    first N rows are what a batch of N looks like. Others are made each for itself.
    """
    largest: dict[tuple[Problem, str], TimedCase] = {}
    for case in cases:
        key = _family(case)
        if key not in largest or case.problem.N > largest[key].problem.N:
            largest[key] = case
    kept: dict[tuple[Problem, str], Inputs] = {}

    def narrowed(case: TimedCase) -> "Inputs":
        p, key = case.problem, _family(case)
        if p.packed or p.pool_slots is None or p.padding:
            return load(case)
        if key not in kept:
            kept.clear()  # before the next are made: both may not fit
            kept[key] = load(largest[key])
        cut = kept[key].map_tokens(lambda t: t[: p.N])
        return dataclasses.replace(cut, state_indices=kept[key].pool[1][: p.N])

    return narrowed


def _family(case: TimedCase) -> tuple[Problem, str]:
    """What cases that differ in N alone have in common."""
    return dataclasses.replace(case.problem, seq_lens=case.problem.seq_lens[:1]), case.gates


def _dump_case(wanted: Wanted) -> tuple[list[TimedCase], Load]:
    problem, inputs, _, _ = options.inputs_from(wanted.shape, "cpu")
    return [TimedCase(_short(problem), problem, "dump")], lambda case: inputs.to("cuda")


def _short(problem: Problem) -> str:
    """The problem's name where the op is said already, and its state where that is not fp32: H=96 N=32 bf16 state."""
    return f"{problem.name.removeprefix(f'{problem.op} ')} {problem.state_name}".rstrip()
