"""Allocations meet the overall sparsity exactly, at the least cost, within the limits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coprune.base.errors import BadInput
from coprune.pruning.allocation.allocation import Curve, Unit, spend, wish, within_budget
from coprune.recipe.pattern import NM, Target, Unstructured


def unit(number: int, rows: int, width: int) -> Unit:
    return Unit(f"m{number}", f"b{number}", rows, width, (f"m{number}",))


def overall(units: Sequence[Unit], targets: Sequence[Target]) -> float:
    return sum(u.weights * t.sparsity for u, t in zip(units, targets, strict=True)) / sum(u.weights for u in units)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Unit], list[float]]:
    shapes = draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=8))
    units = [unit(i, rows, 8 * eights) for i, (rows, eights) in enumerate(shapes)]
    wishes = draw(st.lists(st.floats(-0.2, 1.2), min_size=len(units), max_size=len(units)))
    return units, wishes


@settings(max_examples=60, deadline=None)
@given(problem=problems(), sparsity=st.floats(0.05, 0.87))
def test_the_overall_sparsity_is_as_requested_within_one_step(
    problem: tuple[list[Unit], list[float]], sparsity: float
) -> None:
    units, wishes = problem
    curves = [wish(w, u) for w, u in zip(wishes, units, strict=True)]
    targets = within_budget(units, curves, Target(Unstructured(), sparsity))
    total = sum(u.weights for u in units)
    step = max(u.rows for u in units) / total  # small matrices at their limits cannot compensate for less
    assert abs(overall(units, targets) - sparsity) <= step + 1e-9
    for u, t in zip(units, targets, strict=True):
        assert 0 <= t.sparsity < 1
        assert t.sparsity * u.width == pytest.approx(round(t.sparsity * u.width), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(problem=problems(), n=st.integers(1, 7))
def test_n_of_m_meets_the_budget_as_far_as_whole_n_allow(problem: tuple[list[Unit], list[float]], n: int) -> None:
    units, wishes = problem
    target = Target(NM(n, 8), 1 - n / 8)
    curves = [wish(w, u) for w, u in zip(wishes, units, strict=True)]
    targets = within_budget(units, curves, target)
    total = sum(u.weights for u in units)
    # The same n of 8 everywhere would be exact; exchanges of up to two steps may end within a step of the largest matrix.
    assert abs(overall(units, targets) - target.sparsity) * total <= max(u.weights for u in units) / 8 + 1e-6
    patterns = [t.pattern for t in targets if isinstance(t.pattern, NM)]
    assert len(patterns) == len(targets)
    assert all(pattern.m == 8 and 0 < pattern.n < 8 for pattern in patterns)
    assert [t.sparsity for t in targets] == [pattern.sparsity for pattern in patterns]


@settings(max_examples=30, deadline=None)
@given(slopes=st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=3), min_size=1, max_size=4), data=st.data())
def test_equal_steps_are_spent_at_the_least_cost(slopes: list[list[float]], data: st.DataObject) -> None:
    costs = [np.concatenate([[0.0], np.cumsum(sorted(own))]) for own in slopes]
    budget = data.draw(st.integers(0, sum(len(c) - 1 for c in costs)))
    taken = spend(costs, [5] * len(costs), 5 * budget)
    assert sum(taken) == budget
    best = min(
        sum(float(c[k]) for c, k in zip(costs, choice, strict=True))
        for choice in itertools.product(*(range(len(c)) for c in costs))
        if sum(choice) == budget
    )
    assert sum(float(c[k]) for c, k in zip(costs, taken, strict=True)) == pytest.approx(best, abs=1e-9)


def test_exchanges_reach_a_budget_that_steps_in_order_miss() -> None:
    # Taking steps by cost gives 3 + 3 and leaves 1 of 7; 3 + 4 is exact.
    costs = [np.array([0.0, 0.1, 0.2]), np.array([0.0, 1.0])]
    assert spend(costs, [3, 4], 7) == [1, 1]


def test_limits_hold_within_one_step_and_impossible_ones_are_refused() -> None:
    units = [unit(0, 4, 100), unit(1, 4, 100)]
    curves = [Curve(lambda s: s, 0.4, 0.6), Curve(lambda s: 2 * s, 0.4, 0.6)]
    targets = within_budget(units, curves, Target(Unstructured(), 0.45))
    assert [t.sparsity for t in targets] == [0.5, 0.4]
    with pytest.raises(BadInput, match="no room"):
        within_budget(units, curves, Target(Unstructured(), 0.7))


def test_a_row_always_keeps_a_weight() -> None:
    units = [unit(0, 4, 8)]
    with pytest.raises(BadInput, match="no room"):
        within_budget(units, [wish(0.99, units[0])], Target(Unstructured(), 0.99))
