"""The cost of a budget: KL to the dense model, recomputed only from the first block that differs.

A budget is compared with the best so far on more and more of the tokens, and let go of as soon as it falls behind.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coprune.base.files import write_text
from coprune.model.blocks import Block
from coprune.model.matrices import Matrix
from coprune.model.walk.inputs import Inputs
from coprune.model.walk.recording import Recording, record_batches
from coprune.model.walk.statistics import Gram
from coprune.removal.block_scores import kl_of_logits, logits_of
from coprune.removal.channels_and_heads import Part
from coprune.removal.unit_scores import Search, refitted, score_named
from coprune.run.calibrating import first_batches
from coprune.run.context import Run
from coprune.run.identity import run_identity

Steps = tuple[int, ...]
"""Number of steps that every part loses."""
GUESSED = 24
"""Number of proposals per try, of which the one with the lowest predicted cost is tried."""
RIDGE = 1.0
"""Ridge penalty of the predictions, in squared steps."""
MOST_EXCHANGES = 6


@dataclass(frozen=True)
class Exchanges:
    """Steps of parts that may be exchanged, such that all parts together lose as much as before."""

    groups: Sequence[Sequence[int]]
    """Numbers of parts; among those of one group steps are exchanged."""
    most: Sequence[int]
    """Steps that every part can lose."""

    def change(self, steps: Steps, draw: random.Random) -> Steps:
        """Exchange some steps."""
        changed = list(steps)
        for _ in range(draw.randint(1, MOST_EXCHANGES)):
            self._exchange(changed, draw.choice(self.groups), draw)
        return tuple(changed)

    def _exchange(self, steps: list[int], group: Sequence[int], draw: random.Random) -> None:
        """Move one step from a part to another, in place."""
        giving = [part for part in group if steps[part] > 0]
        taking = [part for part in group if steps[part] < self.most[part]]
        if giving and taking:
            back, more = draw.choice(giving), draw.choice(taking)
            steps[back] -= 1
            steps[more] += 1


def next_tries(tried: Sequence[tuple[Steps, float]], exchanges: Exchanges, seed: int, number: int = 1) -> list[Steps]:
    """Propose variations of the best budget.

    Args:
        tried: budgets with their costs.
        exchanges: the allowed exchanges.
        seed: of the random choice.
        number: how many are tried side by side.

    Returns:
        At most `number` new budgets, the most promising first; at least one, tried before if no other is near.
    """
    best = min(tried, key=lambda one: one[1])
    known = {steps for steps, _ in tried}
    draw = random.Random(f"{seed} {len(tried)}")
    found = [exchanges.change(best[0], draw) for _ in range(GUESSED * number)]
    new = [*dict.fromkeys(steps for steps in found if steps not in known)] or found[:1]
    slopes = _slopes(tried, best)
    return sorted(new, key=lambda steps: float(_difference(steps, best[0]) @ slopes))[:number]


def _difference(steps: Steps, best: Steps) -> NDArray[np.float64]:
    return np.array(steps, dtype=np.float64) - np.array(best, dtype=np.float64)


def _slopes(tried: Sequence[tuple[Steps, float]], best: tuple[Steps, float]) -> NDArray[np.float64]:
    """Estimate the cost of one more step of every part, near the best budget; budgets far from it count less."""
    away = np.array([_difference(steps, best[0]) for steps, _ in tried])
    cost = np.array([found - best[1] for _, found in tried])
    weights = 1 / (1 + np.square(away).sum(axis=1))
    normal = (away * weights[:, None]).T @ away
    slopes: NDArray[np.float64] = np.linalg.solve(
        normal + RIDGE * np.eye(len(best[0])) * max(float(weights.mean()), 1e-9), (away * weights[:, None]).T @ cost
    )
    return slopes


@dataclass(frozen=True)
class Levels:
    """A part with what it keeps at every level, the whole part first."""

    block: Block
    part: Part
    counts: list[int]
    """Units that are kept."""
    keeps: list[list[Tensor]]
    """Kept units by level: U bool for each consumer."""
    costs: list[float]
    """Squared error of the consumers' outputs, relative to them."""
    moved: float
    """How much the block changes the dense model's hidden states."""
    inputs: Mapping[str, Inputs]
    """Inputs of the consumers in the dense model, by name."""

    def steps_to(self, count: int) -> int:
        """Return the number of steps at which `count` units are kept."""
        return self.counts.index(count)


