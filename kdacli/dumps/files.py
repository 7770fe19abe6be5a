"""Reads dump files of two kinds, and folders of them, into one tree of dicts, tensors and plain values.

No object is ever unpickled, and tensors stay in the file until something reads them.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kda_kernels.errors import InputError
from kdacli.dumps import bounds, folders, sglang

Tree = dict[str, Any]


def read(path: Path) -> Any:
    """The contents of a dump; tensors lie on the CPU and are mapped from the file where the format allows it.

    Raises:
        InputError: no such file, not a file, empty, of an unknown kind, damaged, or holding pickled objects; or a
            folder with no dump in it.
    """
    if not path.is_file() and not path.is_dir():
        raise InputError(f"{path} does not exist" if not path.exists() else f"{path} is not a regular file")
    try:
        if path.is_dir():
            return folders.read(path, read)
        if (reader := READERS.get(path.suffix.lower())) is None:
            raise InputError(f"{path} ends in {path.suffix or 'nothing'}: a dump ends in {' or '.join(READERS)}")
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty")
        tree = reader(path)
        bounds.check_contents(tree, path)
        return {"calls": sglang.hooked_calls(tree, path)} if sglang.is_hooked(tree) else tree
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_pt(path: Path) -> Any:
    try:
        bounds.check_pt(path)
        return torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except (InputError, OSError):
        raise
    except Exception as error:  # zipfile, pickletools and torch raise whatever the damage leads to
        raise InputError(f"{path} is truncated or damaged: {_first_sentence(error)}") from error


def _first_sentence(error: Exception) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)) or type(error).__name__
    return re.split(r"\n|\. |: please", text.strip(), maxsplit=1)[0][:200].rstrip(".")


def _read_safetensors(path: Path) -> Tree:
    from safetensors import SafetensorError, safe_open

    flat: Tree = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            flat.update({k: v for k, v in (file.metadata() or {}).items() if k != "format"})
            flat.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a dict)
    except OSError:
        raise
    except (SafetensorError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{path} cannot be loaded: {_first_sentence(error)}") from error
    return _unflatten(flat, path)


def _unflatten(flat: Tree, path: Path) -> Tree:
    """{"decode.inputs.q": t} -> {"decode": {"inputs": {"q": t}}}; a slash separates as well as a dot."""
    tree: Tree = {}
    for name, value in flat.items():
        *parents, last = re.split(r"[./]", name)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise InputError(f"{path}: {name} lies below {parent}, which is a value itself")
        if isinstance(node.get(last), dict):
            raise InputError(f"{path}: {name} is a value and has others below it")
        node[last] = value
    return tree


READERS: dict[str, Callable[[Path], Any]] = {".pt": _read_pt, ".safetensors": _read_safetensors}
