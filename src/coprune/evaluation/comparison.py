"""A comparison of models, and how it is shown: as a table, as CSV with bare numbers, and as Markdown."""

from __future__ import annotations

import csv
import io

from pydantic import BaseModel, ConfigDict

from coprune.base.shown import Sheet, Shown
from coprune.evaluation.changes import Row
from coprune.evaluation.tables import columns_of


class Comparison(Shown, BaseModel):
    """Several models; the first row is the baseline."""

    model_config = ConfigDict(frozen=True)

    rows: tuple[Row, ...]

    def headline(self) -> str:
        """Which models were compared with which."""
        first, *others = (row.name for row in self.rows)
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        return f"{', '.join(others[:3])}{more} with {first}"

    def sheet(self) -> Sheet:
        """Models as columns and figures as lines, since there are more figures than models."""
        rows = [(column.title, *map(column.show, self.rows)) for column in columns_of(self.rows)]
        return Sheet(self.headline(), rows, ("", *(row.name for row in self.rows)))

    def to_markdown(self) -> str:
        """The same as Markdown."""
        sheet = self.sheet()
        names = " | ".join(name.replace("|", "\\|") for name in sheet.columns[1:])
        lines = [f"| | {names} |", "| --- |" + " ---: |" * len(self.rows)]
        return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in sheet.rows)]) + "\n"

    def to_csv(self) -> str:
        """One line per model, with bare numbers (fractions rather than per cent) and empty fields where there is none."""
        columns = columns_of(self.rows)
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["model", *(column.title for column in columns)])
        for row in self.rows:
            values = (column.value(row) for column in columns)
            writer.writerow([row.name, *("" if value is None else repr(value) for value in values)])
        return stream.getvalue()
