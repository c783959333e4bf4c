"""`coprune report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coprune.base.errors import BadInput
from coprune.base.words import Command, Words
from coprune.commands.terminal import show, show_next


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of finished runs, their report.json, a sweep, or a fine-tuning.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The page. [report.html in the run's folder; for several runs, here]"),
    ] = None,
) -> None:
    """Rebuild the page of a run, a fine-tuning or a sweep, or make one page that compares several runs."""
    for run in runs:
        if not run.exists():
            raise BadInput(f"there is no {run}", field="runs", value=run, fix="name the folder of a finished run")
    from coprune.report.links import PAGE_FILE
    from coprune.report.run_folder import REPORT_FILE, write_page
    from coprune.sweeps.finished import is_sweep
    from coprune.sweeps.sweep_page import write_sweep_page
    from coprune.training.finetune_page import is_finetuning, write_finetune_page

    folder = runs[0] if runs[0].is_dir() else runs[0].parent
    path = output or (folder / PAGE_FILE if len(runs) == 1 else Path(PAGE_FILE))
    if len(runs) == 1 and is_sweep(folder):
        write_sweep_page(folder, path)
    elif len(runs) == 1 and is_finetuning(folder) and not (folder / REPORT_FILE).is_file():
        write_finetune_page(folder, path)
    else:
        write_page(runs, path)
    show(f"page      {path}")
    compared: Words = ("compare the models: ", Command("compare", *runs))
    show_next(("a page with other runs: ", Command("report", runs[0], "RUN")) if len(runs) == 1 else compared)
