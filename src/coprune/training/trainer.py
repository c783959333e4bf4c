"""transformers' Trainer, extended to keep zeros.

Its optimiser leaves pruned weights at zero, its learning rate can follow the clock, its loss can be a distillation loss, and
it saves no state in which a pruned weight is not zero.
"""

from __future__ import annotations

import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import SaveStrategy

from coprune.base.devices import accelerator, in_host_memory, is_accelerator, kind_of
from coprune.base.environment import accelerate_told, local_rank, world_size
from coprune.base.errors import NumericalError
from coprune.base.processes import started_processes
from coprune.base.progress import Advance
from coprune.base.words import Set, Setting
from coprune.model.checkpoint.load import quiet_transformers
from coprune.model.loaded_model import choose_device
from coprune.pruning.refine.trainable_parameters import sizes_of
from coprune.recipe.recipe import Recipe
from coprune.training.distill import Objective
from coprune.training.keep_zeros import hold_zeros
from coprune.training.masks import Masks, plain_parameters
from coprune.training.session import Session
from coprune.training.training_data import EVALUATIONS, TrainingData, stack

_WARMUP = 0.03
"""Share of a training in which the learning rate rises."""
_NEVER = 10**9  # steps, where `Along` decides instead


class ZeroKeepingTrainer(Trainer):
    """A Trainer for a pruned model with or without adapters."""

    def __init__(
        self,
        *args: Any,
        masks: Masks,
        settings: Recipe,
        pace: Pace,
        objective: Objective | None = None,
        own_loss: Objective | None = None,
        **kwargs: Any,
    ) -> None:
        """Create a trainer. objective: replaces the data's loss; own_loss: the data's loss, None for the model's own."""
        super().__init__(*args, **kwargs)
        self._masks, self._settings, self._pace = masks, settings, pace
        self._objective, self._own_loss = objective or own_loss, own_loss
        if self._objective is not None:
            # The objective is a mean per batch, so the Trainer has to divide it by the number of batches per step.
            self.loss_is_scaled_for_ga = False

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create the Trainer's own optimiser, which leaves pruned weights at zero."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new:
            if self._settings.train.rates == "relative":
                rates_by_size(optimizer)
            trained: Any = self.model if model is None else model
            hold_zeros(trained, optimizer, self._masks)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create a schedule that follows the completed share of the training, in steps or in minutes."""
        if self.lr_scheduler is None:

            def rate(_: int) -> float:
                return rate_at(self._pace.done)

            stepping: Any = optimizer or self.optimizer
            self.lr_scheduler = LambdaLR(stepping, rate)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the objective in training, and the data's own loss in evaluation, so that modes can be compared."""
        inputs = dict(inputs)
        objective = self._objective if model.training else self._own_loss
        if objective is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = objective(model, inputs)
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the elapsed time, from which a resumed training computes the remaining time."""
        super().log({**logs, "seconds": self._pace.seconds}, start_time)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write a state to resume from, unless a pruned weight in it is not zero."""
        model: Any = self.model
        self._masks.verify(plain_parameters(model))
        if not self.args.should_save:
            return
        # In the model's own format, since the Trainer reads that back.
        layout = (
            {"save_embedding_layers": False} if isinstance(self.model, PeftModel) else {"save_original_format": False}
        )
        unwrapped: Any = self.accelerator.unwrap_model(self.model)
        with quiet_transformers():
            unwrapped.save_pretrained(output_dir or self.args.output_dir, state_dict=state_dict, **layout)


def train(trainer: ZeroKeepingTrainer, state: Path | None) -> None:
    """Train to the end. state: the state to resume from, if any."""
    with suppress(AlreadyFinished):  # its state is loaded by then
        trainer.train(resume_from_checkpoint=None if state is None else str(state))


def build_trainer(
    session: Session, objective: Objective | None, seconds: float | None, advance: Advance
) -> ZeroKeepingTrainer:
    """Create a trainer for a session's settings that saves its states in the session's folder.

    Args:
        session: of the training.
        objective: the loss to minimise; None for the data's own.
        seconds: time limit of the training; None if only steps limit it.
        advance: of the progress bar.
    """
    settings, data = session.settings, session.data
    pace = Pace(seconds)
    trainer = ZeroKeepingTrainer(
        model=session.model,
        args=training_arguments(settings, data, session.training_folder),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        data_collator=stack,
        callbacks=[Along(pace, data.held_out is not None, advance)],
        masks=session.masks,
        settings=settings,
        pace=pace,
        objective=objective,
        own_loss=data.loss if data.has_targets else objective,
    )
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(callback)  # the bar is coprune's own
        elif type(callback).__name__ == "TensorBoardCallback" and callback.logging_dir is None:
            callback.logging_dir = str(
                settings.training_folder / "tensorboard"
            )  # the default is removed with the states
    return trainer


