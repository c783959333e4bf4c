"""Requirements on a smaller model, such as `accuracy>=dense-0.01`, and their statistical test on items."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from coprune.base.errors import BadInput, unknown_name
from coprune.base.words import Setting
from coprune.evaluation.bounds import LEAST_ITEMS, Bounds, Difference, Estimate, Mean, Ratio, Share
from coprune.fitting.tasks import METRICS_OF, Kind, Task, read_tasks

METRICS: dict[str, str] = {
    "accuracy": "share of right answers (choice, answer)",
    "bits": "bits per byte (text)",
    "acceptance": "mean of Σ min(p, q) along the dense model's answers (prompts)",
    "kl": "KL(dense ‖ this) along the dense model's answers, nats per token (prompts)",
}
"""Metrics of items, with the kinds of tasks that have them."""
_COUNTED = {"accuracy": "right", "sound": "sound"}
"""Metrics with a value of 0 or 1 per item, and the word for a 1."""
_AGAINST = ("acceptance", "kl")
"""Metrics that are comparisons with the dense model."""
USUAL: dict[Kind, str] = {
    "choice": "accuracy>=dense-0.02",
    "answer": "accuracy>=dense-0.02",
    "text": "bits<=dense*1.02",
    "prompts": "acceptance>=0.9",
    "writing": "",
}
"""Default requirement by kind of task."""
WORST, WORST_BITS = 8, 2
"""Items are clipped at this multiple of the limit: for kl or an increase in bits, and for bits."""
_LEAST_ALLOWED = 0.01
"""Minimum increase in bits for this clipping, if the limit is lower."""
LOSING_HALF = 2
"""A model that loses half of what a condition allows needs about this many times the items of one that loses nothing."""
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
_CONDITION = re.compile(
    rf"(?P<name>\w+)\s*(?P<sign><=|>=)\s*(?:dense\s*(?:(?P<by>[*+-])\s*(?P<offset>{_NUMBER}))?|(?P<number>{_NUMBER}))"
)


class Verdict(StrEnum):
    """Result of a condition's one-sided test."""

    KEPT = "kept"
    LOST = "not kept"
    OPEN = "inconclusive"


@dataclass(frozen=True)
class Held:
    """The result of testing a condition on items: its estimate and verdict."""

    condition: str
    bounds: Bounds
    least: float
    """Limit of the estimate, with the sign chosen so that higher is better."""
    verdict: Verdict
    needed: int | None
    """Number of similar items that would prove the condition; None if no number would."""
    said: str
    """The measurements in words."""

    def line(self) -> str:
        """Return the finding in one line."""
        mean, low = self.margin
        found = f"{self.said}; margin {mean:+.4f}, at least {low:+.4f} at 95 %"
        if self.verdict is not Verdict.OPEN:
            return f"{self.condition}: {self.verdict} ({found})"
        would = f"about {self.more:,} more items would decide" if self.more else "more such items would not prove it"
        return f"{self.condition}: {self.verdict} ({found}); {would}"

    @property
    def more(self) -> int | None:
        """Return how many more items, half of them unseen, would prove the condition; None if no number would."""
        return None if self.needed is None else 2 * max(1, self.needed - self.bounds.items)

    @property
    def margin(self) -> tuple[float, float]:
        """Distance to the limit, positive if the condition is kept: of the mean, and of its lower confidence bound."""
        return self.bounds.mean - self.least, self.bounds.low - self.least

    @property
    def safety(self) -> float:
        """Lower bound of the margin in standard deviations of the items, to compare conditions and numbers of items."""
        mean, low = self.margin
        spread = (mean - low) * math.sqrt(self.bounds.items)
        return low / spread if 0 < spread < math.inf else math.copysign(math.inf, low)


