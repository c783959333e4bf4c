"""Settings of a recipe that do not go together. Nothing heavy is imported here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coprune.recipe.recipe import Recipe


def contradiction(recipe: Recipe) -> str | None:
    """What is wrong with a recipe's settings taken together, with the fix; None if nothing is."""
    return (
        _of_target(recipe.pattern, recipe.sparsity)
        or _of_propagation(recipe)
        or _of_permutation(recipe)
        or _of_streaming(recipe)
        or _of_folders(recipe)
    )


def _of_target(pattern: str, sparsity: float | None) -> str | None:
    fixed = ratio_of(pattern)
    if sparsity is not None and not 0 <= sparsity < 1:
        return f"sparsity {sparsity:g} is out of range: it is the fraction of zeros, 0 ≤ s < 1."
    if fixed is not None and sparsity is not None and abs(sparsity - fixed) > 1e-9:
        return f"sparsity {sparsity:g} contradicts the pattern {pattern}, which fixes it at {fixed:g}; leave one out."
    return None


def _of_permutation(recipe: Recipe) -> str | None:
    if recipe.permute and ratio_of(recipe.pattern) is None:
        return "permute reorders channels for groups of N:M; give a pattern such as 2:4."
    if recipe.permute and recipe.stream:
        return "permute needs the whole model in memory, which stream does not; leave one out."
    return None


def _of_propagation(recipe: Recipe) -> str | None:
    if recipe.target == "dense" and recipe.propagation == "sequential":
        return "target dense compares two forwards of a block, which needs propagation block."
    if recipe.target == "dense" and recipe.propagation == "dense":
        return (
            "in propagation dense every matrix gets the dense model's inputs, so target dense would be target pruned; "
            "leave it out, or take propagation block."
        )
    if recipe.reconstruct and recipe.propagation == "dense":
        return (
            "reconstruct trains a block on what the pruned blocks before it give, which propagation dense never "
            "computes; take propagation block or sequential."
        )
    return None


def _of_streaming(recipe: Recipe) -> str | None:
    if recipe.stream and recipe.runs_tasks:
        return (
            "zero-shot tasks need the whole model in memory; leave out --stream, or save the model and run: "
            "coprune eval FOLDER --tasks …"
        )
    return None


def _of_folders(recipe: Recipe) -> str | None:
    if recipe.push_to_hub is not None and recipe.save_model is None:
        return "only a saved model can be pushed to the Hub; name its folder with --save-model."
    if recipe.save is not None and recipe.save == recipe.save_model:
        return "the run folder and the model folder are the same; give --save_model a folder of its own."
    return None


def ratio_of(pattern: str) -> float | None:
    """The sparsity that an N:M pattern fixes; None for unstructured. The one place that reads patterns without torch.

    Raises ValueError for what is no pattern.
    """
    if pattern == "unstructured":
        return None
    kept, _, group = pattern.partition(":")
    if not (kept.isdigit() and group.isdigit()):
        raise ValueError(f"unknown pattern {pattern!r}; use 'unstructured' or N:M such as 2:4 (2 kept of every 4).")
    if not 0 < int(kept) < int(group):
        raise ValueError(f"pattern {pattern} keeps {kept} of {group}; N:M needs 0 < N < M, such as 2:4.")
    return 1 - int(kept) / int(group)
