"""Answers of a model and figures of them, as data."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from statistics import fmean

from pydantic import BaseModel, ConfigDict

from coprune.evaluation.answers.likeness import agreed_share, script_agreement
from coprune.evaluation.answers.repetition import distinct, find_loop, longest_repeat
from coprune.evaluation.measurement import Interval


def is_empty(text: str) -> bool:
    """Whether a text says nothing: white space and punctuation at most (accents that stand alone are such, too)."""
    return not any((kind := unicodedata.category(letter))[0] in "LNS" and kind != "Sk" for letter in text)


class Facts(BaseModel):
    """Something that was found of answers."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")


class Answered(Facts):
    """One answer."""

    text: str
    tokens: tuple[int, ...]
    """With the mark that ended it, if it ended by itself."""
    ended: bool
    """Whether the model ended it, or the limit did."""
    seconds: float

    @property
    def loops(self) -> bool:
        """Whether it is stuck in a loop."""
        return find_loop(self.tokens, self.ended) is not None

    @property
    def empty(self) -> bool:
        """Whether it says nothing."""
        return is_empty(self.text)


class Answers(Facts):
    """One model's answers to the same prompts, the likeliest ones and sampled ones (empty where none were sampled)."""

    greedy: tuple[Answered, ...]
    sampled: tuple[Answered, ...] = ()
    chat: bool = False
    """Whether the prompts were put in the tokenizer's chat template."""


class Along(Facts):
    """Divergence from the dense model along its own answers."""

    kl: float
    """KL(dense ‖ this) in nats per token, the mean over answers of the mean over their tokens."""
    interval: Interval | None
    """95 % bootstrap interval over the answers."""


class Figures(Facts):
    """Figures of one model's answers: counts, and means over the answers."""

    answers: int
    loops: int
    ended: int
    tokens: float
    seconds: float
    distinct1: float
    distinct2: float
    distinct3: float
    repeat: int
    """Of all answers the longest stretch that says something at least twice in a row, in tokens."""
    empty: int | None = None
    """None where a report was written before they were counted."""

    @classmethod
    def of(cls, answers: Sequence[Answered]) -> Figures:
        """Of one answer or more."""
        shares = {f"distinct{n}": fmean(distinct(answer.tokens, n) for answer in answers) for n in (1, 2, 3)}
        return cls(
            answers=len(answers),
            loops=sum(answer.loops for answer in answers),
            ended=sum(answer.ended for answer in answers),
            empty=sum(answer.empty for answer in answers),
            tokens=fmean(len(answer.tokens) for answer in answers),
            seconds=fmean(answer.seconds for answer in answers),
            repeat=max(longest_repeat(answer.tokens) for answer in answers),
            **shares,
        )


class Likeness(Facts):
    """Figures of one model's answers against another's: means over the answers."""

    length: float | None
    """Mean tokens over the other's; None where that says nothing."""
    agreed: float
    """Share of the other's tokens before the first difference."""
    script: float | None
    """Share of letters in the other's scripts; None where it wrote no letters."""

    @classmethod
    def of(cls, dense: Sequence[Answered], answers: Sequence[Answered]) -> Likeness:
        """Of answers to the same prompts in the same order."""
        pairs = list(zip(dense, answers, strict=True))
        written = [script_agreement(one.text, other.text) for one, other in pairs]
        known = [share for share in written if share is not None]
        before, after = (sum(len(answer.tokens) for answer in side) for side in (dense, answers))
        return cls(
            length=after / before if before else None,
            agreed=fmean(agreed_share(one.tokens, other.tokens) for one, other in pairs),
            script=fmean(known) if known else None,
        )


class Way(Facts):
    """Answers of one way of choosing tokens, of a model and of the one that it is compared with."""

    figures: Figures
    dense: Figures | None = None
    likeness: Likeness | None = None

    @classmethod
    def of(cls, dense: Sequence[Answered], answers: Sequence[Answered]) -> Way | None:
        """None where nothing was answered this way. dense: empty if there is no other model."""
        if not answers:
            return None
        likeness = Likeness.of(dense, answers) if dense else None
        return cls(figures=Figures.of(answers), dense=Figures.of(dense) if dense else None, likeness=likeness)