@dataclass(frozen=True)
class Condition:
    """One condition, parsed."""

    text: str
    metric: str
    up: bool
    """Whether higher is better."""
    factor: float
    """Factor of the dense model's value; 0 for an absolute condition."""
    number: float

    def judge(self, found: Sequence[float], dense: Sequence[float]) -> Held:
        """Test the condition. found, dense: scores of both models on the same items, without near-duplicates."""
        estimate, least = self._estimate(found, dense)
        bounds = estimate.bounds()
        kept = estimate.is_above(least)
        verdict = Verdict.KEPT if kept else Verdict.LOST if bounds.high < least else Verdict.OPEN
        return Held(self.text, bounds, least, verdict, estimate.needed(least), self._said(estimate, found, dense))

    def is_kept(self, found: Sequence[float], dense: Sequence[float]) -> bool:
        """Return whether the items prove the condition."""
        estimate, least = self._estimate(found, dense)
        return estimate.is_above(least)

    def _estimate(self, found: Sequence[float], dense: Sequence[float]) -> tuple[Estimate, float]:
        """Return the estimate, with the sign chosen so that higher is better, and its limit."""
        if self.metric in _COUNTED:
            new, old = ([value > 0.5 for value in one] for one in (found, dense))
            if self.factor == 0.0:
                return Share(sum(new), 0, 0, len(new)), self.number
            seen = Counter(zip(new, old, strict=True))
            counts = seen[True, True], seen[True, False], seen[False, True], len(new)
            return (Difference(*counts), self.number) if self.factor == 1.0 else (Ratio(*counts), self.factor)
        if self.metric == "acceptance":
            return Mean(found, 0.0), self.number
        if self.factor == 0.0:
            times = WORST if self.metric == "kl" else WORST_BITS
            return Mean([-value for value in found], -times * self.number), -self.number
        pairs = list(zip(found, dense, strict=True))
        if self.factor == 1.0:
            losses, allowed = [value - before for value, before in pairs], self.number
        else:
            losses, allowed = [value / before - 1 for value, before in pairs], self.factor - 1
        floor = -allowed - (WORST - 1) * max(abs(allowed), _LEAST_ALLOWED)
        return Mean([-loss for loss in losses], floor), -allowed

    def _said(self, estimate: Estimate, found: Sequence[float], dense: Sequence[float]) -> str:
        if self.metric in _COUNTED:
            return f"{sum(found):.0f} of {len(found)} {_COUNTED[self.metric]}, dense {sum(dense):.0f}"
        means = f"{math.fsum(found) / max(1, len(found)):.4f}"
        if self.metric == "bits":
            means += f", dense {math.fsum(dense) / max(1, len(dense)):.4f}"
        times = WORST_BITS if self.metric == "bits" and not self.factor else WORST
        counted = isinstance(estimate, Mean) and estimate.beyond
        beyond = f", {counted} of them beyond {times} times the limit" if counted else ""
        return f"{means} on {len(found)} items{beyond}"

    def least_items(self, dense: Sequence[float] | None = None) -> int | None:
        """Return the minimum number of items for a proof, for a model that answers like the dense one.

        dense: its scores; None if not measured yet, for the best possible ones. Returns None if no number is enough.
        """
        best = {"accuracy": 1.0, "sound": 1.0, "acceptance": 1.0, "kl": 0.0, "bits": 1.0 if self.factor else 0.0}[
            self.metric
        ]
        figures = [best] * LEAST_ITEMS if dense is None else dense
        return self.judge(figures, figures).needed

    def strictest(self, items: int, dense: Sequence[float] | None = None) -> Condition | None:
        """Return the strictest condition of this form that a number of items can prove, in hundredths; None if none.

        dense: as in `least_items`.
        """
        if self.metric in ("bits", "kl"):  # their number of items depends on how close a model is to the limit
            return None
        for hundredths in range(1, 100):
            by = hundredths / 100
            if self.factor == 1.0:
                one = replace(self, text=f"{self.metric}>=dense-{by:g}", number=-by)
            elif self.factor:
                one = replace(self, text=f"{self.metric}>=dense*{1 - by:g}", factor=1 - by)
            else:
                one = replace(self, text=f"{self.metric}>={1 - by:g}", number=1 - by)
            least = one.least_items(dense)
            if least is not None and least <= items:
                return one
        return None


def wanted(
    names: Sequence[str], require: str | None, seed: int = 0, items: int | None = None, trusted: bool = False
) -> tuple[tuple[Task, ...], tuple[Condition, ...]]:
    """Read tasks and conditions, and check that there are enough items to prove them, without a model and without torch.

    Args:
        names: tasks, as in `read_tasks`.
        require: conditions; None for the defaults of the tasks' kinds.
        seed: of the halves.
        items: maximum number per task.
        trusted: whether definitions of lm-eval may run code.

    Raises:
        BadInput: a task or condition cannot be read, or cannot be proven.
    """
    tasks = read_tasks(names, seed, items, trusted)
    conditions = read_conditions(require or ",".join(dict.fromkeys(USUAL[one.kind] for one in tasks)))
    require_provable(conditions, tasks)
    return tasks, conditions


