"""The gate of a fit: how often it says that a model keeps what it does not keep."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from scipy import stats

from coprune.base.errors import BadInput
from coprune.evaluation.bounds import LEVEL, bounds_of, items_needed, score_bound
from coprune.fitting.candidates import DENSE, Candidate, Cut
from coprune.fitting.require import Verdict, read_conditions


def passes(items: int, margin: float) -> np.ndarray:
    """By gained and lost items, whether the difference is proven to be above -margin."""
    found = np.zeros((items + 1, items + 1), dtype=bool)
    for gained, lost in itertools.product(range(items + 1), repeat=2):
        if gained + lost <= items and gained - lost > -margin * items:
            found[gained, lost] = score_bound(gained, lost, items) >= -margin
    return found


@pytest.mark.parametrize(("items", "margin"), [(40, 0.1), (90, 0.05), (60, 0.02)])
def test_a_model_at_the_edge_passes_in_one_of_twenty_repetitions_at_most(items: int, margin: float) -> None:
    """Exactly, over all outcomes, whatever the share of items on which two models differ."""
    passed = passes(items, margin)
    gained, lost = np.nonzero(passed)
    for differing in (margin, 1.2 * margin, 0.15, 0.3, 0.6):
        gains = max(0.0, (differing - margin) / 2)
        shares = np.array([gains, gains + margin, 1 - 2 * gains - margin])
        counts = np.stack([gained, lost, items - gained - lost], axis=1)
        wrong = stats.multinomial.pmf(counts, items, shares).sum() if len(counts) else 0.0
        assert wrong <= 1 - LEVEL


def test_what_no_item_contradicts_still_needs_items() -> None:
    assert bounds_of([0.0] * 30, True).low < -0.05
    needed = items_needed([0.0] * 30, -0.01, True)
    assert needed is not None
    assert 0.99**needed < 1 - LEVEL  # as many as an exact test of no loss takes, or more
    assert bounds_of([0.0] * needed, True).low >= -0.01
    assert items_needed([-1.0] * 3 + [0.0] * 27, -0.01, True) is None


def test_of_other_figures_students_bound_holds_in_nineteen_of_twenty() -> None:
    generator = random.Random(0)
    trials = [[generator.gauss(-0.02, 0.1) for _ in range(25)] for _ in range(2000)]
    wrong = sum(bounds_of(trial).low > -0.02 for trial in trials) / len(trials)
    assert abs(wrong - (1 - LEVEL)) < 3 * math.sqrt(LEVEL * (1 - LEVEL) / len(trials))


def test_conditions() -> None:
    accuracy, bits = read_conditions("accuracy>=dense-0.05, bits<=dense*1.1")
    right, dense = [1.0] * 90 + [0.0] * 10, [1.0] * 95 + [0.0] * 5
    assert accuracy.judge(dense * 4, dense * 4).verdict is Verdict.KEPT
    assert accuracy.judge(right, dense).verdict is Verdict.OPEN
    assert accuracy.judge([0.0] * 100, dense).verdict is Verdict.LOST
    before = [1.0 + 0.01 * place for place in range(20)]
    assert bits.judge([1.02 * value for value in before], before).verdict is Verdict.KEPT
    assert bits.judge([1.2 * value for value in before], before).verdict is Verdict.LOST


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("accuracy", "not a condition"),
        ("acuracy>=0.5", "did you mean 'accuracy'"),
        ("accuracy<=dense", "worst model"),
        ("kl<=dense", "already"),
        ("", "not a condition"),
    ],
)
def test_conditions_that_say_nothing(text: str, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        read_conditions(text)


def test_what_is_proven_first_is_what_was_kept_most_clearly_whatever_the_condition_and_the_number_of_items() -> None:
    """In standard deviations: few items, or others that spread more, tell less of the same mean."""
    (bits,), (accuracy,) = read_conditions("bits<=dense*1.02"), read_conditions("accuracy>=dense-0.1")
    dense = [1.0, 1.2] * 50
    clear, spread = (
        [one * 1.01 for one in dense],
        [one * (1.005 + 0.01 * (place % 2)) for place, one in enumerate(dense)],
    )
    assert bits.judge(clear, dense).safety > bits.judge(spread, dense).safety > 0
    assert bits.judge(spread, dense).safety > bits.judge(spread[:10], dense[:10]).safety
    assert bits.judge(clear[:7], dense[:7]).safety == -math.inf
    right = [1.0] * 100
    assert accuracy.judge(right, right).safety > accuracy.judge([0.0] * 3 + right[3:], right).safety > 0


def test_what_is_cut_less_in_every_respect_goes_before_what_is_cut_more() -> None:
    types = ("q8_0", "q4_k_m", "iq4_xs")
    some, few = (
        Candidate(Cut(("vocabulary=131072",)), "q4_k_m"),
        Candidate(Cut(("vocabulary=32768",)), "iq4_xs", "q5_0"),
    )
    narrow, narrower = (some.of(Cut((*few.cut.removed, f"channels={share}"), 1024)) for share in (0.125, 0.25))
    for less, more in (
        (some, few),
        (some, narrow),
        (Candidate(DENSE, "iq4_xs"), few),
        (Candidate(DENSE, "q8_0"), some),
    ):
        assert less.spares(more, types)
        assert not more.spares(less, types)
    for one, other in ((some, Candidate(DENSE, "iq4_xs")), (few, narrow), (narrow, narrower)):
        assert not one.spares(other, types)
        assert not other.spares(one, types)
