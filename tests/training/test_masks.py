"""Finding and verifying masks from a checkpoint's zeros."""

from __future__ import annotations

import pytest
import torch

from coprune.base.errors import BadInput, BrokenMask
from coprune.recipe.pattern import NM, Unstructured
from coprune.training.adapters import choose_targets
from coprune.training.masks import find_masks, plain_parameters, select_parameters
from support.pico import pico_model
from support.pruned import pruned_model, zeros_of


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_masks_are_exactly_the_zeros_of_the_pruned_matrices(family: str) -> None:
    model = pruned_model(family)
    masks = find_masks(model)
    zeros = zeros_of(model)
    for name, pruned in masks.pruned.items():
        assert torch.equal(pruned, zeros[name])
    # Exactly the tensors with many zeros were found.
    assert set(masks.pruned) == {name for name, zero in zeros.items() if zero.float().mean() > 0.05}
    assert masks.patterns["2:4"] == len(masks.matrices) // 2
    assert {entry.pattern for entry in masks.matrices} == {NM(2, 4), Unstructured()}


def test_a_dense_model_has_no_mask() -> None:
    with pytest.raises(BadInput, match=r"dense.*prune it first"):
        find_masks(pico_model("llama"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_verification_names_the_matrix_in_which_a_zero_is_lost(family: str) -> None:
    model = pruned_model(family)
    masks = find_masks(model)
    masks.verify(plain_parameters(model))
    for entry in (masks.matrices[0], masks.matrices[-1]):
        stored = entry.matrix.stored()
        row, column = (stored == 0).nonzero()[7].tolist()
        stored[row, column] = 1e-30
        with pytest.raises(BrokenMask) as caught:
            masks.verify(plain_parameters(model))
        assert entry.matrix.name in str(caught.value)
        stored[row, column] = 0


def test_a_kept_weight_may_become_zero() -> None:
    model = pruned_model()
    masks = find_masks(model)
    stored = masks.matrices[1].matrix.stored()
    stored[tuple((stored != 0).nonzero()[0].tolist())] = 0
    masks.verify(plain_parameters(model))


def test_parameters_are_selected_by_pattern() -> None:
    model = pruned_model()
    chosen = list(select_parameters(model, ("*.q_proj", "*norm.weight")))
    names = {name for name, parameter in model.named_parameters() if any(parameter is c for c in chosen)}
    assert {"model.layers.0.self_attn.q_proj.weight", "model.norm.weight"} <= names
    assert not any("k_proj" in name for name in names)
    with pytest.raises(BadInput, match="matches no parameter"):
        list(select_parameters(model, ("*.nothing",)))


def test_zeros_of_an_output_matrix_that_is_the_embedding_are_kept_under_its_name() -> None:
    model = pruned_model(tie_word_embeddings=True)
    with torch.no_grad():
        model.get_output_embeddings().weight[:100] = 0
    masks = find_masks(model)
    (tied,) = [entry for entry in masks.matrices if entry.tied]
    assert (tied.matrix.name, tied.parameter) == ("lm_head", "model.embed_tokens.weight")
    masks.verify(plain_parameters(model))
    # An adapter on it would also train the embedding.
    assert "lm_head" not in choose_targets(masks, (), rank=2)
