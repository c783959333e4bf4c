"""Sweeps of pico models, one second per run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from coprune.base.progress import Reporter
from coprune.report.schema import Report
from coprune.runner.run_recipe import run_recipe
from coprune.sweeps.expand import Run, expand
from coprune.sweeps.file import Sweep
from support.pico_folder import save_pico, write_words

THREADS = 1


def make_place(folder: Path) -> Path:
    """Fill a folder with a model and texts; return it."""
    save_pico(folder / "model")
    write_words(folder / "words.txt")
    write_words(folder / "test.txt", count=300, seed=1)
    return folder


def sweep_data(**changes: Any) -> dict[str, Any]:
    """Return the content of a small sweep's file, with relative paths."""
    data = {"model": "model", "dataset": "words.txt", "eval_data": "test.txt", "seqlen": 32, "nsamples": 4}
    return data | {"save": "out", "check_memory": False, "report_to": None} | changes


def pico_sweep(**changes: Any) -> tuple[Sweep, list[Run]]:
    """Return a small sweep and its runs."""
    sweep = Sweep.make(sweep_data(**changes))
    return sweep, expand(sweep)


def alone(run: Run, folder: Path) -> Report:
    """Execute a run separately in another folder; return its report."""
    torch.set_num_threads(THREADS)
    places = {"save": folder / run.name}
    if run.recipe.output.model is not None:
        places["save_model"] = folder / "models" / run.name
    return run_recipe(run.recipe.replaced(**places), reporter=Reporter(quiet=True)).report


def measured(report: Report) -> dict[str, Any]:
    """Return a report's results without times, memory and paths."""
    fields = {"sparsity", "perplexity", "calibration", "zero_shot", "sample", "events"}
    matrices = [matrix.model_dump(exclude={"seconds"}) for matrix in report.matrices]
    return report.model_dump(include=fields) | {"matrices": matrices}
