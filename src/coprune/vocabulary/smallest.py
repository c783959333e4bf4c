"""Search for the smallest vocabulary within an allowed loss, and its proof on other text."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass

from coprune.base.errors import BadInput
from coprune.vocabulary.choose import ALIGN

_STEPS = 256
"""Resolution of the search, as a fraction of the vocabulary."""
_WIDER = 1.08
"""Factor by which a size grows if other text does not prove it."""


@dataclass(frozen=True)
class Found:
    """A size with its loss on the proof text."""

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
    """Find the smallest size by bisection between one that loses too much and one that does not.

    Args:
        most: the allowed rise of bits per byte.
        bounds: the smallest possible size, and that of the full vocabulary.
        rise: returns a size's loss on the search text.
        prove: returns its loss on other text.
        tries: known losses by size, which are not measured again.
        tried: called after each new try.

    Returns:
        The size, increased until the other text proves it.

    Raises:
        BadInput: no smaller vocabulary meets the allowed loss.
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
        f"no smaller vocabulary loses at most {most:.2%} on held-out text",
        field="remove",
        value=f"vocabulary=loss:{most:g}",
        fix="allow more, or name a text with vocabulary_text that is closer to what the model will read",
    )
