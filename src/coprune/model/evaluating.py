"""A model that evaluates for a while: no dropout, and afterwards every part of it trains or not as it did."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Let a model evaluate while the body runs. Its parts may differ: somebody may train some and hold others still."""
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
