"""A folder as the calls in it: of `kda capture`, of SGLang's dumper or forward hooks, or of any dump files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kda_kernels.errors import InputError
from kdacli.dumps import names, sglang
from kdacli.dumps.tree import calls_of

Read = Callable[[Path], Any]
SUFFIXES = (".pt", ".safetensors")


def read(folder: Path, read_file: Read) -> dict[str, Any]:
    """{"calls": {name: call}} of everything in a folder; in the place of a call that cannot be read, its error.

    A dumper's folder of experiments counts as the one experiment in it, and a forward hook's folder of processes as
    all of them.

    Raises:
        InputError: there is nothing to read.
    """
    files = _files(folder)
    if not files:
        return _below(folder, read_file)
    if any(sglang.tags(path) for path in files):
        return {"calls": sglang.dumper_calls(folder, [path for path in files if sglang.tags(path)], read_file)}
    calls: dict[str, Any] = {}
    for path in files:
        try:
            found = calls_of(read_file(path), path)
        except InputError as error:
            calls[path.stem] = error
            continue
        calls |= {f"{path.stem}/{name}" if name else path.stem: call for name, call in found.items()}
    return {"calls": calls}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())


def _below(folder: Path, read_file: Read) -> dict[str, Any]:
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    calls: dict[str, Any] = {}
    for path in inner:
        if found := sglang.PROCESS.fullmatch(path.name):
            calls |= {f"rank{found[1]}.{name}": call for name, call in read(path, read_file)["calls"].items()}
    if calls:
        return {"calls": calls}
    full = [path for path in inner if _files(path)]
    if len(full) == 1:
        return read(full[0], read_file)
    if full:
        raise InputError(
            f"{folder} holds the dump folders {names.listed(path.name for path in full)}: name one of them"
        )
    raise InputError(f"{folder} is a directory without dump files ({' or '.join(SUFFIXES)})")
