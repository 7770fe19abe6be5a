"""What is to be timed: from the flags of `kda profile` to cases, and to the inputs of each."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kda_kernels.errors import InputError
from kda_kernels.problem import Op, Problem
from kdacli import options
from kdacli.flags import SHAPE_FLAGS, flag
from kdacli.profile import axes
from kdacli.profile.suites import Case, suite
from kdacli.userkernels import resolve

if TYPE_CHECKING:
    from kda_kernels.tensors import Inputs

Load = Callable[[Case], "Inputs"]
_WITH_SUITE = {"gates", "keys", "seed"}  # the shape flags that a suite leaves open
_WITH_LAYER = _WITH_SUITE | {"tp", "tokens", "seqs", "state_dtype"}
LAYER_GATES = ("init",)  # what a model starts from: a layer's cost should not rest on gates that forget at once


def cases_from(params: Mapping[str, Any]) -> tuple[list[Case], Load]:
    """The cases that the flags describe, and what makes the inputs of one on the GPU.

    Args:
        params: the command's parameters; `gates` is a tuple of regimes, `suite_name` one of `SUITES` or None, `sweep` a
            tuple of `axes.Axis`, `layer` a model's name or None.

    Raises:
        InputError: flags contradict each other, or a dump is not as it should be.
    """
    regimes = tuple(dict.fromkeys(params["gates"]))
    shape = {**params, "gates": regimes[0] if regimes else None}
    _one_of(params, "dump", "suite_name", "sweep", "layer")
    if params["dump"]:
        return _dump_case(shape)
    if params["call"]:
        raise InputError("--call is given without --dump: it names a call of a dump")
    load = _synthetic(options.regime_from(shape))
    if params["suite_name"]:
        return _suite_cases(shape, regimes), load
    if _asks_for_decode(params):
        return suite("decode", regimes), load
    if params["layer"]:
        return _layer_cases(shape, regimes or LAYER_GATES), load
    if params["sweep"]:
        cases = _sweep_cases(shape, regimes or ("bench",))
        return cases, narrowing(cases, load)
    problem = options.problem_from(shape, default_op=_default_op(params))
    return [Case(_short(problem), problem, gates) for gates in regimes or ("bench",)], load


def _asks_for_decode(params: Mapping[str, Any]) -> bool:
    """Whether nothing is said but --op decode: one batch size says little of a decode kernel, so that is its suite."""
    shaped = any(params.get(name) for name in SHAPE_FLAGS if name not in _WITH_SUITE)
    return params["op"] == Op.DECODE and not shaped and not params["sweep"] and not params["layer"]


def _one_of(params: Mapping[str, Any], *names: str) -> None:
    there = [name for name in names if params[name]]
    if len(there) > 1:
        first, second = (f"--{name.removesuffix('_name')}" for name in there[:2])
        raise InputError(f"{first} is given with {second}: leave one out")


def _default_op(params: Mapping[str, Any]) -> Op:
    return resolve(params["kernels"][0], op=params["op"]).op if params["kernels"] else Op.PREFILL


def _suite_cases(shape: Mapping[str, Any], regimes: tuple[str, ...]) -> list[Case]:
    name = shape["suite_name"]
    _leave_open(shape, _WITH_SUITE, "--suite, which sets the shapes")
    if shape["op"] not in (None, name.removesuffix("-bf16")):
        raise InputError(f"--op is {shape['op']} with --suite {name}: leave one out")
    return suite(name, regimes)


def _leave_open(shape: Mapping[str, Any], allowed: set[str], what: str) -> None:
    for other in SHAPE_FLAGS:
        if shape.get(other) is not None and other not in allowed:
            raise InputError(f"{flag(other, shape[other])} is given with {what}: leave one out")


def _layer_cases(shape: Mapping[str, Any], regimes: tuple[str, ...]) -> list[Case]:
    """A prefill of one sequence of -T tokens, and a decode step of -N sequences, with a model's heads and gate."""
    _leave_open(shape, _WITH_LAYER, "--layer, which sets the layer")
    ops = [Op(shape["op"])] if shape["op"] else [Op.PREFILL, Op.DECODE]
    if shape["kernels"] and not shape["op"]:
        ops = list(dict.fromkeys(resolve(name).op for name in shape["kernels"]))
    if Op.GATE in ops:
        raise InputError("--layer is of prefill and decode: the gate stage is a part of prefill")
    found = []
    for op in ops:
        other = "seqs" if op is Op.PREFILL else "tokens"
        problem = options.problem_from({**shape, "model": shape["layer"], "op": op, other: None}, default_op=op)
        found += [Case(_short(problem), problem, gates) for gates in regimes]
    return found


