"""Settings of a recipe that do not go together. Nothing heavy is imported here."""

from __future__ import annotations

from typing import Protocol

from coprune.base.errors import BadInput
from coprune.base.words import Command, LeaveOut, Set, Setting, Words
from coprune.recipe.answers import AnswersPart, cannot_require
from coprune.recipe.choice import USUAL_METHOD, Choice
from coprune.recipe.conditions import LIKENESS
from coprune.recipe.finetune import FinetunePart, cannot_finetune
from coprune.recipe.globs import refuse_numbers
from coprune.recipe.low_rank import LowRankPart, cannot_add
from coprune.recipe.outcome import EvaluationPart, OutputPart
from coprune.recipe.parts import CalibrationPart, ModelPart, PatternPart, SelectionPart
from coprune.recipe.pattern import parse_pattern
from coprune.recipe.reconstruction import ReconstructionPart, cannot_reconstruct
from coprune.recipe.structure import SPREADING, WHOLE_MODEL, StructurePart, cannot_score


class Parts(Protocol):
    """The parts of a recipe that may contradict each other."""

    @property
    def model(self) -> ModelPart: ...
    @property
    def method(self) -> Choice: ...
    @property
    def allocation(self) -> Choice: ...
    @property
    def pattern(self) -> PatternPart: ...
    @property
    def structure(self) -> StructurePart: ...
    @property
    def selection(self) -> SelectionPart: ...
    @property
    def refine(self) -> tuple[Choice, ...]: ...
    @property
    def calibration(self) -> CalibrationPart: ...
    @property
    def low_rank(self) -> LowRankPart: ...
    @property
    def finetune(self) -> FinetunePart: ...
    @property
    def reconstruction(self) -> ReconstructionPart: ...
    @property
    def evaluation(self) -> EvaluationPart: ...
    @property
    def answers(self) -> AnswersPart: ...
    @property
    def output(self) -> OutputPart: ...


def contradiction(recipe: Parts) -> BadInput | None:
    """What is wrong with a recipe's settings taken together, with the fix; None if nothing is."""
    return (
        _of_target(recipe.pattern.name, recipe.pattern.sparsity)
        or cannot_reconstruct(recipe.reconstruction, recipe.calibration)
        or cannot_finetune(recipe.finetune, recipe.output)
        or _of_training(recipe)
        or cannot_add(recipe.low_rank, recipe.structure, recipe.finetune, recipe.output)
        or _of_reshaping(recipe)
        or _of_domains(recipe.structure)
        or _of_allocation(recipe)
        or cannot_score(recipe.structure)
        or _of_removal(recipe)
        or _of_streaming(recipe)
        or _of_answers(recipe)
        or _of_calibration(recipe)
        or _of_folders(recipe.output)
    )


def _of_training(recipe: Parts) -> BadInput | None:
    # A training leaves alone what pruning did.
    trains = recipe.finetune.mode is not None
    return refuse_numbers(recipe.selection.exclude, "exclude", recipe.structure.shares) if trains else None


def _of_target(pattern: str, sparsity: float | None) -> BadInput | None:
    try:
        asked = parse_pattern(pattern)
    except BadInput as error:
        return error
    if sparsity is None or asked.allowed(sparsity):
        return None
    if not 0 <= sparsity < 1:
        wrong = f"sparsity {sparsity:g} is out of range: it is the fraction of zeros, 0 ≤ s < 1"
        return BadInput(wrong, field="sparsity", value=sparsity, fix=("half is ", Set("sparsity", 0.5)))
    fixed = "does not allow it" if asked.sparsity is None else f"fixes it at {asked.sparsity:g}"
    wrong = f"sparsity {sparsity:g} contradicts the pattern {pattern}, which {fixed}"
    return BadInput(wrong, field="sparsity", value=sparsity, fix="leave one out")


def _of_reshaping(recipe: Parts) -> BadInput | None:
    if recipe.pattern.permute and parse_pattern(recipe.pattern.name).n_of_m is None:
        fix: Words = ("give a pattern of them, such as ", Set("pattern", "2:4"))
        return BadInput("permute reorders channels for groups of N:M", field="permute", value=True, fix=fix)
    if recipe.pattern.rotate and recipe.pattern.sparsity == 0:
        nothing = "rotate makes smaller what the pattern takes, and sparsity 0 takes nothing"
        return BadInput(nothing, field="rotate", value=True, fix=LeaveOut("rotate"))
    asked = next((name for name in ("permute", "rotate") if getattr(recipe.pattern, name)), None)
    if asked is not None and recipe.model.stream:
        fix = ("leave out ", Set(asked, True), " or ", Set("stream", True))
        return BadInput(f"{asked} needs the whole model in memory", field=asked, value=True, fix=fix)
    return None


def _of_removal(recipe: Parts) -> BadInput | None:
    """Removing makes a smaller model; what sets weights to zero needs a pattern or a sparsity beside it."""
    if not recipe.structure.remove:
        return None
    if recipe.pattern.is_said:
        return _of_both(recipe) if recipe.structure.shares else None
    if recipe.finetune.mode is not None and not recipe.structure.shares:
        cause: Words = "a model that lost nothing but tokens is not trained in the same run"
        fix: Words = (LeaveOut("finetune"), ", save the model and run: ", Command("finetune", "FOLDER"))
        return BadInput(cause, field="finetune", fix=fix)
    said = {
        "method": recipe.method != USUAL_METHOD,
        "permute": recipe.pattern.permute,
        "rotate": recipe.pattern.rotate,
        "refine": bool(recipe.refine),
        "propagation": recipe.calibration.propagation != "block",
        "encoding": recipe.output.encoding != "dense",
    }
    for setting, given in said.items():
        if given:
            cause = ("remove makes a smaller model, for which ", Setting(setting), " means nothing")
            fix = ("leave it out, or add ", Set("sparsity", 0.5), " for zeros in what is left")
            return BadInput(cause, field=setting, fix=fix)
    return None


