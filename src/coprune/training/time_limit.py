"""The time limit of a fine-tuning, which includes loading, measuring, training, saving and verification."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils.data import Subset

from coprune.base.devices import synchronize
from coprune.base.environment import world_size
from coprune.base.errors import BadInput, UnsupportedModel
from coprune.base.progress import Advance, Reporter
from coprune.base.words import Set, Setting, say
from coprune.evaluation.asked_texts import plain_names
from coprune.evaluation.tasks import Task
from coprune.model.checkpoint.load import evaluating
from coprune.recipe.answers import AnswersPart
from coprune.recipe.recipe import Recipe
from coprune.recipe.sources import split_sources
from coprune.recipe.train_part import has_adapters, has_teacher
from coprune.training.training_data import EVALUATIONS, TrainingData, stack

ENOUGH_STEPS = 20
"""Minimum number of steps with a worthwhile effect."""
_MEASURING, _WATCHING, _ANSWERING = 0.1, 0.05, 0.1
"""Shares of the limit: for one measurement of the model, all held-out measurements, and one model's answers."""
_BACKWARD = 2.0
"""Time of a backward pass relative to a forward pass."""
_SPARE = 1.2
"""Factor for the measurements after the training, relative to the same ones before it."""
_SAVING = 3.0, 5.0
"""Time of saving, reloading and comparing a model relative to loading it: with adapters, and with all weights."""


class TooSlow(UnsupportedModel):
    """Answers that were not requested exceed their share of the time."""


class _Watched(Reporter):
    """A wrapper of a reporter whose progress bars check the time at every step."""

    def __init__(self, reporter: Reporter, check: Callable[[], None]) -> None:
        super().__init__(reporter.quiet)
        self._reporter, self._check = reporter, check

    def say(self, line: str) -> None:
        self._reporter.say(line)

    @contextmanager
    def bar(self, description: str, total: float) -> Iterator[Advance]:
        with self._reporter.bar(description, total) as advance:

            def watched(amount: float) -> None:
                advance(amount)
                self._check()

            yield watched


