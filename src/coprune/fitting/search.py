"""The search: plain quants first, then fewer tokens and parts, each only where it would be smaller than the best so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from coprune.base.errors import BadInput
from coprune.base.files import write_text
from coprune.base.words import Setting
from coprune.fitting.bounds import bounds_of
from coprune.fitting.candidates import (
    DENSE,
    EMBEDDINGS,
    STRUCTURES,
    TYPES,
    VOCABULARIES,
    Candidate,
    Cut,
)
from coprune.fitting.reader import Reader
from coprune.fitting.require import Condition, Held, Verdict
from coprune.fitting.score import answer_text
from coprune.fitting.tasks import METRICS_OF, Task
from coprune.fitting.team import Team
from coprune.fitting.workshop import EXACT, Measured, Workshop

Target = Literal["size", "speed", "memory"]
EXACT_DENSE = Candidate(DENSE, EXACT)
_RUNGS = (4, 2)
"""Parts of the seen items that losers are dropped on."""
_ALIGN = 64
_DISTILLED_SHARE = 0.3
"""Share of the remaining budget for one distillation."""
_DISTILLED = (8_192, 262_144)
"""Tokens of a distillation at least and at most."""
_TRAINING_COST = 4.0
"""Time of a token in training over one in reading: two models forward, one backward, in float32."""


@dataclass(frozen=True)
class Wish:
    """The user's requirements, target and time budget."""

    conditions: tuple[Condition, ...]
    target: Target = "size"
    budget: float = 3600.0
    """Seconds."""
    without: tuple[str, ...] = ()
    """Kinds of changes that are left out."""
    types: tuple[str, ...] = TYPES


@dataclass
class Finding:
    """The result of a search."""

    chosen: Candidate
    held: list[Held]
    """Conditions on the unseen half."""
    kept: bool
    plain: Candidate | None
    """The best plain quant that passed on the seen half."""
    tried: list[Candidate] = field(default_factory=list)
    unseen: dict[Candidate, list[Held]] = field(default_factory=dict)
    out_of_time: bool = False


class OutOfTime(Exception):
    """The budget leaves no time for what would come next."""


