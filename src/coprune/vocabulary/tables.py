"""The tensors of a model with an axis as long as its vocabulary, found by building the model for two vocabulary sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from coprune.base.errors import UnsupportedModel
from coprune.model.checkpoint.conversion import Conversion
from coprune.model.checkpoint.lazy import build_skeleton
from coprune.model.checkpoint.load import explained, quiet_transformers
from coprune.model.checkpoint.locate import ModelFolder
from coprune.model.checkpoint.shards import TensorEntry
from coprune.vocabulary.choose import Kept
from coprune.vocabulary.settings import Naming, resized, sizes_in, sizes_of


@dataclass(frozen=True)
class Table:
    """A tensor whose rows, along one of its axes, are tokens."""

    axis: int
    size: int
    """Number of rows; its tokens are those with the smallest ids."""


def skeleton(folder: ModelFolder, config: Mapping[str, Any]) -> PreTrainedModel:
    """Build the model of a folder without weights, from a changed configuration. Raises BadInput if that fails."""
    content = dict(config)
    with quiet_transformers(), explained(folder):
        made = AutoConfig.for_model(content.pop("model_type"), **content)
        return build_skeleton(folder, made, torch.float32, torch.device("cpu"))


def rows_of(model: PreTrainedModel) -> int:
    """Return the number of embedding rows of a model."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return int(weight.shape[0])


def find_tables(
    folder: ModelFolder, config: Mapping[str, Any], entries: Mapping[str, TensorEntry], kept: Kept
) -> tuple[dict[str, Table], dict[int, int]]:
    """Find every tensor of a folder that has rows for tokens.

    Args:
        folder: the model's folder.
        config: the content of its configuration.
        entries: its tensors.
        kept: the tokens to keep.

    Returns:
        Tables by tensor name, and the configuration's new vocabulary sizes by old.

    Raises:
        UnsupportedModel: the configuration cannot express the smaller vocabulary, or a tensor of its length is not a table.
    """
    model = skeleton(folder, config)
    rows = rows_of(model)
    _refuse_offsets(config)
    sizes = {size: kept.below(size) for size in sizes_of(config, rows)}
    smaller = resized(Naming(rows, sizes=[*sizes]).cut(config, kept, instead=0), sizes)
    before, after = _shapes(model), _shapes(skeleton(folder, smaller))
    found: dict[str, Table] = {}
    for name, shape in before.items():
        new = after.get(name)
        if new is None or len(new) != len(shape):
            raise UnsupportedModel(f"{name} is missing in a model of this configuration with a smaller vocabulary")
        axes = [axis for axis, (old, left) in enumerate(zip(shape, new, strict=True)) if old != left]
        if not axes:
            continue
        if len(axes) > 1 or new[axes[0]] != kept.below(shape[axes[0]]):
            raise UnsupportedModel(f"{name} does not follow the size of the vocabulary row by row")
        found[name] = Table(axes[0], shape[axes[0]])
    if not any(table.size == rows for table in found.values()):
        raise UnsupportedModel("the configuration does not say how large the vocabulary is")
    return _stored(Conversion(model, entries), found, entries, rows), sizes


def _stored(
    conversion: Conversion, tables: Mapping[str, Table], entries: Mapping[str, TensorEntry], rows: int
) -> dict[str, Table]:
    """Return tables by their names in files. Raises UnsupportedModel for another tensor of the same length."""
    found: dict[str, Table] = {}
    for group in conversion.groups:
        if (table := tables.get(group.target)) is None:
            continue
        for name in group.originals:
            shape = entries[name].shape
            if group.converted or len(shape) <= table.axis or shape[table.axis] != table.size:
                raise UnsupportedModel(f"{name} is stored in another layout than the model's {group.target}")
            found[name] = table
    for name in conversion.carried:
        if rows in entries[name].shape:
            raise UnsupportedModel(f"{name} is as long as the vocabulary, but its meaning is unknown")
    return found


def _refuse_offsets(config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModel if ids beyond the tokenizer's have a meaning, such as images in some models."""
    if any(key == "vocab_offset" for key, _ in sizes_in(config)):
        raise UnsupportedModel(
            "the model uses ids beyond the vocabulary for images or sounds, so its vocabulary cannot be cut"
        )


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