@dataclass
class TimeLimit:
    """A limit on the wall time of a whole fine-tuning, and the time spent so far."""

    seconds: float | None
    """None without a limit."""
    began: float = field(default_factory=time.monotonic)
    after_pruning: bool = False
    """Whether the model was pruned in the same run; it is then measured like the dense one and trained at least one step."""
    loading: float = 0.0
    """Seconds that loading the model took."""
    repeated: float = 0.0
    """Seconds spent on work that is repeated after the training."""
    measuring: float = 0.0
    """Seconds of a forward pass of one batch without gradients, in the precision of measurements; 0 if unknown."""
    training: float = 0.0
    """The same in the precision of the training."""

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.began

    @contextmanager
    def before_and_after(self) -> Iterator[None]:
        """Time work that is repeated after the training."""
        started = time.monotonic()
        yield
        self.repeated += time.monotonic() - started

    def of_answers(self, reporter: Reporter, asked: AnswersPart) -> Reporter:
        """Return a reporter for a model's answers that raises TooSlow when answers not requested exceed their time."""
        if self.seconds is None or self.after_pruning or asked.is_asked:
            return reporter
        share = _ANSWERING * self.seconds
        until = time.monotonic() + share

        def check() -> None:
            if time.monotonic() > until:
                raise TooSlow(f"they take longer than {share:.2g} s, a tenth of the time limit")

        return _Watched(reporter, check)

    def before_training(self, reporter: Reporter, settings: Recipe) -> Reporter:
        """Return a reporter for the work before the training, whose bars raise BadInput once no step fits the limit."""
        if not self._needs_a_step(settings):
            return reporter
        step = self._step(settings)
        return _Watched(reporter, lambda: self._require(self.elapsed + self._after(settings), step))

    def loaded(self, seconds: float, settings: Recipe) -> None:
        """Record how long loading the model took.

        Raises:
            BadInput: loading a teacher and saving the result would exceed the limit.
        """
        self.loading = seconds
        if self._needs_a_step(settings):
            self._require(self._others(settings))

    def try_out(self, model: torch.nn.Module, data: TrainingData, settings: Recipe, device: torch.device) -> None:
        """Time forward passes of one batch, to determine how much to measure and how many steps fit.

        Raises:
            BadInput: not even one step fits.
        """
        if self.seconds is None:
            return
        torch.nn.Module.to(model, device)
        count = settings.train.batch_size or data.batch_size
        batch = stack([data.train[place % len(data.train)] for place in range(count)])
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        if not data.has_targets:
            batch.pop("labels", None)

        def forward() -> Any:
            return model(**batch) if data.loss is None else data.loss(model, batch)

        with torch.no_grad(), evaluating(model):
            self.measuring = self.training = _seconds(forward, device)
            if settings.train.dtype == "bfloat16":
                with torch.autocast(device.type, torch.bfloat16):
                    self.training = _seconds(forward, device)
        if self._needs_a_step(settings):
            measured = self.measuring * 2 * bool(settings.evaluate.perplexity)
            self._require(self._others(settings) + measured, self._step(settings))

    def bounded(self, settings: Recipe, task: Task, data: TrainingData, reporter: Reporter) -> Recipe:
        """Return settings with a number of tokens or images to measure that fits the limit, unless one is set."""
        asked, text = settings.evaluate, task.inputs.text
        said = asked.images if text is None else asked.tokens
        if self.seconds is None or self.after_pruning or said is not None or data.unit == "pairs":
            return settings
        names = plain_names(asked.data) if asked.data is not None else split_sources(settings.calibrate.data)
        batches = _MEASURING * self.seconds / self.measuring / max(1, len(names))
        samples = int(batches * (settings.train.batch_size or data.batch_size))
        word, most, unit = "eval_images", max(1, samples), "images"
        if text is not None:
            word, most, unit = "eval_tokens", max(1, samples * data.tokens // text.seqlen) * text.seqlen, "tokens"
        if asked.perplexity:
            reporter.say(
                say((f"Measuring at most {most:,} {unit} to fit the time limit; set ", Setting(word), " to change it."))
            )
        return settings.replaced(**{word: most})

    def planned(
        self, data: TrainingData, settings: Recipe, resumes: bool, reporter: Reporter
    ) -> tuple[TrainingData, float | None]:
        """Fit the training into the remaining time.

        Args:
            data: of the training. If time is short and the settings allow it, steps use fewer samples, and fewer held-out
                samples are measured.
            settings: of the training.
            resumes: whether the training resumes from a saved state.
            reporter: receives a message with the number of steps that fit.

        Returns:
            The data, and the seconds of the training; None without a limit.

        Raises:
            BadInput: not even one step fits.
        """
        if self.seconds is None:
            return data, None
        batch = self._batch(settings)
        after = self._after(settings)
        left = self.seconds - self.elapsed - after
        if world_size() == 1:  # several processes could decide differently
            data = _watched_briefly(data, left, self.measuring, settings.train.batch_size or data.batch_size)
            fitting = int(left / (ENOUGH_STEPS * batch))
            data = replace(data, accumulate=max(1, min(data.accumulate, fitting)))
        if data.held_out is not None:  # measured once more at the end
            watched = self.measuring * len(data.held_out) / (settings.train.batch_size or data.batch_size)
            after, left = after + watched, left - watched
        step = batch * (settings.train.accumulate or data.accumulate)
        if not resumes and not _has_steps(settings):
            self._announce(step, after, left, reporter)
        return data, max(left, 1e-3)

    def _needs_a_step(self, settings: Recipe) -> bool:
        """Return whether at least one step has to fit; a training that resumes may have none left."""
        resumes = any((settings.training_folder / "training").glob("checkpoint-*"))
        return self.seconds is not None and not (self.after_pruning or resumes or _has_steps(settings))

    def _others(self, settings: Recipe) -> float:
        """Return the minimum seconds without training and measuring: time spent, loading a teacher, and saving."""
        return self.elapsed + self.loading * has_teacher(settings.train.mode) + self._after(settings)

    def _step(self, settings: Recipe) -> float:
        """Return the seconds of the smallest step that the settings allow."""
        return self._batch(settings) * (settings.train.accumulate or 1)

    def _batch(self, settings: Recipe) -> float:
        """Return the seconds of training on one batch."""
        return self.training * (1 + _BACKWARD + has_teacher(settings.train.mode))

    def _after(self, settings: Recipe) -> float:
        """Return the estimated seconds after the training: measuring, saving, reloading, comparing."""
        saving = _SAVING[0] if has_adapters(settings.train.mode) else _SAVING[1]
        return _SPARE * self.repeated + saving * self.loading + 2 * self.measuring

    def _announce(self, step: float, after: float, left: float, reporter: Reporter) -> None:
        """Report how many steps fit. Raises BadInput if not even one does."""
        assert self.seconds is not None
        steps, asked = max(0, int(left / step)), Set("minutes", round(self.seconds / 60, 3))
        if steps >= ENOUGH_STEPS:
            reporter.say(say((f"About {steps} steps of {step:.2g} s fit into ", asked, ".")))
        elif steps or self.after_pruning:
            enough = _minutes(self.elapsed + after + ENOUGH_STEPS * step)
            few = (
                f"about {steps} steps of {step:.2g} s fit" if steps else f"a step takes {step:.2g} s, and one is taken"
            )
            said = f", and fewer than {ENOUGH_STEPS} change little. "
            reporter.say(
                say(
                    (
                        f"Little time: {few} into ",
                        asked,
                        said,
                        Set("minutes", enough),
                        " would do, or shorter windows with ",
                        Setting("seqlen"),
                        ".",
                    )
                )
            )
        else:
            self._require(self.elapsed + after, step)

    def _require(self, others: float, step: float = 0.0) -> None:
        """Raise BadInput if a step does not fit the limit. others, step: seconds of the rest and of a step, 0 if unknown."""
        assert self.seconds is not None
        if others + step <= self.seconds:
            return
        raise BadInput(
            f"not one step fits: the rest takes about {others:.0f} s here"
            + (f", and a step {step:.2g} s" if step else ""),
            field="minutes",
            value=f"{self.seconds / 60:g}",
            fix=(
                *("it takes at least ", Set("minutes", _minutes(_SPARE * (others + step)))),
                *(", or shorter windows with ", Setting("seqlen")),
            ),
        )


def _has_steps(settings: Recipe) -> bool:
    """Return whether the settings also limit the training in steps or tokens."""
    return settings.train.max_steps is not None or settings.train.tokens is not None


def _watched_briefly(data: TrainingData, seconds: float, forward: float, batch_size: int) -> TrainingData:
    """Return the data with as many held-out samples as can be measured in their share of the time, perhaps none."""
    if data.held_out is None:
        return data
    most = int(_WATCHING * max(0.0, seconds) / (EVALUATIONS * forward)) * batch_size
    held_out = Subset(data.held_out, range(min(most, len(data.held_out)))) if most else None
    return replace(data, held_out=held_out)


def _minutes(seconds: float) -> float:
    """Return seconds as minutes, rounded up to a tenth."""
    return math.ceil(seconds / 6) / 10


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of some work; if it is short, of its second run, after a warm-up."""
    for _ in range(2):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        found = time.perf_counter() - started
        if found > 0.5:
            break
    return max(found, 1e-6)
