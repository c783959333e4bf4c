"""The page of a sweep: the papers' tables, perplexity against sparsity with its front, and every run."""

from __future__ import annotations

from pathlib import Path

from coprune.base.files import write_text
from coprune.report.folder import PAGE_FILE, can_make_pages
from coprune.run.sweep.finished import read_finished
from coprune.run.sweep.table import PaperTable, paper_tables


def write_sweep_page(folder: Path, path: Path | None = None) -> bool:
    """Write the page of a sweep's finished runs; returns whether it could be made, which needs the extra `report`.

    path: by default `report.html` in the sweep's folder. Raises BadInput if no run is finished.
    """
    if not can_make_pages():
        return False
    from coprune.report.several import Run, runs_page

    sweep, runs, reports = read_finished(folder)
    tables = [_section(table) for table in paper_tables(sweep, runs, reports)]
    write_text(path or folder / PAGE_FILE, runs_page([Run.read(folder / name, name) for name in reports], tables))
    return True


def _section(table: PaperTable) -> str:
    from coprune.report.html import section
    from coprune.report.html import table as html_table

    rows = [[name, *(cell.text for cell in cells)] for name, cells in table.rows.items()]
    return section(
        table.title, html_table(["method", *table.columns], rows), note="Mean ± standard deviation over seeds."
    )
