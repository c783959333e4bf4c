"""How often `coprune fit` says *kept* of a model exactly at the limit, which should be in at most one of twenty trials.

    python benchmarks/proofs.py [--trials 2000]     # some minutes of one core; then python benchmarks/tables.py

Scores of items are drawn from known distributions whose mean is at the limit. `before` is the rule of earlier versions:
Student's interval of the differences, for all but differences of accuracy. Results: benchmarks/results/proofs.csv (shares of
trials), proofs-worst.csv (the largest over all distributions) and proofs-items.csv (items that a proof takes).
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coprune.fitting.require import Condition, read_conditions

RESULTS = Path(__file__).parent / "results"
ITEMS = (8, 16, 32, 64, 128)
Values = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Values]
Pair = Callable[[np.random.Generator, int], tuple[Values, Values]]

# Losses with a mean of 1.
LOSSES: dict[str, Draw] = {
    "Gaussian": lambda rng, count: rng.normal(1, 0.5, count),
    "exponential": lambda rng, count: rng.exponential(1, count),
    "lognormal, σ = 1": lambda rng, count: np.exp(rng.normal(-0.5, 1, count)),
    "a tenth loses 5.5": lambda rng, count: np.where(rng.random(count) < 0.1, 5.5, 0.5),
    "ties": lambda rng, count: rng.choice([0.5, 1.5], count),
    "all equal": lambda rng, count: np.full(count, 1 + 1e-9),
}


def _lost(loss: Draw) -> Pair:
    """Acceptances of 0.9 in the mean."""
    return lambda rng, count: (np.clip(1 - 0.1 * loss(rng, count), 0, None), np.ones(count))


def _rare(rng: np.random.Generator, count: int) -> tuple[Values, Values]:
    """A tenth at an acceptance of 0.1."""
    return np.where(rng.random(count) < 0.1, 0.1, 0.89 / 0.9), np.ones(count)


def _kl(loss: Draw) -> Pair:
    return lambda rng, count: (0.1 * np.maximum(loss(rng, count), 0), np.zeros(count))


def _bits(loss: Draw) -> Pair:
    def draw(rng: np.random.Generator, count: int) -> tuple[Values, Values]:
        dense = np.exp(rng.normal(0, 0.2, count))
        return dense * (1 + 0.02 * loss(rng, count)), dense

    return draw


def answers(dense: float, found: float, gained: float) -> Pair:
    """Right answers at given rates: the dense model's, the other's, and those that only the other has."""

    def draw(rng: np.random.Generator, count: int) -> tuple[Values, Values]:
        drawn = rng.random(count)
        before = drawn < dense
        kept = (drawn < found - gained) | ((drawn >= dense) & (drawn < dense + gained))
        return kept.astype(float), before.astype(float)

    return draw


TRUTHS: dict[str, dict[str, Pair]] = {
    "acceptance>=0.9": {name: _lost(one) for name, one in LOSSES.items()} | {"a tenth at 0.1": _rare},
    "kl<=0.1": {name: _kl(one) for name, one in LOSSES.items()},
    "bits<=dense*1.02": {name: _bits(one) for name, one in LOSSES.items()},
    "accuracy>=dense-0.05": {
        f"dense {dense}, {gained} gained": answers(dense, dense - 0.05, gained)
        for dense, gained in ((1.0, 0.0), (0.9, 0.0), (0.8, 0.02), (0.6, 0.1))
    },
}
TRUTHS |= {
    f"accuracy>=dense*{ratio}": {
        f"dense {dense}, {gained} gained": answers(dense, dense * ratio, gained)
        for dense, gained in ((1.0, 0.0), (0.9, 0.0), (0.8, 0.02), (0.6, 0.1))
    }
    for ratio in (0.9, 0.95, 0.98)
}


def wrongly_kept(
    text: str, draw: Pair, items: int, trials: int, seed: int = 0, kept: Callable[..., bool] | None = None
) -> float:
    """Return the share of trials that call a condition kept. kept: the rule to use instead of coprune's."""
    (condition,) = read_conditions(text)
    rng, rule = np.random.default_rng([seed, items]), kept or Condition.is_kept
    return sum(rule(condition, *map(list, draw(rng, items))) for _ in range(trials)) / trials


