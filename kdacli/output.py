"""What commands print: tables, numbers, progress and JSON. It knows nothing of where the data came from."""

import contextlib
import dataclasses
import json
import math
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kda_kernels.errors import InputError, one_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

PLAIN_WIDTH = 100  # columns when the output is not a terminal
MIN_WIDTH = 80  # whatever is narrower wraps our lines itself, so that no digit is cut off and no column lost
PROGRESS_DELAY_S = 2.0
_NAME = 26  # characters of a name that is kept whole
_FOLDED = 10  # columns that folded text should have at least
_NUMBER = re.compile(r"[-+]?\.?\d")


def console(stderr: bool = False) -> "Console":
    """A rich console on stdout, or on stderr. Colours only on a terminal, and not where NO_COLOR is set."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    if stream.isatty():
        probe = Console(stderr=stderr)
        return Console(stderr=stderr, highlight=False, width=max(probe.width, MIN_WIDTH))
    columns = os.environ.get("COLUMNS", "")
    width = max(int(columns), MIN_WIDTH) if columns.isdigit() else PLAIN_WIDTH
    return Console(stderr=stderr, highlight=False, width=width)


def table(title: str | None, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> "Table":
    """A rich table, to be printed with `console().print`.

    Cells are text as it is (no markup); None becomes "-"; use `good`, `bad` and `dim` for colour. A column that holds
    only numbers is right-aligned and never broken, nor is one of names where the console is wide enough, from the left;
    others fold.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    cells = [[cell if isinstance(cell, Text) else Text("-" if cell is None else str(cell)) for cell in r] for r in rows]
    out = Table(
        title=Text(title) if title else None, box=SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False
    )
    texts = [[row[i].plain for row in cells] for i in range(len(columns))]
    widths = [max(map(len, (name, *column))) for name, column in zip(columns, texts, strict=True)]
    numeric = [bool(column) and all(c == "-" or _NUMBER.match(c) for c in column) for column in texts]
    named = [all(" " not in c and len(c) <= _NAME for c in column) for column in texts]
    least = [w if n else min(w, _FOLDED) for w, n in zip(widths, numeric, strict=True)]
    total, room = sum(least) + 3 * len(columns), console().width
    for name, width, folded, number, names in zip(columns, widths, least, numeric, named, strict=True):
        if number or (names and total + width - folded <= room):
            total += width - folded
            out.add_column(Text(name), justify="right" if number else "left", no_wrap=True, min_width=width)
        else:
            out.add_column(Text(name), overflow="fold")
    for row in cells:
        out.add_row(*row)
    return out


def good(text: object) -> "Text":
    """A cell in green."""
    return _styled(text, "green")


def bad(text: object) -> "Text":
    """A cell in bold red."""
    return _styled(text, "bold red")


def dim(text: object) -> "Text":
    """A cell in grey."""
    return _styled(text, "dim")


def _styled(text: object, style: str) -> "Text":
    from rich.text import Text

    return Text(str(text), style=style)


def say(line: str, *, stderr: bool = False) -> None:
    """Prints one plain line, folded by nobody."""
    print(line, file=sys.stderr if stderr else sys.stdout)


def fmt_sci(value: float | None, digits: int = 2) -> str:
    """3.41e-03; nan and inf as such; "-" for None."""
    return "-" if value is None else f"{value:.{digits}e}" if math.isfinite(value) else str(value)


def fmt_us(value: float | None) -> str:
    """Microseconds to three or four digits: 4.21, 62.2, 483, 3190."""
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def fmt_bytes(value: float | None) -> str:
    """Decimal units, as bandwidths are: 512 B, 67.1 MB, 1.61 GB."""
    if value is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


@contextlib.contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Yields `advance(label=None, steps=1)`. A bar on stderr that appears after two seconds, and only on a terminal.

    Args:
        what: what is being done, shown beside the bar.
        total: number of steps; None shows a moving bar with the time elapsed.
    """
    if not sys.stderr.isatty():
        yield lambda label=None, steps=1: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = [TextColumn("{task.description}"), BarColumn()]
    columns += [TextColumn("{task.completed}/{task.total}")] if total else []
    bar = Progress(
        *columns,
        TimeElapsedColumn(),
        console=console(stderr=True),
        transient=True,
        redirect_stdout=False,  # stdout may be a pipe that wants JSON
        redirect_stderr=False,
    )
    task = bar.add_task(what, total=total)

    def advance(label: str | None = None, steps: int = 1) -> None:
        bar.update(task, advance=steps, description=f"{what}: {label}" if label else what)

    timer = threading.Timer(PROGRESS_DELAY_S, bar.start)  # so that one long step shows it too
    timer.daemon = True
    timer.start()
    try:
        yield advance
    finally:
        timer.cancel()
        timer.join()
        bar.stop()


def check_dest(dest: str | os.PathLike[str] | None, force: bool = False) -> None:
    """Raises `InputError` if `dest` cannot be written: call it before the work that would be lost.

    None and "-" (stdout) always can; an existing file needs `force`.
    """
    if dest is None or str(dest) == "-":
        return
    path = Path(dest)
    if path.is_dir():
        raise InputError(f"{dest} is a directory: name a file")
    if path.is_file() and not force:
        raise InputError(f"{dest} exists: use --force to overwrite it")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{dest} cannot be written: there is no directory {path.parent}")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise InputError(f"{dest} cannot be written: permission denied")


def read_json(path: str, what: str) -> Any:
    """What a file holds that should be `what`. Raises `InputError` where it cannot be read, or is no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no {what}: it is no JSON ({one_line(str(error))})") from error


def write_json(obj: Any, dest: str | os.PathLike[str], force: bool = False) -> None:
    """Writes `obj` as JSON to a path, or to stdout for "-".

    Dataclasses become objects, paths and dtypes strings. JSON has no NaN or Inf: they become the strings "NaN",
    "Infinity" and "-Infinity". A file appears whole or not at all.

    Raises:
        InputError: the file exists and `force` is not set, or it cannot be written.
    """
    write_text(json.dumps(_plain(obj), indent=2, allow_nan=False, ensure_ascii=False) + "\n", dest, force)


def write_text(text: str, dest: str | os.PathLike[str], force: bool = False) -> None:
    """Writes a text to a path, or to stdout for "-". A file appears whole or not at all.

    Raises:
        InputError: the file exists and `force` is not set, or it cannot be written.
    """
    if str(dest) == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    check_dest(dest, force)
    path = Path(dest)
    try:
        if path.exists() and not path.is_file():  # a pipe or a device
            path.write_text(text, encoding="utf-8")
            return
        with whole_file(path) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{dest} cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to; what is there in the end takes the place of `path`, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=f".{path.stem}-") as folder:
        part = Path(folder) / path.name
        yield part
        os.replace(part, path)


def _plain(obj: Any) -> Any:
    """`obj` in JSON's own types."""
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        obj = {f.name: getattr(obj, f.name) for f in dataclasses.fields(obj)}
    if isinstance(obj, dict):
        return {str(key): _plain(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple | set | frozenset):
        return [_plain(value) for value in obj]
    if obj is None or isinstance(obj, bool | int | str):
        return obj
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else "NaN" if math.isnan(obj) else "Infinity" if obj > 0 else "-Infinity"
    if callable(getattr(obj, "item", None)):  # a numpy or torch scalar
        return _plain(obj.item())
    return str(obj)
