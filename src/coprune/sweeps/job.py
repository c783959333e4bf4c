"""Run a sweep's runs, or estimate their memory, as jobs of the pool."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from coprune.base.progress import Reporter
from coprune.runner.runner import make
from coprune.store.store import Store
from coprune.sweeps.expand import Run
from coprune.sweeps.file import SHARED_FOLDER
from coprune.sweeps.finished import finished_report, source_of

if TYPE_CHECKING:
    from coprune.run.reuse import Reuse

Seconds = dict[str, float]
"""Seconds of work that a run reused, by kind."""
# Tokenised texts, reused by later jobs of this process.
_texts: dict[tuple[Hashable, ...], tuple[Any, float]] = {}


@dataclass(frozen=True)
class RunJob:
    """A run to execute or to estimate. gpu: whether it needs one; memory: bytes to reserve, None if unknown."""

    run: Run
    action: Literal["estimate", "run"]
    sweep: Path
    """The sweep's folder."""
    threads: int
    gpu: bool = False
    memory: int | None = None

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.run.name

    def do(self) -> Seconds:
        """Execute or estimate the run; the result goes to its folder or to the sweep's store."""
        if self.run.steps:
            make(self.run.steps, source_of(self.run), Reporter(quiet=True))
        return _ACTIONS[self.action](self)


def _reuse(sweep: Path) -> Reuse:
    """Return what the runs of a sweep share: a store in its folder, and the texts tokenised by this process."""
    from coprune.run.reuse import Reuse

    return Reuse(Store(sweep / SHARED_FOLDER), among_others=True, texts=_texts)


def _estimate(job: RunJob) -> Seconds:
    from coprune.run import context
    from coprune.stages.opening import open_run

    recipe, reuse = job.run.recipe, _reuse(job.sweep)
    opened = open_run(
        context.Run(recipe, context.NOTHING, Reporter(quiet=True), write=True),
        partial(reuse.tokens, recipe.model.name),
    )
    reuse.estimate(recipe, opened.estimate)
    return {}


def _run(job: RunJob) -> Seconds:
    from coprune.runner.run_recipe import run_recipe

    recipe = job.run.recipe
    if finished_report(recipe) is not None:  # the worker was lost after it finished the run
        return {}
    reuse = _reuse(job.sweep)
    run_recipe(recipe, reporter=Reporter(quiet=True), reuse=reuse)
    return dict(vars(reuse.saved))


_ACTIONS: dict[str, Callable[[RunJob], Seconds]] = {"estimate": _estimate, "run": _run}