class Search:
    """Looks for the cheapest candidate that keeps what is required."""

    def __init__(self, workshop: Workshop, wish: Wish, team: Team) -> None:
        """Raises BadInput where a condition is about no task, or a task has none."""
        self.workshop, self.wish, self.tasks = workshop, wish, workshop.asked.tasks
        self._team = team
        self.tried: dict[Candidate, Measured] = {}
        self._vocabulary = len(workshop.tokenizer)
        self._longest = 0.0
        self._to_prove = 1
        for condition in wish.conditions:
            if not any(condition.metric in METRICS_OF[task.kind] for task in self.tasks):
                kinds = ", ".join(sorted({task.kind for task in self.tasks}))
                cause = f"{condition.text} is about no task: there are items of the kind {kinds}"
                raise BadInput(cause, field="require", value=condition.text, fix="leave it out, or add such a task")
        for task in self.tasks:
            if not any(condition.metric in METRICS_OF[task.kind] for condition in wish.conditions):
                cause = f"nothing is required of {task.name}"
                fix = ("add a condition on ", " or ".join(METRICS_OF[task.kind]), " to ", Setting("require"))
                raise BadInput(cause, field="require", fix=fix)

    def measure_dense(self) -> Measured:
        """Measure the dense model on both halves. Raises BadInput where it keeps nothing, or items cannot tell."""
        self.workshop.prepare()
        found = self.workshop.measure(EXACT_DENSE, {task.name: [*task.seen, *task.unseen] for task in self.tasks})
        if found.refused:
            raise BadInput(
                f"the dense model cannot be measured: {found.refused}", field="model", value=self.workshop.asked.model
            )
        for task in self.tasks:
            self._refuse_chance(task, found)
        for condition, task in self._pairs():
            self._refuse_few(condition, task, found)
        return found

    def _refuse_chance(self, task: Task, dense: Measured) -> None:
        if "accuracy" not in METRICS_OF[task.kind]:
            return
        places = [*task.seen, *task.unseen]
        right = dense.of(task, "accuracy", places)
        share = sum(right) / len(right)
        if task.kind == "answer" and not any(right):
            item, reader = task.items[places[0]], self._dense_reader()
            cause = f"none of the dense model's {len(right)} answers to {task.name} matches"
            said = (
                f"{answer_text(reader, item).strip()[:60]!r} was written where {item.regex or item.answer!r} is right"
            )
            raise BadInput(cause, field="task", value=task.name, fix=f"{said}; give examples in the prompt, or a regex")
        if task.kind == "choice":
            above = [value - 1 / len(task.items[place].choices) for value, place in zip(right, places, strict=True)]
            if bounds_of(above).low <= 0:
                cause = (
                    f"the dense model's accuracy on {task.name}, {share:.3f}, is not above chance ({task.chance:.3f})"
                )
                fix = "there is nothing to keep: take another model, prompts that it understands, or more items"
                raise BadInput(cause, field="task", value=task.name, fix=fix)

    def _dense_reader(self) -> Reader:
        return self.workshop.reader(self.workshop.file(EXACT_DENSE), DENSE)

    def _refuse_few(self, condition: Condition, task: Task, dense: Measured) -> None:
        figures = dense.of(task, condition.metric, task.unseen)
        least = condition.least_items(figures)
        if least is None:
            cause = f"the dense model itself does not keep {condition.text} on {task.name} ({sum(figures) / len(figures):.3f})"
            raise BadInput(cause, field="require", value=condition.text, fix="require less")
        if least > len(figures):
            cause = (
                f"{task.name} has too few items to tell {condition.text}: even a model with the same answers would need "
                f"{2 * least} (half of them unseen), and there are {len(task.seen) + len(task.unseen)}"
            )
            raise BadInput(cause, field="task", value=task.name, fix="add items, or require less")

    def _pairs(self) -> list[tuple[Condition, Task]]:
        return [
            (condition, task)
            for condition in self.wish.conditions
            for task in self.tasks
            if condition.metric in METRICS_OF[task.kind]
        ]

    @property
    def _elapsed(self) -> float:
        """Seconds since the beginning, as far as they led to something: the same after a kill."""
        return self.workshop.spent / self._team.count

    @property
    def _proof(self) -> float:
        """Seconds that the last word takes: as many as the dense model took for that half, a candidate."""
        return self._to_prove * self.workshop.known(EXACT_DENSE).seconds / 2

    def _measure(self, pool: Sequence[Candidate], wanted: Mapping[str, Sequence[int]]) -> None:
        """Measure candidates, each if the budget has time for as much as the longest so far. Raises OutOfTime after the last."""
        for first in range(0, len(pool), self._team.count):
            together = pool[first : first + self._team.count]
            anew = [one for one in together if self._is_new(one, wanted)]
            if anew and self.tried and self._elapsed + self._longest + self._proof > self.wish.budget:
                raise OutOfTime
            spent = self.workshop.spent
            if self._team.alone:
                for candidate in anew:
                    self.workshop.measure(candidate, wanted)
            elif anew:
                self._team.measure(self.workshop, anew, wanted)
            self._longest = max(self._longest, self.workshop.spent - spent)
            self.tried |= {one: self.workshop.known(one) for one in together}

    def _is_new(self, candidate: Candidate, wanted: Mapping[str, Sequence[int]]) -> bool:
        known = self.workshop.known(candidate)
        return not known.refused and (not known.bytes or bool(self._missing(known, wanted)))

    def _missing(self, known: Measured, wanted: Mapping[str, Sequence[int]]) -> list[int]:
        return [
            place
            for name, places in wanted.items()
            for place in places
            if place not in next(iter(known.scores.get(name, {}).values()), {})
        ]

    def _seen(self, part: int = 1) -> dict[str, list[int]]:
        return {task.name: [*task.seen[: max(1, len(task.seen) // part)]] for task in self.tasks}

    def cost(self, found: Measured) -> float:
        """Return the target quantity of a candidate, which is minimised."""
        return {"size": float(found.bytes), "memory": float(found.memory), "speed": -found.speed}[self.wish.target]

    def judged(self, candidate: Candidate, places: Mapping[str, Sequence[int]]) -> list[Held]:
        """Test all conditions on some items."""
        found, dense = self.workshop.known(candidate), self.workshop.known(EXACT_DENSE)
        return [
            condition.judge(*(one.of(task, condition.metric, places[task.name]) for one in (found, dense)))
            for condition, task in self._pairs()
        ]

    def judged_so_far(self, candidate: Candidate) -> list[Held]:
        """Test all conditions on the items of the seen half measured so far; empty without any."""
        known = self.workshop.known(candidate)
        places = {
            name: [one for one in own if not self._missing(known, {name: [one]})] for name, own in self._seen().items()
        }
        return self.judged(candidate, places) if all(places.values()) else []

    def _contest(self, pool: Sequence[Candidate], best: Candidate | None) -> Candidate | None:
        """Return the cheapest that is proven to keep everything on the seen half, if it is cheaper than the best so far.

        Losers are dropped on a part of the items first.
        """
        most = None if best is None else self.cost(self.tried[best])
        self._measure(pool, {})
        left = []
        for candidate in pool:
            found = self.tried[candidate]
            if found.refused or (most is not None and self.cost(found) >= most):
                self.workshop.drop(candidate)
            else:
                left.append(candidate)
        left.sort(key=lambda one: self.cost(self.tried[one]))
        for part in _RUNGS:
            left = self._not_lost(left, self._seen(part))
        for candidate in left:
            self._measure([candidate], self._seen())
            if verdict_of(self.judged(candidate, self._seen())) is Verdict.KEPT:
                return candidate
            self.workshop.drop(candidate)
        return None

    def _not_lost(self, pool: Sequence[Candidate], places: Mapping[str, Sequence[int]]) -> list[Candidate]:
        self._measure(pool, places)
        lost = [one for one in pool if verdict_of(self.judged(one, places)) is Verdict.LOST]
        for candidate in lost:
            self.workshop.drop(candidate)
        return [one for one in pool if one not in lost]

    def run(self) -> Finding:
        """Search, and judge the best on the unseen half. Raises BadInput where the budget is too short for one candidate."""
        self.measure_dense()
        spent = self.workshop.spent
        begun = any(self.workshop.known(Candidate(DENSE, one)).bytes for one in self.wish.types)
        if spent >= self.wish.budget and not begun:
            cause = f"the budget of {self.wish.budget / 60:.3g} minutes is too short for one candidate"
            fix = f"the dense model alone took {spent / 60:.1f} minutes: allow several times as many, or fewer items"
            raise BadInput(cause, field="budget", value=self.wish.budget / 60, fix=fix)
        winners, timely = list[Candidate](), True
        try:
            self._climb(winners)
        except OutOfTime:
            timely = False
        return self._proven(winners, not timely)

    def _climb(self, winners: list[Candidate]) -> None:
        """Collect what passes, each cheaper than the one before."""
        plain = [Candidate(DENSE, one) for one in self.wish.types]
        if (best := self._contest(plain, None)) is not None:
            winners.append(best)
            self._to_prove += 1
        base = best or plain[0]
        for pool in (self._embeddings, self._vocabularies, self._structures):
            if (better := self._contest(pool(base), best)) is not None:
                best = base = better
                winners.append(better)
                self._to_prove += 1

    def _embeddings(self, base: Candidate) -> list[Candidate]:
        if "embedding" in self.wish.without:
            return []
        near = [base.type, *self._lower(base.type)]
        return [replace(base, type=one, embedding=stored) for one in near for stored in EMBEDDINGS]

    def _lower(self, kind: str) -> list[str]:
        """Return the next type with fewer bits, or None."""
        types = [*self.wish.types]
        return types[types.index(kind) + 1 :][:1] if kind in types else []

    def _vocabularies(self, base: Candidate) -> list[Candidate]:
        if "vocabulary" in self.wish.without:
            return []
        sizes = [int(share * self._vocabulary) // _ALIGN * _ALIGN for share in VOCABULARIES]
        return [base.of(Cut((f"vocabulary={size}",))) for size in sizes if size]

    def _structures(self, base: Candidate) -> list[Candidate]:
        asked = [one for one in STRUCTURES if one.partition("=")[0] not in self.wish.without]
        tokens = self._distilled()
        return [base.of(Cut((*base.cut.removed, one), tokens)) for one in asked] if tokens else []

    def _distilled(self) -> int:
        """Return the tokens of a distillation that fits the time budget; 0 for too few.

        By what reading them takes the dense model, in powers of two, so that a few seconds more or less change nothing.
        """
        file = self.workshop.folder / "text" / "distilled.txt"
        if file.exists():
            return int(file.read_text())
        left = self.wish.budget - self._elapsed
        rate = self.workshop.known(EXACT_DENSE).speed / _TRAINING_COST
        tokens, (least, most) = _DISTILLED_SHARE * left * rate, _DISTILLED
        found = 0 if tokens < least else min(most, 1 << (int(tokens).bit_length() - 1))
        write_text(file, str(found))
        return found

    def _proven(self, winners: Sequence[Candidate], out_of_time: bool) -> Finding:
        """Test winners on the unseen half, from the safest to the cheapest, up to the first that fails.

        In this order each is tested at the full level, and still at most one in twenty searches ends with a model that misses a
        requirement (testing in a fixed sequence).
        """
        safest = next(iter(self.tried))
        plain = next((one for one in winners if one.plain), None)
        chain = [*dict.fromkeys([safest, *winners])]
        judged: dict[Candidate, list[Held]] = {}
        kept: Candidate | None = None
        unseen = {task.name: [*task.unseen] for task in self.tasks}
        for candidate in chain:
            found = self.workshop.measure(candidate, unseen)
            self.tried[candidate] = found
            judged[candidate] = self.judged(candidate, unseen)
            if verdict_of(judged[candidate]) is not Verdict.KEPT:
                break
            kept = candidate
        chosen = kept or safest
        return Finding(chosen, judged[chosen], kept is not None, plain, [*self.tried], judged, out_of_time)


def verdict_of(held: Sequence[Held]) -> Verdict:
    """Combine the verdicts of all conditions."""
    said = {one.verdict for one in held}
    return next((one for one in (Verdict.LOST, Verdict.OPEN) if one in said), Verdict.KEPT)