def pairs(conditions: Sequence[Condition], tasks: Sequence[Task]) -> Iterator[tuple[Condition, Task]]:
    """Yield each condition with each task that it applies to."""
    return ((one, task) for one in conditions for task in tasks if one.metric in METRICS_OF[task.kind])


def require_provable(conditions: Sequence[Condition], tasks: Sequence[Task]) -> None:
    """Raise BadInput if a condition applies to no task, a task has no condition, or a task has too few items for a proof.

    Only the number of items is checked, which needs no model.
    """
    for condition in conditions:
        if not any(condition.metric in METRICS_OF[task.kind] for task in tasks):
            kinds = ", ".join(sorted({task.kind for task in tasks}))
            cause = f"{condition.text} applies to no task: the items are of the kind {kinds}"
            raise BadInput(cause, field="require", value=condition.text, fix="leave it out, or add such a task")
    for task in tasks:
        if not any(condition.metric in METRICS_OF[task.kind] for condition in conditions):
            fix = ("add a condition on ", " or ".join(METRICS_OF[task.kind]), " to ", Setting("require"))
            raise BadInput(f"no condition applies to {task.name}", field="require", fix=fix)
    for condition, task in pairs(conditions, tasks):
        refuse_few(condition, task)


def refuse_few(condition: Condition, task: Task, dense: Sequence[float] | None = None) -> None:
    """Raise BadInput if not even the dense model could be proven to keep a condition. dense: its unseen scores, if known."""
    least, unseen = condition.least_items(dense), len(task.apart(task.unseen))
    there = len(task.apart(task.seen)) + unseen
    if least is None:
        shown = "" if dense is None else f" ({math.fsum(dense) / len(dense):.3f})"
        cause = f"the dense model itself does not keep {condition.text} on {task.name}{shown}"
        raise BadInput(cause, field="require", value=condition.text, fix="require less")
    if least <= unseen:
        return
    cause = (
        f"{task.name} has too few items to prove {condition.text}: even a model with the same answers would need "
        f"{2 * least} (half of them unseen), and there are {there}"
    )
    provable = condition.strictest(unseen, dense)
    fix = "add items" if provable is None else f"add items, or require what {there} can prove at best: {provable.text}"
    raise BadInput(cause, field="task", value=task.name, fix=fix)


def few_items(condition: Condition, task: Task, dense: Sequence[float]) -> str:
    """Return a warning if only a model that loses little could be proven to keep a condition; empty if the items suffice.

    dense: its unseen scores.
    """
    least, unseen = condition.least_items(dense), len(task.apart(task.unseen))
    if least is None or unseen >= LOSING_HALF * least:
        return ""
    looser = condition.strictest(unseen // LOSING_HALF, dense)
    return (
        f"{len(task.apart(task.seen)) + unseen} items of {task.name} prove {condition.text} only for a model that loses little; "
        f"one that loses half of what is allowed needs about {2 * LOSING_HALF * least}: use more items, or require "
        f"{'less' if looser is None else looser.text}"
    )


def items_needed(held: Sequence[Held]) -> int:
    """Return how many items like these would prove all conditions; 0 if one is refuted, all are proven, or no number would."""
    needed = [one.needed or 0 for one in held]
    return max(needed) if held and verdict_of(held) is Verdict.OPEN and all(needed) else 0


def verdict_of(held: Sequence[Held]) -> Verdict:
    """Combine the verdicts of all conditions."""
    said = {one.verdict for one in held}
    return next((one for one in (Verdict.LOST, Verdict.OPEN) if one in said), Verdict.KEPT)


def read_conditions(text: str) -> tuple[Condition, ...]:
    """Parse conditions separated by commas.

    Raises:
        BadInput: a condition is malformed or names an unknown metric.
    """
    return tuple(_read(part.strip()) for part in text.split(",") if part.strip()) or (_read(text),)


def _read(text: str) -> Condition:
    found = _CONDITION.fullmatch(text)
    if found is None or not all(math.isfinite(float(found[one] or 0)) for one in ("number", "offset")):
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
