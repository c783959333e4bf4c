"""N:M with any M: groups longer than a block of columns or not dividing it, against plain formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import coprune
from coprune.model.walk.statistics import Gram
from coprune.pruning.methods import METHODS, method_named
from coprune.recipe.pattern import NM, Target
from support.pico import pico_model
from support.pico_folder import pico_tokenizer, write_words
from support.problems import correlated_layer
from support.published import published_column_update, published_magnitude, published_wanda

WIDTHS = {NM(3, 5): 260, NM(10, 96): 192, NM(128, 256): 512}
"""Widths above one block of SparseGPT's 128 columns."""
Problem = tuple[NM, Tensor, Gram]


@pytest.fixture(scope="module", params=WIDTHS, ids=str)
def problem(request: pytest.FixtureRequest) -> Problem:
    pattern: NM = request.param
    weight, _, statistic = correlated_layer(rows=5, width=WIDTHS[pattern], tokens=1024)
    return pattern, weight, statistic


def dropped_by(name: str, problem: Problem) -> Tensor:
    """Return the dense weights that a score alone would prune."""
    pattern, weight, statistic = problem
    counts = pattern.m - pattern.n, pattern.m
    if name == "magnitude":
        return published_magnitude(weight, pattern.sparsity, *counts)
    return published_wanda(weight, statistic.mean_square, pattern.sparsity, *counts)


@pytest.mark.parametrize("name", ["magnitude", "wanda"])
def test_methods_by_score_drop_the_lowest_of_each_group(name: str, problem: Problem) -> None:
    pattern, weight, statistic = problem
    pruned = METHODS[name].prune(weight, statistic, Target(pattern, pattern.sparsity))
    assert torch.equal(~pruned.keep, dropped_by(name, problem))


@pytest.mark.parametrize("inner_loop", ["auto", "torch"])
@pytest.mark.parametrize("block_size", [128, 7])
def test_sparsegpt_matches_the_published_loop_in_any_group(problem: Problem, block_size: int, inner_loop: str) -> None:
    pattern, weight, statistic = problem
    method = method_named("sparsegpt", {"block_size": block_size, "inner_loop": inner_loop})
    pruned = method.prune(weight, statistic, Target(pattern, pattern.sparsity))
    expected, dropped = published_column_update(
        weight,
        statistic.gram,
        lambda w, d, _: w**2 / d.reshape(1, -1) ** 2,
        pattern.sparsity,
        pattern.m - pattern.n,
        pattern.m,
        block=weight.shape[1],
    )
    assert torch.equal(~pruned.keep, dropped)
    torch.testing.assert_close(pruned.weight, expected.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("selection", ["seq", "iter"])
@pytest.mark.parametrize("score", ["mag", "wanda"])
def test_ablations_match_the_published_column_update_in_any_group(problem: Problem, score: str, selection: str) -> None:
    pattern, weight, statistic = problem
    norm = statistic.mean_square.sqrt() if score == "wanda" else torch.ones(weight.shape[1])
    pruned = METHODS[f"ablate_{score}_{selection}"].prune(weight, statistic, Target(pattern, pattern.sparsity))
    expected, dropped = published_column_update(
        weight,
        statistic.gram,
        lambda w, _, columns: w.abs() * norm[columns],
        pattern.sparsity,
        pattern.m - pattern.n,
        pattern.m,
        fixed=dropped_by("magnitude" if score == "mag" else "wanda", problem) if selection == "seq" else None,
        block=weight.shape[1],
    )
    assert torch.equal(~pruned.keep, dropped)
    torch.testing.assert_close(pruned.weight, expected.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["ria", "dsnot", "admm", "alps", "wanda_variant"])
def test_other_methods_keep_n_of_every_m(name: str, problem: Problem) -> None:
    pattern, weight, statistic = problem
    keep = METHODS[name].prune(weight, statistic, Target(pattern, pattern.sparsity)).keep
    assert bool((keep.unflatten(1, (-1, pattern.m)).sum(dim=2) == pattern.n).all())


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_run_prunes_to_any_group(method: str, tmp_path: Path) -> None:
    write_words(tmp_path / "words.txt", count=400)
    model = pico_model("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    settings: dict[str, Any] = {
        "nsamples": 2,
        "seqlen": 32,
        "dataset": str(tmp_path / "words.txt"),
        "evaluate": False,
        "quiet": True,
    }
    result = coprune.prune(model, method, processor=pico_tokenizer(), pattern="128:256", **settings)
    assert {matrix.sparsity for matrix in result.report.matrices} == {0.5}
    for name, parameter in result.model.named_parameters():
        if "_proj" in name:
            assert bool(((parameter != 0).unflatten(1, (-1, 256)).sum(dim=2) == 128).all()), name
