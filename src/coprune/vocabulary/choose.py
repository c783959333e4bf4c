"""Choice of the tokens to keep: those with the largest weights, each with the tokens it is merged from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from coprune.base.errors import BadInput

ALIGN = 64
"""Matrix products are fastest with a multiple of this many rows."""
Weights = NDArray[np.float64]


@dataclass(frozen=True)
class Kept:
    """The tokens to keep, by their old ids."""

    old: tuple[int, ...]
    """Old ids in ascending order; a token's new id is its index."""

    @cached_property
    def new(self) -> dict[int, int]:
        """New ids by old ones."""
        return {old: new for new, old in enumerate(self.old)}

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """The old ids as an array."""
        return np.asarray(self.old, dtype=np.int64)

    def below(self, size: int) -> int:
        """Return how many of a table's first `size` rows are kept."""
        return int(np.searchsorted(self.rows, size))


def choose(size: int, weights: Weights, essential: Iterable[int], parts: Callable[[int], Sequence[int] | None]) -> Kept:
    """Choose tokens until a size is full.

    Args:
        size: number of tokens to keep, rounded down to a multiple of 64 if that holds the essential ones.
        weights: of every token; those without fill up by id, since small ids are merged first.
        essential: ids that are always kept.
        parts: the tokens that one is merged from; None for one that no text produces, which is dropped.

    Raises:
        BadInput: the essential tokens do not fit, or the vocabulary is not larger than that.
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
    """Return the number of tokens to keep for a requested size: rounded down to a multiple of 64 if that is enough.

    Args:
        size: the requested size.
        least: number of essential tokens.
        tokens: size of the vocabulary.

    Raises:
        BadInput: the vocabulary is not larger, or the essential tokens do not fit.
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
    """Return tokens with all tokens they are merged from."""
    found = set(tokens)
    for token in list(found):
        found |= set(parts(token) or ())
    return found


def _aligned(
    kept: set[int], weights: Weights, essential: set[int], parts: Callable[[int], Sequence[int] | None]
) -> set[int]:
    """Return the tokens trimmed to a multiple of 64 if no more can be added; all of them if that is impossible."""
    size = len(kept) // ALIGN * ALIGN
    return set(choose(size, weights, essential, parts).old) if size >= len(essential) else kept
