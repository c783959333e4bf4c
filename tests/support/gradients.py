"""A model's gradients by autograd, for the labels sampled by the allocation fisher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coprune.pruning.allocation.fisher import sampled_gradients


def gradients_of_each(model: PreTrainedModel, samples: Iterable[Tensor]) -> Iterator[None]:
    """Run samples (1 × S each) forward and backward; during each iteration parameters have one sample's gradients."""
    for seed, tokens in enumerate(samples):
        model.requires_grad_(True)
        logits = model(input_ids=tokens).logits[0]
        label = (logits.softmax(dim=-1) - sampled_gradients(logits, seed)).argmax(dim=-1)
        torch.nn.functional.cross_entropy(logits, label, reduction="sum").backward()
        model.requires_grad_(False)
        yield
        model.zero_grad()
