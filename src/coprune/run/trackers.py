"""Logs of a run's events: a file of JSON lines, and experiment trackers. All are off unless requested."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, TensorBoardTracker

from coprune.base.environment import wandb_project
from coprune.base.errors import BadInput, unknown_name
from coprune.base.progress import Event, Listener, Reporter
from coprune.pruning.pruner import MatrixResult
from coprune.recipe.recipe import Recipe
from coprune.report.schema import Report
from coprune.run.phase_events import BlockPruned, Failed, Finished, Started


class Tracker:
    """A run in one of accelerate's experiment trackers; it starts with the first figures, so a refused run leaves nothing."""

    def __init__(self, name: str, recipe: Recipe) -> None:
        """Take the tracker's name; it writes where its own environment says, or to the run folder."""
        self._name, self._recipe = name, recipe
        self._begun: Any = None

    def log(self, figures: dict[str, float], step: int) -> None:
        """Log figures by name."""
        if self._begun is None:
            self._begun = self._begin()
        self._begun.log(figures, step=step)

    def close(self) -> None:
        """End the run."""
        if self._begun is not None:
            self._begun.finish()

    def _begin(self) -> Any:
        PartialState()  # required by accelerate's logging
        if self._name == "tensorboard":
            begun = TensorBoardTracker("tensorboard", self._recipe.run_folder)
            begun.start()
            begun.log({"recipe": f"```\n{self._recipe.to_yaml()}```"})
            return begun
        begun = LOGGER_TYPE_TO_CLASS[self._name](wandb_project() if self._name == "wandb" else "coprune")
        begun.start()
        # Trackers can only filter by plain values.
        begun.store_init_configuration(json.loads(json.dumps(self._recipe.flat(), default=str)))
        return begun


TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


@contextmanager
def listening(recipe: Recipe, reporter: Reporter) -> Iterator[None]:
    """Send the reporter's events to the recipe's log file and trackers within the body.

    Raises BadInput if a tracker is unknown or not installed, or the file cannot be written.
    """
    names = [name.strip() for name in (recipe.output.report_to or "").split(",") if name.strip()]
    for name in names:
        if name not in TRACKERS:
            raise unknown_name("tracker", name, TRACKERS, field="report_to")
        if importlib.util.find_spec(name) is None:
            missing = f"the tracker {name} needs a package that is missing"
            raise BadInput(missing, field="report_to", value=name, fix=f"pip install 'coprune[{name}]'")
    before = list(reporter.listeners)
    with ExitStack() as stack:
        if recipe.output.log_json is not None:
            reporter.listeners.append(stack.enter_context(_json_lines(recipe.output.log_json)))
        for name in names:
            tracker = Tracker(name, recipe)
            stack.callback(tracker.close)
            reporter.listeners.append(_feed(tracker))
        reporter.tell(Started(recipe))
        try:
            yield
        except BaseException as error:
            reporter.tell(Failed(f"{type(error).__name__}: {error}"))
            raise
        finally:
            reporter.listeners[:] = before


def block_figures(results: Sequence[MatrixResult]) -> dict[str, float]:
    """Return a finished block's figures for trackers: mean sparsity and layer error."""
    errors = [result.relative_layer_error for result in results if result.relative_layer_error is not None]
    figures = {"block/sparsity": sum(result.sparsity for result in results) / len(results)} if results else {}
    return figures | ({"block/layer_error": sum(errors) / len(errors)} if errors else {})


def final_figures(report: Report) -> dict[str, float]:
    """Return the figures of a finished run, by name."""
    figures = {
        "sparsity/matrices": report.sparsity.matrices,
        "sparsity/model": report.sparsity.model,
        "seconds/prune": report.prune_seconds,
        "seconds/total": report.total_seconds,
        "memory/peak_bytes": float(report.peak_memory_bytes),
    }
    for images in report.accuracy:
        figures |= {
            f"top1/{_plain(images.data)}": images.pruned_top1,
            f"top5/{_plain(images.data)}": images.pruned_top5,
        }
        figures |= {} if images.dense_top1 is None else {f"top1_dense/{_plain(images.data)}": images.dense_top1}
    for entry in report.perplexity:
        figures |= {f"perplexity/{_plain(entry.data)}": entry.pruned}
        figures |= {} if entry.dense is None else {f"perplexity_dense/{_plain(entry.data)}": entry.dense}
    for task in () if report.zero_shot is None else report.zero_shot.tasks:
        figures |= {f"{_plain(task.task)}/{_plain(metric)}": found.value for metric, found in task.pruned.items()}
    return figures


def _feed(tracker: Tracker) -> Listener:
    step = 0

    def hear(event: Event) -> None:
        nonlocal step
        if isinstance(event, BlockPruned):
            tracker.log(block_figures(event.matrices), step)
            step += 1
        elif isinstance(event, Finished):
            tracker.log(event.figures, step)

    return hear


@contextmanager
def _json_lines(path: Path) -> Iterator[Listener]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a", encoding="utf-8")
    except OSError as error:
        raise BadInput(f"the log {path} cannot be written: {error.strerror}", field="log_json", value=path) from error
    with stream:

        def hear(event: Event) -> None:
            line = {"time": time.time(), "event": event.kind, **event.facts()}
            stream.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
            stream.flush()

        yield hear


def _plain(name: str) -> str:
    """Return a name that every tracker accepts: the last part of a path, without special characters."""
    last = name.rstrip("/").rpartition("/")[2]
    return "".join(sign if sign.isalnum() or sign in "-_. " else "_" for sign in last)
