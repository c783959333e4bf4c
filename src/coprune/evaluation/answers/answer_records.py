"""Answers of a model and figures of them, as data."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from pydantic import BaseModel, ConfigDict

from coprune.evaluation.measurement import Interval


def is_empty(text: str) -> bool:
    """Return whether a text has only white space and punctuation (including standalone accents)."""
    return not any((kind := unicodedata.category(letter))[0] in "LNS" and kind != "Sk" for letter in text)


class Facts(BaseModel):
    """Base class of facts about answers."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")


class Answered(Facts):
    """One answer."""

    text: str
    tokens: tuple[int, ...]
    """Token ids, with the end token if the model ended the answer."""
    ended: bool
    """Whether the model ended the answer before the limit."""

    @property
    def loops(self) -> bool:
        """Whether it is stuck in a loop."""
        return find_loop(self.tokens, self.ended) is not None

    @property
    def empty(self) -> bool:
        """Whether it has no words."""
        return is_empty(self.text)


class Answers(Facts):
    """One model's greedy and, optionally, sampled answers to the same prompts."""

    greedy: tuple[Answered, ...]
    sampled: tuple[Answered, ...] = ()
    chat: bool = False
    """Whether the prompts used the tokenizer's chat template."""


class Along(Facts):
    """Closeness to the dense model along its answers: means over answers of means over tokens."""

    kl: float
    """KL(dense ‖ this) in nats per token."""
    interval: Interval | None
    """95 % bootstrap interval over the answers."""
    acceptance: float
    """Σ min(p, q), the acceptance rate of speculative decoding (arXiv 2211.17192)."""
    acceptance_interval: Interval | None = None


class Figures(Facts):
    """Figures of one model's answers: counts, and means over the answers."""

    answers: int
    loops: int
    ended: int
    empty: int
    tokens: float

    @classmethod
    def of(cls, answers: Sequence[Answered]) -> Figures:
        """Compute the figures of one or more answers."""
        return cls(
            answers=len(answers),
            loops=sum(answer.loops for answer in answers),
            ended=sum(answer.ended for answer in answers),
            empty=sum(answer.empty for answer in answers),
            tokens=fmean(len(answer.tokens) for answer in answers),
        )


class Way(Facts):
    """Figures of one way of choosing tokens, for a model and its reference."""

    figures: Figures
    dense: Figures | None = None

    @classmethod
    def of(cls, dense: Sequence[Answered], answers: Sequence[Answered]) -> Way | None:
        """Summarise the answers of one way, or return None if there are none. dense: empty without a reference."""
        if not answers:
            return None
        return cls(figures=Figures.of(answers), dense=Figures.of(dense) if dense else None)


# A loop has at least this many tokens and repetitions, so that "no, no, no" and the rule below a table's head do not count.
LEAST_TOKENS = 20
LEAST_TIMES = 3
# Share of a loop's tokens that equal those one period earlier. Loops that count ("1. I like it. 2. I like it.") change a
# token per repetition; rows of a table or a list of names change more.
SAME_SHARE = 0.9


@dataclass(frozen=True)
class Loop:
    """A repetition at the end of a text."""

    period: int
    """Tokens per repetition."""
    tokens: int
    """Tokens of the loop, at the end of the text."""

    @property
    def times(self) -> float:
        """Number of repetitions."""
        return self.tokens / self.period


def find_loop(tokens: Sequence[int], ended: bool = False) -> Loop | None:
    """Find the loop that a text is stuck in: a tail that repeats often enough and is long enough.

    Args:
        tokens: the text's token ids.
        ended: whether the text ended by itself; then it has no loop.

    Returns:
        The loop of the shortest period; None if there is none.
    """
    if ended:
        return None
    for period in range(1, len(tokens) // LEAST_TIMES + 1):
        length = _repeating_tail(tokens, period)
        if length >= max(LEAST_TIMES * period, LEAST_TOKENS):
            return Loop(period, length)
    return None


def _repeating_tail(tokens: Sequence[int], period: int) -> int:
    """Return the length of the longest tail that repeats with a period in at least SAME_SHARE of its positions."""
    same = longest = 0
    for count, place in enumerate(range(len(tokens) - 1, period - 1, -1), start=1):
        if tokens[place] == tokens[place - period]:
            same += 1
            if same >= SAME_SHARE * count:
                longest = count
    return longest + period if longest else 0
