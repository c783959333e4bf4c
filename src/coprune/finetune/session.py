"""What a fine-tuning run checks and gathers before it trains: model, masks, adapters, text."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coprune.checkpoint.load import load_model
from coprune.checkpoint.locate import locate
from coprune.checkpoint.weights import InMemory
from coprune.data import EvaluationText
from coprune.finetune.adapters import add_adapter, choose_targets, plain_warning
from coprune.finetune.masks import Masks, find_masks, select_parameters
from coprune.finetune.settings import FinetuneSettings
from coprune.finetune.text_windows import TrainingText, read_training_text
from coprune.preparation import Loaded, choose_seqlen, read_evaluation
from coprune.progress import Reporter
from coprune.recipe import Recipe, make_recipe


@dataclass
class Session:
    """All that a run has gathered before it trains. `model` has its adapters on, if it gets any."""

    settings: FinetuneSettings
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    """Of the checkpoint, in which the result is saved."""
    masks: Masks
    text: TrainingText
    evaluation: dict[str, EvaluationText]
    block_size: int
    reporter: Reporter

    @property
    def training_folder(self) -> Path:
        """Where the Trainer keeps what a run resumes from; removed when it is over."""
        return self.settings.run_folder / "training"


def prepare_session(settings: FinetuneSettings, reporter: Reporter) -> Session:
    """Check all that can be checked, cheap things first."""
    recipe = _recipe(settings)
    location = locate(settings.model, settings.cache_dir)
    reporter.say(f"Loading {settings.model}")
    model, tokenizer = load_model(location, "auto")
    masks = find_masks(model)
    reporter.say(
        f"{len(masks.matrices)} pruned matrices, {masks.sparsity:.2%} zeros: "
        + ", ".join(f"{count} × {name}" for name, count in masks.patterns.items())
    )
    dtype = model.dtype
    limit = choose_seqlen(model, recipe)
    block_size = settings.block_size or min(1024, limit)
    text = read_training_text(settings, tokenizer, block_size)
    loaded = Loaded(InMemory(model), tokenizer, location.name, False)
    evaluation = read_evaluation(recipe, loaded, block_size, reporter)
    prepared = _make_trainable(model, masks, settings, reporter)
    return Session(settings, prepared, tokenizer, dtype, masks, text, evaluation, block_size, reporter)


def _recipe(settings: FinetuneSettings) -> Recipe:
    """The part of the settings that a pruning run shares, for what it shares with one."""
    names = ("model", "dataset", "cache_dir", "evaluate", "eval_data", "eval_tokens")
    return make_recipe({name: getattr(settings, name) for name in names} | {"seqlen": settings.block_size})


def _make_trainable(
    model: PreTrainedModel, masks: Masks, settings: FinetuneSettings, reporter: Reporter
) -> PreTrainedModel | PeftModel:
    if settings.mode == "lora":
        # Seeded here, since adapters are drawn before the Trainer sets its seed.
        torch.manual_seed(settings.seed)
        targets = choose_targets(masks, settings.train, settings.rank)
        left = len(masks.matrices) - len(targets)
        if left and not settings.train:
            reporter.say(f"{left} pruned matrices are fused experts and get no adapter; they stay as they are.")
        if not settings.masked:
            reporter.say(f"Plain adapters are saved unmerged. {plain_warning(masks)}")
        return add_adapter(
            model, masks, targets, settings.rank, settings.alpha, settings.dropout, masked=settings.masked
        )
    # Small updates would vanish in half precision, so what is trained is float32.
    torch.nn.Module.to(model, dtype=torch.float32)
    for parameter in select_parameters(model, settings.train):
        parameter.requires_grad_(True)
    return model


def device_of(settings: FinetuneSettings) -> torch.device:
    if settings.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
