"""How many channels and heads each block keeps, when all blocks together keep a certain number.

Parts are spread in groups of parts that are alike: as many units in each, of the same size. Whole steps are spread, a step
being as many units as `align` says, and every part keeps one at least.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coprune.base.errors import BadInput
from coprune.base.options import require_not_negative, with_options
from coprune.base.processes import ALONE, Processes
from coprune.pruning.allocation.uniform import Uniform
from coprune.recipe.choice import Choice


@dataclass(frozen=True)
class ByError:
    """Remove what costs least: the relative errors of the consumers' outputs, as measured on the dense model.

    Errors of different blocks are made comparable by what the cut of each block alone does to the model's distributions.
    """

    tokens: int = 1024
    """Of the calibration, at least so many are run for that (of images: one batch); 0: errors count by `movement`."""
    movement: float = 1.0
    """With 0 tokens, errors count by what their block changes in the hidden states, to this power; 0: all blocks alike."""

    def __post_init__(self) -> None:
        require_not_negative(tokens=self.tokens, movement=self.movement)


@dataclass(frozen=True)
class Search:
    """Move steps of a budget from part to part, and keep what brings the model's distributions nearer to the dense model's.

    Paper: EvoPress, arXiv 2410.14649.
    """

    minutes: float = 0.0
    """How long, all runs that were killed in between together."""
    rounds: int = 0
    """Or how many tries."""
    tokens: int = 2048
    """Of the calibration, at least so many are looked at (of images: one batch)."""
    seed: int = 0

    def __post_init__(self) -> None:
        require_not_negative(minutes=self.minutes, rounds=self.rounds, tokens=self.tokens)

    def require_end(self) -> None:
        """Raise BadInput unless it is said when to stop."""
        if bool(self.minutes) == bool(self.rounds):
            fix = "write search:minutes=8, or search:rounds=100"
            wrong = "a search goes on for some minutes or for some rounds, one of the two"
            raise BadInput(wrong, field="allocation", value="search", fix=fix)


SPREADINGS: dict[str, Uniform | ByError | Search] = {"uniform": Uniform(), "error": ByError(), "search": Search()}
"""Every way to spread units over the blocks, by its name."""


def spreading_named(asked: Choice) -> Uniform | ByError | Search:
    """Look a way up; what spreads zeros alone is uniform for units. Raises BadInput for an option that there is not."""
    if asked.name not in SPREADINGS:
        return SPREADINGS["uniform"]
    found = with_options(SPREADINGS[asked.name], "allocation", asked.name, asked.options)
    if isinstance(found, Search):
        found.require_end()
    return found


def cheapest(costs: Sequence[Sequence[float]], steps: int) -> list[int]:
    """Take steps where they cost least, along the convex curves below the measured ones.

    Args:
        costs: of every part, what it costs to take 0, 1, 2 … steps.
        steps: how many are taken altogether.

    Returns:
        How many steps are taken of every part.
    """
    slopes = [_slopes(own) for own in costs]
    taken = [0] * len(costs)
    queue = [(own[0], part) for part, own in enumerate(slopes) if own]
    heapq.heapify(queue)
    for _ in range(steps):
        _, part = heapq.heappop(queue)
        taken[part] += 1
        if taken[part] < len(slopes[part]):
            heapq.heappush(queue, (slopes[part][taken[part]], part))
    return taken


def _slopes(costs: Sequence[float]) -> list[float]:
    """What each step costs on the largest convex curve below the costs, ascending."""
    found: list[float] = []
    start = 0
    while start < len(costs) - 1:
        slope, end = min(((costs[i] - costs[start]) / (i - start), i) for i in range(start + 1, len(costs)))
        found += [slope] * (end - start)
        start = end
    return found


MOVED_TOKENS = 1024
"""Of the hidden states that blocks change, about so many are looked at."""


def some_tokens(hidden: Tensor, batches: int, total: int | None = None) -> Tensor:
    """Rows of one batch's hidden states (N × H float32), about a thousand of all batches; of models of images, whole
    samples. Each of several processes has its own.

    total: rows of all batches, where they hold different numbers of them (`Recording.uneven`).
    """
    rows = hidden.reshape(-1, hidden.shape[-1]) if hidden.ndim == 3 else hidden.flatten(1)
    per_batch = -(-MOVED_TOKENS // batches) if total is None else -(-MOVED_TOKENS * len(rows) // total)
    step = max(1, len(rows) // per_batch)
    return rows[step // 2 :: step][:per_batch].to(torch.float32, copy=True)


def joined(rows: Sequence[Tensor]) -> Tensor | None:
    """All rows as one tensor; None where there are none."""
    return torch.cat(list(rows)) if len(rows) else None


def movement(before: Tensor | None, after: Tensor | None, processes: Processes = ALONE) -> float:
    """How much a block changes the hidden states: ‖after − before‖² / ‖after‖², mean over rows.

    By rows, because the first token of many models is a thousand times larger than the rest.

    Args:
        before: N × H.
        after: N × H.
        processes: those that go through the block together, each with rows of its own.

    Returns:
        1 where that means nothing: without data, or where a block changes their shape.
    """
    found = processes.gather(_changes(before, after))
    rows = sum(number for _, number in found)
    return sum(change for change, _ in found) / rows if rows else 1.0


def _changes(before: Tensor | None, after: Tensor | None) -> tuple[float, int]:
    """What `movement` says of each row, added up, and of how many rows that is."""
    if before is None or after is None or before.shape != after.shape:
        return 0.0, 0
    size = after.square().sum(dim=1)
    change = (after - before).square().sum(dim=1)
    return float((change / size.clamp_min(1e-30)).double().sum()), len(after)
