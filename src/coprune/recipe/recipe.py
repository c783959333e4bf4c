"""The run as data: all settings that decide its result, as one frozen and validated object.

The command line makes it, the run folder keeps it as `recipe.yaml`, and that file alone is enough to repeat the run.
Nothing heavy is imported here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ValidationError, model_serializer, model_validator

from coprune.base.errors import BadInput
from coprune.base.validation import explain, read_yaml
from coprune.base.words import Command, LeaveOut, Set, Setting, Words
from coprune.recipe.answers import ALONG, cannot_require
from coprune.recipe.choice import USUAL_METHOD, Choice
from coprune.recipe.flat import nest
from coprune.recipe.outcome import OutputPart
from coprune.recipe.parts import Decides, Part, deciding, refuse_numbers
from coprune.recipe.pattern import parse_pattern
from coprune.recipe.presets import with_preset
from coprune.recipe.structure import UNIT_ALLOCATION_NAMES, WHOLE_MODEL, RemovePart, cannot_score
from coprune.recipe.train_part import cannot_train
from coprune.recipe.tree import FIELDS, LEAVES, Tree

Kind = TypeVar("Kind", bound=BaseModel)


def contradiction(recipe: Tree) -> BadInput | None:
    """Return the error in a recipe's combined settings, or None."""
    return (
        _of_target(recipe.prune.pattern, recipe.prune.sparsity)
        or _of_reconstruction(recipe)
        or _of_training(recipe)
        or _of_reshaping(recipe)
        or _of_domains(recipe.remove)
        or _of_allocation(recipe)
        or cannot_score(recipe.remove)
        or _of_removal(recipe)
        or _of_streaming(recipe)
        or _of_answers(recipe)
        or _of_calibration(recipe)
        or _of_folders(recipe.output)
    )


def _unused(asked: Part, place: tuple[str, ...], wanted: Set, why: str) -> BadInput | None:
    """Return the error in a part that configures a step nobody asked for. wanted: the setting that asks for the step."""
    said = asked.first_changed()
    if said is None:
        return None
    word = next(word for word, leaf in LEAVES.items() if leaf.path == (*place, *said))
    cause: Words = (Setting(word), why, Setting(wanted.name))
    return BadInput(cause, field=word, value=attrgetter(".".join(said))(asked), fix=("add ", wanted))


def _of_reconstruction(recipe: Tree) -> BadInput | None:
    asked = recipe.prune.reconstruct
    if asked.steps and recipe.calibrate.propagation == "dense":
        return BadInput(
            "reconstruct trains a block on what the pruned blocks before it give, which propagation dense never computes",
            field="reconstruct",
            value=asked.steps,
            fix=("take ", Set("propagation", "block"), " or ", Set("propagation", "sequential")),
        )
    why = " configures the training of blocks, which needs "
    return None if asked.steps else _unused(asked, ("prune", "reconstruct"), Set("reconstruct", 6), why)


def _of_training(recipe: Tree) -> BadInput | None:
    if recipe.train.mode is None:
        why = " configures the training of the pruned model, which needs "
        return _unused(recipe.train, ("train",), Set("finetune", "lora"), why)
    if (wrong := cannot_train(recipe.train)) is not None:
        return wrong
    if not 0 <= (seed := recipe.calibrate.seed) < 2**32:
        return BadInput(f"seed cannot be {seed}: for training it must be 0 to {2**32 - 1}", field="seed", value=seed)
    # Training keeps the pruned zeros, so names must match after removal.
    return refuse_numbers(recipe.prune.exclude, "exclude", recipe.remove.kinds)


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


def _of_reshaping(recipe: Tree) -> BadInput | None:
    if recipe.prune.permute and parse_pattern(recipe.prune.pattern).n_of_m is None:
        fix: Words = ("give an N:M pattern, such as ", Set("pattern", "2:4"))
        return BadInput("permute reorders channels for groups of N:M", field="permute", value=True, fix=fix)
    if recipe.prune.rotate and recipe.prune.sparsity == 0:
        nothing = "rotate reduces what pruning loses, and sparsity 0 prunes nothing"
        return BadInput(nothing, field="rotate", value=True, fix=LeaveOut("rotate"))
    asked = next((name for name in ("permute", "rotate") if getattr(recipe.prune, name)), None)
    if asked is not None and recipe.model.stream:
        fix = ("leave out ", Set(asked, True), " or ", Set("stream", True))
        return BadInput(f"{asked} needs the whole model in memory", field=asked, value=True, fix=fix)
    return None