@dataclass(frozen=True)
class Consumers:
    """The matrices whose columns fall silent, solved for anew from their Gram matrices."""

    levels: Sequence[Levels]
    refit: bool
    before: Mapping[str, Tensor]
    """Dense weight of every consumer."""

    @classmethod
    def of(cls, run: Run, levels: Sequence[Levels]) -> Self:
        """Copy the consumers of a dense model."""
        refit = score_named(run.recipe.remove.score_of("units")).refit
        return cls(levels, refit, {c.name: c.read().clone() for own in levels for c in own.part.fold.consumers})

    @property
    def places(self) -> list[int]:
        """Number of the block that every part is in."""
        return [own.block.index for own in self.levels]

    def write(self, part: int, level: int) -> None:
        """Silence the units that a part loses at a level."""
        own = self.levels[part]
        for keep, consumer in zip(own.keeps[level], own.part.fold.consumers, strict=True):
            consumer.write(self._solved(own, consumer, keep))

    def _solved(self, own: Levels, consumer: Matrix, keep: Tensor) -> Tensor:
        weight, columns = self.before[consumer.name], own.part.columns(keep)
        if bool(keep.all()):
            return weight
        known = own.inputs.get(consumer.name)
        statistic = None if known is None else known.statistic
        if self.refit and isinstance(statistic, Gram) and statistic.count:
            return refitted(weight, statistic, columns)
        return weight.masked_fill(~columns, 0.0)


BEHIND = 0.005
"""A budget is let go of where the batches that it has seen cost so much more than they do with the best: about what two
budgets of the same cost differ by on some hundred tokens."""

Hidden = list[Tensor]
"""The input of a block, by batch."""


@dataclass
class Candidates:
    """The model with one budget after another."""

    run: Run
    forms: Consumers
    dropped: Sequence[int]
    """Numbers of blocks that go."""
    recording: Recording
    dense: list[Tensor]
    """Logits of the dense model, by batch."""
    now: Steps
    """The budget that the weights have."""
    settled: Steps
    """The budget by which is known what every block is given."""
    hidden: list[Hidden]
    """Inputs of the blocks, and finally the last block's output."""
    sums: dict[Steps, list[float]] = field(default_factory=dict)
    """KL in nats by batch, of fully evaluated budgets."""
    touched: set[int] = field(default_factory=set)
    """Numbers of the parts that are not as they were, or may not be."""

    @classmethod
    @contextmanager
    def of(cls, run: Run, forms: Consumers, dropped: Sequence[int], tokens: int) -> Iterator[Candidates]:
        """Yield candidates, and restore the dense model at the end. tokens: minimum of calibration tokens to use."""
        found = cls._begun(run, forms, dropped, tokens)
        try:
            yield found
        finally:
            with torch.no_grad():
                for part in found.touched:
                    forms.write(part, 0)

    @classmethod
    @torch.no_grad()
    def _begun(cls, run: Run, forms: Consumers, dropped: Sequence[int], tokens: int) -> Candidates:
        assert run.samples is not None
        recording = record_batches(run.model, first_batches(run.task.batches(run.samples.tokens), tokens))
        none = (0,) * len(forms.places)
        found = cls(run, forms, (), recording, [], none, none, [list(recording.hidden)])
        found._run_from(0)
        found.dense = [found._logits(batch, one) for batch, one in enumerate(found.hidden[-1])]
        if dropped:
            found.dropped = dropped
            found._run_from(0)
        return found

    @torch.no_grad()
    def cost(self, steps: Steps, near: Steps | None) -> float:
        """Return KL(dense ‖ with these steps), in nats per token.

        Args:
            steps: the budget.
            near: a budget like this and the next ones, with which they are compared; None to use all tokens.

        Returns:
            For one that fell behind early, the cost of `near` plus the difference so far.
        """
        if near is not None:
            self._settle(near)
        best = None if near is None else self._sums_of(near)
        self._become(steps)
        first = self._first_other(steps, self.settled)
        rows, count = sum(len(one) for one in self.dense), len(self.dense)
        own: list[float] = []
        for batch, hidden in enumerate(self.hidden[first]):
            for block in self.run.model.blocks[first:]:
                hidden = self._run(block, batch, hidden)
            own.append(self._divergence(batch, hidden))
            seen = len(own)
            # On one batch, two, four …
            if best is not None and seen < count and seen & (seen - 1) == 0:
                behind = sum(own) - sum(best[:seen])
                if behind > BEHIND * sum(best[:seen]):
                    return (sum(best) + behind * count / seen) / rows
        self.sums[steps] = own
        return sum(own) / rows

    def _settle(self, near: Steps) -> None:
        if near != self.settled:
            first = self._first_other(near, self.settled)
            self._become(near)
            self._run_from(first)
            self.settled = near

    def _sums_of(self, settled: Steps) -> list[float]:
        """Return the sums of the budget whose hidden states are stored; another process or run may have computed them."""
        if settled not in self.sums:
            self.sums[settled] = [self._divergence(batch, one) for batch, one in enumerate(self.hidden[-1])]
        return self.sums[settled]

    def _first_other(self, one: Steps, other: Steps) -> int:
        """Return the number of the first block in which two budgets differ, or the number of blocks."""
        differing = (at for at, a, b in zip(self.forms.places, one, other, strict=True) if a != b)
        return min(differing, default=len(self.run.model.blocks))

    def _become(self, steps: Steps) -> None:
        """Set the parts to the weights of a budget."""
        for part, (before, after) in enumerate(zip(self.now, steps, strict=True)):
            if before != after:
                self.touched.add(part)
                self.forms.write(part, after)
        self.now = steps

    def _run(self, block: Block, batch: int, hidden: Tensor) -> Tensor:
        return hidden if block.index in self.dropped else self.recording.run(block, batch, hidden)

    def _run_from(self, first: int) -> None:
        """Run the blocks from one on, and note what each is given."""
        self.hidden = self.hidden[: first + 1]
        for block in self.run.model.blocks[first:]:
            self.hidden.append([self._run(block, batch, one) for batch, one in enumerate(self.hidden[-1])])

    def _divergence(self, batch: int, hidden: Tensor) -> float:
        return kl_of_logits(self.dense[batch], self._logits(batch, hidden))

    def _logits(self, batch: int, hidden: Tensor) -> Tensor:
        return logits_of(self.run.model, self.recording.tokens[batch], hidden)


