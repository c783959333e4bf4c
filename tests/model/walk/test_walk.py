"""The walk against full forwards of the whole model, for every family and both kinds of propagation."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coprune.model.blocks import find_blocks
from coprune.model.walk.block_events import BlockDone, MatricesReady
from coprune.model.walk.recording import Dense, Sequential
from coprune.model.walk.statistics import Gram, InputNorm
from coprune.pruning.methods import METHODS
from coprune.pruning.pruner import Solver, prune_walk
from coprune.recipe.pattern import NM, Target, parse_pattern
from support.pico import FAMILIES, pico_model, pico_tokens
from support.sample import TEN, of_ten, sampled
from support.walking import (
    Propagation,
    Solve,
    inputs_by_full_forwards,
    layers_of,
    make_walk,
    masks,
    prune_with_full_forwards,
    prune_with_walk,
    share_of_different_entries,
    wanda_as_published,
)

TWO_OF_FOUR = Target(NM(2, 4), 0.5)
HALF = Target(parse_pattern("unstructured"), 0.5)
BATCHES = pico_tokens(6, 32).split(2)
PROPAGATIONS: list[Propagation] = ["block", "sequential"]


def sparsegpt_on(target: Target) -> Solve:
    def solve(weight: Tensor, x: Tensor) -> Tensor:
        gram = Gram(x.shape[1])
        for batch in x.split(BATCHES[0].numel()):  # sum in the same order, for equal rounding
            gram.update(batch)
        return METHODS["sparsegpt"].prune(weight.clone(), gram, target).weight

    return solve


@pytest.mark.parametrize(
    ("family", "propagation"),
    sampled(
        itertools.product(FAMILIES, PROPAGATIONS),
        quick=[
            (family, PROPAGATIONS[number % 2]) for number, family in enumerate(name for name in FAMILIES if name in TEN)
        ],
    ),
)
def test_masks_of_classifiers_match_full_forwards(family: str, propagation: Propagation) -> None:
    model, oracle = pico_model(family), pico_model(family)
    results = prune_with_walk(model, BATCHES, Solver(METHODS["wanda"]), TWO_OF_FOUR, propagation)
    prune_with_full_forwards(oracle, BATCHES, wanda_as_published(TWO_OF_FOUR), propagation)
    found, expected = masks(model), masks(oracle)
    assert {result.name for result in results} == set(expected)
    assert share_of_different_entries(found, expected) < 1e-4
    for name, mask in found.items():
        assert bool((mask.unflatten(1, (-1, 4)).sum(dim=2) == 2).all()), name
    assert all(result.sparsity == 0.5 and result.tokens == 6 * 32 for result in results)
    assert all(0 < (result.relative_layer_error or 0) < 1 for result in results)
    # Everything but the blocks' matrices is unchanged.
    dense = pico_model(family).state_dict()
    changed = {f"{name}.weight" for name in expected}
    assert all(torch.equal(tensor, dense[name]) for name, tensor in model.state_dict().items() if name not in changed)


@pytest.mark.parametrize("propagation", PROPAGATIONS)
@pytest.mark.parametrize("family", of_ten(["llama", "gpt2", "gemma2", "falcon"]))
def test_weights_of_sparsegpt_are_those_of_full_forwards(family: str, propagation: Propagation) -> None:
    # Updated weights affect the next matrix's inputs, so this compares more than masks.
    model, oracle = (pico_model(family) for _ in range(2))
    prune_with_walk(model, BATCHES, Solver(METHODS["sparsegpt"]), HALF, propagation)
    prune_with_full_forwards(oracle, BATCHES, sparsegpt_on(HALF), propagation)
    assert share_of_different_entries(masks(model), masks(oracle)) < 2e-3
    with torch.no_grad():
        found, expected = model(BATCHES[0]).logits, oracle(BATCHES[0]).logits
    assert float((found - expected).norm() / expected.norm()) < 1e-2


def test_the_two_kinds_of_propagation_differ() -> None:
    found = []
    for propagation in PROPAGATIONS:
        model = pico_model("llama")
        prune_with_walk(model, BATCHES, Solver(METHODS["wanda"]), TWO_OF_FOUR, propagation)
        found.append(masks(model))
    block, sequential = found
    first = "model.layers.0.self_attn"
    assert torch.equal(block[f"{first}.q_proj"], sequential[f"{first}.q_proj"])
    assert not torch.equal(block[f"{first}.o_proj"], sequential[f"{first}.o_proj"])


def test_sliding_windows_are_applied() -> None:
    # A walk with the same attention mask for every block would not distinguish these two.
    found = []
    for window in (8, 64):
        model = pico_model("mistral", sliding_window=window)
        prune_with_walk(model, BATCHES, Solver(METHODS["wanda"]), TWO_OF_FOUR)
        found.append(masks(model))
    assert share_of_different_entries(*found) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_a_walk_that_only_observes_leaves_the_model_unchanged(family: str) -> None:
    model = pico_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    walk = make_walk(model, BATCHES, InputNorm, Dense())
    seen: dict[str, Tensor] = {}
    done = []
    for event in walk:
        if isinstance(event, BlockDone):
            done.append(event.block.index)
            continue
        assert isinstance(event, MatricesReady)
        assert event.inputs is not None
        assert event.inputs.statistic is not None
        seen |= {matrix.name: event.inputs.statistic.mean_square for matrix in event.matrices}
    assert done == list(range(len(walk.model.blocks)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    layers = [layer for block in walk.model.blocks for layer in layers_of(block)]
    expected = inputs_by_full_forwards(model, layers, BATCHES)
    assert seen.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(seen[name], x.square().mean(dim=0), rtol=1e-4, atol=1e-6)


def test_without_data_every_matrix_is_shown_once() -> None:
    model = pico_model("llama")
    walk = make_walk(model, BATCHES)
    walk.recording = None
    names = [m.name for event in walk if isinstance(event, MatricesReady) for m in event.matrices]
    assert names == [layer.name for block in walk.model.blocks for layer in layers_of(block)]


@settings(deadline=None, max_examples=6)
@given(size=st.integers(1, 6), propagation=st.sampled_from(PROPAGATIONS), family=st.sampled_from(["llama", "gpt2"]))
def test_the_batch_size_does_not_matter(size: int, propagation: Propagation, family: str) -> None:
    found = []
    for batches in (BATCHES, torch.cat(BATCHES).split(size)):
        model = pico_model(family, num_hidden_layers=2) if family == "llama" else pico_model(family, n_layer=2)
        prune_with_walk(model, batches, Solver(METHODS["wanda"]), TWO_OF_FOUR, propagation)
        found.append(masks(model))
    assert share_of_different_entries(*found) < 1e-3


def test_the_head_is_pruned_by_the_pruned_models_last_hidden_states() -> None:
    model = pico_model("llama", num_hidden_layers=2, tie_word_embeddings=False)
    include = ["*.layers.*", "lm_head"]
    results = prune_with_walk(model, BATCHES, Solver(METHODS["wanda"]), TWO_OF_FOUR, include=include)
    assert results[-1].name == "lm_head"
    oracle = pico_model("llama", num_hidden_layers=2, tie_word_embeddings=False)
    prune_with_full_forwards(oracle, BATCHES, wanda_as_published(TWO_OF_FOUR), "block")
    with torch.no_grad():
        hidden = torch.cat([oracle.model(tokens).last_hidden_state for tokens in BATCHES]).flatten(0, 1)
    expected = wanda_as_published(TWO_OF_FOUR)(oracle.lm_head.weight.detach(), hidden)
    assert float(((model.lm_head.weight != 0) != (expected != 0)).float().mean()) < 1e-3


def test_walking_in_bfloat16_gives_the_masks_of_full_forwards() -> None:
    model = pico_model("llama", dtype=torch.bfloat16)
    prune_with_walk(model, BATCHES, Solver(METHODS["wanda"]), TWO_OF_FOUR, "sequential")
    oracle = pico_model("llama", dtype=torch.bfloat16)
    prune_with_full_forwards(oracle, BATCHES, wanda_as_published(TWO_OF_FOUR), "sequential")
    assert share_of_different_entries(masks(model), masks(oracle)) < 1e-4


@pytest.mark.parametrize("keep_inputs", [False, True])
def test_nothing_is_computed_whose_output_is_unused(keep_inputs: bool) -> None:
    """A rerun of a block stops at its last matrix, since its outputs are already known."""
    model, plain = pico_model("llama"), pico_model("llama")
    computed = 0

    def count(*_: object) -> None:
        nonlocal computed
        computed += 1

    walk = make_walk(model, BATCHES, moves=Sequential(keep_inputs=keep_inputs))
    find_blocks(model)[0].module.get_submodule("mlp.down_proj").register_forward_hook(count)
    results = prune_walk(walk, Solver(METHODS["wanda"]), lambda matrix: HALF)
    assert computed == len(BATCHES)
    expected = prune_with_walk(plain, BATCHES, Solver(METHODS["wanda"]), HALF, "sequential")
    assert [result.mask_checksum for result in results] == [result.mask_checksum for result in expected]


@pytest.mark.parametrize("left_early", [False, True])
def test_a_walk_in_step_leaves_the_gradient_mode_as_it_was(left_early: bool) -> None:
    """The gradient mode belongs to the thread; training afterwards must find it enabled."""
    walk = iter(make_walk(pico_model("llama"), BATCHES, moves=Sequential()))
    for _ in walk:
        assert torch.is_grad_enabled()
        if left_early:
            walk.close()  # type: ignore[attr-defined]
            break
    assert torch.is_grad_enabled()
