"""The statistical test of a fit: how often it passes a model that misses the requirement."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray
from proofs import ITEMS, TRUTHS, answers, wrongly_kept
from scipy import stats

from coprune.base.errors import BadInput
from coprune.evaluation.bounds import LEVEL, Difference, Mean, Ratio, Share
from coprune.fitting.candidates import DENSE, Candidate, Cut
from coprune.fitting.require import Verdict, read_conditions, require_provable
from coprune.fitting.tasks import Item, Task

Counts = NDArray[np.int64]


def proven(kind: type[Difference | Ratio], items: int, value: float) -> Counts:
    """Return all outcomes that count as a proof: items right in both, gained, lost, and right in neither."""
    found = [
        (both, gained, lost, items - both - gained - lost)
        for both, gained, lost in product(range(items + 1), repeat=3)
        if both + gained + lost <= items and kind(both, gained, lost, items).is_above(value)
    ]
    return np.array(found, dtype=np.int64).reshape(-1, 4)


def chance(outcomes: Counts, items: int, shares: list[float]) -> float:
    return float(stats.multinomial.pmf(outcomes, items, shares).sum()) if len(outcomes) else 0.0


@pytest.mark.parametrize(("items", "margin"), [(8, 0.4), (12, 0.3), (20, 0.1), (24, 0.2)])
def test_a_difference_at_the_limit_passes_in_at_most_one_of_twenty_trials(items: int, margin: float) -> None:
    """Computed exactly over all outcomes, for any share of items on which the models differ."""
    outcomes = proven(Difference, items, -margin)
    for differing in (margin, 1.2 * margin, 0.3, 0.6, 1.0):
        if differing >= margin:
            gains = (differing - margin) / 2
            same = max(0.0, 1 - differing)
            assert chance(outcomes, items, [same / 2, gains, gains + margin, same / 2]) <= 1 - LEVEL


@pytest.mark.parametrize(("items", "ratio"), [(8, 0.9), (16, 0.95), (16, 0.8), (24, 0.9), (24, 0.98)])
def test_a_ratio_at_the_limit_passes_in_at_most_one_of_twenty_trials(items: int, ratio: float) -> None:
    """Computed exactly over all outcomes, including few differing items."""
    outcomes = proven(Ratio, items, ratio)
    for dense, gained in product((0.3, 0.6, 0.8, 0.95, 1.0), (0.0, 0.005, 0.02, 0.05, 0.2)):
        shares = [dense * ratio - gained, gained, dense - dense * ratio + gained, 1 - dense - gained]
        if min(shares) > -1e-12:
            assert chance(outcomes, items, np.clip(shares, 0, 1).tolist()) <= 1 - LEVEL


def test_a_ratio_needs_about_as_many_items_as_the_equivalent_difference() -> None:
    difference, ratio = read_conditions("accuracy>=dense-0.05,accuracy>=dense*0.95")
    right = [1.0] * 8
    assert not ratio.is_kept(right, right)
    assert ratio.least_items() == difference.least_items() == 70
    lost = [0.0] * 2 + [1.0] * 298
    assert ratio.is_kept(lost, [1.0] * 300)
    assert ratio.judge([0.0] * 60 + [1.0] * 240, [1.0] * 300).verdict is Verdict.LOST
    # A score interval: both bounds exclude what they should.
    bounds = Ratio(70, 5, 5, 100).bounds()
    assert 0.9 < bounds.low < bounds.mean == 1 < bounds.high < 1.1


def test_a_share_has_the_exact_bound_of_the_binomial_distribution() -> None:
    assert Share(8, 0, 0, 8).bounds().low == pytest.approx(0.05 ** (1 / 8))
    assert Share(0, 0, 0, 8).bounds().high == pytest.approx(1 - 0.05 ** (1 / 8))
    assert Share(8, 0, 0, 8).needed(0.9) == math.ceil(math.log(0.05) / math.log(0.9))


def test_a_proof_needs_enough_items_even_if_none_contradicts() -> None:
    assert Difference(30, 0, 0, 30).bounds().low < -0.05
    needed = Difference(30, 0, 0, 30).needed(-0.01)
    assert needed is not None
    assert 0.99**needed < 1 - LEVEL  # at least as many as an exact test without any loss
    assert Difference(needed, 0, 0, needed).bounds().low >= -0.01
    assert Difference(27, 0, 3, 30).needed(-0.01) is None


def test_equal_items_do_not_prove_a_mean_that_rare_items_could_lower() -> None:
    """If a tenth of all items score 0, a sample often misses them, so 0.9 is not proven by 1, 1, 1 …"""
    for items in (8, 16, 28):
        assert 0.9**items > 1 - LEVEL
        assert not Mean([1.0] * items, 0).is_above(0.9)
    assert Mean([1.0] * 29, 0).is_above(0.9)
    assert Mean([1.0] * 8, 0).needed(0.9) == 29


def test_figures_are_clipped_at_the_floor_and_the_plain_mean_must_meet_the_limit() -> None:
    fine = [-0.02] * 200
    assert Mean(fine, -0.8).is_above(-0.1)
    assert Mean([-5.0, *fine], -0.8).is_above(-0.1)
    assert not Mean([-50.0, *fine], -0.8).is_above(-0.1)  # its mean is below the limit
    assert not Mean([math.nan, *fine], -0.8).is_above(-0.1)
    assert Mean([-5.0, *fine], -0.8).beyond == 1
    (kl,) = read_conditions("kl<=0.1")
    line = kl.judge([5.0, *(-value for value in fine)], [0.0] * 201).line()
    assert line.startswith("kl<=0.1: kept (0.0448 on 201 items, 1 of them beyond 8 times the limit; margin +0.0552")


def test_bounds_agree_with_the_verdict() -> None:
    rng = np.random.default_rng(0)
    for condition in read_conditions(
        "acceptance>=0.9,kl<=0.1,bits<=dense*1.02,bits<=dense+0.02,bits<=1.2,accuracy>=0.8"
    ):
        for items in (10, 40, 90, 300):
            loss = rng.exponential(0.6, items)
            new, old = {
                "acceptance": (1 - 0.1 * loss, np.ones(items)),
                "kl": (0.1 * loss, np.zeros(items)),
                "bits": (1 + 0.02 * loss, np.ones(items)),
                "accuracy": ((loss < 1.2).astype(float), np.ones(items)),
            }[condition.metric]
            held = condition.judge(new.tolist(), old.tolist())
            assert (held.verdict is Verdict.KEPT) == (held.margin[1] >= -1e-9)
            if held.verdict is Verdict.KEPT:
                assert held.needed is not None
                assert held.needed <= items


@pytest.mark.slow
@pytest.mark.parametrize("text", TRUTHS)
@pytest.mark.parametrize("items", ITEMS)
def test_a_model_at_the_limit_passes_in_at_most_one_of_twenty_trials(text: str, items: int) -> None:
    trials = 400
    for name, draw in TRUTHS[text].items():
        wrong = wrongly_kept(text, draw, items, trials)
        assert wrong <= 1 - LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / trials), name


def test_few_items_prove_nothing_about_skewed_figures() -> None:
    """In this simulation Student's interval is wrong in a third of the trials."""
    for text, name in (("acceptance>=0.9", "a tenth at 0.1"), ("kl<=0.1", "lognormal, σ = 1")):
        assert wrongly_kept(text, TRUTHS[text][name], 16, 200) == 0
    assert wrongly_kept("accuracy>=dense*0.95", answers(0.9, 0.855, 0.0), 30, 300) <= 0.05


