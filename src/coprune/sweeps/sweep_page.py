"""The page of a sweep: the papers' tables, all runs with their Pareto front, and their commands."""

from __future__ import annotations

from pathlib import Path

from coprune.base.files import write_text
from coprune.report.links import PAGE_FILE, link_back
from coprune.report.runs_page import Run, Top, runs_page
from coprune.report.view import Copyable, Section
from coprune.sweeps.finished import read_finished, sweep_command
from coprune.sweeps.paper_tables import SPREAD, paper_tables


def write_sweep_page(folder: Path, path: Path | None = None) -> None:
    """Write the page of a sweep's finished runs, and link to it from their pages.

    path: by default `report.html` in the sweep's folder. Raises BadInput if no run is finished.
    """
    sweep, runs, reports = read_finished(folder)
    page = path or folder / PAGE_FILE
    name = folder.absolute().name
    done = f"{len(reports)} of {len(runs)}" if len(reports) < len(runs) else str(len(runs))
    top = Top(
        kind="Sweep",
        title=f"{name}: {done} runs",
        command=Copyable("command", sweep_command(folder)),
        tables=[Section(one.title, [one.sheet()], SPREAD) for one in paper_tables(sweep, runs, reports)],
    )
    found = [Run.read(folder / one, one) for one in reports]
    write_text(page, runs_page(found, top, page.parent))
    if page == folder / PAGE_FILE:
        for one in reports:
            link_back(folder / one / PAGE_FILE, page, f"The sweep {name}")
