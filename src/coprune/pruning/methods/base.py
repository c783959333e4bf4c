"""The contract of a pruning method: hyperparameters, the statistic it needs, and one pure function on tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from coprune.model.walk.statistics import Statistic
from coprune.pruning.solver_events import Event
from coprune.recipe.pattern import Target


class Pruned(NamedTuple):
    """A pruned matrix: weight (O × I, zero wherever keep is False), keep (O × I bool), numerical events."""

    weight: Tensor
    keep: Tensor
    events: tuple[Event, ...] = ()


class Method(Protocol):
    """A frozen dataclass whose fields are its hyperparameters, its command-line options and its recipe keys."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    # A property because a protocol's variables are invariant; a method writes `statistic: ClassVar[...] = ...`.
    @property
    def statistic(self) -> type[Statistic] | None:
        """The statistic of the inputs that it needs; None for none."""

    # Any, because each method narrows it to the statistic that it names.
    def prune(self, weight: Tensor, statistic: Any, target: Target) -> Pruned:
        """Prune one matrix.

        Args:
            weight: O × I float32, not modified.
            statistic: statistic of its inputs, of the requested type or a richer one.
            target: pattern and sparsity.

        Raises:
            NumericalError: no valid result can be computed.
        """
        ...


def apply_keep(weight: Tensor, keep: Tensor) -> Tensor:
    """Return the weight with zeros where keep is False (also where the weight is infinite or negative)."""
    return weight.masked_fill(~keep, 0.0)


def prune_by_outputs(method: Method, weight: Tensor, statistic: Any, target: Target) -> Pruned:
    """Prune a matrix with weighted outputs by scaling its rows for the method.

    Args:
        method: any method.
        weight: O × I float32, not modified.
        statistic: statistic of the inputs, as the method needs it.
        target: gives the weights of outputs; without them, this is `method.prune`.
    """
    if target.outputs is None:
        return method.prune(weight, statistic, target)
    scale = target.outputs.to(weight).sqrt()[:, None]  # an error counts squared
    larger = weight * scale
    if (grid := target.grid) is not None:
        target = replace(target, grid=lambda values, columns: grid(values / scale, columns) * scale)
    pruned = method.prune(larger, statistic, target)
    # Weights that the method left unchanged stay bit-identical.
    return pruned._replace(weight=torch.where(pruned.weight == larger, weight, pruned.weight / scale))
