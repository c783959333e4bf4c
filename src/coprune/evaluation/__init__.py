"""Measurements on text: perplexity, and closeness to the dense model."""

from coprune.evaluation.closeness import Closeness, closeness, compare_logits
from coprune.evaluation.perplexity import Perplexity, aggregate, perplexity, window_nll

__all__ = ["Closeness", "Perplexity", "aggregate", "closeness", "compare_logits", "perplexity", "window_nll"]
