"""Settings of a recipe that do not go together. Nothing heavy is imported here."""

from __future__ import annotations

from typing import Protocol

from coprune.base.errors import BadInput
from coprune.recipe.outcome import EvaluationPart, OutputPart
from coprune.recipe.parts import CalibrationPart, ModelPart, PatternPart, ReconstructionPart
from coprune.recipe.pattern import parse_pattern


class Parts(Protocol):
    """The parts of a recipe that may contradict each other."""

    @property
    def model(self) -> ModelPart: ...
    @property
    def pattern(self) -> PatternPart: ...
    @property
    def calibration(self) -> CalibrationPart: ...
    @property
    def reconstruction(self) -> ReconstructionPart: ...
    @property
    def evaluation(self) -> EvaluationPart: ...
    @property
    def output(self) -> OutputPart: ...


def contradiction(recipe: Parts) -> str | None:
    """What is wrong with a recipe's settings taken together, with the fix; None if nothing is."""
    return (
        _of_target(recipe.pattern.name, recipe.pattern.sparsity)
        or _of_propagation(recipe)
        or _of_permutation(recipe)
        or _of_streaming(recipe)
        or _of_folders(recipe.output)
    )


def _of_target(pattern: str, sparsity: float | None) -> str | None:
    try:
        asked = parse_pattern(pattern)
    except BadInput as error:
        return str(error)
    if sparsity is None or asked.allowed(sparsity):
        return None
    if not 0 <= sparsity < 1:
        return f"sparsity {sparsity:g} is out of range: it is the fraction of zeros, 0 ≤ s < 1."
    fixed = "does not allow it" if asked.sparsity is None else f"fixes it at {asked.sparsity:g}"
    return f"sparsity {sparsity:g} contradicts the pattern {pattern}, which {fixed}; leave one out."


def _of_permutation(recipe: Parts) -> str | None:
    if recipe.pattern.permute and parse_pattern(recipe.pattern.name).n_of_m is None:
        return "permute reorders channels for groups of N:M; give a pattern such as 2:4."
    if recipe.pattern.permute and recipe.model.stream:
        return "permute needs the whole model in memory, which stream does not; leave one out."
    return None


def _of_propagation(recipe: Parts) -> str | None:
    asked = recipe.calibration
    if asked.aim == "dense" and asked.propagation == "sequential":
        return "target dense compares two forwards of a block, which needs propagation block."
    if asked.aim == "dense" and asked.propagation == "dense":
        return (
            "in propagation dense every matrix gets the dense model's inputs, so target dense would be target pruned; "
            "leave it out, or take propagation block."
        )
    if recipe.reconstruction.steps and asked.propagation == "dense":
        return (
            "reconstruct trains a block on what the pruned blocks before it give, which propagation dense never "
            "computes; take propagation block or sequential."
        )
    return None


def _of_streaming(recipe: Parts) -> str | None:
    if recipe.model.stream and recipe.evaluation.runs_tasks:
        return (
            "zero-shot tasks need the whole model in memory; leave out --stream, or save the model and run: "
            "coprune eval FOLDER --tasks …"
        )
    return None


def _of_folders(output: OutputPart) -> str | None:
    if output.push_to_hub is not None and output.model is None:
        return "only a saved model can be pushed to the Hub; name its folder with --save-model."
    if output.run is not None and output.run == output.model:
        return "the run folder and the model folder are the same; give --save_model a folder of its own."
    return None
