"""Masks from a checkpoint's zeros: found, recognised as N:M, and verified."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coprune.base.errors import BadInput
from coprune.recipe.pattern import NM, Target, Unstructured, parse_pattern
from coprune.training.masks import BrokenMask, find_masks, find_pattern, plain_parameters, select_parameters
from support.pico import pico_model
from support.pruned import pruned_model, zeros_of


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(["1:4", "2:4", "4:8", "3:4", "8:16"]), st.integers(0, 1000))
def test_pattern_of_a_pruned_matrix_is_recognised(pattern, seed):
    score = torch.rand(32, 64, generator=torch.Generator().manual_seed(seed))
    keep = Target(parse_pattern(pattern), 0.0).keep(score)
    assert str(find_pattern(keep)) == pattern


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([0.3, 0.5, 0.6, 0.7]), st.sampled_from(["row", "matrix"]), st.integers(0, 1000))
def test_unstructured_is_not_mistaken_for_a_pattern(sparsity, group, seed):
    score = torch.rand(32, 64, generator=torch.Generator().manual_seed(seed))
    assert find_pattern(Target(Unstructured(), sparsity).keep(score, group)) == Unstructured()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_masks_are_exactly_the_zeros_of_the_pruned_matrices(family):
    model = pruned_model(family)
    masks = find_masks(model)
    zeros = zeros_of(model)
    for name, pruned in masks.pruned.items():
        assert torch.equal(pruned, zeros[name])
    # Nothing that holds many zeros was overlooked, and nothing else was taken.
    assert set(masks.pruned) == {name for name, zero in zeros.items() if zero.float().mean() > 0.05}
    assert masks.patterns["2:4"] == len(masks.matrices) // 2
    assert {entry.pattern for entry in masks.matrices} == {NM(2, 4), Unstructured()}


def test_a_dense_model_has_no_mask():
    with pytest.raises(BadInput, match=r"dense.*Prune it first"):
        find_masks(pico_model("llama"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_verification_names_the_matrix_in_which_a_zero_is_lost(family):
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


def test_a_kept_weight_may_become_zero():
    model = pruned_model()
    masks = find_masks(model)
    stored = masks.matrices[1].matrix.stored()
    stored[tuple((stored != 0).nonzero()[0].tolist())] = 0
    masks.verify(plain_parameters(model))


def test_parameters_are_selected_by_pattern():
    model = pruned_model()
    chosen = list(select_parameters(model, ("*.q_proj", "*norm.weight")))
    names = {name for name, parameter in model.named_parameters() if any(parameter is c for c in chosen)}
    assert {"model.layers.0.self_attn.q_proj.weight", "model.norm.weight"} <= names
    assert not any("k_proj" in name for name in names)
    with pytest.raises(BadInput, match="matches no parameter"):
        list(select_parameters(model, ("*.nothing",)))
