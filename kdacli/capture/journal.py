"""What happened during a capture: one line of JSON an event, appended by every process to one file in the folder.

Imports no torch.
"""

import contextlib
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = "capture.jsonl"
_BUDGET = ".capture-bytes"
WRITING = ".writing-"  # how folders begin where a dump is written before it has its name
_VALUES = {  # what an event of each kind holds
    "found": {"target"},
    "missing": {"target"},
    "note": {"text"},
    "left out": {"target", "reason", "calls"},
    "written": {"target", "file", "bytes"},
}


def record(out: str | Path, event: str, **values: Any) -> None:
    """Appends one event; a line this short is written whole, whoever else writes, or not at all."""
    line = json.dumps({"event": event, "pid": os.getpid(), **values})
    with contextlib.suppress(OSError), open(Path(out) / NAME, "a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")  # a line that a full disk tore before stays one of its own


def events(out: str | Path) -> tuple[list[dict[str, Any]], int]:
    """Every event so far, and how many lines hold none."""
    path = Path(out) / NAME
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    found = [_event(line) for line in lines if line]
    return [event for event in found if event is not None], found.count(None)


def _event(line: str) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and _VALUES.get(str(event.get("event")), {"?"}) <= event.keys() else None


def note(text: str) -> None:
    """One line to the person who watches the program."""
    with contextlib.suppress(OSError, ValueError):  # stderr may be closed
        print(f"kda capture: {text}", file=sys.stderr, flush=True)


def reserve(out: str | Path, size: int, limit: int) -> bool:
    """Counts `size` bytes against the limit that all processes share; False, and nothing counted, if they exceed it."""
    with _locked(Path(out) / _BUDGET) as file:
        text = file.read()
        used = int(text) if text.isdecimal() else 0
        if used + size > limit:
            return False
        file.seek(0)
        file.truncate()
        file.write(str(used + size))
        return True


def clear(out: str | Path) -> None:
    """Removes what an earlier capture wrote into the folder, begun files of killed processes too, and nothing else."""
    for event in events(out)[0]:
        if event["event"] == "written" and Path(event["file"]).name == event["file"] and event["file"].endswith(".pt"):
            (Path(out) / event["file"]).unlink(missing_ok=True)
    for begun in Path(out).glob(f"{WRITING}*"):
        shutil.rmtree(begun, ignore_errors=True)
    for name in (NAME, _BUDGET):
        (Path(out) / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[Any]:
    with open(path, "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        yield file
