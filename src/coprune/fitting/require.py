"""Requirements on a smaller model, such as `accuracy>=dense-0.01`, and their statistical test on items."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from coprune.base.errors import BadInput, unknown_name
from coprune.evaluation.bounds import Bounds, bounds_of, items_needed

METRICS: dict[str, str] = {
    "accuracy": "share of right answers (choice, answer)",
    "bits": "bits per byte (text)",
    "acceptance": "mean of Σ min(p, q) along the dense model's answers (prompts)",
    "kl": "KL(dense ‖ this) along the dense model's answers, nats per token (prompts)",
}
"""Metric of an item, and the kinds of tasks that have it."""
_AGAINST = ("acceptance", "kl")
"""Metrics that compare with the dense model already."""
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
_CONDITION = re.compile(
    rf"(?P<name>\w+)\s*(?P<sign><=|>=)\s*(?:dense\s*(?:(?P<by>[*+-])\s*(?P<offset>{_NUMBER}))?|(?P<number>{_NUMBER}))"
)


class Verdict(StrEnum):
    """Result of a condition's one-sided test."""

    KEPT = "kept"
    LOST = "not kept"
    OPEN = "cannot be told"


@dataclass(frozen=True)
class Held:
    """A condition on items: the mean difference that decides, and the verdict."""

    condition: str
    bounds: Bounds
    least: float
    """Minimum of the difference; signs are such that more is better."""
    verdict: Verdict
    needed: int | None
    """Items that would prove it if all went on like this; None where none would."""

    def line(self) -> str:
        """Return the finding in one line."""
        mean, low = self.margin
        return f"{self.condition}: {self.verdict} (margin {mean:+.4f}, at least {low:+.4f} at 95 %, {self.bounds.items} items)"

    @property
    def margin(self) -> tuple[float, float]:
        """By how much the condition is more than kept: the mean and its lower bound."""
        return self.bounds.mean - self.least, self.bounds.low - self.least

    @property
    def safety(self) -> float:
        """The lower bound in the items' standard deviations, which compares conditions and numbers of items."""
        mean, low = self.margin
        spread = (mean - low) * math.sqrt(self.bounds.items)
        return low / spread if 0 < spread < math.inf else math.copysign(math.inf, low)


@dataclass(frozen=True)
class Condition:
    """One condition, parsed."""

    text: str
    metric: str
    up: bool
    """Whether more is better."""
    factor: float
    """Factor of the dense model's figure; 0 for an absolute condition."""
    number: float

    @property
    def relative(self) -> bool:
        """Whether it is of the difference to the dense model, whatever that one's figures are."""
        return self.factor == 1.0

    def judge(self, found: Sequence[float], dense: Sequence[float]) -> Held:
        """Test the condition on items. found, dense: both models' figures of the same items."""
        sign = 1.0 if self.up else -1.0
        pairs = zip(found, dense, strict=True)
        differences = [sign * (value - self.factor * before) + 0.0 for value, before in pairs]
        least = sign * self.number + 0.0  # not -0.0
        answers = self.metric == "accuracy" and self.factor in (0.0, 1.0)
        bounds = bounds_of(differences, answers)
        verdict = Verdict.KEPT if bounds.low >= least else Verdict.LOST if bounds.high < least else Verdict.OPEN
        return Held(self.text, bounds, least, verdict, items_needed(differences, least, answers))

    def least_items(self, dense: Sequence[float]) -> int | None:
        """Return how many items it takes at the least: of a model that answers as the dense one does. None: more never will."""
        return self.judge(dense, dense).needed


def read_conditions(text: str) -> tuple[Condition, ...]:
    """Read conditions with commas between.

    Raises:
        BadInput: one names no metric, or is not written as a condition.
    """
    return tuple(_read(part.strip()) for part in text.split(",") if part.strip()) or (_read(text),)


def _read(text: str) -> Condition:
    found = _CONDITION.fullmatch(text)
    if found is None:
        fix = "write a figure, >= or <=, and a number, dense, dense-0.01 or dense*1.02: accuracy>=dense-0.01"
        raise BadInput(f"{text!r} is not a condition", field="require", value=text, fix=fix)
    name, up, number = found["name"], found["sign"] == ">=", found["number"]
    if name not in METRICS:
        raise unknown_name("figure", name, METRICS, field="require")
    if up is not (name in ("accuracy", "acceptance")):
        sign = "<=" if up else ">="
        fix = f"write {name}{sign}…"
        raise BadInput(f"{text!r} would hold for the worst model", field="require", value=text, fix=fix)
    if number is None and name in _AGAINST:
        fix = f"give a number, as in {name}{found['sign']}0.9"
        raise BadInput(f"{name} compares with the dense model already", field="require", value=text, fix=fix)
    if number is not None:
        return Condition(text, name, up, 0.0, float(number))
    by, offset = found["by"], float(found["offset"] or 0)
    if by == "*":
        return Condition(text, name, up, offset, 0.0)
    return Condition(text, name, up, 1.0, -offset if by == "-" else offset)
