"""Prepare a fine-tuning: check its settings, and load its model, masks, adapters and data."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from coprune.base.errors import BadInput, about
from coprune.base.progress import Reporter
from coprune.base.words import LeaveOut, Set, Setting, per_cent
from coprune.data.bos import bos_of
from coprune.data.windows import Windows
from coprune.evaluation.bos_choice import score_in_memory
from coprune.evaluation.tasks import Data, Task, task_for
from coprune.evaluation.tasks.image_task import ImageInputs
from coprune.evaluation.tasks.pair_task import PairInputs
from coprune.evaluation.tasks.speech_task import SpeechInputs
from coprune.evaluation.tasks.text_task import choose_seqlen
from coprune.model.blocks import find_blocks
from coprune.model.checkpoint.load import PAIRED, WHAT, load_model, task_at
from coprune.model.checkpoint.locate import Location, locate
from coprune.model.loaded_model import Loaded, in_memory
from coprune.model.transformers_private import installed_trackers
from coprune.recipe.recipe import Recipe
from coprune.recipe.train_part import has_adapters, has_teacher
from coprune.training.adapters import add_adapter, choose_targets, plain_warning
from coprune.training.masks import (
    History,
    Masks,
    leave_alone,
    masks_of,
    parameters_within,
    routers_within,
    select_parameters,
)
from coprune.training.time_limit import TimeLimit
from coprune.training.training_data import (
    TrainingData,
    begun,
    read_pairs,
    read_training_images,
    read_training_text,
    read_whole_texts,
)


@dataclass
class Session:
    """Inputs of a training. `model` includes the adapters, if there are any."""

    settings: Recipe
    model: PreTrainedModel | PeftModel
    loaded: Loaded
    """The same model without PEFT's wrapper, and its tokenizer or image processor."""
    task: Task
    dtype: torch.dtype
    """Dtype of the checkpoint, in which the result is saved."""
    masks: Masks
    data: TrainingData
    evaluation: dict[str, Data]
    reporter: Reporter
    history: History = field(default_factory=History)
    location: Location | None = None
    """Source of the model."""

    @property
    def block_size(self) -> int | None:
        """Tokens per window; None for images."""
        return self.data.tokens or None

    @property
    def training_folder(self) -> Path:
        """Folder of the Trainer's resumable states, removed at the end."""
        return self.settings.training_folder / "training"


def prepare_session(
    settings: Recipe, reporter: Reporter, limit: TimeLimit | None = None, device: torch.device | None = None
) -> Session:
    """Load and check the inputs of a training, the cheapest checks first.

    Args:
        settings: of the training.
        reporter: receives progress.
        limit: of the training's time; the model's speed is measured for it.
        device: of the training.
    """
    limit, device = limit or TimeLimit(None), device or torch.device("cpu")
    _check_named(settings)
    location = locate(settings.model.name, settings.model.cache_dir)
    require_trainable(location, settings.train.mode)
    reporter.say(f"Loading {settings.model.name}")
    started = time.monotonic()
    model, processor = load_model(location, "auto")
    limit.loaded(time.monotonic() - started, settings)
    masks, history = masks_of(model, location.path), History.read(location.path)
    for removal in history.removed:
        reporter.say(f"Removed before: {removal.line()}.")
    if masks.matrices:
        reporter.say(
            f"{len(masks.matrices)} pruned matrices, {per_cent(masks.sparsity)} zeros: "
            + ", ".join(f"{count} × {name}" for name, count in masks.patterns.items())
        )
    dtype = model.dtype
    loaded = Loaded(in_memory(model, location), processor, location.name, False)
    task = _task(settings, loaded)
    data = _training_data(settings, loaded, reporter)
    prepared = _make_trainable(model, masks, settings, reporter)
    limit.try_out(model, data, settings, device)
    task = _task(limit.bounded(settings, task, data, reporter), loaded)
    data, evaluation = _begun_alike(data, task, loaded, reporter)
    return Session(settings, prepared, loaded, task, dtype, masks, data, evaluation, reporter, history, location)


def require_trainable(location: Location, mode: str | None) -> None:
    """Raise BadInput for a mode that needs targets which plain text does not provide."""
    if (task := task_at(location)) in ("embeddings", "labels") and not has_teacher(mode):
        raise BadInput(
            f"{location.name} {WHAT[task]}, for which plain text has no targets",
            field="mode",
            value=mode,
            fix=("train it toward the dense model with ", Set("mode", "distill")),
        )


def _task(settings: Recipe, loaded: Loaded) -> Task:
    """Return the model's task, as for pruning."""
    if loaded.task == "text":
        settings = settings.replaced(seqlen=_window_length(settings, loaded))
    if settings.train.eval_seqlen is not None:
        settings = settings.replaced(seqlen=settings.train.eval_seqlen)
    return task_for(settings, loaded)


