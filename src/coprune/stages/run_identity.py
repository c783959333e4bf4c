"""The identity of a run: its settings, its model and its data."""

from __future__ import annotations

import hashlib
from pathlib import Path

from coprune.recipe.parts import Decides
from coprune.recipe.recipe import Recipe
from coprune.removal.unit_scores import ByError, unit_allocation_named
from coprune.store.place import Identity


def may_round_otherwise(recipe: Recipe) -> bool:
    """Return whether a run may resume with different settings that only affect the last bits.

    It may not if blocks are trained, since a training step takes one batch, nor if the cuts of blocks must match.
    """
    fits = recipe.remove.parts or recipe.prune.reshapes
    return not (recipe.prune.reconstruct.steps or fits)


def weighs_blocks(recipe: Recipe) -> bool:
    """Return whether blocks are weighted by a measure that differs between streamed models and models in memory."""
    if not recipe.remove.parts:
        return False  # for zeros, options of the same name mean something else
    by = unit_allocation_named(recipe.prune.allocation)
    return isinstance(by, ByError) and by.tokens > 0


def run_identity(
    recipe: Recipe, model_fingerprint: str, data_fingerprint: str | None, streams: bool = False
) -> Identity:
    """Return the identity of a run's blocks: recipe, model and data. streams: whether the model is streamed from disk."""
    settings, rounding = recipe.deciding(Decides.RESULT), recipe.deciding(Decides.ROUNDING)
    if not may_round_otherwise(recipe):
        settings, rounding = settings | rounding, {}
    if recipe.prune.allocation.is_file:
        settings["allocation file"] = Path(recipe.prune.allocation.name).read_text(encoding="utf-8")
    if (kept := recipe.remove.kept_scores) is not None and kept.is_file():
        settings["experts' scores"] = hashlib.sha256(kept.read_bytes()).hexdigest()
    if weighs_blocks(recipe):
        settings["what blocks are weighed by"] = "hidden states" if streams else "logits"
    known = {**settings, "model weights": model_fingerprint, "calibration tokens": data_fingerprint}
    return Identity.of("blocks", 1, known, rounding)
