"""Runs a program with a capture in it, and says what came of it."""

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import kda_kernels
import kdacli
from kda_kernels.errors import UnavailableError
from kdacli.capture import journal
from kdacli.capture.settings import Settings

BOOTSTRAP = Path(__file__).parent / "bootstrap"


@dataclasses.dataclass(frozen=True)
class Result:
    """What a capture left.

    Attributes:
        exit_code: the program's; negative for the signal that ended it.
        files: (name, bytes) of each dump.
        found: targets that some process had; missing: targets whose module lacked them.
        notes: what was told meanwhile, each once.
        left_out: {(target, reason): calls} of those that were seen and not recorded, to the power of ten below.
    """

    exit_code: int
    files: list[tuple[str, int]]
    found: list[str]
    missing: list[str]
    notes: list[str]
    left_out: dict[tuple[str, str], int]


def run(program: Sequence[str], settings: Settings) -> Result:
    """Runs `program` to its end.

    Args:
        program: its words; a first word that is a Python file or -m is given to this Python.

    Raises:
        UnavailableError: it cannot be started.
    """
    words = list(program)
    if words[0] == "-m" or words[0].endswith(".py"):
        words = [sys.executable, *words]
    try:
        process = subprocess.Popen(words, env=environment(settings))
    except OSError as error:
        raise UnavailableError(f"{words[0]} cannot be started: {error.strerror}") from error
    exit_code = _wait(process)
    events, torn = journal.events(settings.out)
    if torn:
        journal.note(f"{torn} lines of {journal.NAME} are torn: there may be dumps that are not counted here")
    return Result(
        exit_code=exit_code,
        files=[(event["file"], event["bytes"]) for event in events if event["event"] == "written"],
        found=_each(events, "found", "target"),
        missing=_each(events, "missing", "target"),
        notes=_each(events, "note", "text"),
        left_out=_left_out(events),
    )


def environment(settings: Settings) -> dict[str, str]:
    """Ours, with what a child needs to record."""
    roots = {package.__name__: str(Path(package.__path__[0]).parent) for package in (kdacli, kda_kernels)}
    return {
        **os.environ,
        **settings.to_environment(),
        "KDA_CAPTURE_ROOTS": os.pathsep.join(f"{name}={root}" for name, root in roots.items()),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(BOOTSTRAP), os.environ.get("PYTHONPATH")))),
    }


def _wait(process: subprocess.Popen) -> int:
    """Waits; Ctrl-C reaches the program too, which decides what becomes of it, and a request to end is passed on."""
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
    }
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _left_out(events: list[dict]) -> dict[tuple[str, str], int]:
    counts: dict[tuple[str, str], dict[int, int]] = {}  # of each process, which counts for itself
    for event in events:
        if event["event"] == "left out":
            counts.setdefault((event["target"], event["reason"]), {})[event["pid"]] = event["calls"]
    return {key: sum(of_each.values()) for key, of_each in counts.items()}


def _each(events: list[dict], kind: str, key: str) -> list[str]:
    return list(dict.fromkeys(event[key] for event in events if event["event"] == kind))
