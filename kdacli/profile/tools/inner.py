"""`kda profile` inside a profiler: the same command line again, in a process that knows it is watched."""

import glob
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from kda_kernels.errors import InputError, UnavailableError

TRACE_ENV = "KDA_PROFILE_TRACE"  # set for the process that is watched, to the profiler's name
# The flags that are for the outer process, and how many words follow each.
_OWN_FLAGS = {
    "--nsys": 0, "--ncu": 0, "--force": 0, "--stages": 0,
    "--nsys-path": 1, "--ncu-path": 1, "--output": 1, "--json": 1,
}  # fmt: skip


def arguments(words: Sequence[str]) -> list[str]:
    """The command line without the flags that are for the outer process."""
    kept, skip = [], 0
    for word in words:
        name, equals, _ = word.partition("=")
        if skip:
            skip -= 1
        elif name in _OWN_FLAGS:
            skip = 0 if equals else _OWN_FLAGS[name]
        else:
            kept.append(word)
    return kept


def find(program: str, path: str | None, places: Sequence[str], how_to_get: str) -> str:
    """The profiler to use: `path` if given, else on PATH, else the newest that one of the patterns `places` meets.

    Raises:
        InputError: `path` is no program.
        UnavailableError: there is none.
    """
    if path is not None:
        if not (os.path.isfile(path) and os.access(path, os.X_OK)):
            raise InputError(f"--{program}-path is {path}: it should be the program {program}")
        return path
    if found := shutil.which(program):
        return found
    for place in places:
        if there := glob.glob(place):
            return max(there, key=by_version)
    raise UnavailableError(f"{program} is not here: {how_to_get}")


def command(words: Sequence[str]) -> list[str]:
    """What a profiler is to start for `kda <words>`."""
    return [sys.executable, "-m", "kdacli", *arguments(words)]


def environment(profiler: str) -> dict[str, str]:
    """That of this process, so that the inner one imports the same kda and knows that it is watched."""
    import kda_kernels
    import kdacli

    roots = [str(Path(module.__path__[0]).resolve().parent) for module in (kdacli, kda_kernels)]
    before = os.environ.get("PYTHONPATH")
    return {**os.environ, TRACE_ENV: profiler, "PYTHONPATH": os.pathsep.join([*roots, *([before] if before else [])])}


def report_path(suffix: str, output: str | None = None, directory: str = ".") -> Path:
    """Where a profiler's report goes: `output`, or the first free kda-profile-<n> with the suffix.

    Raises:
        InputError: `output` exists, or its directory does not.
    """
    if output is None:
        n = 1
        while any(Path(directory).glob(f"kda-profile-{n}.*")):  # nsys leaves files of other suffixes beside a report
            n += 1
        return Path(directory) / f"kda-profile-{n}{suffix}"
    path = Path(output if output.endswith(suffix) else output + suffix)
    if path.exists():
        raise InputError(f"{path} exists: name another --output")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path} cannot be written: there is no directory {path.parent}")
    return path


def by_version(path: str) -> list[int]:
    """A key that sorts paths by the version numbers in them."""
    return [int(n) for n in re.findall(r"\d+", path)]