def training_arguments(settings: Recipe, data: TrainingData, folder: Path) -> TrainingArguments:
    """Convert the settings to transformers' arguments."""
    device = training_device(settings.model.device)
    steps = steps_asked(settings, data)
    until_time = settings.train.minutes is not None and steps is None
    return arguments_on(
        device,
        output_dir=str(folder),
        per_device_train_batch_size=settings.train.batch_size or data.batch_size,
        per_device_eval_batch_size=settings.train.batch_size or data.batch_size,
        gradient_accumulation_steps=settings.train.accumulate or data.accumulate,
        num_train_epochs=settings.train.epochs,
        max_steps=_NEVER if until_time else steps or -1,
        learning_rate=settings.train.rate,
        # Fused: one pass over each weight instead of ten, which saves a tenth of a small step on a CPU.
        optim="adamw_torch" if kind_of(device) == "other" else "adamw_torch_fused",
        bf16=settings.train.dtype == "bfloat16",
        seed=settings.calibrate.seed,
        data_seed=settings.calibrate.seed,
        report_to=[name.strip() for name in (settings.output.report_to or "none").split(",")],
        eval_strategy="no" if data.held_out is None else "steps",
        eval_steps=None if data.held_out is None else _NEVER,
        save_steps=settings.train.save_every,
        ddp_find_unused_parameters=not data.has_targets,  # a model without a head may have a pooler without gradients
        **_ALWAYS,
        **_checkpointing(settings.train.gradient_checkpointing),
    )


def steps_asked(settings: Recipe, data: TrainingData) -> int | None:
    """Return the requested number of optimiser steps, from steps or tokens; None if another setting limits the training."""
    if settings.train.tokens is None:
        return settings.train.max_steps
    windows = (settings.train.batch_size or data.batch_size) * (settings.train.accumulate or data.accumulate)
    return math.ceil(settings.train.tokens / (windows * data.tokens * started_processes().size))


# Arguments that do not depend on the settings: coprune has its own progress bar and log.
_ALWAYS: dict[str, Any] = {
    "logging_strategy": "steps",
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
    "save_strategy": SaveStrategy.STEPS,
    "save_total_limit": 1,
    "prediction_loss_only": True,
    "remove_unused_columns": False,
    "disable_tqdm": True,
    "ddp_timeout": 24 * 3600,
    "log_level": "error",
    "label_names": ["labels"],
}


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """Request activation checkpointing under the name that this version of transformers has for it."""
    if not wanted:
        return {}
    known = TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


_SECONDS_BETWEEN_STATES = 600.0  # at most, for machines on which steps are slow


class Pace:
    """Clock of a training: its seconds, including those before an interruption, and its completed share."""

    def __init__(self, limit: float | None) -> None:
        """Create a pace. limit: seconds of the training, None without a limit."""
        self.limit = limit
        self.done = 0.0
        self.agreed = 0.0
        """Seconds at the last step, the same in all processes."""
        self._before = 0.0
        self._started = time.perf_counter()

    def start(self, seconds_before: float = 0.0) -> None:
        """Start the clock. seconds_before: used before an interruption."""
        self._before, self._started = seconds_before, time.perf_counter()
        self.agreed = seconds_before
        if self.limit is not None:
            self.limit = _agreed(self.limit)

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return self._before + time.perf_counter() - self._started

    def update(self, step: int, max_steps: int) -> None:
        """Update the completed share; it is 1 if another step would not fit. All processes call this at the same step."""
        self.done = min(1.0, step / max(1, max_steps))
        before, self.agreed = self.agreed, _agreed(self.seconds)
        if self.limit is not None:
            fits = 2 * self.agreed - before <= self.limit  # if the next step takes as long as the last
            self.done = max(self.done, self.agreed / self.limit) if fits else 1.0

    @property
    def now(self) -> float:
        """The completed share within a step."""
        return self.done if self.limit is None else min(1.0, max(self.done, self.seconds / self.limit))


def rate_at(done: float) -> float:
    """Return the learning rate relative to its peak at a share of the training.

    It starts at a tenth, so that the first step of a short training is not wasted.
    """
    return max(0.1, done / _WARMUP) if done < _WARMUP else (1 - done) / (1 - _WARMUP)


