"""Scores of a block's channels or heads: the published ones, and one that removes at the lowest cost.

Shapes: O × C is the consumer, the matrix whose inputs the channels are (a down projection, an output projection). A unit
is removed as a whole: one channel, or the K channels of a key-value head with all its query heads. U units.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from coprune.base.kernels.shifted import inverse_of_factor
from coprune.base.method_options import one_of, require_not_negative, require_positive, with_options
from coprune.base.precision import full_float32, total
from coprune.base.processes import ALONE, Processes
from coprune.model.matrices import Matrix, mask_checksum
from coprune.model.walk.inputs import Inputs
from coprune.model.walk.statistics import Gram
from coprune.pruning.allocation.allocation import Uniform
from coprune.pruning.linear_algebra import damped_cholesky
from coprune.pruning.pruner import MatrixResult
from coprune.pruning.solver_events import Event
from coprune.recipe.choice import Choice
from coprune.removal.channels_and_heads import Part, silence

Curve = list[tuple[Tensor, float]]
"""The kept units (U bool) at several counts, each with the squared error of the consumer's outputs per token."""


class Score(Protocol):
    """A way of choosing the units to keep."""

    @property
    def refit(self) -> bool:
        """Whether the consumer's kept columns are refitted."""
        ...

    def keep(self, weight: Tensor, statistic: Gram, units: Tensor, count: int) -> Tensor:
        """Choose the units to keep.

        Args:
            weight: the consumer, O × C float32.
            statistic: of its inputs.
            units: the columns of every unit, U × K int64; columns outside all units go first.
            count: number of units to keep.

        Returns:
            U bool, True where kept.
        """
        ...


@dataclass(frozen=True)
class Magnitude:
    """Keep the units whose columns have the largest norm."""

    refit: bool = False

    def keep(self, weight: Tensor, statistic: Gram, units: Tensor, count: int) -> Tensor:
        return by_norm(weight, units, count)


@dataclass(frozen=True)
class WandaSP:
    """Keep the units with the largest ‖W_:c‖ · n_c, n the root mean square of the input (arXiv 2306.11695, 2312.11983)."""

    refit: bool = False

    def keep(self, weight: Tensor, statistic: Gram, units: Tensor, count: int) -> Tensor:
        score = weight.square().sum(dim=0) * statistic.mean_square
        return largest(score[units].sum(dim=1), count)


@dataclass(frozen=True)
class FLAP:
    """Keep the units with the largest Var(x_c) · ‖W_:c‖²: units that hardly vary can go (arXiv 2312.11983).

    The authors add the mean of the removed units to the consumer's bias. Most language models have no biases, so here
    the refit, if requested, compensates.
    """

    refit: bool = False

    def keep(self, weight: Tensor, statistic: Gram, units: Tensor, count: int) -> Tensor:
        variance = (statistic.mean_square - statistic.mean.square()).clamp_min(0)
        return largest((weight.square().sum(dim=0) * variance)[units].sum(dim=1), count)