def _sweep_cases(shape: Mapping[str, Any], regimes: tuple[str, ...]) -> list[Case]:
    """One case for each point. Where N is swept over a pool, all share one of twice the most sequences."""
    for axis in shape["sweep"]:
        name = axes.PARAMETERS[axis.name]
        for other in (name, *(("lens",) if name != "heads" else ("model",))):
            if shape.get(other) is not None:
                raise InputError(f"{flag(other)} is given with --sweep {axis.name}: leave one out")
    op = _default_op(shape)
    found = []
    for gates in regimes:
        for point in axes.points(shape["sweep"]):
            problem = options.problem_from({**shape, **axes.flags_of(point)}, default_op=op)
            found.append(Case(_short(problem), problem, gates, tuple(point.items())))
    most = max(case.problem.N for case in found)
    if shape.get("pool") is None and found[0].problem.pool_slots is not None:
        found = [dataclasses.replace(c, problem=dataclasses.replace(c.problem, pool_slots=2 * most)) for c in found]
    return found


def _synthetic(regime: Mapping[str, Any]) -> Load:
    def load(case: Case) -> "Inputs":
        from kdacli.synthetic import make_inputs

        options.require_memory(case.problem, "cuda")
        return make_inputs(case.problem, **{**regime, "gates": case.gates}, device="cuda")

    return load


def narrowing(cases: Sequence[Case], load: Load) -> Load:
    """A `load` that makes the tensors of the most sequences once, and hands each smaller case its first rows.

    Making a pool of some GB takes longer than timing a kernel on it. Only dense batches over one pool are cut so: their
    first N rows are what a batch of N looks like. Others are made each for itself.
    """
    largest: dict[tuple[Problem, str], Case] = {}
    for case in cases:
        key = _family(case)
        if key not in largest or case.problem.N > largest[key].problem.N:
            largest[key] = case
    kept: dict[str, Any] = {}

    def narrowed(case: Case) -> "Inputs":
        p, key = case.problem, _family(case)
        if p.packed or p.pool_slots is None or p.padding:
            return load(case)
        if kept.get("key") != key:
            kept.clear()  # before the next are made: both may not fit
            kept.update(key=key, inputs=load(largest[key]))
        whole = kept["inputs"]
        cut = {name: getattr(whole, name)[: p.N] for name in ("q", "k", "v", "g", "beta", "state_indices")}
        return dataclasses.replace(whole, **cut)

    return narrowed


def _family(case: Case) -> tuple[Problem, str]:
    """What cases that differ in N alone have in common."""
    return dataclasses.replace(case.problem, seq_lens=case.problem.seq_lens[:1]), case.gates


def _dump_case(shape: Mapping[str, Any]) -> tuple[list[Case], Load]:
    problem, inputs, _, _ = options.inputs_from(shape, "cpu")
    return [Case(_short(problem), problem, "dump")], lambda case: inputs.to("cuda")


def _short(problem: Problem) -> str:
    """The problem's name where the op is said already, and its state where that is not fp32: H=96 N=32 bf16 state."""
    state = " bf16 state" if problem.state_dtype == "bfloat16" else ""
    return problem.name.removeprefix(f"{problem.op} ") + state
