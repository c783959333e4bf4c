"""Refinements: never worse, as good as brute force where that is possible, and keeping the pattern."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coprune.base.errors import BadInput
from coprune.model.walk.statistics import Gram
from coprune.pruning.masked_fit import Rounds, solve_masked
from coprune.pruning.methods import METHODS, Pruned
from coprune.pruning.refine import REFINEMENTS, refinement_named
from coprune.pruning.refine.swaps import Swaps, swap_in_rows
from coprune.recipe.pattern import NM, Target, Unstructured
from support.problems import TARGETS, correlated_layer

patterns = st.sampled_from(
    [Target(Unstructured(), 0.5), Target(Unstructured(), 0.7), *(Target(NM(n, 8), 1 - n / 8) for n in (2, 4, 6)),
     Target(NM(2, 4), 0.5)]
)  # fmt: skip


def errors(weight: Tensor, pruned: Tensor, gram: Tensor) -> Tensor:
    exact = (weight - pruned).double()
    return ((exact @ gram.double()) * exact).sum(dim=1)


@pytest.mark.parametrize("refinement", REFINEMENTS)
@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=8, deadline=None)
@given(target=patterns, seed=st.integers(0, 1000), rows=st.integers(1, 8), groups=st.integers(1, 4))
def test_refinements_are_never_worse_and_keep_the_pattern(
    method: str, refinement: str, target: Target, seed: int, rows: int, groups: int
) -> None:
    weight, _, statistic = correlated_layer(rows, 16 * groups, tokens=64, seed=seed)
    pruned = METHODS[method].prune(weight, statistic, target)
    copies = pruned.weight.clone(), pruned.keep.clone()
    refined = REFINEMENTS[refinement].refine(weight, pruned, statistic, target)
    assert torch.equal(pruned.weight, copies[0])
    assert torch.equal(pruned.keep, copies[1])
    assert torch.equal(refined.weight == 0, ~refined.keep)
    assert torch.equal(refined.keep.sum(dim=1), pruned.keep.sum(dim=1))
    if isinstance(target.pattern, NM):
        assert bool((refined.keep.reshape(-1, target.pattern.m).sum(dim=1) == target.pattern.n).all())
    if refinement == "refit":
        assert torch.equal(refined.keep, pruned.keep)
    before, after = (errors(weight, p.weight, statistic.gram) for p in (pruned, refined))
    assert bool((after <= before).all())


def test_refit_is_least_squares_on_the_kept_inputs() -> None:
    weight, x, statistic = correlated_layer(12, 32, tokens=1024)
    for target in TARGETS:
        pruned = METHODS["wanda"].prune(weight, statistic, target)
        refined = refinement_named("refit:rounds=100,tolerance=0,damping=0").refine(weight, pruned, statistic, target)
        for row, kept in enumerate(pruned.keep):
            best = torch.linalg.lstsq(x[:, kept].double(), (x @ weight[row]).double()[:, None]).solution.squeeze(1)
            torch.testing.assert_close(refined.weight[row, kept].double(), best, rtol=1e-3, atol=1e-3)


def test_refit_stops_when_a_round_gains_little() -> None:
    weight, _, statistic = correlated_layer(12, 64, tokens=1024)
    pruned = METHODS["wanda"].prune(weight, statistic, TARGETS[0])

    def left(asked: str) -> float:
        refined = refinement_named(asked).refine(weight, pruned, statistic, TARGETS[0])
        return float(errors(weight, refined.weight, statistic.gram).sum())

    start = float(errors(weight, pruned.weight, statistic.gram).sum())
    best, one = left("refit:rounds=200,tolerance=0,damping=0"), left("refit:rounds=1,damping=0")
    early = left("refit:rounds=200,tolerance=0.01,damping=0")
    assert best < early < one
    assert start - early > 0.8 * (start - best)


def test_refit_in_bfloat16_is_as_accurate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coprune.base.precision.multiplies_bfloat16", lambda _: True)
    for target, tokens in itertools.product(TARGETS, (12, 1024)):
        weight, _, statistic = correlated_layer(16, 64, tokens=tokens)
        pruned = METHODS["sparsegpt"].prune(weight, statistic, target)
        exact, rounded = (
            errors(weight, refinement_named(asked).refine(weight, pruned, statistic, target).weight, statistic.gram)
            for asked in ("refit", "refit:products=bfloat16")
        )
        before = errors(weight, pruned.weight, statistic.gram)
        assert not torch.equal(exact, rounded)
        assert bool((rounded <= before).all())
        assert float((before - rounded).sum()) > 0.9 * float((before - exact).sum())


def test_products_stay_in_float32_where_bfloat16_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _, statistic = correlated_layer(16, 64)
    pruned = METHODS["wanda"].prune(weight, statistic, TARGETS[0])
    monkeypatch.setattr("coprune.base.precision.multiplies_bfloat16", lambda _: False)
    exact, asked = (
        refinement_named(name).refine(weight, pruned, statistic, TARGETS[0]).weight
        for name in ("refit", "refit:products=bfloat16")
    )
    assert torch.equal(exact, asked)


def test_a_row_that_cannot_improve_stays_unchanged() -> None:
    weight, _, statistic = correlated_layer(4, 16)
    keep = torch.ones(4, 16, dtype=torch.bool)
    for refinement in REFINEMENTS.values():
        refined = refinement.refine(weight, Pruned(weight, keep), statistic, Target(Unstructured(), 0.0))
        assert torch.equal(refined.weight, weight)
    dead = solve_masked(weight, weight * 0, keep, torch.zeros(16, 16), Rounds(5))
    assert not dead.any()


@pytest.mark.parametrize("refinement", REFINEMENTS)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps"])
@pytest.mark.parametrize("tokens", [1, 12])
def test_fewer_tokens_than_inputs_do_not_inflate_weights(refinement: str, method: str, tokens: int) -> None:
    weight, _, statistic = correlated_layer(16, 64, tokens=tokens)
    for target in TARGETS:
        pruned = METHODS[method].prune(weight, statistic, target)
        refined = REFINEMENTS[refinement].refine(weight, pruned, statistic, target)
        before, after = (errors(weight, p.weight, statistic.gram) for p in (pruned, refined))
        assert bool((after <= before).all())
        # Relative to their contribution, since damping is proportional to each input's size.
        largest, largest_after = ((w * statistic.root_mean_square).abs().max() for w in (weight, refined.weight))
        assert float(largest_after) < 2 * float(largest)


@pytest.mark.parametrize("start", ["wanda", "sparsegpt"])
def test_the_first_swap_of_a_row_is_the_best_of_all(start: str) -> None:
    weight, _, statistic = correlated_layer(6, 12)
    gram = statistic.gram.double()
    pruned = METHODS[start].prune(weight, statistic, TARGETS[0])
    swapped, _ = swap_in_rows(weight, pruned, statistic.gram, candidates=12, steps=1)
    for row in range(6):
        now, keep = pruned.weight[row].double(), pruned.keep[row]
        best = errors(weight[row : row + 1], now[None], gram)
        for i, j in itertools.product((~keep).nonzero().flatten(), keep.nonzero().flatten()):
            trial = now.clone()
            trial[i], trial[j] = weight[row, i], 0.0
            best = torch.minimum(best, errors(weight[row : row + 1], trial[None], gram))
        got = errors(weight[row : row + 1], swapped[row : row + 1], gram)
        torch.testing.assert_close(got, best, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_swaps_end_when_none_gains(target: Target) -> None:
    weight, _, statistic = correlated_layer(4, 16)
    gram = statistic.gram.double()
    pruned = METHODS["wanda"].prune(weight, statistic, target)
    swapped = Swaps(candidates=16, refit_rounds=0, damping=0).refine(weight, pruned, statistic, target)
    assert torch.equal(swapped.weight, weight * swapped.keep)
    assert not torch.equal(swapped.keep, pruned.keep)
    group = target.pattern.m if isinstance(target.pattern, NM) else 16
    for row in range(4):
        now, keep = swapped.weight[row].double(), swapped.keep[row]
        reached = float(errors(weight[row : row + 1], now[None], gram))
        for i, j in itertools.product((~keep).nonzero().flatten(), keep.nonzero().flatten()):
            if i // group == j // group:
                trial = now.clone()
                trial[i], trial[j] = weight[row, i], 0.0
                assert float(errors(weight[row : row + 1], trial[None], gram)) > reached * (1 - 1e-3)


def test_few_candidates_find_almost_what_all_find() -> None:
    weight, _, statistic = correlated_layer(32, 96)
    pruned = METHODS["wanda"].prune(weight, statistic, TARGETS[0])
    few, every = (
        statistic.relative_error(weight, swap_in_rows(weight, pruned, statistic.gram, count, 200)[0])
        for count in (8, 96)
    )
    start = statistic.relative_error(weight, pruned.weight)
    assert every < 0.8 * start
    assert few < 1.05 * every


def average_error(run: Callable[[Tensor, Gram, Target], Pruned], target: Target, seeds: int = 3) -> float:
    total = 0.0
    for seed in range(seeds):
        weight, _, statistic = correlated_layer(48, 96, tokens=1024, seed=seed)
        total += statistic.relative_error(weight, run(weight, statistic, target).weight)
    return total / seeds


@pytest.mark.parametrize("target", [*TARGETS, Target(Unstructured(), 0.7)], ids=str)
def test_methods_rank_in_the_expected_order(target: Target) -> None:
    def method(name: str) -> float:
        return average_error(METHODS[name].prune, target)

    def refined(name: str, refinement: str) -> float:
        def run(weight: Tensor, statistic: Gram, target: Target) -> Pruned:
            pruned = METHODS[name].prune(weight, statistic, target)
            return REFINEMENTS[refinement].refine(weight, pruned, statistic, target)

        return average_error(run, target)

    wanda, sparsegpt = method("wanda"), method("sparsegpt")
    assert method("magnitude") >= wanda >= sparsegpt
    assert wanda >= refined("wanda", "refit") >= refined("wanda", "swaps")
    assert sparsegpt >= refined("sparsegpt", "refit")
    assert sparsegpt >= method("admm") >= method("alps")


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_swaps_do_not_beat_exhaustive_search(target: Target) -> None:
    weight, _, statistic = correlated_layer(3, 8, tokens=256)
    group = target.pattern.m if isinstance(target.pattern, NM) else 8
    masks = []
    for chosen in itertools.combinations(range(8), 4):
        mask = torch.zeros(8, dtype=torch.bool)
        mask[list(chosen)] = True
        if bool((mask.reshape(-1, group).sum(dim=1) == group // 2).all()):
            masks.append(mask)
    gram = statistic.gram.double()
    best = torch.full((3,), torch.inf, dtype=torch.float64)
    for mask in masks:
        solved = torch.zeros(3, 8, dtype=torch.float64)
        inner = torch.linalg.inv(gram[mask][:, mask])
        solved[:, mask] = (weight.double() @ gram)[:, mask] @ inner
        best = torch.minimum(best, errors(weight, solved, gram))
    reached: dict[tuple[str, int], float] = {}
    for name, method in METHODS.items():
        if "variant" in name:
            continue
        for row in range(3):  # row by row, since a matrix-wide choice may distribute zeros unevenly
            one = weight[row : row + 1]
            pruned = method.prune(one, statistic, target)
            for refine in (None, *REFINEMENTS.values()):
                result = refine.refine(one, pruned, statistic, target) if refine else pruned
                error = float(errors(one, result.weight, gram))
                assert error >= float(best[row]) * (1 - 1e-4)
                reached[name, row] = min(error, reached.get((name, row), torch.inf))
    assert any(reached["alps", row] == pytest.approx(float(best[row]), rel=1e-3) for row in range(3))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("refits", "did you mean 'refit'"),
        ("refit:rounds=0", "positive"),
        ("refit:rounds", "no value"),
        ("swaps:refit-rounds=-1", "negative"),
        ("swaps:steps=1.5", "integer"),
    ],
)
def test_bad_names_and_options_are_refused(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        refinement_named(text)
