"""The one door from a run to the removal of whole parts. It is imported inside functions, by recipes that remove something."""

from __future__ import annotations

from coprune.removal.by_bytes import cut_by_bytes, file_cut_by_bytes
from coprune.removal.cut_and_prune import check_cut_and_zeros, cutting_of, of_both, zeros_of
from coprune.removal.mixtures import may_have_experts
from coprune.removal.removal_plan import Removable, find_removable
from coprune.removal.removal_stage import check_names, remove_parts, smaller_model
from coprune.removal.unit_scores import ByError, spreading_named

__all__ = [
    "ByError",
    "Removable",
    "check_cut_and_zeros",
    "check_names",
    "cut_by_bytes",
    "cutting_of",
    "file_cut_by_bytes",
    "find_removable",
    "may_have_experts",
    "of_both",
    "remove_parts",
    "smaller_model",
    "spreading_named",
    "zeros_of",
]
