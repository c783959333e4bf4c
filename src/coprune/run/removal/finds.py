"""What a search has tried, kept in the run's folder, so that a killed one goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from coprune.base.files import write_text
from coprune.pruning.evolution import Steps
from coprune.pruning.structure.spreading import Search
from coprune.run.journal import run_identity
from coprune.run.session import Session

FINDS_FILE = "search.json"
"""What a search has tried, in the run's folder."""


@dataclass
class Finds:
    """What was tried so far, and what it cost."""

    path: Path | None
    """Where that is kept; None where no folder is wanted."""
    identity: str
    """Of the recipe, the model and the data."""
    tried: list[tuple[Steps, float]] = field(default_factory=list)
    seconds: float = 0.0

    @classmethod
    def of(cls, session: Session) -> Finds:
        """What an earlier run of the same kind found, or nothing; the first process's answer for all."""
        found = session.opened.around.processes.from_first(lambda: cls._read(session))
        return found if session.opened.around.writes else replace(found, path=None)

    @classmethod
    def _read(cls, session: Session) -> Finds:
        opened = session.opened
        known = run_identity(opened.recipe, opened.loaded.fingerprint(session.model.blocks), opened.fingerprint)
        identity = hashlib.sha256(json.dumps(known.settings, sort_keys=True, default=str).encode()).hexdigest()
        found = cls(opened.recipe.run_folder / FINDS_FILE if opened.around.writes else None, identity)
        if found.path is not None and found.path.is_file():
            try:
                content: dict[str, Any] = json.loads(found.path.read_text(encoding="utf-8"))
                if content["identity"] == identity:
                    tried = [(tuple(steps), float(cost)) for steps, cost in content["tried"]]
                    found.tried, found.seconds = tried, float(content["seconds"])
            except (ValueError, KeyError, TypeError):
                return found  # somebody else's, or damaged: the search begins anew
        return found

    def add(self, tries: Sequence[tuple[Steps, float]], seconds: float) -> None:
        """Note tries that were made side by side, all at once, so that a killed search makes the same ones again."""
        self.tried += tries
        self.seconds += seconds
        if self.path is not None:
            content = {"identity": self.identity, "seconds": self.seconds, "tried": self.tried}
            write_text(self.path, json.dumps(content) + "\n")

    @property
    def best(self) -> tuple[Steps, float]:
        """The first of those that cost least."""
        return min(self.tried, key=lambda one: one[1])

    def share_done(self, asked: Search) -> float:
        """How much of the search is over; 1 at its end."""
        return min(1.0, self.seconds / (60 * asked.minutes) if asked.minutes else len(self.tried) / asked.rounds)

    def is_over(self, asked: Search) -> bool:
        """Whether nothing is left to be tried."""
        return bool(self.tried) and self.share_done(asked) >= 1.0
