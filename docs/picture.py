"""Draws docs/kda.svg from real runs of the command line: `python3 dev.py picture`."""

import io
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

COMMANDS = ("verify --kernel triton-prefill", "compile --kernel triton-decode --kernel triton-gate")
WIDTH = 100
PICTURE = Path(__file__).resolve().parent / "kda.svg"


def output_of(words: str) -> str:
    """What `kda WORDS` prints, colours included. Raises `CalledProcessError` if it fails."""
    env = os.environ | {"FORCE_COLOR": "1", "COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "kdacli", *words.split()]
    return subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    for words in COMMANDS:
        console.print(Text(f"$ kda {words}", style="bold"))
        console.print(Text.from_ansi(output_of(words).strip("\n")))
        console.print()
    console.save_svg(str(PICTURE), title="kda")


main()