def _of_removal(recipe: Tree) -> BadInput | None:
    """Check a removal: setting zeros as well needs a pattern or a sparsity."""
    if not recipe.remove.parts:
        return None
    if recipe.prune.asks_for_zeros:
        return _of_both(recipe) if recipe.remove.kinds else None
    if recipe.train.mode is not None and not recipe.remove.kinds:
        cause: Words = "a run that only cuts the vocabulary cannot train as well"
        fix: Words = (LeaveOut("finetune"), ", save the model and run: ", Command("finetune", "FOLDER"))
        return BadInput(cause, field="finetune", fix=fix)
    said = {
        "method": recipe.prune.method != USUAL_METHOD,
        "permute": recipe.prune.permute,
        "rotate": recipe.prune.rotate,
        "refine": bool(recipe.prune.refine),
        "propagation": recipe.calibrate.propagation != "block",
    }
    for setting, given in said.items():
        if given:
            cause = ("remove makes a smaller model without zeros, so ", Setting(setting), " has no effect")
            fix = ("leave it out, or add ", Set("sparsity", 0.5), " for zeros in the rest")
            return BadInput(cause, field=setting, fix=fix)
    return None


def _of_both(recipe: Tree) -> BadInput | None:
    """Check a run that removes parts and prunes the rest."""
    if recipe.evaluate.runs_tasks:
        fix: Words = ("save the model and run: ", Command("evaluate", "FOLDER", Set("tasks", ...)))
        return BadInput("a run that removes parts and prunes cannot run zero-shot tasks", field="tasks", fix=fix)
    asked, kinds = recipe.prune, recipe.remove.kinds
    return refuse_numbers(asked.include, "include", kinds) or refuse_numbers(asked.exclude, "exclude", kinds)


def _of_allocation(recipe: Tree) -> BadInput | None:
    """Check the allocation: of zeros to matrices, or of channels and heads to blocks."""
    asked, kinds = recipe.prune.allocation.name, recipe.remove.kinds
    if asked in WHOLE_MODEL and recipe.model.stream:
        wrong = f"{WHOLE_MODEL[asked]}, which must be in memory"
        return BadInput(wrong, field="allocation", value=asked, fix=("leave out ", Set("stream", True)))
    units, zeros = recipe.remove.removes_units, not kinds or recipe.prune.asks_for_zeros
    if asked == "uniform" or (units and asked in UNIT_ALLOCATION_NAMES) or zeros:
        return None
    fix = ("take ", Set("allocation", "uniform"))
    if units:
        cause = (
            f"channels and heads are allocated by {', '.join(UNIT_ALLOCATION_NAMES)}, not by {recipe.prune.allocation}"
        )
    else:
        cause = f"allocation {recipe.prune.allocation} is for channels or heads, and none are removed"
    return BadInput(cause, field="allocation", value=str(recipe.prune.allocation), fix=fix)


def _of_domains(asked: RemovePart) -> BadInput | None:
    """Check domains and their weights, which only apply to experts."""
    weights = asked.weights
    if asked.domains and "experts" not in asked.shares:
        fix: Words = ("add ", Set("remove", "experts=0.25"), ", or leave it out")
        return BadInput(
            "domains are only for scoring experts, and none are removed", field="domains", value=asked.domains, fix=fix
        )
    if asked.domains and asked.weighs_experts:
        none: Words = (
            Set("score", str(asked.score_of("experts"))),
            " scores experts by their weights, and reads no text",
        )
        return BadInput(none, field="domains", value=asked.domains, fix="leave one out")
    if weights is not None and asked.kept_scores is None and weights.keys() != asked.texts.keys():
        named = ", ".join(asked.texts) or "none"
        return BadInput(f"blend must give a weight for each domain ({named})", field="blend", value=asked.blend)
    return None


def _of_streaming(recipe: Tree) -> BadInput | None:
    if recipe.model.stream and recipe.evaluate.runs_tasks:
        return BadInput(
            "zero-shot tasks need the whole model in memory",
            field="stream",
            value=True,
            fix=(LeaveOut("stream"), ", or save the model and run: ", Command("evaluate", "FOLDER", Set("tasks", ...))),
        )
    return None


