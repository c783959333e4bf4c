"""The time budget of a fit: time spent, expected time of steps, and the number of items it allows."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from pydantic import BaseModel

from coprune.base.errors import BadInput
from coprune.base.words import Set, Setting
from coprune.fitting.candidates import DENSE, EXACT, FOREIGN, Candidate
from coprune.fitting.fit_notes import Sizes, noted
from coprune.fitting.require import LOSING_HALF
from coprune.fitting.score import ANSWER_TOKENS
from coprune.fitting.tasks import LEAST_HALF, Task
from coprune.fitting.workshop import Workshop
from coprune.gguf_files.llama_cpp import tensor_kind
from coprune.gguf_files.types_by_tensor import seconds_to_round
from coprune.store.notes import write_note

EXACT_DENSE = Candidate(DENSE, EXACT)
_TRAINING_COST = 4.0
"""Time per token of training relative to reading: two models forward, one backward, in float32."""
_READING, _OWN = 0.1, 0.05
"""Shares of the budget for reading all items with the dense model, and for generating its own text."""
_PROVING = 0.25
"""Share for reading them if fewer could prove only a model that loses almost nothing."""
_DISTILLED_SHARE = 0.3
"""Share of the remaining budget for one distillation."""
DISTILLED = (8_192, 262_144)
"""Minimum and maximum tokens of a distillation."""
_GRIDS = 2.0
"""Safety factor for types that search a grid: on rows with importances of very different sizes some took 15 times as long."""
_PROBED = 4
"""Items of a task that are timed before the number of items is chosen."""


class Paces(BaseModel):
    """Seconds of the dense model: to load it, and per item by the task's key."""

    opened: float
    items: dict[str, float]


