"""Tables that fit: columns of less worth are left out where the terminal is too narrow, and named."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kdacli import output

if TYPE_CHECKING:
    from rich.table import Table

_GAP = 3  # blanks between columns


def fitting(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], spare: Sequence[str] = ()
) -> "tuple[Table, list[str]]":
    """The table, and the columns that it had no room for.

    Args:
        title: printed above.
        columns: names.
        rows: cells, as for `output.table`.
        spare: the columns that may be left out, the least important first; empty ones always are, unnamed.
    """
    left_out, room = [], output.console().width
    texts = [[_plain(row[i]) for row in rows] for i in range(len(columns))]
    kept = [i for i, name in enumerate(columns) if name not in spare or set(texts[i]) != {"-"}]
    widths = [max(map(len, (name, *column))) for name, column in zip(columns, texts, strict=True)]
    for i in [columns.index(name) for name in spare if name in columns]:
        if sum(widths[i] for i in kept) + _GAP * len(kept) <= room:
            break
        if i in kept:
            kept.remove(i)
            left_out.append(columns[i])
    return output.table(title, [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]), left_out


def _plain(cell: object) -> str:
    return "-" if cell is None else getattr(cell, "plain", None) or str(cell)
