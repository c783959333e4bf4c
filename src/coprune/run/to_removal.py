"""The one door from a run to the removal of whole parts. It is imported inside functions, by recipes that remove something."""

from __future__ import annotations

from coprune.removal.cut_and_prune import cut_and_prune
from coprune.removal.mixtures import may_have_experts
from coprune.removal.removal_stage import check_names, remove_parts, smaller_model, what_may_go
from coprune.removal.shares import Removable
from coprune.removal.unit_scores import ByError, spreading_named

__all__ = [
    "ByError",
    "Removable",
    "check_names",
    "cut_and_prune",
    "may_have_experts",
    "remove_parts",
    "smaller_model",
    "spreading_named",
    "what_may_go",
]
