"""The store: a folder of results, each under a key made of everything that decides it.

A key holds contents (digests of files, values of settings) and no names, so an outdated result is never found. A result
is complete when its record exists. Of several processes that want the same one, one does the work and the others wait;
a killed one releases its claim and leaves its files in the result's folder for the next.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from coprune.base.environment import user_cache
from coprune.base.errors import BadInput
from coprune.base.files import require_usable
from coprune.store.claim import claimed
from coprune.store.notes import Note, Record, read_note, write_note


@dataclass(frozen=True)
class Key:
    """Identifier of a result: the step, and a digest of everything that decides it."""

    step: str
    digest: str

    def __str__(self) -> str:
        return f"{self.step}-{self.digest}"


def key_of(step: str, version: int, /, **contents: Any) -> Key:
    """Return the key of a result.

    Args:
        step: the name of the work, with which the result's file names begin.
        version: increased whenever the step changes, so that older results are no longer found.
        contents: everything that decides the result: settings, and digests of models and texts; serialised as JSON.
    """
    said = json.dumps([step, version, contents], sort_keys=True, default=str)
    return Key(step, hashlib.sha256(said.encode()).hexdigest()[:32])


class Store:
    """A folder of results; with None nothing is kept and everything is recomputed."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    @classmethod
    def of_user(cls) -> Store:
        """Return the user's own store, in XDG_CACHE_HOME or ~/.cache. Raises BadInput if that is not writable."""
        folder = user_cache() / "store"
        try:
            require_usable(folder)
        except BadInput as error:
            fix = "set XDG_CACHE_HOME to a folder that can be written to"
            raise BadInput(f"the cache {error.cause}", fix=fix) from error
        return cls(folder)

    @property
    def folder(self) -> Path | None:
        """Folder of the results and their files; None if nothing is kept."""
        return self._folder

    def find(self, key: Key, kind: type[Record]) -> Note[Record] | None:
        """Return a complete result with the seconds it took, or None."""
        return None if self._folder is None else read_note(self._record(key), kind)

    def get(self, key: Key, kind: type[Record], make: Callable[[], Record]) -> Record:
        """Return a complete result, made now if missing; an error in `make` leaves nothing."""
        if (found := self.find(key, kind)) is not None:
            return found.record
        with self.claim(key):
            if (found := self.find(key, kind)) is not None:  # another process made it meanwhile
                return found.record
            started = time.perf_counter()
            record = make()
            self.complete(key, record, time.perf_counter() - started)
            return record

    def get_sparing(self, key: Key, kind: type[Record], make: Callable[[], Record]) -> tuple[Record, float]:
        """Return a result like `get`, and the seconds that it took if it was complete before; 0 if it was made now."""
        if (found := self.find(key, kind)) is None:
            return self.get(key, kind, make), 0.0
        return found.record, found.seconds

    def seconds(self, step: str = "*") -> list[float]:
        """Return the seconds of each complete result of a step, by default of all steps."""
        found = (
            [] if self._folder is None else [read_note(file, BaseModel) for file in self._folder.glob(f"{step}-*.json")]
        )
        return [note.seconds for note in found if note is not None]

    @contextmanager
    def claim(self, key: Key) -> Iterator[None]:
        """Wait for the claim on a result and hold it within the body, for results made by several calls."""
        if self._folder is None:
            yield
            return
        with claimed(self._folder / f"{key}.lock"):
            yield

    def complete(self, key: Key, record: BaseModel, seconds: float = 0.0) -> None:
        """Record a result as complete; its files must be on disk by now."""
        if self._folder is not None:
            write_note(self._record(key), record, seconds)

    def _record(self, key: Key) -> Path:
        assert self._folder is not None
        return self._folder / f"{key}.json"
