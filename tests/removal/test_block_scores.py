"""Scores of blocks against whole forwards of the model without them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch import Tensor

from coprune.base.errors import BadInput
from coprune.model.checkpoint.weights import InMemory
from coprune.model.walk.block_calls import forward_logits
from coprune.model.walk.model_structure import FoundModel, ProvenModel
from coprune.model.walk.prove import prove_replay
from coprune.recipe.choice import Choice
from coprune.removal.block_scores import Divergence, block_score_named, divergences, influences, may_go
from support.pico import pico_model, pico_tokens
from support.pico_pairs import pico_pair_model, pico_pairs

BATCHES = [pico_tokens(2, 24), pico_tokens(2, 24, seed=1)]


def proven(family: str = "llama") -> ProvenModel:
    deeper: dict[str, Any] = {"num_hidden_layers": 5} if family == "llama" else {}
    module = pico_model(family, **deeper)
    return prove_replay(FoundModel.without_matrices(InMemory(module)), pico_tokens(1, 24))


def distance(model: ProvenModel, gone: Collection[int]) -> float:
    """Return KL(dense ‖ without some blocks) by whole forwards, in nats per token."""
    module: Any = model.module
    layers, total = module.model.layers, 0.0
    for batch in BATCHES:
        log_p = module(batch, use_cache=False).logits.log_softmax(dim=-1)
        module.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(layers) if i not in gone)
        log_q = module(batch, use_cache=False).logits.log_softmax(dim=-1)
        module.model.layers = layers
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total / sum(batch.numel() for batch in BATCHES)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_divergence_matches_whole_forwards_without_the_block(family: str) -> None:
    model = proven(family)
    if family == "gemma3_text":  # two kinds of blocks with different calls
        found = divergences(model, BATCHES, [3])
        assert found[3] == pytest.approx(distance(model, [3]), rel=1e-3)
        return
    for gone in ([], [1]):
        found = divergences(model, BATCHES, [0, 2, 4], gone)
        assert found == {index: pytest.approx(distance(model, [*gone, index]), rel=1e-3) for index in (0, 2, 4)}


@torch.no_grad()
@pytest.mark.parametrize("family", ["T5", "Bart"])
def test_scoring_an_encoder_block_includes_its_effect_on_the_decoder(family: str) -> None:
    module: Any = pico_pair_model(family)
    sides = (module.get_encoder(), module.get_decoder())
    lists = [getattr(side, "block", None) or side.layers for side in sides]
    batch = pico_pairs(module, 3)
    model = prove_replay(FoundModel.without_matrices(InMemory(module)), pico_pairs(module, 1))
    assert may_go(model) == ([[1], [3, 4]] if family == "T5" else [[0, 1], [2, 3]])
    found = divergences(model, [batch], [1, 3], [0] if family == "Bart" else [])
    log_p = forward_logits(module, batch).log_softmax(dim=-1)
    if family == "Bart":
        del lists[0][0]
    for index, (own, at) in ((1, (lists[0], -1)), (3, (lists[1], 1))):
        block = own[at]
        del own[at]
        log_q = forward_logits(module, batch).log_softmax(dim=-1)
        own.insert(at if at > 0 else len(own), block)
        assert found[index] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum()) / 27, rel=1e-3)
    gone = Divergence(tokens=30, candidates=1).choose(model, [batch], [1, 1]).blocks if family == "T5" else []
    assert sorted(model.blocks[index].part for index in gone) == ([0, 1] if family == "T5" else [])


@torch.no_grad()
def test_influence_is_one_minus_the_mean_cosine() -> None:
    model = proven()
    module: Any = model.module
    states = [module(batch, output_hidden_states=True, use_cache=False).hidden_states for batch in BATCHES]
    found = influences(model, BATCHES)
    for index in range(4):  # the state after the last block is normalised
        pairs = [(own[index].flatten(0, 1), own[index + 1].flatten(0, 1)) for own in states]
        cosines = torch.cat([(a * b).sum(dim=1) / a.norm(dim=1) / b.norm(dim=1) for a, b in pairs])
        assert found[index] == pytest.approx(1 - float(cosines.mean()), abs=1e-5)


@torch.no_grad()
def test_blocks_are_removed_one_by_one_each_time_the_best() -> None:
    model = proven()
    gone: list[int] = []
    for _ in range(3):
        left = [index for index in range(5) if index not in gone]
        gone.append(min(left, key=lambda index: distance(model, [*gone, index])))
    assert Divergence(tokens=1000, candidates=0).choose(model, BATCHES, [3]).blocks == gone


def test_the_number_of_tokens_and_candidates_is_limited() -> None:
    model, tried = proven(), list[tuple[int, int]]()

    def watched(own: ProvenModel, batches: list[Tensor], candidates: list[int], gone: list[int]) -> dict[int, float]:
        tried.append((len(batches), len(candidates)))
        return divergences(own, batches, candidates, gone)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coprune.removal.block_scores.divergences", watched)
        assert len(set(Divergence(tokens=30, candidates=2).choose(model, BATCHES, [3]).blocks)) == 3
    assert tried == [(1, 5), (1, 2), (1, 2)]


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ("kl:tokens=0", "tokens"),
        ("influence:tokens=3", "has no options"),
        ("kl:luck=1", "option of score 'kl': 'luck'"),
    ],
)
def test_invalid_options_of_block_scores_are_refused(score: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        block_score_named(Choice.of(score))
