"""How far a training has come, in steps or in minutes, and what happens along the way: rates, measurements, the end.

Where time is the limit, the processes of one training go by the clock of the first, so that all take the same steps at
the same learning rates.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from coprune.base.errors import NumericalError
from coprune.base.progress import Advance
from coprune.base.words import LeaveOut, Setting
from coprune.training.settings import FinetuneSettings

_SECONDS_BETWEEN_STATES = 600.0  # at most, on machines that take few steps in that time


class Pace:
    """Seconds since the start of a training (those before an interruption included) and the share that is done."""

    def __init__(self, minutes: float | None) -> None:
        self.limit = None if minutes is None else minutes * 60
        self.done = 0.0
        self.agreed = 0.0
        """Seconds at the last step, the same in all processes."""
        self._before = 0.0
        self._started = time.perf_counter()

    def start(self, seconds_before: float = 0.0) -> None:
        """Start the clock, for an interrupted training at what it had used."""
        self._before, self._started = seconds_before, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return self._before + time.perf_counter() - self._started

    def update(self, step: int, max_steps: int) -> None:
        """Find out how much is done; called by all processes at the same step."""
        by_steps = step / max(1, max_steps)
        self.agreed = _agreed(self.seconds)
        self.done = min(1.0, by_steps if self.limit is None else max(by_steps, self.agreed / self.limit))


def rate_at(done: float, schedule: str, warmup: float) -> float:
    """Learning rate relative to its peak when a share of the training is done.

    It starts at a tenth, so that the first step of a short training is not lost.
    """
    if done < warmup:
        return max(0.1, done / warmup)
    rest = (done - warmup) / (1 - warmup)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * rest))
    return 1 - rest if schedule == "linear" else 1.0


class AtItsEnd(Exception):
    """A training that is gone on from had taken its last step."""


class Along(TrainerCallback):
    """What happens along the way: the bar moves, the held-out loss is measured at equal shares, time runs out."""

    def __init__(self, settings: FinetuneSettings, pace: Pace, measure: bool, advance: Advance) -> None:
        self._settings, self._pace, self._advance = settings, pace, advance
        self._measure = measure
        self._measured = 0
        self._shown = 0.0
        self._saved = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the clock, the bar and the count of measurements where an earlier run left them.

        Raises AtItsEnd if that was after the last step, since the Trainer would take one more.
        """
        self._pace.start(max((entry.get("seconds", 0.0) for entry in state.log_history), default=0.0))
        self._pace.update(state.global_step, state.max_steps)
        self._measured, self._saved = self._due(), self._pace.agreed
        self._show()
        if state.global_step and self._pace.done >= 1:
            raise AtItsEnd

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move on; the learning rate of the next step is set right after this."""
        self._pace.update(state.global_step + 1, state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Save a state in time, measure at equal shares of the training, and stop when the time is up."""
        self._show()
        # The Trainer would count the steps itself, but not where it watches for the best state.
        late = self._pace.agreed - self._saved >= _SECONDS_BETWEEN_STATES
        if late or state.global_step % self._settings.save_every == 0:
            control.should_save = True
        if self._pace.done >= 1:
            control.should_training_stop = control.should_save = True
        if self._measure and self._due() > self._measured:
            self._measured = self._due()
            control.should_evaluate = True
            # The best state can only be gone back to if it was saved.
            control.should_save = control.should_save or self._settings.patience is not None
        if control.should_save:
            self._saved = self._pace.agreed
        return control

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Raise NumericalError as soon as the loss is not finite."""
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            raise NumericalError(
                f"the loss at step {state.global_step} is not finite",
                field="learning_rate",
                fix=("lower ", Setting("learning_rate"), ", or ", LeaveOut("bf16")),
            )

    def _due(self) -> int:
        """How many measurements should have been made by now."""
        return math.floor(self._pace.done * self._settings.evaluations + 1e-9)

    def _show(self) -> None:
        self._advance(self._pace.done - self._shown)
        self._shown = self._pace.done


def _agreed(seconds: float) -> float:
    if not (dist.is_available() and dist.is_initialized()):
        return seconds
    first = [seconds]
    dist.broadcast_object_list(first)  # on whatever device the processes talk through
    return first[0]