@dataclass(frozen=True)
class OBS:
    """Remove, a few at a time, the units for which the others compensate best.

    The error of removing the columns R of W, with the others free to change, is tr(W_R (H⁻¹_RR)⁻¹ W_Rᵀ) with H the
    damped Gram matrix (the optimal brain surgeon on columns, as in arXiv 2203.07259 for heads and channels).
    """

    refit: bool = True
    damping: float = 0.01
    """Added to the Gram matrix, as a fraction of its mean diagonal."""
    steps: int = 32
    """Number of steps in which the units are removed."""

    def __post_init__(self) -> None:
        require_positive(damping=self.damping, steps=self.steps)

    def keep(self, weight: Tensor, statistic: Gram, units: Tensor, count: int) -> Tensor:
        with full_float32():
            surgery = Surgery.on(weight, statistic, units, self.damping)
            while (surplus := int(surgery.left.sum()) - count) > 0:
                surgery.remove(min(surplus, max(1, -(-(len(units) - count) // self.steps))))
        return surgery.left


@dataclass
class Surgery:
    """The state of removing units a few at a time, with the remaining weights compensating."""

    units: Tensor
    left: Tensor
    """U bool."""
    current: Tensor
    """O × C: the refitted weight."""
    inverse: Tensor
    """C × C: inverse of the remaining columns' damped Gram matrix."""
    lost: float = 0.0
    """Squared error of the outputs so far, per token."""

    @classmethod
    def on(cls, weight: Tensor, statistic: Gram, units: Tensor, damping: float) -> Surgery:
        """Start with all units and without the columns outside them. Arguments as in `Score.keep`; damping: as in `OBS`."""
        lower, _ = damped_cholesky(statistic.gram, damping)
        left = torch.ones(len(units), dtype=torch.bool, device=weight.device)
        surgery = cls(units, left, weight.clone(), inverse_of_factor(lower))
        outside = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
        outside[units.flatten()] = False
        if bool(outside.any()):
            surgery._take_out(outside.nonzero().flatten())
        return surgery

    def remove(self, number: int) -> None:
        """Remove the `number` units that cost least."""
        current, inverse = self.current, self.inverse
        cost = removal_cost(current, inverse, self.units).masked_fill(~self.left, torch.inf)
        chosen = cost.topk(number, largest=False).indices
        self.left[chosen] = False
        self._take_out(self.units[chosen].flatten())

    def _take_out(self, columns: Tensor) -> None:
        """Remove columns and compensate with the others."""
        current, inverse = self.current, self.inverse
        gone = current[:, columns]
        self.lost += float((gone * torch.linalg.solve(inverse[columns][:, columns], gone.T).T).sum())
        push = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])
        current -= gone @ push
        inverse -= inverse[:, columns] @ push
        # Removed units stay removed despite rounding.
        inverse[columns], inverse[:, columns] = 0.0, 0.0
        inverse[columns, columns] = 1.0
        current[:, columns] = 0.0


def curve(score: Score, weight: Tensor, statistic: Gram, units: Tensor, counts: Sequence[int]) -> Curve:
    """Measure the cost of keeping fewer and fewer units, each choice a subset of the one before.

    Args:
        score: chooses the units, and says whether the rest is refitted.
        weight, statistic, units: as in `Score.keep`.
        counts: descending.
    """
    if isinstance(score, OBS):
        return _in_one_go(score, weight, statistic, units, counts)
    found, whole = Curve(), energy(weight, statistic)
    for count in counts:
        keep = score.keep(weight, statistic, units, count)
        columns = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
        columns[units[keep].flatten()] = True
        left = refitted(weight, statistic, columns) if score.refit else weight.masked_fill(~columns, 0.0)
        found.append((keep, whole * statistic.relative_error(weight, left)))
    return found


def energy(weight: Tensor, statistic: Gram) -> float:
    """Return ‖XWᵀ‖² / T over all tokens seen. weight: O × C float32."""
    with full_float32():
        return float(total((weight @ statistic.gram) * weight))


def _in_one_go(score: OBS, weight: Tensor, statistic: Gram, units: Tensor, counts: Sequence[int]) -> Curve:
    """Return the whole curve from a single removal down to the last count."""
    found, most = Curve(), max(1, len(units) // (3 * score.steps))  # as fine as removing a third in all steps
    with full_float32():
        surgery = Surgery.on(weight, statistic, units, score.damping)
        for count in counts:
            while (surplus := int(surgery.left.sum()) - count) > 0:
                surgery.remove(min(surplus, most))
            found.append((surgery.left.clone(), surgery.lost))
    return found


SCORES: dict[str, Score] = {"magnitude": Magnitude(), "wanda_sp": WandaSP(), "flap": FLAP(), "obs": OBS()}
"""Scores of channels and heads by name."""


def score_named(asked: Choice) -> Score:
    """Return a score with its options. Raises BadInput for an unknown name or option."""
    return one_of(SCORES, "score", asked.name, asked.options)


def by_norm(weight: Tensor, units: Tensor, count: int) -> Tensor:
    """Keep the units whose columns have the largest norm: U bool. weight: O × C; units: U × K."""
    return largest(weight.square().sum(dim=0)[units].sum(dim=1), count)


def largest(score: Tensor, count: int) -> Tensor:
    """Return the mask of the `count` largest entries; of equal entries the first."""
    keep = torch.zeros(len(score), dtype=torch.bool, device=score.device)
    keep[score.argsort(descending=True, stable=True)[:count]] = True
    return keep


def removal_cost(weight: Tensor, inverse: Tensor, units: Tensor) -> Tensor:
    """Return tr(W_R (H⁻¹_RR)⁻¹ W_Rᵀ) for every unit R: U. weight: O × C; inverse: H⁻¹, C × C; units: U × K."""
    own = inverse[units[:, :, None], units[:, None, :]]
    parts = weight[:, units].permute(1, 2, 0)
    cost: Tensor = (parts * torch.linalg.solve(own, parts)).sum(dim=(1, 2))
    return cost


LEAST_DAMPING = 0.01
"""Minimum damping of a refit, however many tokens it sees."""


def refitted(weight: Tensor, statistic: Gram, keep: Tensor, damping: float | None = None) -> Tensor:
    """Return the consumer whose kept columns best reproduce all: W_k = W H_:k H_kk⁻¹, zeros elsewhere.

    Args:
        weight: O × C float32.
        statistic: of its inputs.
        keep: C bool.
        damping: added to the Gram matrix, as a fraction of its mean diagonal; by default C / T for T tokens, since few
            tokens and many columns give mostly noise.
    """
    with full_float32():
        gram = statistic.gram
        damping = max(LEAST_DAMPING, len(keep) / statistic.count) if damping is None else damping
        gram.diagonal().add_(damping * gram.diagonal().mean())
        lower, _ = damped_cholesky(gram[keep][:, keep], 1e-7)
        solved = torch.cholesky_solve(gram[keep] @ weight.T, lower).T
    result = torch.zeros_like(weight)
    result[:, keep] = solved
    return result


def unit_costs(score: Score, consumer: Matrix, inputs: Inputs | None, units: Tensor) -> Tensor:
    """Return the share of the consumer's outputs lost with each unit as units go one by one: U float32.

    Args:
        score: chooses which unit goes next, and says whether the rest is refitted.
        consumer: the matrix.
        inputs: its inputs; without tokens, shares of the squared norm are returned.
        units: the columns of every unit, U × K int64.
    """
    weight, (known, _) = consumer.read(), _known(inputs)
    if known is None:
        norms = weight.square().sum(dim=0)[units].sum(dim=1)
        return norms.cpu() / float(norms.sum().clamp_min(1e-30))
    levels, whole = curve(score, weight, known, units, range(len(units), 0, -1)), energy(weight, known)
    nothing = torch.zeros(len(units), dtype=torch.bool, device=weight.device)
    costs = torch.zeros(len(units), device=weight.device)
    for (before, lost), (after, more) in pairwise([*levels, (nothing, whole)]):
        costs[before & ~after] = (more - lost) / max(whole, 1e-30)
    return costs.cpu()


def remove_units(
    module: torch.nn.Module,
    part: Part,
    inputs: Mapping[str, Inputs],
    score: Score,
    count: int,
    chosen: Sequence[int] = (),
) -> tuple[list[Tensor], list[MatrixResult]]:
    """Keep `count` units of a part and zero the others, in place.

    Args:
        module: the block.
        part: the part of the block.
        inputs: Gram matrices of the consumers' inputs, by name; a consumer without an entry saw no token.
        score: chooses the units, and says whether the consumer is refitted.
        count: number of units to keep.
        chosen: their numbers, if already known.

    Returns:
        The kept units (U bool for each consumer) and the consumers' results.
    """
    keeps, results = [], []
    for consumer in part.fold.consumers:
        started, weight = time.perf_counter(), consumer.read()
        known, events = _known(inputs.get(consumer.name))
        units, number = part.grouped.to(weight.device), count // part.group
        if chosen:
            keep = torch.zeros(part.count, dtype=torch.bool, device=weight.device)
            keep[[*chosen]] = True
        else:
            by_score = by_norm(weight, units, number) if known is None else score.keep(weight, known, units, number)
            keep = part.ungrouped(by_score)
        columns = part.columns(keep)
        solved = refitted(weight, known, columns) if known is not None and score.refit else weight
        consumer.write(solved.masked_fill(~columns, 0.0))
        keeps.append(keep)
        result = _result(consumer, known, weight, columns, time.perf_counter() - started)
        results.append(result.model_copy(update={"events": events}))
    silence(module, part.block, part.masks(keeps))
    return keeps, results


def _known(inputs: Inputs | None) -> tuple[Gram | None, tuple[Event, ...]]:
    """Return the Gram matrix of a consumer's inputs, if it saw any, and the events to report."""
    statistic = None if inputs is None else inputs.statistic
    if inputs is None or not isinstance(statistic, Gram) or not statistic.count:
        return None, (Event(kind="no tokens"),)
    if not bool(statistic.gram.diagonal().any()):  # such as an expert that multiplies other experts' tokens by zero
        return None, (Event(kind="only zeros"),)
    return statistic, ()


def _result(consumer: Matrix, known: Gram | None, weight: Tensor, columns: Tensor, seconds: float) -> MatrixResult:
    after = consumer.read()
    left = after[:, columns]
    return MatrixResult(
        name=consumer.name,
        shape=(left.shape[0], left.shape[1]),
        sparsity=1 - int(left.count_nonzero()) / left.numel(),
        relative_layer_error=None if known is None else known.relative_error(weight, after),
        tokens=None if known is None else known.count,
        mask_checksum=mask_checksum(left if consumer.input_dim == 1 else left.T),
        seconds=seconds,
    )


@dataclass(frozen=True)
class ByError:
    """Allocate by cost: the relative errors of the consumers' outputs, measured on the dense model.

    Errors of different blocks are weighted by the effect of cutting each block alone on the model's distributions.
    """

    tokens: int = 1024
    """Minimum number of calibration tokens for these weights (for image models: one batch); 0: weight by `movement`."""

    def __post_init__(self) -> None:
        require_not_negative(tokens=self.tokens)


UNIT_ALLOCATIONS: dict[str, Uniform | ByError] = {"uniform": Uniform(), "error": ByError()}
"""Allocations of units to blocks, by name."""


def unit_allocation_named(asked: Choice) -> Uniform | ByError:
    """Return an allocation of units; one that only applies to zeros counts as uniform. Raises BadInput for an unknown option."""
    if asked.name not in UNIT_ALLOCATIONS:
        return UNIT_ALLOCATIONS["uniform"]
    return with_options(UNIT_ALLOCATIONS[asked.name], "allocation", asked.name, asked.options)


def cheapest(costs: Sequence[Sequence[float]], steps: int) -> list[int]:
    """Take steps where they cost least, along the lower convex hulls of the measured costs.

    Args:
        costs: for each part, the cost of taking 0, 1, 2 … steps.
        steps: total number of steps to take.

    Returns:
        Number of steps taken from each part.
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
    """Return the cost of each step on the lower convex hull of the costs, ascending."""
    found: list[float] = []
    start = 0
    while start < len(costs) - 1:
        slope, end = min(((costs[i] - costs[start]) / (i - start), i) for i in range(start + 1, len(costs)))
        found += [slope] * (end - start)
        start = end
    return found


MOVED_TOKENS = 1024
"""Approximate number of hidden states used to measure a block's change."""


def some_tokens(hidden: Tensor, batches: int, total: int | None = None) -> Tensor:
    """Return some rows of one batch's hidden states (N × H float32), about a thousand over all batches and processes.

    For image models, rows are samples. total: number of rows in all batches, if they differ in size (`Recording.uneven`).
    """
    rows = hidden.reshape(-1, hidden.shape[-1]) if hidden.ndim == 3 else hidden.flatten(1)
    per_batch = -(-MOVED_TOKENS // batches) if total is None else -(-MOVED_TOKENS * len(rows) // total)
    step = max(1, len(rows) // per_batch)
    return rows[step // 2 :: step][:per_batch].to(torch.float32, copy=True)


def joined(rows: Sequence[Tensor]) -> Tensor | None:
    """Concatenate the rows; None if there are none."""
    return torch.cat(list(rows)) if len(rows) else None


def movement(before: Tensor | None, after: Tensor | None, processes: Processes = ALONE) -> float:
    """Return how much a block changes the hidden states: ‖after − before‖² / ‖after‖², mean over rows.

    Averaged over rows because in many models the first token is a thousand times larger than the rest.

    Args:
        before: N × H.
        after: N × H.
        processes: all that run the block together, each with its own rows.

    Returns:
        The change; 1 without data, or for a block that changes the shape.
    """
    found = processes.gather(_changes(before, after))
    rows = sum(number for _, number in found)
    return sum(change for change, _ in found) / rows if rows else 1.0


def _changes(before: Tensor | None, after: Tensor | None) -> tuple[float, int]:
    """Return the sum of `movement` over rows, and the number of rows."""
    if before is None or after is None or before.shape != after.shape:
        return 0.0, 0
    size = after.square().sum(dim=1)
    change = (after - before).square().sum(dim=1)
    return float((change / size.clamp_min(1e-30)).double().sum()), len(after)
