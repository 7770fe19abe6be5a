"""What SGLang writes: its dumper's folders of one tensor a file, and its forward hooks' one file a pass.

Dumper (sglang.srt.debug_utils.dumper): <dir>/dump_<time>/step=0___rank=0___dump_index=7___name=q___layer_id=3.pt, each
{"value": .., "meta": {..}}. A call is what one rank dumped in one step for one layer; a name that comes back begins the
next call. Parameters (name=param__model.layers.3.self_attn.A_log) belong to every call of their layer.

Forward hooks (--debug-tensor-dump-output-folder): <dir>/TP0_PP0_Rank0_pid12/Pass00000.pt, {module: its output}. A call
is what one layer has.

Names are matched by their last part with the table of aliases, without a leading kda_.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kda_kernels.errors import InputError
from kdacli.dumps import names
from kdacli.dumps.tree import check_keys

PROCESS = re.compile(r"TP\d+_PP\d+_Rank(\d+)_pid\d+")
_LAYER = re.compile(r"(?:^|[._])layers?\.(\d+)\.")
_PARAMETER = "param__"
_HOOKED = "non_intrusive__"
_TABLES = {"inputs": names.INPUTS, "outputs": names.OUTPUTS, "options": names.OPTIONS}
_CORE = ("attn", "core_attn", "linear_attn")  # modules whose output is o

Tags = dict[str, str]
Calls = dict[str, dict[str, dict[str, Any]]]


def tags(path: Path) -> Tags:
    """{"step": "0", "rank": "0", "name": "q", ..} of a dumper's file; empty if it is none."""
    found = dict(part.split("=", 1) for part in path.stem.split("___") if "=" in part)
    return found if "name" in found and found.get("dump_index", "").isdecimal() else {}


def dumper_calls(
    folder: Path, paths: Sequence[Path], read_file: Callable[[Path], Any]
) -> dict[str, dict[str, dict[str, Any]] | InputError]:
    """The KDA calls among a dumper's files, or why one cannot be read; files under other names are not opened.

    Raises:
        InputError: no file has a name that the table knows, or a parameter cannot be read.
    """
    calls: Calls = {}
    parameters: dict[tuple[str, str], dict[str, Any]] = {}
    current: dict[str, str] = {}
    broken: dict[str, InputError] = {}
    everything = sorted((int(found["dump_index"]), path, found) for path in paths for found in [tags(path)])
    for _, path, found in everything:
        place = meaning(found["name"])
        if place is None:
            continue
        section, key = place
        rank, layer = found.get("rank", "0"), found.get("layer_id") or _layer_in(found["name"])
        group = ".".join(filter(None, (f"rank{rank}", f"step{found.get('step', '0')}", layer and f"layer{layer}")))
        if found["name"].startswith(_PARAMETER):
            parameters.setdefault((rank, layer), {})[key] = _value(path, read_file)
            continue
        try:
            value = _value(path, read_file)
        except InputError as error:
            broken[current.get(group, group)] = error
            continue
        name = current.get(group, group)
        if key in calls.get(name, {}).get(section, {}):
            number = sum(other == group or other.startswith(f"{group}.") for other in calls)
            name = current[group] = f"{group}.{number + 1}"
        call = calls.setdefault(name, {"meta": {"engine": "SGLang's dumper", "rank": rank, "layer": layer}})
        call.setdefault(section, {})[key] = value
    if not calls and not broken:
        raise _nothing(folder, {found["name"] for _, _, found in everything})
    for call in calls.values():
        more = parameters.get((call["meta"]["rank"], call["meta"]["layer"]), {})
        call["inputs"] = more | call.get("inputs", {})
    return calls | broken


def is_hooked(tree: Any) -> bool:
    """Whether a file holds the outputs of modules by their names in the model."""
    return isinstance(tree, Mapping) and any(_LAYER.search(f"{key}.") for key in tree if isinstance(key, str))


def hooked_calls(tree: Mapping[str, Any], path: Path) -> Calls:
    """The KDA calls in one pass, one a layer.

    Raises:
        InputError: no layer has a tensor under a name that the table knows.
    """
    check_keys(tree, f"{path}: ")
    calls: Calls = {}
    for name, value in tree.items():
        place = meaning(name)
        layer = _layer_in(name)
        if place is None or not layer:
            continue
        section, key = place
        call = calls.setdefault(f"layer{layer}", {"meta": {"engine": "SGLang's forward hooks", "layer": layer}})
        values = list(value) if isinstance(value, list | tuple) else [value]
        call.setdefault(section, {})[key] = values[0] if values else None
        if section == "outputs" and key == "o" and len(values) > 1:
            call["outputs"]["final_state"] = values[1]
    if not calls:
        raise _nothing(path, tree)
    return calls


def _nothing(path: Path, there: Iterable[str]) -> InputError:
    held = names.listed(there)
    return InputError(f"{path} has no tensor of a KDA call under a name that kda knows: it holds {held}")


def meaning(name: str) -> tuple[str, str] | None:
    """(inputs, outputs or options, our name) of a name in a dump of SGLang; None if it is nothing of a KDA call."""
    hooked = name.startswith(_HOOKED) or bool(_LAYER.search(name))
    parts = re.split(r"__|\.", name.removeprefix(_HOOKED).removeprefix(_PARAMETER))
    if parts[-1].isdigit():  # one of several
        parts.pop()
    if hooked and parts and parts[-1] == "output":  # the dumper's word for a module's output
        parts.pop()
    if not parts:
        return None
    last = parts[-1].removeprefix("kda_")
    if last in _CORE and "inputs" not in parts:
        return "outputs", "o"
    for section, table in _TABLES.items():
        if key := names.ours(last, table):
            return section, key
    return None


def _layer_in(name: str) -> str:
    found = _LAYER.search(name)
    return found[1] if found else ""


def _value(path: Path, read_file: Callable[[Path], Any]) -> Any:
    tree = read_file(path)
    if not isinstance(tree, dict) or "value" not in tree:
        raise InputError(f"{path} does not hold what SGLang's dumper writes: it should be a dict with a value")
    return tree["value"]
