"""What a refinement is: a second look at a pruned matrix, whichever method pruned it."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from torch import Tensor

from coprune.model.walk.statistics import Gram
from coprune.pruning.methods.base import Pruned
from coprune.recipe.pattern import Target


class Refinement(Protocol):
    """A frozen dataclass whose fields are its hyperparameters, its command-line options and its recipe keys."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def refine(self, weight: Tensor, pruned: Pruned, statistic: Gram, target: Target) -> Pruned:
        """Improve one pruned matrix; no row's layer error grows and the pattern stays.

        Args:
            weight: O × I float32, the dense weight that is aimed at; not modified.
            pruned: as its method left it; not modified.
            statistic: the Gram matrix of its inputs.
            target: pattern and sparsity.
        """
        ...
