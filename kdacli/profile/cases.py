"""What is to be timed: from the flags of `kda profile` to cases, and to the inputs of each."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kda_kernels import registry
from kda_kernels.errors import InputError
from kda_kernels.problem import Op, Problem
from kdacli import options
from kdacli.flags import SHAPE_FLAGS, flag
from kdacli.profile.suites import Case, suite

if TYPE_CHECKING:
    from kda_kernels.tensors import Inputs

Load = Callable[[Case], "Inputs"]
_WITH_SUITE = {"gates", "keys", "seed"}  # the shape flags that a suite leaves open


def cases_from(params: Mapping[str, Any]) -> tuple[list[Case], Load]:
    """The cases that the flags describe, and what makes the inputs of one on the GPU.

    Args:
        params: the command's parameters; `gates` is a tuple of regimes, `suite_name` one of `SUITES` or None.

    Raises:
        InputError: flags contradict each other, or a dump is not as it should be.
    """
    regimes = tuple(dict.fromkeys(params["gates"]))
    shape = {**params, "gates": regimes[0] if regimes else None}
    if params["dump"]:
        return _dump_case(shape)
    if params["call"]:
        raise InputError("--call is given without --dump: it names a call of a dump")
    if params["suite_name"]:
        cases = _suite_cases(shape, regimes)
    else:
        problem = options.problem_from(shape, default_op=_default_op(params))
        cases = [Case(_short(problem), problem, gates) for gates in regimes or ("bench",)]
    return cases, _synthetic(options.regime_from(shape))


def _default_op(params: Mapping[str, Any]) -> Op:
    return registry.get(params["kernels"][0]).op if params["kernels"] else Op.PREFILL


def _suite_cases(shape: Mapping[str, Any], regimes: tuple[str, ...]) -> list[Case]:
    name = shape["suite_name"]
    for other in SHAPE_FLAGS:
        if shape.get(other) is not None and other not in _WITH_SUITE:
            raise InputError(f"{flag(other, shape[other])} is given with --suite, which sets the shapes: leave one out")
    if shape["op"] not in (None, name):
        raise InputError(f"--op is {shape['op']} with --suite {name}: leave one out")
    return suite(name, regimes)


def _synthetic(regime: Mapping[str, Any]) -> Load:
    def load(case: Case) -> "Inputs":
        from kdacli.synthetic import make_inputs

        options.require_memory(case.problem, "cuda")
        return make_inputs(case.problem, **{**regime, "gates": case.gates}, device="cuda")

    return load


def _dump_case(shape: Mapping[str, Any]) -> tuple[list[Case], Load]:
    if shape["suite_name"]:
        raise InputError("--suite is given with --dump: leave one out")
    problem, inputs, _, _ = options.inputs_from(shape, "cpu")
    return [Case(_short(problem), problem, "dump")], lambda case: inputs.to("cuda")


def _short(problem: Problem) -> str:
    """The problem's name where the op is said already: prefill N=1 T=8192 H=96 -> N=1 T=8192 H=96."""
    return problem.name.removeprefix(f"{problem.op} ")
