"""What a file held, as calls, and a call as inputs, outputs, options and meta under our names."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kda_kernels.errors import InputError
from kdacli.dumps import names
from kdacli.dumps.names import Section

_LONGEST = 200  # letters of a name

Calls = dict[str, dict[str, Any] | InputError]  # in the place of a call, why it cannot be read
Found = dict[str, tuple[str, Any]]  # {our name: (its name in the dump, value)}


@dataclasses.dataclass
class Parts:
    """One call, taken apart. `unused` are the names that the table of aliases does not know."""

    inputs: Found = dataclasses.field(default_factory=dict)
    outputs: Found = dataclasses.field(default_factory=dict)
    options: Found = dataclasses.field(default_factory=dict)
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)
    unused: list[str] = dataclasses.field(default_factory=list)


def calls_of(tree: Any, path: Path) -> Calls:
    """{name: call} of whatever a file or folder held; a call that stands alone has the name "".

    Options and meta beside several calls are given to each of them.

    Raises:
        InputError: it is no dict of tensors, and no dict or list of such dicts.
    """
    if isinstance(tree, list | tuple):
        tree = {"calls": tree}
    if not isinstance(tree, dict) or not tree:
        held = "nothing" if isinstance(tree, dict) else f"a {type(tree).__name__}"
        raise InputError(f"{path} holds {held}: it should hold a dict of tensors by name")
    check_keys(tree, f"{path}: ")
    if "calls" not in tree and _is_call(tree):
        return {"": tree}
    shared = {k: v for k, v in tree.items() if _section(k) in ("options", "meta") or not isinstance(v, dict | list)}
    shared.pop("calls", None)
    calls = tree.get("calls", {k: v for k, v in tree.items() if k not in shared})
    if isinstance(calls, list | tuple):
        calls = {f"call_{i}": call for i, call in enumerate(calls)}
    if not isinstance(calls, dict) or not calls:
        raise InputError(f"{path} holds no tensors and no calls: it should hold a dict of tensors by name")
    check_keys(calls, f"{path}: ")
    for name, call in calls.items():
        if not isinstance(call, dict | InputError):
            raise InputError(f"{path}: call {name} is a {type(call).__name__}: it should be a dict of tensors by name")
    return {name: call if isinstance(call, InputError) else _merge(shared, call) for name, call in calls.items()}


def split(call: Mapping[str, Any]) -> Parts:
    """Sorts what a call holds, flat or in sections. Entries that are None count as absent.

    Raises:
        InputError: two names mean the same thing, or a section of options holds an unknown one.
    """
    parts = Parts()
    flat = {}
    check_keys(call)
    for key, value in call.items():
        section = _section(key)
        if section == "outputs" and isinstance(value, list | tuple):
            value = dict(zip(("o", "final_state"), value, strict=False))
        if section is None or not isinstance(value, dict):
            flat[key] = value
        elif section == "meta":
            check_keys(value)
            parts.meta |= {name: part for name, part in value.items() if _plain(part)}
            parts.unused += [name for name in value if name not in parts.meta]
        else:
            rest = _sort(value, Section[section.upper()], parts)
            if section == "options" and rest:
                raise InputError(f"option {next(iter(rest))} is unknown: there are {', '.join(names.OPTIONS)}")
            parts.unused += rest
    for key, value in _sort(flat, Section.FLAT, parts).items():
        if isinstance(value, bool | int | float | str):
            parts.meta[key] = value
        else:
            parts.unused.append(key)
    return parts


def _section(name: str) -> str | None:
    return names.ours(name, names.SECTIONS)


def _is_call(tree: Mapping[str, Any]) -> bool:
    """A call has tensors, or sections; several calls have neither at their level."""
    return any(isinstance(v, torch.Tensor) or _section(k) in ("inputs", "outputs") for k, v in tree.items())


def _merge(shared: Mapping[str, Any], call: Mapping[str, Any]) -> dict[str, Any]:
    """A call with what stands beside all calls; what the call says itself goes first."""
    merged = {**shared, **call}
    for name, value in shared.items():
        if isinstance(value, dict) and isinstance(call.get(name), dict):
            merged[name] = value | call[name]
    return merged


def _sort(values: Mapping[str, Any], section: Section, parts: Parts) -> dict[str, Any]:
    """Adds to `parts` what the table knows under our names, and returns the rest."""
    check_keys(values)
    rest, known = names.rename({k: v for k, v in values.items() if v is not None}, section)
    for key, (name, value) in known.items():
        output = section is Section.OUTPUTS or key in names.OUTPUTS
        part = parts.options if key in names.OPTIONS else parts.outputs if output else parts.inputs
        if key in part:
            raise InputError(f"{key} is given twice, as {part[key][0]} and as {name}: keep one")
        part[key] = (name, value)
    return rest


def check_keys(values: Mapping[Any, Any], where: str = "") -> None:
    """Raises `InputError` unless every key is a name that can stand in a line or a table."""
    for key in values:
        if not isinstance(key, str):
            raise InputError(f"{where}a key of the dump is a {type(key).__name__}: keys should be names")
        if not key.isprintable() or len(key) > _LONGEST:
            raise InputError(
                f"{where}a key of the dump is {key[:40]!r}..: it should be up to {_LONGEST} printable letters"
            )


def _plain(value: Any) -> bool:
    """Whether a value can stand in a report: text, a number, or lists and dicts of such."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(part) for key, part in value.items())
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
