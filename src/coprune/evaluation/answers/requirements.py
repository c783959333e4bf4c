"""Whether a model's answers are as required."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from coprune.evaluation.answers.facts import AnswerFacts
from coprune.recipe.conditions import LIKENESS, Condition, no_emptier


class Requirement(BaseModel):
    """One condition, and what was found."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    condition: str
    figure: float | None
    """None where it could not be measured: then the condition does not hold."""
    dense: float | None
    """The dense model's, where it is compared with that."""
    holds: bool

    def line(self) -> str:
        """For people."""
        found = "not measured" if self.figure is None else f"{self.figure:.4g}"
        dense = "" if self.dense is None else f", dense {self.dense:.4g}"
        return f"{self.condition} {'holds' if self.holds else 'does not hold'} ({found}{dense})"


def answer_rows(
    facts: AnswerFacts | None, left_out: str | None, required: Sequence[Requirement]
) -> list[tuple[str, str]]:
    """What a report says of answers in its last lines: names and values. left_out: why there are none."""
    rows = [] if facts is None else facts.lines()
    rows += [] if left_out is None else [("answers", f"not looked at: {left_out}")]
    return rows + [("required", one.line()) for one in required]


def judge(conditions: Sequence[Condition], facts: AnswerFacts | None) -> tuple[Requirement, ...]:
    """Hold answers against conditions.

    Args:
        conditions: what is required.
        facts: the answers; None where none could be had, so that no condition holds.

    Returns:
        One requirement per condition; and those of `no_emptier` that do not hold, where empty answers were counted.
    """
    found = [_judge(condition, facts) for condition in conditions]
    beside_dense = facts is not None and facts.greedy.dense is not None
    unsaid = [_judge(condition, facts) for condition in no_emptier(conditions, beside_dense)]
    return (*found, *(one for one in unsaid if one.figure is not None and not one.holds))


def _judge(condition: Condition, facts: AnswerFacts | None) -> Requirement:
    figure, dense = (None, None) if facts is None else _figures(condition, facts)
    known = figure is not None and not (condition.against_dense and dense is None)
    holds = known and condition.holds(figure or 0.0, dense)
    return Requirement(
        condition=condition.text, figure=figure, dense=dense if condition.against_dense else None, holds=holds
    )


def _figures(condition: Condition, facts: AnswerFacts) -> tuple[float | None, float | None]:
    """The figure that a condition is about, and the dense model's."""
    way = facts.sampled if condition.sampled else facts.greedy
    if condition.name == "kl":
        return None if facts.along is None else facts.along.kl, None
    if way is None:
        return None, None
    if condition.name in LIKENESS:
        return None if way.likeness is None else getattr(way.likeness, condition.name), None
    return getattr(way.figures, condition.name), None if way.dense is None else getattr(way.dense, condition.name)
