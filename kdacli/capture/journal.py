"""What happened during a capture: one line of JSON an event, appended by every process to one file in the folder.

Imports no torch.
"""

import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAME = "capture.jsonl"
_BUDGET = ".capture-bytes"


def record(out: str | Path, event: str, **values: Any) -> None:
    """Appends one event; a line this short is written whole, whoever else writes."""
    line = json.dumps({"event": event, "pid": os.getpid(), **values}) + "\n"
    with open(Path(out) / NAME, "a", encoding="utf-8") as file:
        file.write(line)


def events(out: str | Path) -> list[dict[str, Any]]:
    """Every event so far."""
    path = Path(out) / NAME
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


def note(text: str) -> None:
    """One line to the person who watches the program."""
    print(f"kda capture: {text}", file=sys.stderr, flush=True)


def reserve(out: str | Path, size: int, limit: int) -> bool:
    """Counts `size` bytes against the limit that all processes share; False, and nothing counted, if they exceed it."""
    with _locked(Path(out) / _BUDGET) as file:
        used = int(file.read() or 0)
        if used + size > limit:
            return False
        file.seek(0)
        file.truncate()
        file.write(str(used + size))
        return True


def clear(out: str | Path) -> None:
    """Removes what an earlier capture wrote into the folder, and nothing else."""
    for event in events(out):
        if event["event"] == "written" and Path(event["file"]).name == event["file"]:
            (Path(out) / event["file"]).unlink(missing_ok=True)
    for name in (NAME, _BUDGET):
        (Path(out) / name).unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[Any]:
    with open(path, "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        yield file
