"""An uneven budget found by evolution: steps move from block to block, and what is nearest to the dense model stays.

What was tried stands in the run's folder. The next try follows from that and the seed alone, so a killed search goes on as if
it had not been.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coprune.base.files import path_of, write_text
from coprune.pruning.structure.evolution import next_try
from coprune.pruning.structure.spreading import Search
from coprune.run.journal import run_identity
from coprune.run.removal.candidates import Candidates
from coprune.run.removal.steps import Levels, Steps
from coprune.run.session import Session

FINDS_FILE = "search.json"
"""What a search has tried, in the run's folder."""
STARTS = ("uniform", "by error")
"""What it tries first."""


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
        """What an earlier run of the same kind found, or nothing."""
        opened = session.opened
        known = run_identity(opened.recipe, opened.loaded.fingerprint(session.model.blocks), opened.fingerprint)
        identity = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()
        found = cls(path_of(opened.recipe.run_folder, FINDS_FILE) if opened.around.writes else None, identity)
        content: dict[str, Any] = {}
        if found.path is not None and found.path.is_file():
            try:
                content = json.loads(found.path.read_text(encoding="utf-8"))
            except ValueError:
                content = {}
        if content.get("identity") == identity:
            found.tried = [(tuple(steps), cost) for steps, cost in content["tried"]]
            found.seconds = content["seconds"]
        return found

    def add(self, steps: Steps, cost: float, seconds: float) -> None:
        """Note a try."""
        self.tried.append((steps, cost))
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


def search_steps(
    session: Session,
    asked: Search,
    levels: Sequence[Levels],
    first: Sequence[Steps],
    rest: tuple[Sequence[Sequence[int]], Sequence[int]],
) -> Steps:
    """Search for the steps with which the model stays nearest to the dense one.

    Args:
        session: of the run.
        asked: how long.
        levels: of every part.
        first: what is tried first.
        rest: numbers of the parts among which steps are exchanged, and numbers of the blocks that go.
    """
    finds, reporter = Finds.of(session), session.opened.around.reporter
    if finds.tried:
        reporter.say(f"{len(finds.tried)} tries of the search were made by an earlier run.")
    most = [len(own.counts) - 1 for own in levels]
    with (
        reporter.bar("Searching", 1.0) as advance,
        Candidates.of(session, levels, rest[1], asked.tokens) as candidates,
    ):
        done = 0.0
        while (share := finds.share_done(asked)) < 1.0:
            advance(share - done)
            started, done = time.perf_counter(), share
            count = len(finds.tried)
            steps = first[count] if count < len(first) else next_try(finds.tried, rest[0], most, asked.seed)
            cost = candidates.cost(steps, finds.best[0] if count else None)
            finds.add(steps, cost, time.perf_counter() - started)
        advance(1.0 - done)
    steps, cost = finds.best
    starts = ", ".join(f"{name} {found:.4f}" for name, (_, found) in zip(STARTS, finds.tried, strict=False))
    reporter.say(f"The best of {len(finds.tried)} tries: KL {cost:.4f} ({starts}).")
    return steps
