"""What to do where memory runs out."""

from __future__ import annotations

from coprune.base.words import Set, Together, Words
from coprune.recipe.recipe import Recipe


def less_memory(recipe: Recipe) -> Words:
    """What would make a run of this recipe take less memory."""
    calibration = recipe.calibration
    changes = [Set("batch_size", 1)] if calibration.batch_size != 1 else []
    changes += [Set("activation_memory", 0)] if calibration.activation_memory != 0 else []
    changes += [Set("stream", True)] if recipe.model.stream is False else []
    changes += [Set("nsamples", max(1, calibration.samples // 4))]
    return ("it takes less with ", Together(tuple(changes)))
