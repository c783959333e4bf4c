"""A toy model to break on purpose: embeddings, blocks, a head."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class ToyBlock(nn.Module):
    """A block hidden + linear(hidden), with a scale passed by the model."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def forward(self, hidden: Tensor, scale: Tensor | None = None) -> Tensor:
        out: Tensor = hidden + self.second(torch.relu(self.first(hidden)))
        return out if scale is None else out * scale


class ToyModel(nn.Module):
    """A model that calls its blocks in order; subclasses change how."""

    def __init__(self, blocks: int = 3, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embeddings = nn.Embedding(32, width)
        self.layers = nn.ModuleList(ToyBlock(width) for _ in range(blocks))
        self.head = nn.Linear(width, 32, bias=False)
        self.eval().requires_grad_(False)

    def between(self, index: int, hidden: Tensor) -> Tensor:
        return hidden

    def run_blocks(self, hidden: Tensor) -> Tensor:
        for index, block in enumerate(self.layers):
            hidden = block(self.between(index, hidden), scale=torch.ones(()))
        return hidden

    def forward(self, input_ids: Tensor, use_cache: bool = False, **more: Any) -> Any:
        return SimpleNamespace(logits=self.head(self.run_blocks(self.embeddings(input_ids))))
