"""The part of a recipe about what the models write: prompts that they answer, and what is required of the answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from coprune.base.errors import BadInput, unknown_name
from coprune.base.validation import path_as_text
from coprune.base.words import LeaveOut, Piece, Set, Words
from coprune.recipe.parts import Decides, Part, Shown, Word

_MEASUREMENT = Decides.MEASUREMENT | Decides.COST


class AnswersPart(Part):
    """Settings of the answers that the dense and the pruned model generate."""

    title = "What the models write"
    prefix = "generate_"
    head = "prompts"

    prompts: Annotated[
        str | None,
        Word("generate"),
        BeforeValidator(path_as_text, json_schema_input_type=str | Path | None),
        _MEASUREMENT,
        Shown.COMMON,
        Field(
            description="Let the models answer prompts, greedily and sampled, and measure loops, lengths and closeness to the "
            "dense model: builtin (of several fields and languages), or a .jsonl file with the column prompt (file:column for "
            "another).",
        ),
    ] = None
    count: Annotated[
        int | None,
        Word("generate_prompts"),
        _MEASUREMENT,
        Field(description="Use only so many of the prompts. [all]", ge=1),
    ] = None
    new_tokens: Annotated[
        int, Word("generate_tokens"), _MEASUREMENT, Field(description="Most tokens of an answer.", ge=1)
    ] = 128
    temperature: Annotated[
        float, _MEASUREMENT, Field(description="Temperature of the sampled answers; 0 for greedy ones alone.", ge=0)
    ] = 0.8
    gate: Annotated[
        bool,
        Word("gate"),
        _MEASUREMENT,
        Field(
            description="Let a model that is saved answer a few short prompts, and say whether the answers loop or are empty."
        ),
    ] = True
    require: Annotated[
        str | None,
        Word("require"),
        Decides.MEASUREMENT,
        Shown.COMMON,
        Field(
            description="Exit with 3, once all is saved, unless the answers, or what is measured, are so: conditions with commas "
            "between, such as 'loops<=dense+1,kl<0.5' or 'perplexity<=dense*1.05' (accuracy, word_error; cosine, overlap, alike "
            "with the dense model); no more answers may be empty than the dense model's unless that is said: empty<=dense+1."
        ),
    ] = None

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Requirements on the answers, parsed. Raises BadInput as `read_conditions`."""
        return tuple(one for one in read_conditions(self.require) if one.name not in MEASURED)

    @property
    def measured(self) -> tuple[Condition, ...]:
        """Requirements on what is measured, parsed. Raises BadInput as `read_conditions`."""
        return tuple(one for one in read_conditions(self.require) if one.name in MEASURED)

    @property
    def is_asked(self) -> bool:
        """Whether the user asked for answers; a few are checked anyway when a model is saved."""
        return self.prompts is not None or bool(self.conditions)


def cannot_require(asked: AnswersPart, dense: Words | None) -> BadInput | None:
    """Return the error in the requirements on answers, or None.

    Args:
        asked: the settings.
        dense: how to get the dense model's answers; None where they are available.
    """
    try:
        conditions = asked.conditions + asked.measured
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
            what = "measurements" if condition.name in MEASURED else "answers"
            cause, fix = (f"the dense model's {what}",), dense
        else:
            continue
        return BadInput((f"{condition.text} is about ", *cause), field="require", value=asked.require, fix=fix)
    return None


FIGURES: dict[str, str] = {
    "loops": "answers that loop",
    "empty": "answers that say nothing: white space and punctuation at most",
    "ended": "answers that end by themselves",
    "tokens": "mean tokens of an answer",
}
"""Figures of one model's answers."""
ALONG: dict[str, str] = {
    "kl": "mean KL(dense ‖ this) along the dense model's own answers, in nats per token",
    "acceptance": "mean of Σ min(dense, this) along the dense model's own answers",
}
"""Figures along the dense model's likeliest answers, with its distributions."""
MEASURED: dict[str, str] = {
    "perplexity": "perplexity; of masked tokens, or of targets, where that is measured",
    "accuracy": "share of right labels",
    "word_error": "wrong words of transcripts over the words that are said",
    "cosine": "mean cosine with the dense model's embeddings",
    "overlap": "share of the nearest passages that both models find",
    "alike": "1 less the word error against the dense model's transcripts",
}
"""Figures of measurements."""
BESIDE = ("cosine", "overlap", "alike")
"""Measurements that compare with the dense model already."""
_SAMPLED = "sampled"
_SIZE = r"(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
_CONDITION = re.compile(
    r"(?:(?P<way>\w+)\.)?(?P<name>\w+)\s*(?P<sign><=|>=|<|>)\s*"
    rf"(?:(?P<dense>dense)\s*(?:(?P<offset>[+-]\s*{_SIZE})|\*\s*(?P<factor>{_SIZE}))?|(?P<number>[+-]?{_SIZE}))"
)