def before(condition: Condition, found: Sequence[float], dense: Sequence[float]) -> bool:
    """Decide by Student's interval."""
    from scipy.special import stdtrit

    if condition.metric == "accuracy" and condition.factor in (0.0, 1.0):
        return condition.is_kept(found, dense)
    sign = 1.0 if condition.up else -1.0
    differences = sign * (np.array(found) - condition.factor * np.array(dense))
    error = stdtrit(len(found) - 1, 0.95) * differences.std(ddof=1) / math.sqrt(len(found))
    return bool(differences.mean() - error >= sign * condition.number)


def items_for(text: str, used: float, spread: float) -> int:
    """Return how many unseen items prove a condition in half of all trials.

    used: mean loss, as a share of the allowed one. spread: its standard deviation, in the same unit.
    """
    (condition,) = read_conditions(text)
    rng = np.random.default_rng(0)
    found: list[int] = []
    for _ in range(31):
        loss = np.maximum(rng.normal(used, spread, 400), 0)
        pair = {
            "acceptance": (np.clip(1 - (1 - condition.number) * loss, 0, 1), np.ones(400)),
            "kl": (condition.number * loss, np.zeros(400)),
            "bits": (1 + (condition.factor - 1) * loss, np.ones(400)),
        }[condition.metric]
        found.append(condition.judge(*(one.tolist() for one in pair)).needed or 1 << 20)
    return int(np.median(found))


def answers_for(text: str, differing: float) -> int:
    """Return how many unseen items prove a condition where a share of the answers differs, as many better as worse."""
    (condition,) = read_conditions(text)
    count, half = 1000, round(500 * differing)
    dense = np.r_[np.ones(700), np.zeros(300)]
    found = dense.copy()
    found[:half], found[count - half :] = 0, 1
    return condition.judge(found.tolist(), dense.tolist()).needed or 0


def main() -> None:
    """Write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    trials = parser.parse_args().trials
    rows = list[dict[str, Any]]()
    for text, truths in TRUTHS.items():
        for items, (name, draw) in product(ITEMS, truths.items()):
            old, new = (wrongly_kept(text, draw, items, trials, kept=rule) for rule in (before, None))
            rows.append({"condition": text, "figures": name, "items": items, "before": old, "now": new})
        print(worst([row for row in rows if row["condition"] == text]), flush=True)
    write("proofs", rows)
    write("proofs-worst", worst(rows))
    shares = ((0.0, 0.0), (0.3, 0.3), (0.5, 0.5), (0.8, 0.5))
    needed = [
        {"condition": f"`{text}`"} | {f"{used:.0%} used": 2 * items_for(text, used, spread) for used, spread in shares}
        for text in ("acceptance>=0.9", "acceptance>=0.8", "kl<=0.1", "bits<=dense*1.02")
    ]
    write("proofs-items", needed)
    texts = ("accuracy>=dense-0.02", "accuracy>=dense-0.05", "accuracy>=dense-0.1", "accuracy>=dense*0.95")
    differing = (0.0, 0.05, 0.1, 0.2)
    write(
        "proofs-answers",
        [
            {"condition": f"`{text}`"} | {f"{share:.0%} differ": 2 * answers_for(text, share) for share in differing}
            for text in texts
        ],
    )


def worst(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each condition and number of items: the largest share of any distribution, before and now."""

    def most(text: str, items: int, when: str) -> str:
        return f"{100 * max(row[when] for row in rows if (row['condition'], row['items']) == (text, items)):.1f}"

    return [
        {"wrongly kept, %": f"`{text}`"}
        | {f"{items} items": f"{most(text, items, 'before')} → {most(text, items, 'now')}" for items in ITEMS}
        for text in dict.fromkeys(row["condition"] for row in rows)
    ]


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """Write rows as CSV."""
    with (RESULTS / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        out = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        out.writeheader()
        out.writerows(rows)


if __name__ == "__main__":
    main()
