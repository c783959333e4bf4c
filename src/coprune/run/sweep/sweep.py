"""Sweeps that are called from Python: `coprune.sweep`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from coprune.base.errors import BadInput
from coprune.base.words import Command, Set
from coprune.recipe.presets import PRESETS
from coprune.run.arguments import CalibrationArguments, OutcomeArguments
from coprune.run.sweep.file import Sweep
from coprune.run.sweep.finished import finished_reports
from coprune.run.sweep.ledger import Ledger
from coprune.run.sweep.plan import Execution
from coprune.run.sweep.result import SweepResult
from coprune.run.sweep.run import check_sweep, run_sweep
from coprune.run.sweep.scripts import sweep_of_script

Lists = str | Path | Mapping[str, Any]
"""A sweep's file, or what it would say."""
_EXECUTION = ("ray", "workers", "threads", "retries")


class SweepArguments(CalibrationArguments, OutcomeArguments, total=False):
    """Settings of all runs, and where they are done."""

    model: str
    method: str
    preset: str | None
    ray: str | None
    workers: int | None
    threads: int | None
    retries: int


def sweep(
    lists: Lists | None = None,
    *,
    script: str | None = None,
    dry_run: bool = False,
    quiet: bool = False,
    **settings: Unpack[SweepArguments],
) -> SweepResult:
    """Do many runs: every combination of some lists, several at a time, and collect what they found.

    Runs are done in processes of their own, so a script that calls this needs `if __name__ == "__main__":`. The same call
    again goes on where it stopped: what is finished is not done again.

    Args:
        lists: a file, or a mapping of what it would say, in which any setting of `coprune.prune` may have a list, such as
            `{"model": "smollm2-135m", "method": ["wanda", "sparsegpt"], "seed": [0, 1], "save": "out/table"}`.
        script: instead of that, a batch script of the Wanda repository (`llama-7b`, `opt` …).
        dry_run: only say which runs there are.
        quiet: no live table on standard error.
        settings: settings that replace what the lists say for all runs; `workers` (runs at a time), `threads` (cores of a
            run), `retries` (of a run that was lost) and `ray` (the address of a Ray cluster, or `local`).

    Returns:
        The runs with their reports, the reasons of those that failed, and what it took; tables are in the sweep's folder.

    Raises:
        BadInput: one of the runs cannot be as asked, or the folder belongs to something else.
    """
    how = Execution(**{name: value for name, value in settings.items() if name in _EXECUTION})  # type: ignore[arg-type]
    fixed = {name: value for name, value in settings.items() if name not in _EXECUTION}
    older: Any = fixed.pop("preset", None)  # what `script` was called
    chosen = _chosen(lists, script or older).with_settings(fixed)
    if dry_run:
        runs = check_sweep(chosen)
        return SweepResult(chosen, runs, finished_reports(runs), ledger=Ledger.read(chosen.folder))
    return run_sweep(chosen, how, quiet)


def _chosen(lists: Lists | None, script: str | None) -> Sweep:
    if lists is not None and script is not None:
        named = "lists" if isinstance(lists, Mapping) else lists
        meant = f"for a preset of its runs, write 'preset: {script}' into it" if script in PRESETS else "leave one out"
        raise BadInput(f"a file ({named}) and a script ({script}) are named", field="script", value=script, fix=meant)
    if script is not None:
        return sweep_of_script(script)
    if lists is None:
        example = Command("sweep", Set("script", "llama-7b"), Set("dry_run", True))
        raise BadInput("neither a file nor a script is named", field="file", fix=("for example: ", example))
    return Sweep.make(lists) if isinstance(lists, Mapping) else Sweep.read(Path(lists))
