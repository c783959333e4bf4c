"""The smallest vocabulary that loses no more than is allowed, and its proof on other text."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass

from coprune.base.errors import BadInput
from coprune.vocabulary.choose import ALIGN

_STEPS = 256
"""Sizes are told apart by one of so many parts of the vocabulary."""
_WIDER = 1.08
"""Factor by which a size grows if other text does not prove it."""


@dataclass(frozen=True)
class Found:
    """A size, and what it loses on the text that proves it."""

    size: int
    proven: float


def search(
    most: float,
    bounds: tuple[int, int],
    rise: Callable[[int], float],
    prove: Callable[[int], float],
    tries: MutableMapping[int, float],
    tried: Callable[[], None] = lambda: None,
) -> Found:
    """Find the smallest size by halving what is between one that loses too much and one that does not.

    Args:
        most: the rise of bits per byte that is allowed.
        bounds: the smallest size that can be, and the whole vocabulary.
        rise: what a size loses on the text that is searched on.
        prove: what it loses on other text.
        tries: what sizes lost, by size; those that are there are not tried again.
        tried: is called when one was added.

    Returns:
        The size; the next larger one where other text does not prove it.

    Raises:
        BadInput: only the whole vocabulary loses so little.
    """
    step = max(ALIGN, bounds[1] // _STEPS // ALIGN * ALIGN)
    low, high = bounds[0] // step, -(-bounds[1] // step)

    def loses(size: int) -> float:
        if size not in tries:
            tries[size] = rise(size)
            tried()
        return tries[size]

    while high - low > 1:
        middle = (low + high) // 2
        if loses(middle * step) <= most:
            high = middle
        else:
            low = middle
    size = high * step
    while size < bounds[1]:
        proven = prove(size)
        if proven <= most:
            return Found(size, proven)
        size = -(-int(size * _WIDER) // step) * step
    raise BadInput(
        f"no smaller vocabulary loses at most {most:.2%} on text that was held out",
        field="remove",
        value=f"vocabulary=loss:{most:g}",
        fix="allow more, or name a text with vocabulary_text that is more like what the model will read",
    )