def test_near_duplicates_count_as_one_item_in_a_proof() -> None:
    """With clusters of five, items are not independent, and a bound that counts them all is wrong far too often."""
    (condition,) = read_conditions("accuracy>=dense-0.1")
    rng, draw, wrong, counted = np.random.default_rng(0), answers(0.9, 0.8, 0.02), 0, 0
    task = Task(
        "t", "choice", (Item("a"),) * 200, (), tuple(rng.permutation(200).tolist()), 1.0, tuple([*range(40)] * 5)
    )
    for _ in range(300):
        found, dense = (np.tile(one, 5).tolist() for one in draw(rng, 40))
        apart = task.apart(task.unseen)
        assert len(apart) == 40
        wrong += condition.is_kept([found[place] for place in apart], [dense[place] for place in apart])
        counted += condition.is_kept(found, dense)
    assert wrong / 300 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)
    assert counted / 300 > 0.15


def task_of(kind: str, count: int) -> Task:
    half = count // 2
    return Task("mine", kind, (), tuple(range(half)), tuple(range(half, count)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "count", "required", "provable"),
    [
        ("choice", 66, "accuracy>=dense-0.05", "accuracy>=dense-0.11"),
        ("choice", 66, "accuracy>=dense*0.95", "accuracy>=dense*0.89"),
        ("choice", 66, "accuracy>=0.95", "accuracy>=0.91"),
        ("prompts", 32, "acceptance>=0.9", "acceptance>=0.82"),
    ],
)
def test_too_few_items_are_refused_with_what_they_can_prove(
    kind: str, count: int, required: str, provable: str
) -> None:
    task, conditions = task_of(kind, count), read_conditions(required)
    with pytest.raises(BadInput, match=rf"would need \d+ .*there are {count}") as raised:
        require_provable(conditions, [task])
    assert str(raised.value.fix).endswith(f"what {count} can prove at best: {provable}")
    require_provable(read_conditions(provable), [task])


