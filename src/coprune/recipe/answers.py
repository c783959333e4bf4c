"""The part of a recipe about what the models write: prompts that they answer, and what is required of the answers.

A fine-tuning has the same settings, so each is a type of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from coprune.base.errors import BadInput
from coprune.base.words import LeaveOut, Piece, Set, Words
from coprune.recipe.conditions import Condition, read_conditions
from coprune.recipe.decides import Decides, Shown
from coprune.recipe.parts import Part

_MEASUREMENT = Decides.MEASUREMENT | Decides.COST

Prompts = Annotated[
    str | None,
    BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value),
    _MEASUREMENT,
    Shown.COMMON,
    Field(
        description="Let the models answer prompts, greedily and sampled, and measure loops, lengths and likeness to the dense "
        "model: builtin (of several fields and languages), or a .jsonl file with the column prompt (file:column for "
        "another).",
    ),
]
Count = Annotated[int | None, _MEASUREMENT, Field(description="Use only so many of the prompts. [all]", ge=1)]
NewTokens = Annotated[int, _MEASUREMENT, Field(description="Most tokens of an answer.", ge=1)]
Temperature = Annotated[
    float, _MEASUREMENT, Field(description="Temperature of the sampled answers; 0 for greedy ones alone.", ge=0)
]
Seed = Annotated[int, Decides.MEASUREMENT, Field(description="Seed of the sampled answers.", ge=0)]
Gate = Annotated[
    bool,
    _MEASUREMENT,
    Field(
        description="Let a model that is saved answer a few short prompts, and say whether the answers loop or are empty."
    ),
]
Require = Annotated[
    str | None,
    Decides.MEASUREMENT,
    Shown.COMMON,
    Field(
        description="Exit with 3, once all is saved, unless the answers are so: conditions with commas between, such as "
        "'loops<=dense+1,kl<0.5'; no more may be empty than the dense model's unless that is said, as in empty<=dense+1."
    ),
]


class AnswersPart(Part):
    """What the dense and the pruned model write."""

    prompts: Prompts = None
    count: Count = None
    new_tokens: NewTokens = 128
    temperature: Temperature = 0.8
    seed: Seed = 0
    gate: Gate = True
    require: Require = None

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """What is required, read. Raises BadInput as `read_conditions`."""
        return read_conditions(self.require)

    @property
    def is_asked(self) -> bool:
        """Whether somebody asked for answers, which are looked at anyway where a model is saved."""
        return self.prompts is not None or self.require is not None


def cannot_require(asked: AnswersPart, dense: Words | None) -> BadInput | None:
    """What is wrong with what is required of answers; None if nothing is.

    Args:
        asked: the settings.
        dense: how to have the dense model's answers; None where they are there.
    """
    try:
        conditions = asked.conditions
    except BadInput as error:
        return error
    cause: tuple[Piece | str, ...]
    fix: Words
    for condition in conditions:
        if condition.sampled and asked.prompts is None:
            cause, fix = ("sampled answers",), ("ask for them with ", Set("generate", "builtin"))
        elif condition.sampled and not asked.temperature:
            none = Set("generate_temperature", asked.temperature)
            cause, fix = ("sampled answers, and with ", none, " none are sampled"), LeaveOut("generate_temperature")
        elif condition.needs_dense and dense is not None:
            cause, fix = ("the dense model's answers",), dense
        else:
            continue
        return BadInput((f"{condition.text} is about ", *cause), field="require", value=asked.require, fix=fix)
    return None
