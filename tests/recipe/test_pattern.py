"""The contract of patterns, for the built-in ones and a new one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coprune.base.errors import BadInput, NumericalError
from coprune.recipe.pattern import NM, PATTERNS, Group, Pattern, Target, Unstructured, find_pattern, parse_pattern
from support.patterns import Blocks

EXAMPLES = [Unstructured(), NM(2, 4), NM(4, 8), NM(1, 4), NM(3, 4), NM(7, 20), Blocks(4)]
sparsities = st.sampled_from([0.0, 0.25, 0.29, 0.5, 0.75, 0.9])


@pytest.fixture(autouse=True)
def _known_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PATTERNS, "1xW", Blocks)  # the line in the table


def scores_for(pattern: Pattern, rows: int, groups: int, seed: int) -> Tensor:
    return torch.rand(rows, groups * (pattern.group_size or 1), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pattern", EXAMPLES, ids=str)
def test_patterns_round_trip_as_text(pattern: Pattern) -> None:
    assert parse_pattern(str(pattern)) == pattern
    assert len({parse_pattern(str(pattern)), pattern}) == 1


@pytest.mark.parametrize("text", ["4:2", "0:4", "4:4", "2-4", "semi", "", "1x", "2:4 "])
def test_impossible_patterns_are_refused(text: str) -> None:
    with pytest.raises(BadInput):
        parse_pattern(text)


def test_an_unknown_pattern_lists_the_known_ones() -> None:
    with pytest.raises(BadInput, match=r"use 'unstructured' or N:M such as 2:4 .* or 1xW such as 1x4"):
        parse_pattern("semi")


@pytest.mark.parametrize("pattern", EXAMPLES, ids=str)
@pytest.mark.parametrize("group", ["row", "matrix"])
@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 5), groups=st.integers(1, 6), seed=st.integers(0, 999), sparsity=sparsities)
def test_a_mask_follows_its_pattern_and_has_its_sparsity(
    pattern: Pattern, group: Group, rows: int, groups: int, seed: int, sparsity: float
) -> None:
    score = scores_for(pattern, rows, groups, seed)
    asked = pattern.ratio(sparsity)
    assert pattern.allowed(asked)
    keep = Target(pattern, asked).keep(score, group)
    assert keep.dtype == torch.bool
    assert keep.shape == score.shape
    assert pattern.holds(keep)
    # The sparsity is at most one step of a row, or of the matrix, below the requested one.
    step = 1 / pattern.steps(score.shape[1])
    assert asked - step < float((~keep).float().mean()) <= asked + 1e-6
    # Kept weights stay kept if they become more important.
    assert torch.equal(Target(pattern, asked).keep(score + keep, group), keep)


@pytest.mark.parametrize("pattern", EXAMPLES, ids=str)
@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 5), groups=st.integers(1, 6), seed=st.integers(0, 999), share=st.floats(0, 1))
def test_early_masks_only_prune_what_the_final_mask_prunes(
    pattern: Pattern, rows: int, groups: int, seed: int, share: float
) -> None:
    score = scores_for(pattern, rows, groups, seed)
    sparsity = pattern.ratio(None)
    final = pattern.choose(score, sparsity, "matrix")
    early = pattern.choose_early(score, sparsity, share * sparsity, "matrix")
    assert bool(early[final].all())
    assert float((~early).float().mean()) <= share * sparsity + 1e-6
    assert torch.equal(pattern.choose_early(score, sparsity, sparsity, "matrix"), final)


@pytest.mark.parametrize("pattern", EXAMPLES, ids=str)
def test_every_step_is_a_possible_sparsity_of_the_pattern(pattern: Pattern) -> None:
    target = Target(pattern, pattern.ratio(None))
    steps = pattern.steps(40)
    for step in range(pattern.first_step, steps):
        near = target.with_sparsity(step / steps)
        assert near.sparsity == pytest.approx(step / steps)
        assert near.pattern.allowed(near.sparsity)
        assert type(near.pattern) is type(pattern)
        assert near.pattern.group_size == pattern.group_size
    choices = pattern.sparsities_near(target.sparsity, 0.25, 5)
    assert choices == sorted(choices)
    assert all(target.with_sparsity(sparsity).sparsity == pytest.approx(sparsity) for sparsity in choices)


@pytest.mark.parametrize("pattern", [p for p in EXAMPLES if p.group_size], ids=str)
def test_a_width_that_the_groups_do_not_divide_is_refused(pattern: Pattern) -> None:
    width = 2 * (pattern.group_size or 0) + 1
    assert not pattern.fits(width)
    with pytest.raises(BadInput, match=f"{pattern}.*{width} inputs"):
        Target(pattern, pattern.ratio(None)).keep(torch.rand(2, width))


@pytest.mark.parametrize("pattern", EXAMPLES, ids=str)
def test_nan_scores_are_refused(pattern: Pattern) -> None:
    score = scores_for(pattern, 2, 2, 0)
    score[0, 1] = float("nan")
    with pytest.raises(NumericalError):
        Target(pattern, pattern.ratio(None)).keep(score)


def test_a_pattern_with_a_fixed_sparsity_allows_no_other() -> None:
    assert NM(2, 4).ratio(None) == 0.5
    assert NM(1, 4).ratio(0.5) == 0.75
    assert not NM(2, 4).allowed(0.6)
    assert Unstructured().ratio(None) == 0.5
    assert Unstructured().ratio(0.7) == 0.7
    assert not Unstructured().allowed(1.0)
    assert not Unstructured().allowed(float("nan"))


def test_targets_have_readable_names() -> None:
    assert str(Target(Unstructured(), 0.5)) == "50.00 %"
    assert str(Target(NM(3, 8), 0.625)) == "62.50 % (3:8)"
    assert [pattern.label("0.7") for pattern in (Unstructured(), NM(2, 4), Blocks(4))] == ["0.7", "2:4", "1x4 0.7"]


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(["1:4", "2:4", "4:8", "3:4", "8:16"]), st.integers(0, 1000))
def test_pattern_of_a_pruned_matrix_is_recognised(pattern: str, seed: int) -> None:
    score = torch.rand(32, 64, generator=torch.Generator().manual_seed(seed))
    keep = Target(parse_pattern(pattern), 0.0).keep(score)
    assert str(find_pattern(keep)) == pattern


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([0.3, 0.5, 0.6, 0.7]), st.sampled_from(["row", "matrix"]), st.integers(0, 1000))
def test_unstructured_is_not_mistaken_for_a_pattern(sparsity: float, group: Group, seed: int) -> None:
    score = torch.rand(32, 64, generator=torch.Generator().manual_seed(seed))
    assert find_pattern(Target(Unstructured(), sparsity).keep(score, group)) == Unstructured()
