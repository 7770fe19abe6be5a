"""What a user's function takes: which problems its signature rules out, and the arguments of one call.

The convention is the docstring of `kdacli.userkernels`.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kda_kernels.errors import InputError
from kda_kernels.problem import CHUNK, FEATURES, LAYOUTS, SAFE_BOUND, Gate, Op, Problem

if TYPE_CHECKING:
    from kda_kernels.tensors import Inputs

_TOKENS = ("q", "k", "v", "g", "beta")
_GATE = ("g", "A_log", "dt_bias", "lower_bound", "cu_seqlens", "chunk_size")
_BUFFERS = ("out", "final_state")
# Switches, and what a function does that neither names one nor has an attribute of that name.
_SWITCHES = {
    "use_gate_in_kernel": True,
    "use_qk_l2norm_in_kernel": True,
    "use_beta_sigmoid_in_kernel": True,
    "allow_neg_eigval": False,
    "state_v_first": True,
}
_NAMES = (
    *_TOKENS,
    *("A_log", "dt_bias", "lower_bound", "cu_seqlens", "scale", "state", "state_indices"),
    *("output_final_state", "inplace_final_state", "safe_gate"),
    *_SWITCHES,
    *_BUFFERS,
    *sorted(FEATURES - LAYOUTS),
    "cu_seqlens_cpu",
)


@dataclasses.dataclass(frozen=True)
class Signature:
    """The parameters of a function, by our names.

    Attributes:
        typed: our name -> the function's own.
        required: our names of those without a default.
        positional: the function's own names of parameters that cannot be passed by keyword, in order.
        fixed: the value of each switch that the function does not name.
    """

    typed: Mapping[str, str]
    required: frozenset[str]
    positional: tuple[str, ...]
    fixed: Mapping[str, bool]

    @classmethod
    def of(cls, function: Callable[..., Any], op: Op, who: str) -> "Signature":
        """Raises `InputError` where the function cannot be called by the convention; `who` is its name in messages."""
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):
            raise InputError(f"{who} has no signature that Python can read: wrap it in a function that has") from None
        known = _GATE if op is Op.GATE else _NAMES
        typed: dict[str, str] = {}
        required: set[str] = set()
        positional: list[str] = []
        unknown: list[str] = []
        for p in parameters:
            if p.kind is p.VAR_POSITIONAL:
                continue
            if p.kind is p.VAR_KEYWORD:
                typed |= {name: name for name in ("A_log", "dt_bias") if name not in typed}
                continue
            name, optional = _our_name(p.name), p.default is not p.empty
            if name not in known or (name in _BUFFERS and optional):
                unknown += [] if optional else [p.name]
                continue
            if name in typed and typed[name] != p.name:
                raise InputError(f"{who} takes {typed[name]} and {p.name}, which both mean {name}: keep one")
            typed[name] = p.name
            required |= set() if optional else {name}
            positional += [p.name] if p.kind is p.POSITIONAL_ONLY else []
        if unknown:
            names = ", ".join(known)
            raise InputError(f"{who} takes {', '.join(unknown)} without a default: what kda passes is {names}")
        if lacking := [name for name in (("g",) if op is Op.GATE else _TOKENS) if name not in typed]:
            raise InputError(f"{who} does not take {', '.join(lacking)}: a {op} kernel should")
        fixed = {name: bool(getattr(function, name, on)) for name, on in _SWITCHES.items() if name not in typed}
        return cls(typed, frozenset(required), tuple(positional), fixed)

    def refusal(self, problem: Problem) -> str | None:
        """Why a function of this signature cannot run `problem`; None if it can."""
        rest = None if problem.op is Op.GATE else self._rest(problem) or self._features(problem)
        return self._batch(problem) or self._gate(problem) or rest

    @property
    def features(self) -> frozenset[str]:
        """What it names of `kda_kernels.problem.FEATURES`."""
        return FEATURES.intersection(self.typed)

    def _features(self, problem: Problem) -> str | None:
        missing = sorted(self.features & self.required - problem.features)
        return f"its {self.typed[missing[0]]} has no default: calls with it only" if missing else None

    def _batch(self, problem: Problem) -> str | None:
        if problem.packed and problem.N != 1 and "cu_seqlens" not in self.typed:
            return "it takes no cu_seqlens: dense batches only, or one sequence"
        if not problem.packed and "cu_seqlens" in self.required:
            return f"its {self.typed['cu_seqlens']} has no default: packed batches only"
        return None

    def _gate(self, problem: Problem) -> str | None:
        gate = problem.options.gate
        for name, needed_by in (("A_log", gate is not Gate.NONE), ("lower_bound", gate is Gate.SAFE)):
            if needed_by and name not in self.typed:
                return f"it takes no {name}: not the {gate} gate"
            if not needed_by and name in self.required:
                return f"its {self.typed[name]} has no default: not the gate {gate}"
        if gate is not Gate.NONE and "dt_bias" not in self.typed:
            return f"it takes no dt_bias: not the {gate} gate"
        return None

    def _rest(self, problem: Problem) -> str | None:
        options = problem.options
        wanted = {
            "use_qk_l2norm_in_kernel": options.qk_l2norm,
            "use_beta_sigmoid_in_kernel": options.beta_is_logit,
            "allow_neg_eigval": options.allow_neg_eigval,
        }
        stateful = problem.initial_state or problem.final_state or problem.pool_slots is not None
        if stateful:
            wanted["state_v_first"] = problem.state_v_first
        for name, on in wanted.items():
            if self.fixed.get(name, on) != on:
                return f"it takes no {name}, which is taken as {self.fixed[name]}: {on} is asked"
        if "scale" not in self.typed and not problem.has_usual_scale:
            return f"it takes no scale, which is taken as K^-0.5: {problem.scale} is asked"
        return self._state(problem)

    def _state(self, problem: Problem) -> str | None:
        pooled = problem.pool_slots is not None
        if (pooled or problem.initial_state) and "state" not in self.typed:
            return "it takes no initial_state"
        if pooled and "state_indices" not in self.typed:
            return "it takes no state_indices: no pools"
        if not pooled and "state_indices" in self.required:
            return f"its {self.typed['state_indices']} has no default: pools only"
        if not (pooled or problem.initial_state) and "state" in self.required:
            return f"its {self.typed['state']} has no default: it should start from a state"
        return None

    def arguments(self, inputs: "Inputs", op: Op) -> dict[str, Any]:
        """What to pass, by our names: a value for each parameter that the call has one for.

        Raises:
            InputError: the call lacks what the function cannot do without, or has what it does not take.
        """
        values = _values(inputs, op)
        if values.get("dt_bias") is not None and "dt_bias" not in self.typed:
            raise InputError("the call has a dt_bias, and the function takes none")
        passed = {name: values[name] for name in self.typed if name in values}
        for name in [name for name, value in passed.items() if value is None]:
            if name in self.required and name not in _BUFFERS:
                raise InputError(f"the call has no {name}, and the function's {self.typed[name]} has no default")
            if name not in self.required:
                del passed[name]
        return passed

    def call(self, function: Callable[..., Any], passed: Mapping[str, Any]) -> Any:
        """Calls the function with `arguments`, under its own names."""
        named = {self.typed[name]: value for name, value in passed.items()}
        args = [named.pop(name) for name in self.positional if name in named]
        return function(*args, **named)


def _our_name(name: str) -> str:
    from kdacli.dumps.names import INPUTS, OPTIONS, ours

    return ours(name, INPUTS) or ours(name, OPTIONS) or name


def _values(inputs: "Inputs", op: Op) -> dict[str, Any]:
    """All that a call has to offer, by our names."""
    options = inputs.options
    raw, bound = options.gate is not Gate.NONE, options.lower_bound
    gate = {
        "g": inputs.g,
        "A_log": inputs.A_log,
        "dt_bias": inputs.dt_bias,
        "lower_bound": bound if raw else None,
        "cu_seqlens": inputs.cu_seqlens,
    }
    if op is Op.GATE:
        return {**gate, "chunk_size": CHUNK}
    pooled = inputs.state_indices is not None
    return {
        **gate,
        "q": inputs.q,
        "k": inputs.k,
        "v": inputs.v,
        "beta": inputs.beta,
        "scale": inputs.scale,
        "state": inputs.state,
        "state_indices": inputs.state_indices,
        "output_final_state": inputs.output_final_state,
        "inplace_final_state": pooled,
        "safe_gate": bound is not None and bound >= SAFE_BOUND,
        "use_gate_in_kernel": raw,
        "use_qk_l2norm_in_kernel": options.qk_l2norm,
        "use_beta_sigmoid_in_kernel": options.beta_is_logit,
        "allow_neg_eigval": options.allow_neg_eigval,
        "state_v_first": inputs.state_v_first,
        **{name: getattr(inputs, name) for name in (*FEATURES - LAYOUTS, "cu_seqlens_cpu")},
        "out": inputs.v.new_empty(inputs.v.shape),
        "final_state": inputs.new_final_state() if inputs.output_final_state and not pooled else None,
    }
