"""What a run takes over from others: only what is equal to the last bit, found in a store under keys of contents.

Nothing that depends on how a model is pruned is taken over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from coprune.recipe.parts import Decides
from coprune.recipe.recipe import Recipe
from coprune.run.memory_estimate import Estimate
from coprune.store.store import Key, Store, key_of

Tokens = TypeVar("Tokens")
Texts = dict[tuple[Hashable, ...], tuple[Any, float]]
"""Texts that a process has tokenised, with the seconds that it took."""
_TEXTS_KEPT = 16


@dataclass
class Saved:
    """Seconds of work that a run did not do again, by kind."""

    dense: float = 0.0
    tokens: float = 0.0
    estimate: float = 0.0
    statistics: float = 0.0


class KeptEstimate(BaseModel):
    """A bound of the memory of runs that take as much as each other."""

    model_config = ConfigDict(frozen=True)

    estimate: Estimate | None
    """None for models of images."""


@dataclass
class Reuse:
    """Where a run finds and leaves what others can use; by default everything is done anew."""

    store: Store = field(default_factory=lambda: Store(None))
    among_others: bool = False
    """Whether runs on the same model follow, for which statistics and estimates are kept as well."""
    texts: Texts | None = None
    """None to tokenise every text anew."""
    saved: Saved = field(default_factory=Saved)

    def tokens(self, model: str, key: tuple[Hashable, ...], read: Callable[[], Tokens]) -> Tokens:
        """Return text as token ids. model: its name; key: what decides them besides; read: tokenises the text."""
        if self.texts is None:
            return read()
        key = (model, *key)
        if key in self.texts:
            found, seconds = self.texts[key]
            self.saved.tokens += seconds
        else:
            started = time.perf_counter()
            found, seconds = read(), time.perf_counter() - started
            if len(self.texts) >= _TEXTS_KEPT:
                self.texts.pop(next(iter(self.texts)))
            self.texts[key] = found, seconds
        tokens: Tokens = found
        return tokens

    def estimate(self, recipe: Recipe, estimate: Callable[[], Estimate | None]) -> Estimate | None:
        """Return the memory that a run will take."""
        if not self.among_others:
            return estimate()
        key = estimate_key(recipe)
        if (kept := self.store.find(key, KeptEstimate)) is None:
            return self.store.get(key, KeptEstimate, lambda: KeptEstimate(estimate=estimate())).estimate
        self.saved.estimate += kept.seconds
        # The memory was checked before the run started.
        found = kept.record.estimate
        return None if found is None else replace(found, available_bytes=None)


def kept_estimate(recipe: Recipe, store: Store) -> KeptEstimate | None:
    """Return a stored estimate for runs like this one, or None."""
    found = store.find(estimate_key(recipe), KeptEstimate)
    return None if found is None else found.record


def estimate_key(recipe: Recipe) -> Key:
    """Return the key of runs that take as much memory as this one."""
    return key_of("estimate", 3, **recipe.deciding(Decides.COST))
