"""Cases as one word on the command line: a case's name, and what to change in it.

    prefill-lengths/lens=0,17/HV=2/transforms=offset+open-gates

Changes are fields of the case, of its problem, or of its options, by the names of `FIELDS`. `OP-any` is a plain small
case of each op to start from, so that every case can be written down.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from kda_kernels.errors import InputError
from kda_kernels.problem import ROUNDINGS, Gate, Op, Parts
from kdacli.synthetic import GATES, KEYS
from kdacli.verify.cases.case import Case, row
from kdacli.verify.cases.suites import NAMES, suite
from kdacli.verify.properties import PROPERTIES
from kdacli.verify.transforms import TRANSFORMS

_MAX = 1 << 20


class Field(NamedTuple):
    """One thing that a case says: where it is kept (case, problem, options or parts), as what, and how it is read."""

    part: str
    name: str
    read: Callable[[str], Any]


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= _MAX):
        raise ValueError(f"it should be a whole number up to {_MAX}")
    return int(text)


def _optional(read: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text == "none" else read(text)


def _flag(text: str) -> bool:
    if text not in ("yes", "no"):
        raise ValueError("it should be yes or no")
    return text == "yes"


def _lens(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


def _names(known: Any) -> Callable[[str], tuple[str, ...]]:
    def read(text: str) -> tuple[str, ...]:
        found = tuple(filter(None, text.split("+"))) if text != "none" else ()
        for name in found:
            _one_of(known)(name)
        return found

    return read


def _one_of(known: Any) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in known:
            raise ValueError(f"it should be one of {', '.join(known)}")
        return text

    return read


FIELDS = {
    "lens": Field("problem", "seq_lens", _lens),
    **{name: Field("problem", name, _count) for name in ("H", "HV", "K", "V", "padding")},
    "pool": Field("problem", "pool_slots", _optional(_count)),
    "packed": Field("problem", "packed", _flag),
    "v_first": Field("problem", "state_v_first", _flag),
    "initial_state": Field("problem", "initial_state", _flag),
    "final_state": Field("problem", "final_state", _flag),
    **{name: Field("problem", name, str) for name in ("dtype", "g_dtype", "beta_dtype", "param_dtype", "state_dtype")},
    "state_rounding": Field("problem", "state_rounding", _one_of(ROUNDINGS)),
    "conv": Field("parts", "width", _count),
    "conv_bias": Field("parts", "bias", _flag),
    "conv_dtype": Field("parts", "weight_dtype", str),
    "conv_state_dtype": Field("parts", "state_dtype", str),
    "tokens_first": Field("parts", "tokens_first", _flag),
    "norm": Field("parts", "norm", _flag),
    "norm_dtype": Field("parts", "norm_dtype", str),
    "gate": Field("options", "gate", Gate),
    "lower_bound": Field("options", "lower_bound", _optional(float)),
    "logit": Field("options", "beta_is_logit", _flag),
    "neg_eigval": Field("options", "allow_neg_eigval", _flag),
    "l2norm": Field("options", "qk_l2norm", _flag),
    "scale": Field("options", "scale", _optional(float)),
    "gates": Field("case", "gates", _one_of(GATES)),
    "keys": Field("case", "keys", _one_of(KEYS)),
    "transforms": Field("case", "transforms", _names(TRANSFORMS)),
    "properties": Field("case", "properties", _names(PROPERTIES)),
    "steps": Field("case", "decode_steps", _count),
    "seed": Field("case", "seed", _count),
}


def any_case(op: Op) -> Case:
    """The plain case that others are written down from."""
    return row("any", op, (1,) if op.decodes else (64,), "a case written down on the command line", dim=32)


def table() -> dict[str, Case]:
    """Every case that has a name of its own."""
    return {case.name: case for case in (*suite(NAMES[1]), *map(any_case, Op))}


def parse(text: str) -> Case:
    """The case that a word describes; its name is that word.

    Raises:
        InputError: the name or a field is unknown, or the changes do not fit together.
    """
    name, *changes = text.split("/")
    cases = table()
    if name not in cases:
        raise InputError(f"case {name} is unknown: kda verify --list --suite full shows them")
    case = cases[name]
    by_part: dict[str, dict[str, Any]] = {"case": {}, "problem": {}, "options": {}, "parts": {}}
    for change in changes:
        key, _, value = change.partition("=")
        if key not in FIELDS:
            raise InputError(f"{key} is no field of a case: there are {', '.join(FIELDS)}")
        field = FIELDS[key]
        try:
            by_part[field.part][field.name] = field.read(value)
        except ValueError as error:
            raise InputError(f"{key} is {value!r} in {text}: {error}") from error
    options, parts = dataclasses.replace(case.problem.options, **by_part["options"]), case.problem.parts
    if by_part["parts"]:
        if parts is None and case.problem.op is Op.PREFILL:
            parts = Parts(width=0, norm=False)
        if parts is None:
            raise InputError(f"{text} says of a convolution or a norm, which the op {case.problem.op} has not")
        parts = dataclasses.replace(parts, **by_part["parts"])
    problem = dataclasses.replace(case.problem, options=options, parts=parts, **by_part["problem"])
    return dataclasses.replace(case, name=text, problem=problem, **by_part["case"])


def write(case: Case) -> str:
    """The shortest word that `parse` turns back into this case: changes of the case it is named after, or of `any`."""
    cases = table()
    bases = [cases[name] for name in (case.name.split("/")[0], f"{case.problem.op}-any") if name in cases]
    return min((_changes(base, case) for base in bases), key=len)


def renamed(case: Case) -> str:
    """As `write`, but always as changes of the case it is named after."""
    return _changes(table()[case.name.split("/")[0]], case)


def changed(old: Case, new: Case, keys: Iterable[str] = FIELDS) -> list[str]:
    """The fields in which two cases differ, by their names here; `keys`: those that are asked for."""
    before, after = _values(old, new, keys), _values(new, old, keys)
    return [key for key in keys if before[key] != after[key]]


def _changes(base: Case, case: Case) -> str:
    values = _values(case, base)
    return "/".join([base.name, *(f"{key}={_text(values[key])}" for key in changed(base, case))])


def _values(case: Case, other: Case, keys: Iterable[str] = FIELDS) -> dict[str, Any]:
    """Of each field. A case without a convolution or a norm has those of the other one, left out."""
    problem = case.problem
    parts = problem.parts or _left_out(other.problem.parts)
    where = {"case": case, "problem": problem, "options": problem.options, "parts": parts}
    return {key: getattr(where[FIELDS[key].part], FIELDS[key].name) for key in keys}


@functools.cache
def _left_out(parts: Parts | None) -> Parts:
    return dataclasses.replace(parts or Parts(), width=0, norm=False)


def _text(value: Any) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ("," if isinstance(value[0], int) else "+").join(map(str, value))
    return str(value)
