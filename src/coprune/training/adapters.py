"""Adapters on a pruned model: put on, saved in PEFT's own format, loaded and merged."""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from coprune.base.errors import BadInput
from coprune.base.files import write_text
from coprune.base.whole_folder import whole_folder
from coprune.base.words import Set
from coprune.model.checkpoint.companions import CARD_FILE
from coprune.model.checkpoint.load import task_of
from coprune.model.checkpoint.part_files import refuse_occupied
from coprune.model.transformers_private import Conv1D
from coprune.training.masked_lora import MaskedLoraConfig
from coprune.training.masks import Masks, plain_parameters
from coprune.training.saved_adapter import adapter_settings, read_adapter_config
from coprune.training.saving import require_finite


def choose_targets(masks: Masks, patterns: Sequence[str], rank: int, alone: Container[int] = ()) -> list[str]:
    """Names of the pruned linear layers that get an adapter.

    patterns: shell-like; without, all of them. alone: ids of parameters that get none. Experts that share one parameter,
    convolutions and an output matrix that is the embedding, too, get none and stay as they are. Raises BadInput for a pattern
    that matches none, or a rank above the width of a layer.
    """
    every = [*(entry.matrix for entry in masks.matrices if not entry.tied), *masks.whole]
    matrices = [matrix for matrix in every if isinstance(matrix.owner, nn.Linear | Conv1D)]
    matrices = [matrix for matrix in matrices if id(matrix.owner.get_parameter(matrix.attribute)) not in alone]
    names = [matrix.name for matrix in matrices]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise BadInput(
                f"the pattern {pattern!r} matches none of the {len(names)} pruned linear layers",
                field="train",
                value=pattern,
            )
    chosen = [m for m in matrices if not patterns or any(fnmatchcase(m.name, p) for p in patterns)]
    if not chosen:
        raise BadInput(
            "only fused experts or convolutions are pruned, which get no adapters",
            field="mode",
            value="lora",
            fix=("use ", Set("mode", "dense")),
        )
    for matrix in chosen:
        if rank > min(matrix.shape):
            raise BadInput(
                f"rank {rank} is above the width of {matrix.name} ({matrix.shape[0]} × {matrix.shape[1]})",
                field="rank",
                value=rank,
                fix=f"use at most {min(matrix.shape)}",
            )
    return [matrix.name for matrix in chosen]


@dataclass(frozen=True)
class AdapterSize:
    """How large an adapter is, and how strong its update."""

    rank: int
    alpha: float
    dropout: float


def add_adapter(model: PreTrainedModel, masks: Masks, targets: list[str], size: AdapterSize, masked: bool) -> PeftModel:
    """Put trainable adapters on some layers of a model; masked ones, or PEFT's plain ones."""
    settings: dict[str, Any] = {
        "r": size.rank,
        "lora_alpha": size.alpha,
        "lora_dropout": size.dropout,
        "target_modules": targets,
        "fan_in_fan_out": any(isinstance(model.get_submodule(name), Conv1D) for name in targets),
        "task_type": "CAUSAL_LM" if task_of(model.config) == "text" else None,
    }
    config = MaskedLoraConfig(**settings, coprune_masks=masks.fingerprint()) if masked else LoraConfig(**settings)
    with _without_deprecations():
        adapted: PeftModel = get_peft_model(model, config)
    return adapted


def save_adapter(adapted: PeftModel, folder: Path, card: str) -> None:
    """Save adapters in PEFT's format (and a model card), whole or not at all.

    Raises BadInput if the folder is taken, NumericalError if an adapter is not finite, CopruneError on a full disk.
    """
    refuse_occupied(folder)
    require_finite((name, tensor) for name, tensor in adapted.named_parameters() if ".lora_" in name)
    with whole_folder(folder) as out:
        adapted.save_pretrained(str(out), save_embedding_layers=False)
        write_text(out / CARD_FILE, card)


def load_adapter(model: PreTrainedModel, masks: Masks, folder: Path) -> PeftModel:
    """Put saved adapters, masked or plain, on the pruned model that they were trained on.

    Raises BadInput for a folder without adapters, or adapters of another model or of other masks.
    """
    config = read_adapter_config(folder)
    settings = adapter_settings(folder, config, model)
    made_for = config.get("coprune_masks")
    if made_for is not None and made_for != masks.fingerprint():
        raise BadInput(
            f"the adapter in {folder} was trained on other masks than those of this model",
            field="adapter",
            value=folder,
            fix="give the pruned model that it was trained on",
        )
    known = LoraConfig(**settings) if made_for is None else MaskedLoraConfig(**settings, coprune_masks=made_for)
    with _without_deprecations():
        adapted: PeftModel = PeftModel.from_pretrained(model, str(folder), config=known)
    return adapted


def merge_adapter(model: PreTrainedModel, masks: Masks, folder: Path) -> PreTrainedModel:
    """Merge saved masked adapters into the pruned model that they were trained on.

    Raises BadInput for plain adapters, whose merging would fill the zeros, and as `load_adapter`; BrokenMask.
    """
    config = read_adapter_config(folder)
    if config.get("coprune_masks") is None:
        raise BadInput(
            f"the adapter in {folder} is a plain one", field="adapter", value=folder, fix=plain_warning(masks)
        )
    return merge(load_adapter(model, masks, folder), masks)


def merge(adapted: PeftModel, masks: Masks) -> PreTrainedModel:
    """Merge masked adapters that are on a model. Raises BrokenMask if that would not keep every zero."""
    merged: PreTrainedModel = adapted.merge_and_unload()
    masks.verify(plain_parameters(merged))
    return merged


def plain_warning(masks: Masks) -> str:
    """What merging plain adapters would do to a model."""
    zeros = sum(entry.zeros for entry in masks.matrices)
    return (
        f"Merging it would make nearly all of the {zeros:,} zeros in the adapted layers nonzero, and the model dense "
        "again. Use it unmerged (PeftModel.from_pretrained), or train a masked adapter, which merges and keeps every zero."
    )


@contextmanager
def _without_deprecations() -> Iterator[None]:
    """PEFT still asks transformers for properties by names that are on their way out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
