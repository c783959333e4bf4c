"""A budget found by evolution: steps move from part to part, and what is nearest to the dense model stays.

What was tried stands in the run's folder. The next try follows from that and the seed alone, so a killed search goes on as if
it had not been. Several processes make as many tries side by side, each with all of the calibration that is looked at.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager

from coprune.pruning.evolution import Exchanges, Steps, next_tries
from coprune.pruning.structure.spreading import Search
from coprune.run.removal.candidates import Candidates
from coprune.run.removal.finds import Finds
from coprune.run.session import Session

STARTS = ("uniform", "error")
"""What is tried first."""


def search_steps(
    session: Session,
    asked: Search,
    finds: Finds,
    exchanges: Exchanges,
    first: Sequence[Steps],
    opened: AbstractContextManager[Candidates],
) -> Steps:
    """Search for the steps with which the model stays nearest to the dense one; every process makes a try at a time.

    Args:
        session: of the run.
        asked: how long.
        finds: what was tried before.
        exchanges: what may change places.
        first: what is tried first; may be left out where that was done.
        opened: what tells the cost of a budget, for as long as it is entered.
    """
    reporter, processes = session.opened.around.reporter, session.opened.around.processes
    if finds.tried:
        reporter.say(f"{len(finds.tried)} tries of the search were made by an earlier run.")
    with reporter.bar("Searching", 1.0) as advance, opened as candidates:
        done = 0.0
        while (share := finds.share_done(asked)) < 1.0:
            advance(share - done)
            started, done = time.perf_counter(), share
            count = len(finds.tried)
            number = min(processes.size, asked.rounds - count) if asked.rounds else processes.size
            starts = first[count : count + number]
            tries = starts or next_tries(finds.tried, exchanges, asked.seed, number)
            # What is tried first is looked at to the end; all else may be let go of as soon as it falls behind the best.
            best = None if starts else finds.best[0]
            costs = processes.in_order([candidates.cost(steps, best) for steps in processes.own(tries)])
            took = processes.gather(time.perf_counter() - started)[0]
            finds.add([*zip(tries, costs, strict=True)], took)
        advance(1.0 - done)
    return say_best(session, finds)


def say_best(session: Session, finds: Finds) -> Steps:
    """Tell of the best that was found, and return it."""
    steps, cost = finds.best
    starts = ", ".join(f"{name} {found:.4f}" for name, (_, found) in zip(STARTS, finds.tried, strict=False))
    session.opened.around.reporter.say(f"The best of {len(finds.tried)} tries: KL {cost:.4f} ({starts}).")
    return steps
