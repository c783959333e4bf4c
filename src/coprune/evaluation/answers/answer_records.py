"""Answers of a model and figures of them, as data."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from pydantic import BaseModel, ConfigDict

from coprune.evaluation.measurement import Interval


def is_empty(text: str) -> bool:
    """Return whether a text has only white space and punctuation (including accents that stand alone)."""
    return not any((kind := unicodedata.category(letter))[0] in "LNS" and kind != "Sk" for letter in text)


class Facts(BaseModel):
    """Something that was found of answers."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")


class Answered(Facts):
    """One answer."""

    text: str
    tokens: tuple[int, ...]
    """Token ids, with the end token if the model ended the answer."""
    ended: bool
    """Whether the model ended the answer; otherwise it reached the limit."""
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
    """One model's greedy and sampled answers to the same prompts (none sampled: empty)."""

    greedy: tuple[Answered, ...]
    sampled: tuple[Answered, ...] = ()
    chat: bool = False
    """Whether the prompts were put in the tokenizer's chat template."""


class Along(Facts):
    """How close a model stays to the dense one along that one's answers: means over answers of means over their tokens."""

    kl: float
    """KL(dense ‖ this) in nats per token."""
    interval: Interval | None
    """95 % bootstrap interval over the answers."""
    acceptance: float
    """Σ min(p, q), with which speculative decoding accepts a draft token (arXiv 2211.17192)."""
    acceptance_interval: Interval | None = None


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
    """Length in tokens of the longest stretch in any answer that repeats a phrase at least twice in a row."""
    empty: int | None = None
    """None where a report was written before they were counted."""

    @classmethod
    def of(cls, answers: Sequence[Answered]) -> Figures:
        """Compute the figures of one or more answers."""
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
        """Compare answers to the same prompts in the same order."""
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
        """Summarise the answers of one way, or return None without any. dense: empty if there is no other model."""
        if not answers:
            return None
        likeness = Likeness.of(dense, answers) if dense else None
        return cls(figures=Figures.of(answers), dense=Figures.of(dense) if dense else None, likeness=likeness)


# Letters whose names begin with how they are drawn, before they say the script.
_DRAWN = {"FULLWIDTH", "HALFWIDTH", "MODIFIER", "MATHEMATICAL", "KATAKANA-HIRAGANA"}


def agreed_share(dense: Sequence[int], answer: Sequence[int]) -> float:
    """Return the share of the dense model's tokens before the first difference.

    Args:
        dense: token ids of the dense model's answer.
        answer: token ids of the other model's.

    Returns:
        Between 0 and 1; 1 if both answers are empty, 0 if only the dense model's is.
    """
    if not dense:
        return 0.0 if answer else 1.0
    same = 0
    for expected, found in zip(dense, answer, strict=False):
        if expected != found:
            break
        same += 1
    return same / len(dense)


def scripts(text: str) -> Counter[str]:
    """Count a text's letters by their script, as Unicode's names of them tell it: LATIN, CYRILLIC, CJK, ARABIC …

    Args:
        text: any text; what is no letter (digits, punctuation, marks) does not count.

    Returns:
        Letters of each script.
    """
    return Counter(script for letter in text if letter.isalpha() and (script := _script(letter)) is not None)


def _script(letter: str) -> str | None:
    words = unicodedata.name(letter, "").split()
    return next((word for word in words if word not in _DRAWN), None)


def script_agreement(dense: str, answer: str) -> float | None:
    """Return the overlap of two answers' distributions of letters over scripts.

    Args:
        dense: the dense model's answer.
        answer: the other model's.

    Returns:
        1 for the same mixture, 0 for no script in common or no letters in the answer; None if the dense one has no letters.
    """
    expected, found = scripts(dense), scripts(answer)
    if not expected:
        return None
    if not found:
        return 0.0
    all_expected, all_found = expected.total(), found.total()
    return sum(min(count / all_expected, found[script] / all_found) for script, count in expected.items())


# A loop is at least so many tokens long and says the same at least so often: "no, no, no" and the rule below the head of
# a table are none.
LEAST_TOKENS = 20
LEAST_TIMES = 3
# So many of a loop's tokens are those of one period before. Loops that count ("1. I like it. 2. I like it.") change a
# token each time round; rows of a table or a list of names change more.
SAME_SHARE = 0.9


@dataclass(frozen=True)
class Loop:
    """A text that ends by saying the same again and again."""

    period: int
    """Tokens that one time round takes."""
    tokens: int
    """Tokens at the end of the text that are in it."""

    @property
    def times(self) -> float:
        """Number of repetitions."""
        return self.tokens / self.period


def distinct(tokens: Sequence[int], n: int) -> float:
    """Return the share of an answer's n-grams that are distinct (arXiv 1510.03055); 1 without any.

    Args:
        tokens: the answer's token ids.
        n: length of an n-gram.

    Returns:
        Between 0 (exclusive) and 1.
    """
    found = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return len(set(found)) / len(found) if found else 1.0


def find_loop(tokens: Sequence[int], ended: bool = False) -> Loop | None:
    """Find the loop that a text is stuck in: its tail repeats with some period, often enough and long enough.

    Args:
        tokens: the text's token ids.
        ended: whether the text ended by itself. Then it is stuck in nothing; how much it repeated is told by
            `longest_repeat`.

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
    """Return the longest tail that repeats with some period in SAME_SHARE of its places, and that period."""
    same = longest = 0
    for count, place in enumerate(range(len(tokens) - 1, period - 1, -1), start=1):
        if tokens[place] == tokens[place - period]:
            same += 1
            if same >= SAME_SHARE * count:
                longest = count
    return longest + period if longest else 0


def longest_repeat(tokens: Sequence[int]) -> int:
    """Return the length in tokens of the longest stretch that repeats a phrase at least twice in a row; 0 for none.

    Args:
        tokens: the text's token ids.

    Returns:
        The length of the whole stretch, first saying included: 6 for "a b a b a b".
    """
    longest = 0
    for period in range(1, len(tokens) // 2 + 1):
        run = 0
        for place in range(period, len(tokens)):
            run = run + 1 if tokens[place] == tokens[place - period] else 0
            if run >= period:
                longest = max(longest, run + period)
    return longest
