"""Choose the tokens that stay: the weightiest, each with the tokens that it is made by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from coprune.base.errors import BadInput

ALIGN = 64
"""Products with a head of a multiple of so many rows are the fastest."""
Weights = NDArray[np.float64]


@dataclass(frozen=True)
class Kept:
    """The tokens that stay, by their ids before, which is how many rows each table keeps."""

    old: tuple[int, ...]
    """Old ids in ascending order; a token's new id is its index."""

    @cached_property
    def new(self) -> dict[int, int]:
        """New ids by old ones."""
        return {old: new for new, old in enumerate(self.old)}

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """The same as an array."""
        return np.asarray(self.old, dtype=np.int64)

    def below(self, size: int) -> int:
        """Return how many stay of a table's first so many rows."""
        return int(np.searchsorted(self.rows, size))


def choose(size: int, weights: Weights, essential: Iterable[int], parts: Callable[[int], Sequence[int] | None]) -> Kept:
    """Choose tokens until a size is full.

    Args:
        size: how many stay; a multiple of 64 below it, if one is as large as what has to stay.
        weights: of every token; what has none fills up by its id, since those of small ids are merged first.
        essential: ids that stay in any case.
        parts: what a token is made by; None for one that no text is cut into, which is left out.

    Raises:
        BadInput: what has to stay is more than that, or there are no more tokens than that.
    """
    kept = closure(essential, parts)
    size = possible(size, len(kept), len(weights))
    for number in np.lexsort((np.arange(len(weights)), -weights)):
        if len(kept) >= size:
            break
        token = int(number)
        if token in kept:
            continue
        made_by = parts(token)
        lacking = {token, *made_by} - kept if made_by is not None else set()
        if len(kept) + len(lacking) <= size:
            kept |= lacking
    if len(kept) < size and len(kept) % ALIGN:
        kept = _aligned(kept, weights, closure(essential, parts), parts)
    return Kept(tuple(sorted(kept)))


def possible(size: int, least: int, tokens: int) -> int:
    """Return how many tokens stay where a size is asked for: a multiple of 64, where that is enough.

    Args:
        size: as asked for.
        least: how many have to stay.
        tokens: how many there are.

    Raises:
        BadInput: there are no more, or more have to stay.
    """
    aligned = size // ALIGN * ALIGN
    size = aligned if aligned >= least else size
    if size < least:
        least = -(-least // ALIGN) * ALIGN
        cause = (
            f"{size:,} tokens are fewer than required ({least:,}: bytes, special tokens, and those that settings name)"
        )
        raise BadInput(cause, field="remove", value=f"vocabulary={size}", fix=f"keep {least:,} or more")
    if size >= tokens:
        cause = f"the vocabulary has only {tokens:,} tokens, not more than {size:,}"
        raise BadInput(cause, field="remove", value=f"vocabulary={size}", fix="keep fewer")
    return size


def closure(tokens: Iterable[int], parts: Callable[[int], Sequence[int] | None]) -> set[int]:
    """Return tokens with all that they are made by."""
    found = set(tokens)
    for token in list(found):
        found |= set(parts(token) or ())
    return found


def _aligned(
    kept: set[int], weights: Weights, essential: set[int], parts: Callable[[int], Sequence[int] | None]
) -> set[int]:
    """Return as many fewer as a multiple of 64 takes, where no more tokens can be reached; all if not even that is possible."""
    size = len(kept) // ALIGN * ALIGN
    return set(choose(size, weights, essential, parts).old) if size >= len(essential) else kept
