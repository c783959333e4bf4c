"""How much an answer repeats itself: the share of n-grams that are distinct, the longest repeat, and whether it loops.

All of it goes by token ids, since a loop repeats tokens, whatever they read as.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
        """How often it goes round."""
        return self.tokens / self.period


def distinct(tokens: Sequence[int], n: int) -> float:
    """Share of an answer's n-grams that are distinct (arXiv 1510.03055); 1 where there are none.

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
    """The longest tail whose tokens are, in SAME_SHARE of the places, those of one period before; with that period."""
    same = longest = 0
    for count, place in enumerate(range(len(tokens) - 1, period - 1, -1), start=1):
        if tokens[place] == tokens[place - period]:
            same += 1
            if same >= SAME_SHARE * count:
                longest = count
    return longest + period if longest else 0


def longest_repeat(tokens: Sequence[int]) -> int:
    """Tokens of the longest stretch anywhere in a text that says something at least twice in a row; 0 for none.

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
