"""The identity of a run, by which another one may resume it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coprune.recipe.parts import Decides
from coprune.recipe.recipe import Recipe
from coprune.report.run_events import ResumedOtherwise


@dataclass(frozen=True)
class Identity:
    """The identity of a run, by which another one may resume it."""

    settings: dict[str, Any]
    """Values that must be equal: recipe, model and data."""
    rounding: dict[str, Any] = field(default_factory=dict)
    """Values that may differ, since they change only rounding."""


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[ResumedOtherwise]:
    """Return in what an unfinished run differs from this one."""
    written = json.loads(json.dumps(now))
    return [
        ResumedOtherwise(setting=key, before=before.get(key), now=value)
        for key, value in written.items()
        if before.get(key) != value
    ]


def may_round_otherwise(recipe: Recipe) -> bool:
    """Return whether a run may resume with other settings on which only last bits hang.

    Not where a step of training takes one batch, nor where what goes from one block must fit what goes from the others.
    """
    fits = recipe.remove.parts or recipe.prune.reshapes
    return not (recipe.prune.reconstruct.steps or fits)


def weighs_blocks(recipe: Recipe) -> bool:
    """Return whether blocks are weighed by what a run does with all of the model in memory, and by something else without."""
    if not recipe.remove.parts:
        return False  # options of the same name are others for zeros
    from coprune.run.to_removal import ByError, spreading_named

    by = spreading_named(recipe.prune.allocation)
    return isinstance(by, ByError) and by.tokens > 0


def run_identity(
    recipe: Recipe, model_fingerprint: str, data_fingerprint: str | None, streams: bool = False
) -> Identity:
    """Return what a run is by its recipe, its model and its data. streams: whether the model's blocks stay on the disk."""
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
    return Identity(known, rounding)
