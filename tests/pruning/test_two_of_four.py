"""2:4 zeros fit torch's semi-structured tensors, as far as this can be checked without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)
from transformers import PreTrainedModel

import coprune
from support.page_code import first_code
from support.pico import pico_model
from support.pico_folder import pico_tokenizer


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    made = pico_model("llama", hidden_size=64, intermediate_size=128).bfloat16()
    settings: dict[str, Any] = {
        "dataset": torch.randint(0, 60, (2, 16)),
        "evaluate": False,
        "layer_error": False,
        "quiet": True,
    }
    coprune.prune(made, "magnitude", pattern="2:4", processor=pico_tokenizer(), **settings)
    return made


def test_torch_stores_every_pruned_matrix_in_half_its_values_without_loss(model: PreTrainedModel) -> None:
    """By torch's own conversion, which would silently drop values of any other matrix."""
    matrices = [one.weight for one in model.model.layers.modules() if isinstance(one, torch.nn.Linear)]
    assert len(matrices) == 7 * len(model.model.layers)
    for weight in matrices:
        values, places = sparse_semi_structured_from_dense_cutlass(weight.detach())
        assert values.numel() == weight.numel() // 2
        assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, places), weight)
    dense = torch.randn(64, 64).bfloat16()
    assert not torch.equal(
        sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(dense)), dense
    )


def test_the_pages_code_only_lacks_a_gpu(model: PreTrainedModel) -> None:
    with pytest.raises(RuntimeError, match="Only CUDA tensors are currently supported"):
        exec(first_code("gpus.md"), {"model": model, "torch": torch})
