"""How a run's checkpoint is stored, as the recipe asks for it and the source allows."""

from __future__ import annotations

from coprune.model.checkpoint.encoding import DENSE, Encoding, Untouched
from coprune.model.checkpoint.weights import Weights
from coprune.packed.encoding import PackedEncoding
from coprune.recipe.recipe import Recipe


def encoding_for(recipe: Recipe, weights: Weights) -> Encoding:
    """Return how a run's checkpoint is to be stored."""
    if recipe.output.as_gguf:
        return Untouched()
    if recipe.output.encoding == "packed":
        return PackedEncoding()
    return DENSE if weights.stored_as is None or recipe.output.encoding == "dense" else weights.stored_as
