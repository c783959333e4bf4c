"""The loop of a worker, which runs jobs and reports events; for local processes and Ray alike."""

from __future__ import annotations

import gc
import logging
import traceback
import warnings
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from coprune.base.environment import quieten_tokenizers
from coprune.base.progress import Event, Listener
from coprune.store.store import Store
from coprune.sweeps.events import Cause, Doing, Done, JobEvent, NotDone, Tell
from coprune.sweeps.expand import Run

if TYPE_CHECKING:
    from coprune.run.reuse import Reuse

Action = Literal["estimate", "run"]


class Work(Protocol):
    """Something that a worker does, which passes between processes."""

    @property
    def name(self) -> str:
        """Names it among all that are done together."""
        ...

    @property
    def threads(self) -> int:
        """Cores that it takes."""
        ...

    @property
    def gpu(self) -> bool:
        """Whether it needs a GPU."""
        ...

    @property
    def memory(self) -> int | None:
        """Bytes that it will take, None if unknown."""
        ...

    def do(self, tell: Tell) -> Mapping[str, float]:
        """Run it, and return the seconds saved by shared results."""
        ...


@dataclass(frozen=True)
class Job:
    """A run to do, or to estimate. gpu: whether it needs one; memory: bytes that it will take, None if unknown."""

    run: Run
    action: Action
    sweep: Path
    """The sweep's folder."""
    threads: int
    gpu: bool = False
    memory: int | None = None

    @property
    def name(self) -> str:
        """The run's."""
        return self.run.name

    def do(self, tell: Tell) -> Mapping[str, float]:
        """Run or estimate it."""
        return _ACTIONS[self.action](self, tell)


# Texts as tokens, which the later jobs of this process find again.
_texts: dict[tuple[Hashable, ...], tuple[Any, float]] = {}


def do_job(job: Work, tell: Tell) -> None:
    """Run a job and report its end; only an interruption is raised."""
    import torch

    from coprune.base.errors import CopruneError
    from coprune.base.memory import return_free_memory

    _quieten()
    torch.set_num_threads(job.threads)
    try:
        saved = job.do(tell)
        tell(Done(job.name, saved))
    except CopruneError as error:
        tell(NotDone(job.name, Cause.REFUSED, error))
    except Exception:
        tell(NotDone(job.name, Cause.BROKEN, traceback.format_exc()))
    finally:
        gc.collect()
        return_free_memory()


def _estimate(job: Job, tell: Tell) -> dict[str, float]:
    from coprune.base.progress import Reporter
    from coprune.run import context
    from coprune.stages.opening import open_run

    tell(Doing(job.run.name, "estimating"))
    recipe, reuse = job.run.recipe, _reuse(job.sweep)
    opened = open_run(
        context.Run(recipe, context.NOTHING, Reporter(quiet=True), write=True),
        partial(reuse.tokens, recipe.model.name),
    )
    reuse.estimate(recipe, opened.estimate)
    return {}


def _reuse(sweep: Path) -> Reuse:
    """Return what the runs of a sweep share: a store in its folder, and the texts that this process has tokenised."""
    from coprune.run.reuse import Reuse
    from coprune.sweeps.finished import SHARED_FOLDER

    return Reuse(Store(sweep / SHARED_FOLDER), among_others=True, texts=_texts)


def _run(job: Job, tell: Tell) -> dict[str, float]:
    from coprune.base.progress import Reporter
    from coprune.runner.run_recipe import run_recipe
    from coprune.sweeps.finished import finished_report

    recipe = job.run.recipe
    if finished_report(recipe) is not None:  # by this sweep, whose worker was lost before it could tell
        return {}
    tell(Doing(job.run.name, "loading"))
    _forget_peak()
    reuse = _reuse(job.sweep)
    reporter = Reporter(quiet=True)
    reporter.listeners.append(_teller(job.run.name, tell))
    run_recipe(recipe, reporter=reporter, reuse=reuse)
    saved: dict[str, float] = vars(reuse.saved)
    return saved


_ACTIONS: dict[Action, Callable[[Job, Tell], dict[str, float]]] = {"estimate": _estimate, "run": _run}


def _teller(name: str, tell: Tell) -> Listener:
    """Return a listener to a run's events that reports its current activity."""
    from coprune.run.events import BlockPruned, Phase, PhaseDone

    following = {
        Phase.PREPARE: "measuring the dense model",
        Phase.MEASURE_DENSE: "pruning",
        Phase.PRUNE: "measuring the pruned model",
        Phase.MEASURE_PRUNED: "saving",
        Phase.SAVE: "writing the report",
    }
    blocks = 0

    def listen(event: Event) -> None:
        nonlocal blocks
        if isinstance(event, PhaseDone):
            tell(Doing(name, following[event.phase]))
        elif isinstance(event, BlockPruned):
            blocks += 1
            tell(Doing(name, f"pruning, {blocks} blocks done"))

    return listen


def _forget_peak() -> None:
    """Start the peak of this process's memory anew, so that a report tells of its own run (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _quieten() -> None:
    """Silence the libraries' notes, as the command does."""
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    quieten_tokenizers()


@dataclass(frozen=True)
class Capacity:
    """Resources for jobs on all machines together; memory in bytes, None if unknown."""

    cores: int
    memory: int | None
    gpus: int
    cores_each: int
    """Cores of the largest machine, the maximum for one job."""
    memory_each: int | None


class Workers(Protocol):
    """Do jobs, several at a time."""

    capacity: Capacity
    at_once: int
    """Maximum number of jobs at a time."""

    def has_room(self, job: Work) -> bool:
        """Return whether a job can start now; always true if none is running."""
        ...

    def start(self, job: Work) -> None:
        """Start a job, which there is room for."""
        ...

    def events(self, seconds: float) -> list[JobEvent]:
        """Wait up to some seconds and return the events since the last call."""
        ...

    def stop(self) -> None:
        """End all jobs and workers."""
        ...
