"""Draws docs/kda.svg from real runs of the command line and docs/speed.svg from records: `python3 dev.py picture`."""

import io
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

COMMANDS = ("verify --kernel triton-prefill", "compile --kernel triton-decode --kernel triton-gate")
WIDTH = 100
HERE = Path(__file__).resolve().parent
PICTURE, SPEED, RECORDS = HERE / "kda.svg", HERE / "speed.svg", HERE.parent / "benchmarks"


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


def draw_speed() -> None:
    """Prefill and decode beside peers, from the committed records."""
    import matplotlib
    import matplotlib.figure

    from kdacli.profile.records.record import read
    from kdacli.profile.records.row import timed
    from kdacli.profile.reporting.plot import beside

    chosen = (("prefill-h200", "init", ("P1", "P2", "P4")), ("decode-h200", "bench", None))
    with matplotlib.rc_context({"font.size": 9, "svg.hashsalt": "kda", "svg.fonttype": "none"}):
        figure = matplotlib.figure.Figure((9.6, 3.8), layout="constrained")
        for part, (name, gates, cases) in zip(figure.subfigures(1, 2), chosen, strict=True):
            rows = timed(read(str(RECORDS / f"{name}.json")).rows)
            beside(
                part.subplots(), [row for row in rows if row.gates == gates and (cases is None or row.case in cases)]
            )
        figure.savefig(SPEED, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    draw_speed()
    main()
