"""A dump file as the tensors of one or several KDA calls.

A dump is a dict of one call, flat ({"q": .., "o": .., "scale": ..}) or in sections ({"inputs": {..}, "outputs": {..},
"options": {..}, "meta": {..}}), or several calls: {"calls": [call, ..]}, [call, ..] or {"prefill": call, ..}. Options
and meta beside several calls hold for all of them. In .safetensors the levels are joined by dots ("inputs.q").
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kda_kernels import checks
from kda_kernels.errors import InputError
from kda_kernels.problem import Op
from kda_kernels.tensors import Inputs, Outputs
from kdacli.dumps import files, names
from kdacli.dumps.infer import build_inputs, infer_op
from kdacli.dumps.outputs import build_outputs
from kdacli.dumps.said import parse
from kdacli.dumps.shapes import normalise, usable
from kdacli.dumps.tree import Calls, calls_of, split


@dataclasses.dataclass
class Dump:
    """One call of a dump.

    Attributes:
        inputs: the tensors, on the CPU, checked. A state pool is as it was before the call.
        outputs: what the dumping engine computed, if it is there: o [B, T, HV, V], final_state like the state.
        op: the operation.
        meta: everything plain that the dump says beside tensors and options.
        notes: what was assumed, one sentence each.
        call: its name in the file; "" if the file holds one call.
    """

    inputs: Inputs
    outputs: Outputs | None
    op: Op
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    call: str = ""


def load(path: str | Path, call: str | None = None) -> Dump:
    """The only call of a dump, or the one named `call`.

    Raises:
        InputError: see `load_all`; or there are several calls and none, or an unknown one, was named.
    """
    path = Path(path)
    calls = calls_of(files.read(path), path)
    if call is None and len(calls) > 1:
        raise InputError(f"{path} holds the calls {names.listed(calls)}: name one of them (--call)")
    return _dump(path, calls, next(iter(calls)) if call is None else call)


def load_all(
    path: str | Path, only: Sequence[str] = (), like: Sequence[Dump] = (), broken: list[str] | None = None
) -> list[Dump]:
    """Every call of a dump, or those named, in the order of the file.

    Args:
        like: whose inputs a call has that holds outputs only: the one of its name, or the only one there is.
        broken: of a folder, is given what is wrong with calls that cannot be read, as long as one can.

    Raises:
        InputError: the file cannot be read, there is no call of that name, or a call lacks something, or a tensor or
            option of it is wrong.
    """
    path = Path(path)
    calls = calls_of(files.read(path), path)
    if absent := [name for name in only if name not in calls]:
        _named(path, calls, absent[0])
    named = {dump.call: dump for dump in like}
    other = like[0] if len(like) == 1 else None
    found: list[Dump] = []
    errors: list[InputError] = []
    for name in [name for name in calls if not only or name in only]:
        try:
            found.append(_dump(path, calls, name, named.get(name, other)))
        except InputError as error:
            if broken is None or not path.is_dir():
                raise
            errors.append(error)
    if not found:
        raise errors[0]
    if broken is not None:
        broken += map(str, errors)
    return found


def _named(path: Path, calls: Calls, name: str) -> dict[str, Any]:
    if name not in calls:
        held = f"the calls {names.listed(calls)}" if "" not in calls else "one call, which has no name"
        raise InputError(f"{path} has no call {name}: it holds {held}")
    if isinstance(call := calls[name], InputError):
        raise call
    return call


def _dump(path: Path, calls: Calls, name: str, like: Dump | None = None) -> Dump:
    call = _named(path, calls, name)
    try:
        return _parse(call, name, like)
    except InputError as error:
        where = f"{path}, call {name}" if name else f"{path}"
        raise InputError(f"{where}: {error}") from error


def _parse(call: Mapping[str, Any], name: str, like: Dump | None) -> Dump:
    parts = split(call)
    found, notes = parts.inputs, []
    if like is not None and parts.outputs and not found:
        dims = checks.check_inputs(like.inputs, values=True)
        notes.append("it holds outputs only: judged on the other's inputs")
        outputs = build_outputs(parts.outputs, like.inputs, dims, like.op, notes)
        return Dump(like.inputs, outputs, like.op, parts.meta, notes, name)
    if parts.unused:
        notes.append(f"not used: {names.listed(parts.unused)}")
    for key in names.REQUIRED:
        if key not in found:
            raise names.missing(key, [*(name for name, _ in found.values()), *parts.unused])
    for output, room in names.ROOM.items():
        if output in parts.outputs:
            found.setdefault(room, parts.outputs[output])
    said = parse(parts.options)
    tensors = normalise({key: usable(name, value) for key, (name, value) in found.items()}, notes)
    inputs = build_inputs(tensors, said, found["beta"][0], notes)
    dims = checks.check_inputs(inputs, values=True)
    steps = inputs.conv is not None or inputs.norm is not None
    op = infer_op(checks.seq_lens(inputs, dims), inputs.state is not None, said, notes, steps)
    outputs = build_outputs(parts.outputs, inputs, dims, op, notes)
    return Dump(inputs, outputs, op, parts.meta, notes, name)