class AlreadyFinished(Exception):
    """The resumed training had already finished."""


class Along(TrainerCallback):
    """Callback of a training: advance the bar, measure the held-out loss at equal intervals, stop at the time limit."""

    def __init__(self, pace: Pace, measure: bool, advance: Advance) -> None:
        self._pace, self._measure, self._advance = pace, measure, advance
        self._measured = 0
        self._shown = 0.0
        self._saved = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the clock, the progress bar and the count of measurements of an earlier run.

        Raises AlreadyFinished if all steps were done, since the Trainer would take one more.
        """
        self._pace.start(max((entry.get("seconds", 0.0) for entry in state.log_history), default=0.0))
        self._pace.update(state.global_step, state.max_steps)
        self._measured, self._saved = self._due(), self._pace.agreed
        self._show(self._pace.done)
        if state.global_step and self._pace.done >= 1:
            raise AlreadyFinished

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update the completed share, from which the learning rate of the next step is set right after this."""
        self._pace.update(state.global_step + 1, state.max_steps)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the progress within a long step."""
        self._show(self._pace.now)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Save states regularly, measure at equal shares of the training, and stop when the time is up."""
        self._show(self._pace.done)
        if self._pace.agreed - self._saved >= _SECONDS_BETWEEN_STATES:
            control.should_save = True
        if self._pace.done >= 1:
            control.should_training_stop = control.should_save = True
        if self._measure and self._due() > self._measured:
            self._measured = self._due()
            control.should_evaluate = True
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
                fix=("lower ", Setting("learning_rate"), ", or use ", Set("dtype", "float32")),
            )

    def _due(self) -> int:
        """Return the number of measurements due by now."""
        return math.floor(self._pace.done * EVALUATIONS + 1e-9)

    def _show(self, done: float) -> None:
        self._advance(done - self._shown)
        self._shown = done


def _agreed(seconds: float) -> float:
    if not (dist.is_available() and dist.is_initialized()):
        return seconds
    first = [seconds]
    dist.broadcast_object_list(first)  # on whatever device the backend uses
    return first[0]


def rates_by_size(optimizer: torch.optim.Optimizer) -> None:
    """Scale the learning rate of every matrix by its root mean square, and of every vector by its median magnitude.

    Zeros are ignored; a parameter of zeros keeps its rate. Every parameter becomes a group of its own. A resumed training
    restores the rates from its state.
    """
    each = [(group, parameter) for group in optimizer.param_groups for parameter in group["params"]]
    sizes = sizes_of((parameter, parameter != 0) for _, parameter in each)
    optimizer.param_groups.clear()
    for (group, parameter), size in zip(each, sizes, strict=True):
        rate = group["lr"] * (_median(parameter) or size)
        optimizer.add_param_group({**group, "params": [parameter], "lr": rate})


def _median(parameter: torch.Tensor) -> float | None:
    """Return the median magnitude of a vector's nonzero entries; None for a matrix or a vector of zeros."""
    if parameter.ndim > 1:
        return None
    there = parameter.detach()[parameter != 0].abs()
    return float(there.median()) if len(there) else None


def training_device(name: str) -> torch.device:
    """Return the training device of this process. name: `auto`, or a device's; raises BadInput if unavailable."""
    found = accelerator()
    if found is not None and name in ("auto", found.type):
        return torch.device(found.type, local_rank())
    return choose_device(name)


class OneDeviceArguments(TrainingArguments):
    """transformers' training arguments for one device per process."""

    _taken: torch.device | None = None

    @property
    def device(self) -> torch.device:
        """The chosen device. transformers' own property is read first, since it sets up transformers and accelerate."""
        chosen = super().device
        return self._taken or chosen

    @property
    def n_gpu(self) -> int:
        """Number of GPUs of this process, at most 1, since the Trainer would use them all."""
        found: int = super().n_gpu
        return min(1, found)


def arguments_on(device: torch.device, **settings: Any) -> OneDeviceArguments:
    """Return the Trainer's arguments for a device. settings: of `TrainingArguments`, without a device."""
    settings |= {"use_cpu": in_host_memory(device), "dataloader_pin_memory": is_accelerator(device)}
    if world_size() > 1:
        return OneDeviceArguments(**settings)
    with accelerate_told(str(device)):
        arguments = OneDeviceArguments(**settings)
        arguments._taken = device
        # Read now, while accelerate's setting is in place.
        if is_accelerator(arguments.device) and device.index is not None:
            torch.accelerator.set_device_index(device.index)
    return arguments
