"""Parts removed, and zeros in what is left, as one run: the recipes of both parts, and the report of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coprune.evaluation.answers.facts import judge
from coprune.evaluation.required import judge_measured
from coprune.pruning.allocation import allocation_named
from coprune.pruning.allocation.by_file import ByFile
from coprune.pruning.methods import Method
from coprune.recipe.choice import USUAL_METHOD, Choice
from coprune.recipe.parts import refuse_numbers
from coprune.recipe.recipe import Recipe
from coprune.recipe.structure import RemovePart
from coprune.removal.unit_scores import SPREADINGS
from coprune.report.schema import Report
from coprune.steps.checks import prepare_solver

# Settings of the pruning alone, at their defaults.
_NO_ZEROS: dict[str, Any] = {
    "pattern": "unstructured",
    "sparsity": None,
    "permute": False,
    "rotate": False,
    "refine": (),
    "propagation": "block",
    "encoding": "source",
    "report_to": None,
    "push_to_hub": None,
    "private": None,
    "log_json": None,
    "prompt": "",
}

_UNIFORM = Choice(name="uniform")


def check_cut_and_zeros(recipe: Recipe, method: Method | None) -> None:
    """Check how what is left is pruned, whose turn comes late. method: where it was handed over. Raises BadInput."""
    prepare_solver(recipe, method)
    asked = allocation_named(_for_zeros(recipe))
    globs = [glob for glob, _ in asked.entries] if isinstance(asked, ByFile) else []
    if (wrong := refuse_numbers(globs, "allocation", recipe.remove.kinds)) is not None:
        raise wrong


def _for_units(recipe: Recipe) -> Choice:
    """Return the allocation of channels and heads in the cut."""
    return recipe.prune.allocation if _spreads_units(recipe) else _UNIFORM


def _for_zeros(recipe: Recipe) -> Choice:
    """Return the allocation of zeros."""
    return _UNIFORM if _spreads_units(recipe) else recipe.prune.allocation


def _spreads_units(recipe: Recipe) -> bool:
    """Return whether the recipe's allocation applies to the channels or heads that it removes."""
    return recipe.remove.spreads and recipe.prune.allocation.name in SPREADINGS


def cutting_of(recipe: Recipe, folder: Path | None) -> Recipe:
    """Return the recipe of the cut. folder: of its run; None to leave the smaller model in memory."""
    own = recipe.replaced(**_NO_ZEROS, save=folder, save_model=None if folder is None else folder / "model")
    return own.replaced(method=USUAL_METHOD, allocation=_for_units(recipe))


def zeros_of(recipe: Recipe, cut: Report, folder: Path | None) -> Recipe:
    """Return the recipe of the pruning after the cut. folder: of its run, if it leaves one."""
    # As the dense model decided, so that all figures are of the same windows.
    bos = recipe.calibrate.bos if cut.bos is None or cut.bos.used == "as given" else cut.bos.used
    model = recipe.model.name if cut.saved_model is None else str(cut.saved_model)
    whole = recipe.model_copy(update={"remove": RemovePart()}).replaced(allocation=_for_zeros(recipe))
    # Answers are held against conditions where the dense model's are known, which is not there; but they are looked at.
    require = "loops>=0" if recipe.evaluate.answers.conditions else None
    # The folder goes to the Hub when the card of both halves is in it.
    own = {"push_to_hub": None, "private": None, "prompt": "", "require": require}
    return whole.replaced(model=model, save=folder, bos=bos, evaluate_dense=False, **own)


def of_both(recipe: Recipe, cut: Report, pruned: Report) -> Report:
    """Return the second half's measurements, beside the first half's and the dense model's."""
    texts = {text.data: text.dense for text in cut.perplexity}
    images = {one.data: one for one in cut.accuracy}
    answers = None if pruned.answers is None else pruned.answers.beside(cut.answers)
    asked = recipe.evaluate.answers
    both = pruned.model_copy(
        update={
            "recipe": recipe,
            "model": cut.model,
            "perplexity": [one.model_copy(update={"dense": texts.get(one.data)}) for one in pruned.perplexity],
            "accuracy": [
                one.model_copy(
                    update={
                        name: getattr(images[one.data], name)
                        for name in ("dense_top1", "dense_top1_interval", "dense_top5")
                        if one.data in images
                    }
                )
                for one in pruned.accuracy
            ],
            "bos": cut.bos,
            "answers": answers,
            "required": judge(asked.conditions, answers),
            "events": [*cut.events, *pruned.events],
            "trainings": [*cut.trainings, *pruned.trainings],
            "edits": [*cut.edits, *pruned.edits],
            "covered": cut.covered,
            "left": cut.left,
            "padding": cut.padding,
            "prune_seconds": cut.prune_seconds + pruned.prune_seconds,
            "total_seconds": cut.total_seconds + pruned.total_seconds,
            "earlier_seconds": cut.earlier_seconds + pruned.earlier_seconds,
            "peak_memory_bytes": max(cut.peak_memory_bytes, pruned.peak_memory_bytes),
        }
    )
    measurements = judge_measured(asked.measured, both.figures())
    return both.model_copy(update={"required": (*both.required, *measurements)})