@dataclass(frozen=True)
class Condition:
    """A condition, parsed."""

    text: str
    name: str
    sampled: bool
    """Whether it is about sampled answers rather than greedy ones."""
    sign: str
    number: float
    """Bound, or offset from the dense model's figure."""
    against_dense: bool
    factor: float = 1.0
    """Factor of the dense model's figure."""

    @property
    def needs_dense(self) -> bool:
        """Whether it requires the dense model's answers, or measurements."""
        return self.against_dense or self.name in ALONG or self.name in BESIDE

    def holds(self, figure: float, dense: float | None) -> bool:
        """Return whether a figure meets the condition. dense: the dense model's figure, for relative conditions."""
        bound = self.number + self.factor * (dense or 0.0) if self.against_dense else self.number
        if self.sign == "<=":
            return figure <= bound
        if self.sign == ">=":
            return figure >= bound
        return figure < bound if self.sign == "<" else figure > bound


def read_conditions(text: str | None) -> tuple[Condition, ...]:
    """Read conditions with commas between them.

    Args:
        text: as it was given; None for none.

    Returns:
        The conditions, all of which have to hold.

    Raises:
        BadInput: one names no figure, or is not written as a condition.
    """
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    # A final comma is harmless.
    return tuple(map(_read, parts[:-1] if parts[1:] and not parts[-1] else parts))


def no_emptier(conditions: Sequence[Condition], beside_dense: bool) -> tuple[Condition, ...]:
    """Return what goes without saying wherever something is required: no answer is empty, or no more than the dense model's.

    Empty answers neither loop nor repeat, so they would pass most conditions. A condition on empty answers replaces this,
    for greedy and for sampled answers each.
    """
    said = {condition.sampled for condition in conditions if condition.name == "empty"}
    ways = sorted({condition.sampled for condition in conditions} - said)
    bound = "dense" if beside_dense else "0"
    return tuple(_read(f"{_SAMPLED}.empty<={bound}" if sampled else f"empty<={bound}") for sampled in ways)


def _read(text: str) -> Condition:
    found = _CONDITION.fullmatch(text)
    if found is None:
        fix = "write a figure, <, <=, > or >=, and a number, dense, dense+1 or dense*1.1: loops<=dense+1,kl<0.5"
        raise BadInput(f"{text!r} is not a condition", field="require", value=text, fix=fix)
    name, way = found["name"], found["way"]
    if name not in FIGURES and name not in ALONG and name not in MEASURED:
        raise unknown_name("figure", name, [*FIGURES, *ALONG, *MEASURED], field="require")
    if way not in (None, _SAMPLED):
        raise unknown_name("kind of answers", way, [_SAMPLED], field="require")
    if way is not None and (name in ALONG or name in MEASURED):
        fix, where = "leave out 'sampled.'", "the likeliest answers" if name in ALONG else "the data"
        raise BadInput(f"{name} is measured along {where}", field="require", value=text, fix=fix)
    dense = found["dense"] is not None
    if dense and (name in ALONG or name in BESIDE):
        fix = f"give a number, as in {name}{found['sign']}0.5"
        raise BadInput(f"{name} already compares with the dense model", field="require", value=text, fix=fix)
    number = found["offset"] if dense else found["number"]
    size, factor = float((number or "0").replace(" ", "")), float(found["factor"] or 1)
    return Condition(text, name, way is not None, found["sign"], size, against_dense=dense, factor=factor)