FINDS_FILE = "search.json"
"""The tries of a search, in the run's folder."""


@dataclass
class Finds:
    """The tries so far, and their costs."""

    path: Path | None
    """File of the tries; None without a folder."""
    identity: str
    """Hash of the recipe, the model and the data."""
    tried: list[tuple[Steps, float]] = field(default_factory=list)
    seconds: float = 0.0

    @classmethod
    def of(cls, run: Run) -> Finds:
        """Read the tries of an earlier run of the same kind, or none; the first process's answer for all."""
        found = run.processes.from_first(lambda: cls._read(run))
        return found if run.writes else replace(found, path=None)

    @classmethod
    def _read(cls, run: Run) -> Finds:
        known = run_identity(run.recipe, run.loaded.fingerprint(run.model.blocks), run.fingerprint)
        identity = hashlib.sha256(json.dumps(known.settings, sort_keys=True, default=str).encode()).hexdigest()
        found = cls(run.recipe.run_folder / FINDS_FILE if run.writes else None, identity)
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
        """Record tries made side by side, all at once, so that a killed search repeats the same ones."""
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
        """Return the finished share of the search, from 0 to 1."""
        return min(1.0, self.seconds / (60 * asked.minutes) if asked.minutes else len(self.tried) / asked.rounds)


STARTS = ("uniform", "error")
"""The budgets that are tried first."""


def search_steps(
    run: Run,
    asked: Search,
    finds: Finds,
    exchanges: Exchanges,
    first: Sequence[Steps],
    opened: AbstractContextManager[Candidates],
) -> Steps:
    """Search for the steps with which the model stays nearest to the dense one; every process makes a try at a time.

    Args:
        run: what it is asked and has found.
        asked: how long.
        finds: what was tried before.
        exchanges: what may change places.
        first: what is tried first; may be left out where that was done.
        opened: what tells the cost of a budget, for as long as it is entered.
    """
    reporter, processes = run.reporter, run.processes
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
            # The first tries are measured on all tokens; later ones stop as soon as they fall behind the best.
            best = None if starts else finds.best[0]
            costs = processes.in_order([candidates.cost(steps, best) for steps in processes.own(tries)])
            took = processes.gather(time.perf_counter() - started)[0]
            finds.add([*zip(tries, costs, strict=True)], took)
        advance(1.0 - done)
    return say_best(run, finds)


def say_best(run: Run, finds: Finds) -> Steps:
    """Report the best budget and return it."""
    steps, cost = finds.best
    starts = ", ".join(f"{name} {found:.4f}" for name, (_, found) in zip(STARTS, finds.tried, strict=False))
    run.reporter.say(f"The best of {len(finds.tried)} tries: KL {cost:.4f} ({starts}).")
    return steps