class Budget:
    """The time budget of a fit. Time spent before a kill counts if its results were stored."""

    def __init__(self, workshop: Workshop, seconds: float, workers: int) -> None:
        """Create a budget. workshop: records the time spent; seconds: for the whole fit; workers: parallel candidates."""
        self._workshop, self.seconds, self._workers = workshop, seconds, workers

    @property
    def elapsed(self) -> float:
        """Seconds spent so far."""
        return self._workshop.spent / self._workers

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.seconds - self.elapsed

    @property
    def own(self) -> float:
        """Seconds for generating the model's own text."""
        return _OWN * self.seconds

    def until(self, proof: float, share: float = 1.0) -> float:
        """Return the deadline, in `time.perf_counter()`, for a share of the time until `proof` seconds for the final test."""
        return time.perf_counter() + share * (self.left - proof)

    @property
    def _reads(self) -> float:
        """Training speed in tokens per second."""
        return self._workshop.known(EXACT_DENSE).speed / _TRAINING_COST

    @property
    def _half(self) -> float:
        return self._workshop.known(EXACT_DENSE).seconds / 2

    def _reading(self, candidate: Candidate) -> float:
        """Return the expected seconds of measuring one half: by the items measured so far, at most those of the dense model."""
        known, tasks = self._workshop.known(candidate), self._workshop.asked.tasks
        measured = sum(map(known.items, tasks))
        if not measured:
            return self._half
        half = sum(map(self._workshop.known(EXACT_DENSE).items, tasks)) / 2
        return min(self._half, known.seconds * half / measured)

    def proof(self, candidates: Sequence[Candidate]) -> float:
        """Return the expected seconds of the final test of some candidates, and of writing the result."""
        return sum(map(self._reading, candidates)) + self._workshop.making.took_to_make(EXACT_DENSE)

    def expected(self, candidate: Candidate, tried: Sequence[Candidate]) -> float:
        """Return the expected seconds of making and measuring a candidate, from candidates tried or from the dense model."""
        workshop, made = self._workshop, 0.0
        if candidate.type != FOREIGN:
            own = [one for one in (candidate, *tried) if one.type != FOREIGN]
            made = max(workshop.making.took_to_make(one) * _work(candidate) / _work(one) for one in own)
        read = max(map(self._reading, tried), default=self._half)
        if candidate.cut == DENSE:
            return made + read
        cut = 0.0 if workshop.making.is_made(candidate.cut) else workshop.making.expected_to_cut(candidate.cut)
        continued = 2 * ANSWER_TOKENS * sum(len(task.seen) for task in workshop.asked.writing)
        tokens = _TRAINING_COST * candidate.cut.tokens + continued
        return made + read + cut + tokens / workshop.known(EXACT_DENSE).speed

    def distilled(self) -> int:
        """Return the number of tokens for distillation that fits the budget, or that of an earlier call; 0 if too few fit.

        It is estimated from the dense model's reading speed and rounded down to a power of two, so that a few seconds more
        or less do not change it.
        """
        file = self._workshop.folder / "text" / "distilled.json"
        if tokens := noted(file, Sizes, {}).get("tokens", 0):
            return tokens
        carried, (least, most) = _DISTILLED_SHARE * self.left * self._reads, DISTILLED
        found = 0 if carried < least else min(most, 1 << (int(carried).bit_length() - 1))
        write_note(file, Sizes({"tokens": found}))
        return found

    def refuse(self, seconds: float) -> None:
        """Raise BadInput if the budget is too short for the next required work. seconds: of that work."""
        needed = self.elapsed + seconds
        if needed > self.seconds:
            cause = f"the budget of {self.seconds / 60:.3g} minutes is too short for one candidate"
            fix = (
                f"the minimum is about {needed / 60:.1f} minutes, and a search takes several times as long: use ",
                Set("budget", f"{math.ceil(3 * needed / 60)}m"),
                ", or fewer items with ",
                Setting("items"),
            )
            raise BadInput(cause, field="budget", value=self.seconds / 60, fix=fix)

    def affordable_tasks(self, least: Mapping[str, int]) -> tuple[Task, ...]:
        """Return the tasks with as many items as the budget allows, the first in their seeded order.

        Items used by an earlier call are kept. A few items are timed with the dense model.

        Args:
            least: minimum number of unseen items for a proof of a model that loses nothing, by the task's key.

        Raises:
            BadInput: the budget is too short for one candidate on these items.
        """
        workshop, tasks = self._workshop, self._workshop.asked.tasks
        file = workshop.folder / "text" / "items.json"
        before = noted(file, Sizes, {})
        if (paces := self._paces()) is None:
            return tasks
        wanted, left = dict[str, int](), _READING * self.seconds
        by_time = sorted(tasks, key=lambda task: paces.items[task.key] * len(task.unseen))
        for number, task in enumerate(by_time):  # longer tasks get what shorter ones leave of their share
            share = int(left / (len(tasks) - number) / (2 * paces.items[task.key]))
            proving = int(_PROVING * self.seconds / len(tasks) / (2 * paces.items[task.key]))
            useful = max(share, least[task.key], min(LOSING_HALF * least[task.key], proving))
            whole = max(len(task.seen), len(task.unseen))
            wanted[task.key] = min(whole, max(useful, LEAST_HALF, before.get(task.key, 0)))
            left = max(0.0, left - 2 * paces.items[task.key] * wanted[task.key])
        found = tuple(_first(task, wanted[task.key]) for task in tasks)
        places = {task.name: [*task.seen, *task.unseen] for task in found}
        known = workshop.known(EXACT_DENSE)
        missing = {task.key: len(known.missing(task, places[task.name])) for task in found}
        if any(missing.values()):
            reading = paces.opened + sum(paces.items[key] * count for key, count in missing.items())
            one = paces.opened + sum(paces.items[task.key] * len(places[task.name]) for task in found)
            self.refuse(reading + one + workshop.making.took_to_make(EXACT_DENSE))
        for task, all_items in zip(found, tasks, strict=True):
            there, all_of = len(places[task.name]), len(all_items.seen) + len(all_items.unseen)
            if there < all_of:
                what = f"Using {there:,} of {all_of:,} items of {task.name}, chosen by the seed, to fit the budget of"
                workshop.reporter.say_once(f"{what} {self.seconds / 60:.3g} minutes")
        write_note(file, Sizes(wanted))
        return found

    def _paces(self) -> Paces | None:
        """Time a few items of each task with the dense model, once; None if it cannot be loaded."""
        workshop, key = self._workshop, self._workshop.key("fit-paces")
        if (note := workshop.store.find(key, Paces)) is not None:
            return note.record
        opened = workshop.measure(EXACT_DENSE, {})
        if opened.refused:
            return None
        self.refuse(opened.seconds)
        workshop.paces.clear()
        places = {task.name: task.seen[:_PROBED] for task in workshop.asked.tasks}
        workshop.measure(EXACT_DENSE, places)
        # Only the total time is known for items that were measured before a kill.
        usual = workshop.known(EXACT_DENSE).seconds / sum(map(len, places.values()))
        items = {task.key: max(1e-6, workshop.paces.get(task.key, usual)) for task in workshop.asked.tasks}
        found = Paces(opened=opened.seconds, items=items)
        workshop.store.complete(key, found)
        return found


def _first(task: Task, count: int) -> Task:
    """Return a task with the first items of each half, up to a number of different ones."""

    def of(places: Sequence[int]) -> tuple[int, ...]:
        apart = task.apart(places)
        return tuple(places) if count >= len(apart) else tuple(places[: places.index(apart[count])])

    return replace(task, seen=of(task.seen), unseen=of(task.unseen))


def _work(candidate: Candidate) -> float:
    """Return the mean time that a processor needs to quantise a weight to a candidate's types."""
    if candidate.type == EXACT:
        return 1.0
    kinds = dict(candidate.types).values() or (tensor_kind(candidate.type),)
    return fmean(seconds_to_round(kind) * (_GRIDS if kind.startswith(("iq1", "iq2", "iq3")) else 1.0) for kind in kinds)
