"""Permute a model's channels for N:M before it is pruned: a consumer of the walk that leaves the function as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from coprune.base.errors import BadInput
from coprune.base.processes import ALONE, Processes
from coprune.base.shown import per_cent
from coprune.base.words import Set
from coprune.model.checkpoint.weights import Weights, require_in_memory
from coprune.model.folding import Fold, close
from coprune.model.matrices import Matrix
from coprune.model.removal.find_parts import known_folds
from coprune.model.walk.moves import Dense
from coprune.model.walk.prove import COMPARED_LOGITS
from coprune.model.walk.proven import ProvenModel
from coprune.model.walk.record import forward_logits
from coprune.model.walk.recording import Recording
from coprune.model.walk.shown import BlockDone
from coprune.model.walk.statistics import InputNorm, Statistic
from coprune.model.walk.walk import Walk
from coprune.pruning.methods.base import Method
from coprune.pruning.methods.ria import RIA, ria_score
from coprune.pruning.methods.wanda import wanda_score
from coprune.pruning.permute.search import permute_channels, retained_score
from coprune.recipe.pattern import Pattern


@dataclass
class Permuted:
    """What permuting did: score retained in the permuted matrices before and after, and which matrices those are."""

    before: float = 0.0
    after: float = 0.0
    names: list[str] = field(default_factory=list)
    of: int = 0
    """How many matrices there are to prune."""

    def describe(self) -> str:
        """One line."""
        if not self.names:
            return "No inputs could be permuted without changing the model; it is as it was."
        gained = self.after / self.before - 1 if self.before else 0.0  # all weights may be zero
        return (
            f"Permuted the inputs of {len(self.names)} of {self.of} matrices (the others' come from the residual stream "
            f"or from what could not be proved): N:M retains {per_cent(gained)} more of their score."
        )


def check_permutable(weights: Weights, pattern: Pattern) -> tuple[int, int]:
    """The N and M to permute channels for. Raises BadInput where permuting makes no sense or is not possible."""
    if pattern.n_of_m is None:
        raise BadInput(
            "permute reorders channels for groups of N:M",
            field="permute",
            fix=("give a pattern of them, such as ", Set("pattern", "2:4")),
        )
    require_in_memory(weights, "permute")
    return pattern.n_of_m


@torch.no_grad()
def permute_model(
    model: ProvenModel,
    recording: Recording,
    method: Method,
    pattern: Pattern,
    processes: Processes = ALONE,
    advance: Callable[[float], None] = lambda blocks: None,
) -> Permuted:
    """Permute input channels in place, so that N:M retains more of the score; the model computes what it did before.

    If the logits of the sample that the model was proven on differ by more than rounding, everything is put back.

    Args:
        model: a model in memory.
        recording: calibration batches of its own, since it moves their hidden states on.
        method: the score is RIA's own for RIA, Wanda's for every other.
        pattern: N of every M inputs are kept.
        processes: those that look at the model together.
        advance: called with the share of a block that was done.

    Returns:
        What was permuted, and what that retains.

    Raises:
        BadInput: where permuting makes no sense.
        NumericalError: where the activations are not finite.
    """
    n_of_m = check_permutable(model.weights, pattern)
    probe = model.structure.sample
    logits = forward_logits(model.module, probe, COMPARED_LOGITS)
    permuted = Permuted(of=sum(1 for _ in model.chosen.all()))
    folds = known_folds(model)
    done: list[tuple[Fold, list[Tensor]]] = []
    known: dict[str, Statistic] = {}
    inside = replace(model, chosen=replace(model.chosen, outside=[]))
    for event in Walk(inside, recording, InputNorm, Dense(), processes=processes, advance=advance):
        if not isinstance(event, BlockDone):
            known |= event.statistics()
            continue
        score = partial(_score, statistics=known, method=method)
        for fold in folds.get(event.block.name, []):
            if fold.layout.size % n_of_m[1] == 0:
                done.append((fold, _permute(fold, score, n_of_m, permuted)))
        known = {}
    if not close(forward_logits(model.module, probe, COMPARED_LOGITS), logits, len(model.blocks)):
        for fold, orders in reversed(done):
            fold.undo(orders)
        return Permuted(of=permuted.of)
    return permuted


def _permute(
    fold: Fold, score_of: Callable[[Matrix], Tensor], n_of_m: tuple[int, int], permuted: Permuted
) -> list[Tensor]:
    """Find the best orders for one fold and apply them."""
    orders = []
    for consumer in fold.consumers:
        score = score_of(consumer)
        order = torch.stack([permute_channels(part, *n_of_m) for part in fold.layout.scores(score)])
        orders.append(order)
        permuted.before += retained_score(score, *n_of_m)
        permuted.after += retained_score(score[:, fold.layout.columns(order).to(score.device)], *n_of_m)
        permuted.names.append(consumer.name)
    fold.apply(orders)
    return orders


def _score(matrix: Matrix, statistics: Mapping[str, Statistic], method: Method) -> Tensor:
    statistic = statistics.get(matrix.name)
    if statistic is None:
        return matrix.read().abs()
    if isinstance(method, RIA):
        return ria_score(matrix.read(), statistic, method.power)
    return wanda_score(matrix.read(), statistic)