def test_bits_and_kl_need_items_whatever_the_limit() -> None:
    for kind, conditions in (("text", ("bits<=dense*1.02", "bits<=dense*1.5")), ("prompts", ("kl<=0.1", "kl<=1"))):
        for required in conditions:
            with pytest.raises(BadInput, match="even a model with the same answers would need 46 "):
                require_provable(read_conditions(required), [task_of(kind, 44)])
            require_provable(read_conditions(required), [task_of(kind, 46)])


def test_a_verdict_counts_right_answers_and_the_items_that_would_decide() -> None:
    (condition,) = read_conditions("accuracy>=dense-0.1")
    dense = [1.0] * 25 + [0.0] * 8
    held = condition.judge([0.0, *dense[1:]], dense)
    assert held.line().startswith(
        "accuracy>=dense-0.1: inconclusive (24 of 33 right, dense 25; margin +0.0697, at least -"
    )
    assert held.line().endswith(f"); about {2 * ((held.needed or 0) - 33)} more items would decide")
    assert held.verdict is Verdict.OPEN
    worse = condition.judge([0.0] * 4 + dense[4:], dense)
    assert worse.line().endswith("more such items would not prove it")


def test_conditions_are_judged_kept_lost_or_open() -> None:
    accuracy, bits = read_conditions("accuracy>=dense-0.05, bits<=dense*1.1")
    right, dense = [1.0] * 90 + [0.0] * 10, [1.0] * 95 + [0.0] * 5
    assert accuracy.judge(dense * 4, dense * 4).verdict is Verdict.KEPT
    assert accuracy.judge(right, dense).verdict is Verdict.OPEN
    assert accuracy.judge([0.0] * 100, dense).verdict is Verdict.LOST
    before = [1.0 + 0.01 * place for place in range(40)]
    assert bits.judge([1.03 * value for value in before], before).verdict is Verdict.KEPT
    assert bits.judge([1.2 * value for value in before], before).verdict is Verdict.LOST


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("accuracy", "not a condition"),
        ("acuracy>=0.5", "did you mean 'accuracy'"),
        ("accuracy<=dense", "worst model"),
        ("kl<=dense", "already"),
        ("bits<=dense*1e999", "not a condition"),
        ("", "not a condition"),
    ],
)
def test_malformed_conditions_are_refused(text: str, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        read_conditions(text)


def test_candidates_are_proven_in_order_of_confidence() -> None:
    """Confidence is in standard deviations: few or widely spread items say less about the same mean."""
    (bits,), (accuracy,) = read_conditions("bits<=dense*1.02"), read_conditions("accuracy>=dense-0.1")
    dense = [1.0, 1.2] * 50
    clear, spread = (
        [one * 1.01 for one in dense],
        [one * (1.005 + 0.01 * (place % 2)) for place, one in enumerate(dense)],
    )
    assert bits.judge(clear, dense).safety > bits.judge(spread, dense).safety > 0
    assert bits.judge(spread, dense).safety > bits.judge(spread[:10], dense[:10]).safety
    right = [1.0] * 100
    assert accuracy.judge(right, right).safety > accuracy.judge([0.0] * 3 + right[3:], right).safety > 0


def test_candidates_reduced_less_are_proven_before_those_reduced_more() -> None:
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
