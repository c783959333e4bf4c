"""Tables on a terminal, which are folded where it is narrower than they are."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from coprune.base.shown import Sheet


def print_sheet(sheet: Sheet) -> None:
    """Print a table with named columns."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    first, *others = sheet.columns
    table.add_column(first)
    for column in others:
        table.add_column(column, justify="right", overflow="fold")
    for row in sheet.rows:
        table.add_row(*row)
    Console().print(table)
