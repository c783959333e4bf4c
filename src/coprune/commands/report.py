"""`coprune report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coprune.base.errors import BadInput


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs, their report.json, or a sweep.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The page. [report.html in the run's folder, or here for several]"),
    ] = None,
) -> None:
    """Make the page of a run again, or one page that compares several runs."""
    from coprune.report.folder import PAGE_FILE, write_page
    from coprune.run.sweep.finished import is_sweep
    from coprune.run.sweep.page import write_sweep_page

    folder = runs[0] if runs[0].is_dir() else runs[0].parent
    path = output or (folder / PAGE_FILE if len(runs) == 1 else Path(PAGE_FILE))
    made = write_sweep_page(folder, path) if len(runs) == 1 and is_sweep(folder) else write_page(runs, path)
    if not made:
        raise BadInput("the page needs altair and vl-convert", fix="pip install 'coprune[report]'")
    typer.echo(f"page      {path}")