def _window_length(settings: Recipe, loaded: Loaded) -> int:
    limit = choose_seqlen(loaded.model, settings.calibrate.seqlen)
    return settings.calibrate.seqlen or min(1024, limit)


def _training_data(settings: Recipe, loaded: Loaded, reporter: Reporter) -> TrainingData:
    task = task_for(settings, loaded)  # with the window length of training, which evaluation need not share
    text = task.inputs.text
    if text is None:
        _refuse_what_only_text_has(settings)
        return read_training_images(settings, ImageInputs(settings, loaded))
    if loaded.task in PAIRED:
        pairs = SpeechInputs(settings, loaded) if loaded.task == "speech" else PairInputs(settings, loaded)
        return read_pairs(settings, pairs, loaded, reporter)
    if text.whole:
        return read_whole_texts(settings, text, task.metric, loaded.processor)
    data = read_training_text(settings, loaded.processor, _window_length(settings, loaded))
    for windows in (data.train, data.held_out):
        if windows is not None:
            text.check_ids(windows.tokens)
    return data


def _begun_alike(
    data: TrainingData, task: Task, loaded: Loaded, reporter: Reporter
) -> tuple[TrainingData, dict[str, Data]]:
    """Return training and evaluation data with a BOS token at the start of each window where the model needs it."""
    evaluation, text = task.metric.evaluation(reporter), task.inputs.text
    if text is None or text.whole:
        return data, evaluation
    tried = Windows(data.train.tokens, data.fingerprint, data.source, data.given)
    choice = text.choose_bos(score_in_memory(loaded.model), tried, evaluation)
    if (line := choice.line()) is not None:
        reporter.say(f"The token that begins a text: {line}.")
    if choice.used == "every" and not data.given:
        data = begun(data, bos_of(loaded.processor, "every"))
    return data, text.data_begun(choice, evaluation)


def _check_named(settings: Recipe) -> None:
    """Raise BadInput early for a missing teacher or tracker."""
    if (name := settings.train.teacher) is not None:
        with about("teacher", name):
            locate(name, settings.model.cache_dir)
    for tracker in {name.strip() for name in (settings.output.report_to or "").split(",")} - {"", "all"}:
        if tracker not in (there := installed_trackers()):
            fix = f"pip install {tracker}" + (f", or use an installed one: {', '.join(there)}" if there else "")
            raise BadInput(f"the tracker {tracker} is not installed", field="report_to", value=tracker, fix=fix)


def _refuse_what_only_text_has(settings: Recipe) -> None:
    for name, value in (("seqlen", settings.calibrate.seqlen), ("eval_seqlen", settings.train.eval_seqlen)):
        if value is not None:
            raise BadInput("images are not cut into windows", field=name, fix=LeaveOut(name))
    if settings.train.tokens is not None:
        raise BadInput("images have no tokens", field="tokens", fix=("use ", Setting("max_steps")))


def _make_trainable(
    model: PreTrainedModel, masks: Masks, settings: Recipe, reporter: Reporter
) -> PreTrainedModel | PeftModel:
    blocks = find_blocks(model)
    alone = leave_alone(model, blocks, settings.prune.exclude)
    if has_adapters(settings.train.mode):
        # Seeded here, since adapters are drawn before the Trainer sets its seed.
        torch.manual_seed(settings.calibrate.seed)
        targets = choose_targets(masks, settings.train.only, settings.train.adapters.rank, alone)
        left = len(masks.matrices) + len(masks.whole) - len(targets)
        if left and not settings.train.only and not alone:
            reporter.say(f"{left} matrices (fused experts, convolutions) get no adapter and are not trained.")
        if not settings.train.adapters.masked:
            reporter.say(f"Plain adapters are saved unmerged. {plain_warning(masks)}")
        asked = settings.train.adapters
        return add_adapter(model, masks, targets, asked.rank, asked.alpha, masked=asked.masked)
    # In float32, since small updates would vanish in half precision.
    torch.nn.Module.to(model, dtype=torch.float32)
    if settings.train.scope == "blocks":
        trained = parameters_within(model, [block.name for block in blocks], masks)
    elif settings.train.scope == "routers":
        trained = routers_within(model, blocks)
    else:
        trained = select_parameters(model, settings.train.only)
    chosen = [parameter for parameter in trained if id(parameter) not in alone]
    if not chosen:
        raise BadInput(
            "nothing is left to train", field="exclude", value=settings.prune.exclude, fix=LeaveOut("exclude")
        )
    for parameter in chosen:
        parameter.requires_grad_(True)
    return model
