"""What a call from Python hands over beside the recipe, because no file could hold it."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from coprune.model.opened import Loaded
from coprune.pruning.methods import Method


@dataclass(frozen=True)
class Given:
    """Objects that a run takes instead of what its recipe names."""

    loaded: Loaded | None = None
    """A model that is open already."""
    method: Method | None = None
    """The method that the recipe tells of but cannot name."""
    line: str | None = None
    """What to say first, where the call left something open."""

    @property
    def model(self) -> PreTrainedModel | None:
        """The model that is open already."""
        return None if self.loaded is None else self.loaded.model


NOTHING = Given()
