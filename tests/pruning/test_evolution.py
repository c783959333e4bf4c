"""The next budgets of a search: near the best, of the same total, and none twice."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coprune.pruning.evolution import Exchanges, Steps, Together, next_tries

ALIKE: list[list[Together]] = [[(0,), (1,), (2,)], [(3,), (4,)]]
TWO_KINDS = Exchanges(ALIKE, [1] * 5, [3, 3, 3, 2, 2])


def all_alike(parts: int, most: int) -> Exchanges:
    return Exchanges([[(at,) for at in range(parts)]], [1] * parts, [most] * parts)


@pytest.mark.parametrize("number", [1, 4])
def test_tries_side_by_side_are_new_ones_with_as_many_steps(number: int) -> None:
    tried: list[tuple[Steps, float]] = [((1, 1, 1, 1, 1), 2.0)]
    for _ in range(5):
        found = next_tries(tried, TWO_KINDS, seed=0, number=number)
        assert found == next_tries(tried, TWO_KINDS, seed=0, number=number)
        assert len({*found}) == len(found) == number
        assert not {*found} & {steps for steps, _ in tried}
        for steps in found:
            assert (sum(steps[:3]), sum(steps[3:])) == (3, 2)
            assert all(0 <= own <= most for own, most in zip(steps, TWO_KINDS.most, strict=True))
        tried += [(steps, 2.0 + steps[0]) for steps in found]


def test_where_all_is_tried_something_is_tried_again() -> None:
    tried: list[tuple[Steps, float]] = [((1, 0), 1.0), ((0, 1), 2.0)]
    assert next_tries(tried, all_alike(2, 1), seed=0, number=3) in ([(1, 0)], [(0, 1)])


def test_what_cost_more_is_guessed_to_cost_more() -> None:
    tried: list[tuple[Steps, float]] = [((1, 1, 1), 1.0), ((2, 0, 1), 9.0), ((2, 1, 0), 9.0), ((0, 1, 2), 0.5)]
    (steps,) = next_tries(tried, all_alike(3, 3), seed=0)
    assert steps[0] < 2


@settings(max_examples=100, deadline=None)
@given(
    masses=st.lists(st.sampled_from([1, 3, 5, 8]), min_size=2, max_size=12),
    together=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_parts_of_any_size_lose_as_much_as_before(masses: list[int], together: int, seed: int) -> None:
    parts = range(len(masses))
    groups: list[list[Together]] = [
        [(at,) for at in parts],
        [tuple(parts[at : at + together]) for at in range(0, len(masses), together)],
    ]
    exchanges, draw = Exchanges(groups, masses, [5] * len(masses), least=1), random.Random(seed)
    steps: Steps = tuple(draw.randint(1, 5) for _ in parts)
    total = sum(own * mass for own, mass in zip(steps, masses, strict=True))
    for _ in range(10):
        steps = exchanges.change(steps, draw)
        assert sum(own * mass for own, mass in zip(steps, masses, strict=True)) == total
        assert all(1 <= own <= 5 for own in steps)


def test_a_large_part_changes_places_with_several_small_ones() -> None:
    exchanges, draw = Exchanges([[(0,), (1,), (2,), (3,)]], [3, 1, 1, 1], [2] * 4), random.Random(0)
    assert {exchanges.change((1, 1, 1, 1), draw) for _ in range(200)} >= {(2, 0, 0, 0), (0, 2, 2, 2)}
