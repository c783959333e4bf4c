"""Sweeps from Python: `coprune.sweep`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from coprune.base.errors import BadInput, unknown_name
from coprune.base.validation import settings_of
from coprune.base.words import Command, Set
from coprune.data.keyword_arguments import ExecutionArguments, RecipeArguments
from coprune.recipe.presets import PRESETS
from coprune.sweeps.execution import check_sweep, run_sweep
from coprune.sweeps.execution_settings import ExecutionSettings
from coprune.sweeps.file import Sweep
from coprune.sweeps.finished import Ledger, finished_reports
from coprune.sweeps.sweep_result import SweepResult

Lists = str | Path | Mapping[str, Any]
"""A sweep's file, or its content."""


class SweepArguments(RecipeArguments, ExecutionArguments, total=False):
    """Settings of all runs, and how they execute."""

    model: str
    method: str
    preset: str | None


def sweep(
    lists: Lists | None = None,
    *,
    script: str | None = None,
    dry_run: bool = False,
    quiet: bool = False,
    **settings: Unpack[SweepArguments],
) -> SweepResult:
    """Run every combination of lists of settings, several in parallel, and collect the results.

    Each run is a process of its own, so a script that calls this needs `if __name__ == "__main__":`. Call it again to resume
    an interrupted sweep.

    Args:
        lists: a file, or a mapping of its content, in which any setting of `coprune.prune` may have a list, such as
            `{"model": "smollm2-135m", "method": ["wanda", "sparsegpt"], "seed": [0, 1], "save": "out/table"}`.
        script: name of a batch script of the Wanda repository (`llama-7b`, `opt` …), instead of `lists`.
        dry_run: only list the runs.
        quiet: show no progress bar and messages on standard error.
        settings: settings that override the lists in all runs; `workers` (parallel runs), `threads` (cores per run),
            `retries` (of a lost run) and `ray` (the address of a Ray cluster, or `local`).

    Returns:
        The runs with their reports, the reasons of failed ones, and the time; tables are in the sweep's folder.

    Raises:
        BadInput: a run is invalid, or the folder holds something else.
    """
    own = ExecutionSettings.model_fields
    how = settings_of(ExecutionSettings, {name: value for name, value in settings.items() if name in own})
    fixed = {name: value for name, value in settings.items() if name not in own}
    chosen = _chosen(lists, script).with_settings(fixed)
    if dry_run:
        runs = check_sweep(chosen)
        return SweepResult(chosen, runs, finished_reports(runs), ledger=Ledger.read(chosen.folder))
    return run_sweep(chosen, how, quiet)


def _chosen(lists: Lists | None, script: str | None) -> Sweep:
    if lists is not None and script is not None:
        named = "lists" if isinstance(lists, Mapping) else lists
        meant = f"to set a preset for its runs, add 'preset: {script}' to it" if script in PRESETS else "leave one out"
        raise BadInput(f"a file ({named}) and a script ({script}) are named", field="script", value=script, fix=meant)
    if script is not None:
        return sweep_of_script(script)
    if lists is None:
        example = Command("sweep", Set("script", "llama-7b"), Set("dry_run", True))
        raise BadInput("neither a file nor a script is named", field="file", fix=("for example: ", example))
    return Sweep.make(lists) if isinstance(lists, Mapping) else Sweep.read(Path(lists))


_ALL_PATTERNS = ["unstructured", "2:4", "4:8"]


def _paper_table(model: str | list[str], folder: str, folders: str = "{pattern}/{method}") -> dict[str, Any]:
    """Return a sweep of three methods × three patterns at 50 %, in the order of the scripts."""
    return {
        "model": model,
        "method": ["wanda", "sparsegpt", "magnitude"],
        "pattern": _ALL_PATTERNS,
        "sparsity": 0.5,
        "save": folder,
        "sweep": {"folders": folders},
    }


SWEEPS: dict[str, dict[str, Any]] = {
    "llama-7b": _paper_table("decapoda-research/llama-7b-hf", "out/llama_7b"),
    "llama-13b": _paper_table("decapoda-research/llama-13b-hf", "out/llama_13b"),
    "llama-30b": _paper_table("decapoda-research/llama-30b-hf", "out/llama_30b"),
    "llama-65b": _paper_table("decapoda-research/llama-65b-hf", "out/llama_65b"),
    "llama-2-7b": _paper_table("meta-llama/Llama-2-7b-hf", "out/llama2_7b"),
    "llama-2-13b": _paper_table("meta-llama/Llama-2-13b-hf", "out/llama2_13b"),
    "llama-2-70b": _paper_table("meta-llama/Llama-2-70b-hf", "out/llama2_70b"),
    "llama-3.2-1b": _paper_table("meta-llama/Llama-3.2-1B", "out/llama_3.2_1b"),
    "opt": _paper_table(
        [f"facebook/opt-{size}" for size in ("125m", "1.3b", "2.7b", "6.7b", "13b")],
        "out/opt",
        "{model}/{pattern}/{method}",
    ),
    "ablate-weight-update": {
        "model": "decapoda-research/llama-7b-hf",
        "nsamples": 128,
        "pattern": ["unstructured", "4:8", "2:4"],
        "method": ["ablate_mag_seq", "ablate_wanda_seq", "ablate_mag_iter", "ablate_wanda_iter"],
        "sparsity": 0.5,
        "save": "out/llama_7b_ablation",
        "sweep": {"folders": "{pattern}/{method}"},
    },
}


def sweep_of_script(name: str) -> Sweep:
    """Return a built-in sweep. Raises BadInput if the name is unknown."""
    if name not in SWEEPS:
        raise unknown_name("script", name, SWEEPS, field="script")
    return Sweep.make(SWEEPS[name])
