"""Channel permutation: never a worse score, and the same model outputs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import coprune
from coprune.base.errors import BadInput
from coprune.model.walk.recording import record_batches
from coprune.pruning import permutation
from coprune.pruning.methods import METHODS
from coprune.pruning.permutation import (
    deal_serpentine,
    permute_channels,
    permute_model,
    retained_score,
    summed_maxima,
)
from coprune.recipe.pattern import NM, Pattern
from support.pico import pico_model, pico_tokens, randomise_vectors
from support.pico_folder import pico_tokenizer, write_words
from support.sample import of_ten
from support.walking import matrices_of, prove

PATTERNS = [NM(2, 4), NM(1, 4), NM(4, 8), NM(1, 2), NM(3, 4)]


def uneven_scores(rows: int, width: int, seed: int) -> Tensor:
    """Return scores with strong channels next to each other."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.linspace(2, -2, width).exp()
    return torch.rand(rows, width, generator=generator) * strength


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), rows=st.integers(1, 20), groups=st.integers(1, 8), pattern=st.sampled_from(PATTERNS))
def test_an_order_is_a_permutation_and_never_retains_less(seed: int, rows: int, groups: int, pattern: NM) -> None:
    score = torch.rand(rows, groups * pattern.m, generator=torch.Generator().manual_seed(seed))
    order = permute_channels(score, *pattern.n_of_m)
    assert sorted(order.tolist()) == list(range(score.shape[1]))
    assert retained_score(score[:, order], *pattern.n_of_m) >= retained_score(score, *pattern.n_of_m)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_strong_channels_are_spread(pattern: NM) -> None:
    score = uneven_scores(32, 8 * pattern.m, seed=1)
    order = permute_channels(score, *pattern.n_of_m)
    assert retained_score(score[:, order], *pattern.n_of_m) > 1.02 * retained_score(score, *pattern.n_of_m)


@pytest.mark.parametrize("seed", range(5))
def test_two_groups_of_four_match_exhaustive_search(seed: int) -> None:
    score = uneven_scores(6, 8, seed)
    best = max(
        retained_score(score[:, [*first, *(c for c in range(8) if c not in first)]], 2, 4)
        for first in itertools.combinations(range(8), 4)
    )
    found = retained_score(score[:, permute_channels(score, 2, 4)], 2, 4)
    assert found >= 0.98 * best
    assert found <= best + 1e-4


def test_restricted_exchanges_gain_nearly_as_much_with_many_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    score = uneven_scores(24, 4 * 300, seed=2)[:, torch.randperm(1200, generator=torch.Generator().manual_seed(2))]
    dealt = retained_score(score[:, deal_serpentine(score.sum(dim=0), 4).reshape(-1)], 2, 4)
    gained = []
    for together in (300, 128):
        monkeypatch.setattr(permutation, "_GROUPS", together)
        order = permute_channels(score, 2, 4)
        assert sorted(order.tolist()) == list(range(1200))
        gained.append(retained_score(score[:, order], 2, 4) / dealt - 1)
    among_all, among_some = gained
    assert 0.85 * among_all < among_some < among_all


def test_channels_are_dealt_in_serpentine_order() -> None:
    totals = torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1])
    assert deal_serpentine(totals, 4).tolist() == [[0, 3, 4, 7], [1, 2, 5, 6]]


@pytest.mark.parametrize(("first", "second", "width"), [(3, 5, 7), (40, 50, 3000), (2, 3, 2_000_000)])
def test_maxima_are_summed_for_every_pair(first: int, second: int, width: int) -> None:
    a, b = torch.rand(first, width), torch.rand(second, width)
    expected = torch.stack([torch.maximum(row, b).sum(dim=1) for row in a])
    torch.testing.assert_close(summed_maxima(a, b), expected)


def test_a_width_that_m_does_not_divide_is_refused() -> None:
    with pytest.raises(BadInput, match="2:4"):
        permute_channels(torch.rand(3, 10), 2, 4)


EXPECTED = {
    # Permutable inputs in a block: those from the MLP's inner layer, and from the values within heads.
    "llama": {"o_proj", "down_proj"},
    "qwen3": {"o_proj", "down_proj"},
    "gemma2": {"o_proj", "down_proj"},
    "opt": {"out_proj", "fc2"},
    "gpt_neox": {"dense", "dense_4h_to_h"},  # queries, keys and values in one matrix, head by head
    "gpt2": {"c_proj"},
    "phi3": {"o_proj", "down_proj"},  # the same, all queries first
    "falcon": {"dense", "dense_4h_to_h"},  # the same, with the queries that share a key together
    "mixtral": {"o_proj", "down_proj"},
    "qwen3_moe": {"o_proj", "down_proj"},
    "gpt_oss": {"o_proj", "down_proj"},
    "deepseek_v3": {"o_proj", "down_proj"},  # values and a part of the keys share a matrix
    "qwen3_5_text": {"o_proj", "down_proj"},  # attention outputs have a gate, which shares a matrix with the queries
}


def permute(model: PreTrainedModel, method: str = "wanda", pattern: Pattern = PATTERNS[0]) -> Any:
    batches = pico_tokens(16, 32).split(8)
    proven = prove(model, batches[0][:1])
    return permute_model(proven, record_batches(proven, batches), METHODS[method], pattern)


@pytest.mark.parametrize("family", of_ten(EXPECTED))
def test_permuting_keeps_the_models_outputs(family: str) -> None:
    model = pico_model(family)
    randomise_vectors(model)
    tokens = pico_tokens(4, 24, seed=9)
    with torch.no_grad():
        before = model(tokens).logits
        weights = {matrix.name: matrix.read() for matrix in matrices_of(model)}
        permuted = permute(model)
        after = model(tokens).logits
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()
    kinds = {name.partition("[")[0].rpartition(".")[2] for name in permuted.names}
    assert kinds == EXPECTED[family]
    assert permuted.after > permuted.before
    changed = {matrix.name for matrix in matrices_of(model) if not torch.equal(matrix.read(), weights[matrix.name])}
    assert changed >= set(permuted.names)


def test_a_run_keeps_more_of_adjacent_strong_channels(tmp_path: Path) -> None:
    """MLP channels sorted by strength, four strong ones per group: 2:4 would prune half of them."""
    words = write_words(tmp_path / "words.txt")
    errors = {}
    for permute_first in (False, True):
        model = pico_model("llama", num_hidden_layers=2)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.up_proj.weight *= torch.linspace(2, -2, 96).exp()[:, None]
        report = coprune.prune(
            model,
            "wanda",
            processor=pico_tokenizer(),
            pattern="2:4",
            permute=permute_first,
            dataset=str(words),
            nsamples=8,
            seqlen=32,
            evaluate=False,
            quiet=True,
        ).report
        errors[permute_first] = {m.name: m.relative_layer_error or 0 for m in report.matrices}
        assert all(m.sparsity == 0.5 for m in report.matrices)
    first = "model.layers.0.mlp.down_proj"
    assert errors[True][first] < 0.8 * errors[False][first]
    assert sum(errors[True].values()) < sum(errors[False].values())


def test_a_failed_proof_restores_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """If logits differed after all, weights are restored and no permutation is reported."""
    model = pico_model("llama")
    before = [parameter.clone() for parameter in model.parameters()]
    monkeypatch.setattr("coprune.pruning.permutation.close", lambda output, dense, blocks: False)
    assert permute(model).names == []
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
