"""An uneven budget found by evolution: steps move from block to block, and what is nearest to the dense model stays.

What was tried stands in the run's folder. The next try follows from that and the seed alone, so a killed search goes on as if
it had not been. Several processes make as many tries side by side, each with all of the calibration that is looked at.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from coprune.base.files import path_of, write_text
from coprune.pruning.structure.evolution import next_tries
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
        """What an earlier run of the same kind found, or nothing; the first process's answer for all."""
        found = session.opened.around.processes.from_first(lambda: cls._read(session))
        return found if session.opened.around.writes else replace(found, path=None)

    @classmethod
    def _read(cls, session: Session) -> Finds:
        opened = session.opened
        known = run_identity(opened.recipe, opened.loaded.fingerprint(session.model.blocks), opened.fingerprint)
        identity = hashlib.sha256(json.dumps(known.settings, sort_keys=True, default=str).encode()).hexdigest()
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


def search_steps(
    session: Session,
    asked: Search,
    levels: Sequence[Levels],
    first: Sequence[Steps],
    rest: tuple[Sequence[Sequence[int]], Sequence[int]],
) -> Steps:
    """Search for the steps with which the model stays nearest to the dense one; every process makes a try at a time.

    Args:
        session: of the run.
        asked: how long.
        levels: of every part.
        first: what is tried first.
        rest: numbers of the parts among which steps are exchanged, and numbers of the blocks that go.
    """
    finds, reporter, processes = Finds.of(session), session.opened.around.reporter, session.opened.around.processes
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
            count, best = len(finds.tried), finds.best[0] if finds.tried else None
            number = min(processes.size, asked.rounds - count) if asked.rounds else processes.size
            tries = first[count : count + number] or next_tries(finds.tried, rest[0], most, asked.seed, number)
            costs = processes.in_order([candidates.cost(steps, best) for steps in processes.own(tries)])
            took = processes.gather(time.perf_counter() - started)[0]
            finds.add([*zip(tries, costs, strict=True)], took)
        advance(1.0 - done)
    steps, cost = finds.best
    starts = ", ".join(f"{name} {found:.4f}" for name, (_, found) in zip(STARTS, finds.tried, strict=False))
    reporter.say(f"The best of {len(finds.tried)} tries: KL {cost:.4f} ({starts}).")
    return steps
