"""Refinements of a pruned matrix, one file each, in one table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor

from coprune.base.method_options import one_of
from coprune.model.walk.statistics import Gram
from coprune.pruning.methods.base import Pruned
from coprune.pruning.refine.refit import Refit
from coprune.pruning.refine.swaps import Swaps
from coprune.recipe.choice import Choice
from coprune.recipe.pattern import Target


class Refinement(Protocol):
    """A frozen dataclass whose fields are its hyperparameters, its command-line options and its recipe keys."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def refine(self, weight: Tensor, pruned: Pruned, statistic: Gram, target: Target) -> Pruned:
        """Improve one pruned matrix without raising any row's layer error or leaving the pattern.

        Args:
            weight: O × I float32, the dense target weight; not modified.
            pruned: the method's result; not modified.
            statistic: the Gram matrix of its inputs.
            target: pattern and sparsity.
        """
        ...


__all__ = ["REFINEMENTS", "Refinement", "refinement_named"]

REFINEMENTS: dict[str, Refinement] = {
    "refit": Refit(),
    "swaps": Swaps(),
}


def refinement_named(asked: Choice | str | Mapping[str, Any]) -> Refinement:
    """Return a refinement by name with its options set.

    Args:
        asked: a name, or a name with options (`refit:rounds=10`) for the fields of its dataclass.

    Raises:
        BadInput: an unknown name or option, or a value of the wrong type or out of range.
    """
    choice = Choice.of(asked)
    return one_of(REFINEMENTS, "refinement", choice.name, choice.options, "refine")
