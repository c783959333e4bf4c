"""Which tokens stay: what has to, then the weightiest, each with what it is made by."""

from __future__ import annotations

import numpy as np

from coprune.vocabulary.choose import choose

MADE_BY = {300: (200, 201), 450: (440,)}


def test_what_has_to_stay_and_what_is_weighty_stay_with_what_they_are_made_by() -> None:
    weights = np.zeros(512)
    weights[[450, 499, 498]] = 3, 2, 1
    kept = choose(64, weights, [300], lambda token: None if token == 498 else MADE_BY.get(token, ()))
    named = {300, 200, 201, 450, 440, 499}
    assert kept.old == (*range(64 - len(named)), *sorted(named))  # no text is cut into 498; small ids fill up
    assert [kept.new[token] for token in kept.old] == list(range(64))
    assert kept.below(201) == 64 - len(named) + 1
