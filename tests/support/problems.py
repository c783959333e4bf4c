"""Random layers with correlated inputs of very different scales, as in language models."""

from __future__ import annotations

import torch
from torch import Tensor

from coprune.model.walk.statistics import Gram
from coprune.recipe.pattern import Target, parse_pattern

TARGETS = [
    Target(parse_pattern("unstructured"), 0.5),
    Target(parse_pattern("2:4"), 0.5),
    Target(parse_pattern("4:8"), 0.5),
]


def correlated_layer(rows: int = 24, width: int = 64, tokens: int = 512, seed: int = 0) -> tuple[Tensor, Tensor, Gram]:
    """Return a weight (rows × width), its inputs (tokens × width) and their Gram statistic."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator) * torch.linspace(0, -3, width).exp()
    x = hidden @ torch.randn(width, width, generator=generator) / width**0.5
    x += 0.1 * torch.randn(tokens, width, generator=generator)
    x *= torch.exp(0.7 * torch.randn(width, generator=generator))
    statistic = Gram(width)
    statistic.update(x)
    return torch.randn(rows, width, generator=generator), x, statistic