def _of_answers(recipe: Tree) -> BadInput | None:
    asked = recipe.evaluate.answers
    dense: Words | None = None if recipe.evaluate.dense else ("leave out ", Set("evaluate_dense", False))
    if (wrong := cannot_require(asked, dense)) is not None:
        return wrong
    if asked.measured and not recipe.evaluate.perplexity:
        cause = f"{asked.measured[0].text} is about a measurement"
        return BadInput(cause, field="require", value=asked.require, fix=("leave out ", Set("evaluate", False)))
    if recipe.model.stream and asked.is_asked:
        later = Command("evaluate", "FOLDER", Set("generate", "builtin"))
        fix: Words = (LeaveOut("stream"), ", or save the model and run: ", later)
        return BadInput("answers need the whole model in memory", field="stream", value=True, fix=fix)
    if recipe.remove.kinds and recipe.prune.asks_for_zeros:
        for condition in asked.conditions:
            if condition.name in ALONG:
                cause = (
                    f"{condition.text} needs the dense model, which a run that removes parts and prunes does not keep"
                )
                fix = ("save the model and run: ", Command("evaluate", "FOLDER", Set("generate", "builtin")))
                return BadInput(cause, field="require", fix=fix)
    return None


def _of_calibration(recipe: Tree) -> BadInput | None:
    try:
        own = recipe.calibrate.is_own
    except BadInput as error:
        return error
    if own and recipe.model.stream:
        return BadInput(
            "the dense model must be in memory to generate calibration text",
            field="stream",
            value=True,
            fix=(
                LeaveOut("stream"),
                ", or calibrate on a generated file: ",
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


_NOT_HELD = "This file alone does not repeat the run: {what} was passed in Python."


class Recipe(Tree):
    """The settings of a run, read from and written as a flat mapping: `{"model": "smollm2-135m", "nsamples": 32}`."""

    @model_validator(mode="before")
    @classmethod
    def _nest(cls, settings: Any) -> Any:
        return nest(with_preset(settings)) if isinstance(settings, Mapping) else settings

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (error := contradiction(self)) is not None:
            raise error
        return self

    @property
    def cuts_and_prunes(self) -> bool:
        """Whether parts are removed and the rest is pruned."""
        return bool(self.remove.kinds) and self.prune.asks_for_zeros

    @property
    def reads_calibration(self) -> bool:
        """Whether the calibration text is read; not if only experts are removed, scored on other texts or none."""
        own = bool(self.remove.domains) or self.remove.weighs_experts
        return not (set(self.remove.shares) == {"experts"} and own) or self.prune.reconstruct.steps > 0

    @property
    def sets_zeros(self) -> bool:
        """Whether weights are set to zero, in addition to any removal."""
        return not self.remove.parts or self.prune.asks_for_zeros

    @property
    def way(self) -> str:
        """Names of the scores of removal and of the pruning method."""
        scores = [score.name for score in self.remove.scores.values()]
        return "-".join([*scores, *([self.prune.method.name] if self.sets_zeros else [])])

    @property
    def shape(self) -> str:
        """Removed parts, and the pattern of zeros."""
        return ", ".join([*self.remove.parts, *([self.prune.pattern] if self.sets_zeros else [])])

    @property
    def run_folder(self) -> Path:
        """Folder of the run's report; the default is never inside the model's folder."""
        return self.output.run or self._outside(self._usual_folder)

    def _outside(self, folder: Path) -> Path:
        """Return the folder, moved beside the model's folder if it would be inside it."""
        model = self.output.model
        if model is None or not folder.absolute().is_relative_to(model.absolute()):
            return folder
        return model.with_name(f"{model.name}-run") / folder.absolute().relative_to(model.absolute())

    @property
    def _usual_folder(self) -> Path:
        name = Path(self.model.name).name.removesuffix(".gguf") or "model"
        if self.remove.parts:
            return (
                Path("out") / name / f"without-{self.remove.label}{self._target if self.sets_zeros else ''}" / self.way
            )
        return Path("out") / name / self._target.removeprefix("-") / self.prune.method.name

    @property
    def _target(self) -> str:
        label = parse_pattern(self.prune.pattern).label(f"{self.prune.ratio:g}")
        return re.sub("[: =,]", "-", f"-{label}")

    @property
    def training_folder(self) -> Path:
        """Folder of curves, adapters and resumable states, for a recipe that only trains."""
        usual = Path("out") / "finetune" / (Path(self.model.name).name or "model") / str(self.train.mode)
        return self.output.run or self._outside(usual)

    @property
    def trained_folder(self) -> Path:
        """Folder of the trained model."""
        return self.output.model or self.training_folder / "model"

    def flat(self) -> dict[str, Any]:
        """Return every setting by name; choices with options as text, except the method."""
        return {word: self.setting(word) for word in LEAVES}

    def setting(self, word: str) -> Any:
        """Return the value of a setting by name."""
        return _as_text(attrgetter(".".join(LEAVES[word].path))(self))

    def replaced(self, **settings: Any) -> Recipe:
        """Return the recipe with other values, by name, without validation."""
        changed = self
        for word, value in settings.items():
            path = LEAVES[word].path
            if isinstance(value, Choice) and word == "method":
                path = path[:-1]  # with its options
            changed = _with(changed, path, value)
        return changed

    def as_stored(self) -> Recipe:
        """Return the recipe as a run stores it: without settings that notify others or overwrite files."""
        return self.replaced(report_to=None, push_to_hub=None, private=None, log_json=None, overwrite=None)

    @property
    def given(self) -> list[str]:
        """Python objects passed to the call, which the recipe needs to repeat the run."""
        return [f"the method {self.prune.method.name}"] if self.prune.method.is_given else []

    def deciding(self, what: Decides) -> dict[str, Any]:
        """Return the settings that influence some results, by name."""
        return deciding(self.flat(), FIELDS, what)

    @property
    def whole(self) -> dict[str, Any]:
        """The settings that decide weights and measurements, without destinations and notifications."""
        return self.deciding(Decides.WHOLE)

    def has_same_result(self, other: Recipe) -> bool:
        """Return whether another recipe gives the same weights and measurements."""
        return self.whole == other.whole

    @model_serializer
    def _by_name(self) -> dict[str, Any]:
        method, said = self.prune.method, self.flat()
        del said["options"]
        return said | {"method": method.model_dump() if method.options else method.name}

    def to_yaml(self, usual: bool = True) -> str:
        """Return the recipe as YAML for `Recipe.from_yaml`, without unset values.

        If the call passed Python objects that no file can hold, a comment says so.

        Args:
            usual: whether to include settings that have their default values.
        """
        said = {
            word: value
            for word, value in self.model_dump(mode="json").items()
            if value not in (None, []) and (usual or self.setting(word) != DEFAULTS[word])
        }
        if "data" not in self.calibrate.model_fields_set:
            said.pop("dataset", None)  # its default depends on what the model reads
        if self.train.mode is None:  # its settings have no effect
            said = {word: value for word, value in said.items() if LEAVES[word].path[0] != "train"}
        note = f"# {_NOT_HELD.format(what=' and '.join(self.given))}\n" if self.given else ""
        return note + yaml.safe_dump(said, sort_keys=False, allow_unicode=True, width=10_000)

    @classmethod
    def from_yaml(cls, path: Path) -> Recipe:
        """Read a recipe file. Raises BadInput if it is missing, not YAML, or not a valid recipe."""
        return make_recipe(read_settings(path))


def _as_text(value: Any) -> Any:
    """Return a choice, or several, as text; other values unchanged."""
    if isinstance(value, tuple):
        return tuple(_as_text(one) for one in value)
    return str(value) if isinstance(value, Choice) else value


def _with(part: Kind, path: tuple[str, ...], value: Any) -> Kind:
    """Return a part or recipe with another value at a path."""
    first, *rest = path
    return part.model_copy(update={first: _with(getattr(part, first), tuple(rest), value) if rest else value})


DEFAULTS: dict[str, Any] = {**Recipe.model_validate({"model": "-"}).flat(), "model": None}
"""Defaults of all settings, by name."""


def read_settings(path: Path) -> dict[str, Any]:
    """Read the settings in a recipe file. Raises BadInput if it is not a mapping."""
    data = read_yaml(path, "the recipe", "recipe")
    if not isinstance(data, dict):
        raise BadInput(
            f"the recipe {path} holds no settings",
            field="recipe",
            value=path,
            fix="write settings such as 'model: smollm2-135m'",
        )
    return data


def make_recipe(settings: Mapping[str, Any], called: Mapping[str, str] | None = None) -> Recipe:
    """Make a recipe from settings; report the first problem as a BadInput.

    Args:
        settings: by name; a `preset` is replaced with its settings, and explicit ones win.
        called: the caller's names of settings for error messages, if they differ.

    Raises:
        BadInput: a name is unknown or given twice, a value is of the wrong type, or settings contradict each other.
    """
    names = dict(called or {})
    try:
        return Recipe.model_validate(dict(settings))
    except ValidationError as error:
        raise explain(error, lambda place: _named(place, names)).renamed(names) from None


def _named(place: tuple[str, ...], names: Mapping[str, str]) -> tuple[str, str]:
    """Return the name of the setting at a path, and how messages call it."""
    for word, leaf in LEAVES.items():
        # A method's name and options share one path.
        path = leaf.path[:-1] if leaf.field.annotation is Choice and leaf.path[-1] == "name" else leaf.path
        if place[: len(path)] == path or path[: len(place)] == place:
            return word, ".".join([names.get(word, word), *place[len(path) :]])
    return place[0], ".".join(place)
