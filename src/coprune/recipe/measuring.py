"""What can be said about a measurement: settings of a recipe, by the names that fit where nothing is pruned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from coprune.base.errors import BadInput
from coprune.base.words import LeaveOut
from coprune.recipe.flat import FLAT, PARTS, place_of, word_for
from coprune.recipe.recipe import Recipe, make_recipe

_OF_MEASURING = {"model", "calibration", "evaluation", "answers", "output"}
"""Parts of a recipe that say something of a measurement, too."""


class Setting(NamedTuple):
    """A setting of a measurement."""

    word: str
    """The recipe's word for it."""
    description: str | None = None
    """What it means here; None where it means what it does in a recipe."""


SETTINGS: dict[str, Setting] = {
    "data": Setting(
        "eval_data",
        "Texts, comma-separated: embedded,c4@seqlen=1024,a path … [wikitext2]; or images: digits, a folder …",
    ),
    "tasks": Setting("tasks", "Tasks of lm-eval, comma-separated, such as boolq,arc_easy."),
    "zero_shot": Setting("eval_zero_shot", "The papers' seven tasks."),
    "num_fewshot": Setting("num_fewshot"),
    "include_path": Setting("include_path"),
    "limit": Setting("limit"),
    "apply_chat_template": Setting("apply_chat_template"),
    "gen_kwargs": Setting("gen_kwargs"),
    "log_samples": Setting("log_samples"),
    "generate": Setting("generate"),
    "generate_prompts": Setting("generate_prompts"),
    "generate_tokens": Setting("generate_tokens"),
    "generate_temperature": Setting("generate_temperature"),
    "generate_seed": Setting("generate_seed"),
    "seqlen": Setting("seqlen", "Tokens per window. [min(2048, model's limit)]"),
    "bos": Setting("bos"),
    "batch_size": Setting("batch_size", "Windows per forward pass. [about 4096 tokens]"),
    "tokens": Setting("eval_tokens", "Use only so many tokens of each text. [all]"),
    "images": Setting("eval_images", "Use only so many images of each set. [all]"),
    "dtype": Setting("dtype"),
    "device": Setting("device"),
    "cache_dir": Setting("cache_dir"),
}
"""By name; the names of a command's options are made from these."""


def measuring_recipe(model: str, settings: Mapping[str, Any]) -> Recipe:
    """The recipe that measures a model, on WikiText-2 unless a text, a task or prompts are named.

    Args:
        model: as in a recipe.
        settings: those of SETTINGS, or others of a recipe.

    Raises:
        BadInput: a setting is unknown, has a value that it cannot have, or says how to prune.
    """
    _refuse_pruning(settings)
    named = {(SETTINGS[name].word if name in SETTINGS else name): value for name, value in settings.items()}
    recipe = make_recipe({"model": model} | {word: value for word, value in named.items() if value is not None})
    named_others = recipe.evaluation.runs_tasks or recipe.answers.prompts is not None
    if recipe.evaluation.data is None and not named_others:
        return recipe.replaced(eval_data="wikitext2")
    return recipe


def _refuse_pruning(settings: Mapping[str, Any]) -> None:
    """Raise BadInput for a setting that a measurement would ignore, since nothing is pruned."""
    for name, value in settings.items():
        if name not in SETTINGS and _says_how_to_prune(name):
            raise BadInput(
                f"{name} says how to prune, and a measurement prunes nothing",
                field=name,
                value=value,
                fix=LeaveOut(name),
            )


def _says_how_to_prune(name: str) -> bool:
    """Whether a recipe's setting, by any of its names, is one of pruning or training. Raises BadInput for no setting."""
    part = name.partition(".")[0]
    if part not in PARTS:
        word = word_for(name)
        part = place_of(word)[0] if word in FLAT else word  # a preset and a variant stand for several parts
    return part not in _OF_MEASURING