def _of_both(recipe: Parts) -> BadInput | None:
    """Parts removed and zeros in what is left are two halves of a run."""
    if recipe.evaluation.runs_tasks:
        fix: Words = ("save the model and run: ", Command("evaluate", "FOLDER", Set("tasks", ...)))
        return BadInput("zero-shot tasks are not run by a run that cuts and prunes", field="tasks", fix=fix)
    asked, shares = recipe.selection, recipe.structure.shares
    return refuse_numbers(asked.include, "include", shares) or refuse_numbers(asked.exclude, "exclude", shares)


def _of_allocation(recipe: Parts) -> BadInput | None:
    """Zeros are spread over matrices, channels and heads over blocks; with both in one run, one word may be for either."""
    asked, shares = recipe.allocation.name, recipe.structure.shares.keys()
    if asked in WHOLE_MODEL and recipe.model.stream:
        wrong = f"{WHOLE_MODEL[asked]}, which has to be in memory"
        return BadInput(wrong, field="allocation", value=asked, fix=("leave out ", Set("stream", True)))
    units, zeros = recipe.structure.spreads, not shares or recipe.pattern.is_said
    if asked == "uniform" or (units and asked in SPREADING) or zeros:
        return None
    fix = ("take ", Set("allocation", "uniform"))
    if units:
        cause = f"channels and heads are spread over the blocks by {', '.join(SPREADING)}, not by {recipe.allocation}"
    else:
        cause = f"allocation {recipe.allocation} spreads channels or heads over the blocks, and none are removed"
    return BadInput(cause, field="allocation", value=str(recipe.allocation), fix=fix)


def _of_domains(asked: StructurePart) -> BadInput | None:
    """Domains and their weights are for experts."""
    weights = asked.weights
    if asked.domains and "experts" not in asked.shares:
        fix: Words = ("add ", Set("remove", "experts=0.25"), ", or leave it out")
        return BadInput("domains are what experts are scored on", field="domains", value=asked.domains, fix=fix)
    if weights is not None and asked.kept_scores is None and weights.keys() != asked.texts.keys():
        named = ", ".join(asked.texts) or "none"
        return BadInput(f"weights are of the domains that there are ({named})", field="blend", value=asked.blend)
    return None


def _of_streaming(recipe: Parts) -> BadInput | None:
    if recipe.model.stream and recipe.evaluation.runs_tasks:
        return BadInput(
            "zero-shot tasks need the whole model in memory",
            field="stream",
            value=True,
            fix=(LeaveOut("stream"), ", or save the model and run: ", Command("evaluate", "FOLDER", Set("tasks", ...))),
        )
    return None


def _of_answers(recipe: Parts) -> BadInput | None:
    asked = recipe.answers
    dense: Words | None = None if recipe.evaluation.dense else ("leave out ", Set("evaluate_dense", False))
    if (wrong := cannot_require(asked, dense)) is not None:
        return wrong
    if recipe.model.stream and asked.is_asked:
        later = Command("evaluate", "FOLDER", Set("generate", "builtin"))
        fix: Words = (LeaveOut("stream"), ", or save the model and run: ", later)
        return BadInput("answers need the whole model in memory", field="stream", value=True, fix=fix)
    if recipe.structure.shares and recipe.pattern.is_said:
        for condition in asked.conditions:
            if condition.name in LIKENESS:
                cause = f"{condition.text} is about the dense model, which a run that cuts and prunes does not keep"
                fix = ("save the model and run: ", Command("evaluate", "FOLDER", Set("generate", "builtin")))
                return BadInput(cause, field="require", fix=fix)
    return None


def _of_calibration(recipe: Parts) -> BadInput | None:
    try:
        own = recipe.calibration.is_own
    except BadInput as error:
        return error
    if own and recipe.model.stream:
        return BadInput(
            "the dense model writes its calibration text with all of it in memory",
            field="stream",
            value=True,
            fix=(
                LeaveOut("stream"),
                ", or calibrate on a file that was written: ",
                Command("generate", "MODEL", "OUT.jsonl"),
            ),
        )
    return None


def _of_folders(output: OutputPart) -> BadInput | None:
    if output.push_to_hub is not None and output.model is None:
        return BadInput(
            "only a saved model can be pushed to the Hub",
            field="push_to_hub",
            value=output.push_to_hub,
            fix=("name its folder with ", Setting("save_model")),
        )
    if output.private and output.push_to_hub is None:
        fix: Words = ("name one with ", Setting("push_to_hub"), ", or ", LeaveOut("private"))
        return BadInput("there is no repository to keep private", field="private", value=True, fix=fix)
    if output.run is not None and output.run == output.model:
        same = "the run folder and the model folder are the same"
        return BadInput(same, field="save_model", value=output.run, fix=("name another with ", Setting("save_model")))
    return None
