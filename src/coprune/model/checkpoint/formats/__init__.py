"""Formats of quantised checkpoints: codes with scales, as people download them."""

from coprune.model.checkpoint.formats.find import find_weights
from coprune.model.checkpoint.formats.weight import Rounding, Weight

__all__ = ["Rounding", "Weight", "find_weights"]
