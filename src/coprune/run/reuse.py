"""Results that a run reuses from others: bit-identical ones only, stored under keys of their contents.

Nothing that depends on how a model is pruned is reused.
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
"""Texts that a process has tokenised, with the time taken in seconds."""
_TEXTS_KEPT = 16


@dataclass
class Saved:
    """Seconds that a run saved by reuse, by kind of work."""

    dense: float = 0.0
    tokens: float = 0.0
    estimate: float = 0.0
    statistics: float = 0.0


class KeptEstimate(BaseModel):
    """A memory bound shared by runs with the same needs."""

    model_config = ConfigDict(frozen=True)

    estimate: Estimate | None
    """None for image models."""


@dataclass
class Reuse:
    """Where a run finds and stores reusable results; by default nowhere."""

    store: Store = field(default_factory=lambda: Store(None))
    among_others: bool = False
    """Whether more runs on the same model follow, so that statistics and estimates are stored as well."""
    texts: Texts | None = None
    """None to tokenise every text again."""
    saved: Saved = field(default_factory=Saved)

    def tokens(self, model: str, key: tuple[Hashable, ...], read: Callable[[], Tokens]) -> Tokens:
        """Return text as token ids. model: its name; key: what else decides them; read: tokenises the text."""
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
        """Return the memory estimate of a run."""
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
    """Return the key shared by runs with the same memory needs."""
    return key_of("estimate", 3, **recipe.deciding(Decides.COST))
