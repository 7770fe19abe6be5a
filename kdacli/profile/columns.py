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
        spare: the columns that may be left out, the least important first.
    """
    kept, left_out, room = list(range(len(columns))), [], output.console().width
    widths = [max(len(_plain(cell)) for cell in (name, *column)) for name, column in _by_column(columns, rows)]
    for name in spare:
        if sum(widths[i] for i in kept) + _GAP * len(kept) <= room:
            break
        if name in columns:
            kept.remove(columns.index(name))
            left_out.append(name)
    return output.table(title, [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]), left_out


def _by_column(columns: Sequence[str], rows: Sequence[Sequence[object]]):
    return ((name, [row[i] for row in rows]) for i, name in enumerate(columns))


def _plain(cell: object) -> str:
    return "-" if cell is None else getattr(cell, "plain", None) or str(cell)
