"""The next budgets of a search: near the best, of the same total, and none twice."""

from __future__ import annotations

import pytest

from coprune.removal.candidates import Exchanges, Steps, next_tries

TWO_KINDS = Exchanges([[0, 1, 2], [3, 4]], [3, 3, 3, 2, 2])


def all_alike(parts: int, most: int) -> Exchanges:
    return Exchanges([range(parts)], [most] * parts)


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
