"""What can be said about a measurement: settings of a recipe, by the names that fit where nothing is pruned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from coprune.base.errors import BadInput
from coprune.base.words import LeaveOut
from coprune.recipe.flat import flatten, names_said
from coprune.recipe.recipe import Recipe, make_recipe


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
    "require": Setting(
        "require",
        "Exit with 3 unless the answers are so: conditions with commas between, such as 'loops<=dense+1,kl<0.5'; no more may "
        "be empty than the dense model's unless that is said, as in empty<=dense+1.",
    ),
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
    named = {(SETTINGS[name].word if name in SETTINGS else name): value for name, value in settings.items()}
    known = {setting.word for setting in SETTINGS.values()}
    for word in flatten(named):
        if word not in known:
            name = names_said(named)[word]
            cause = f"{name} says how to prune or where that goes, and a measurement prunes nothing"
            raise BadInput(cause, field=name, value=settings.get(name), fix=LeaveOut(name))
    recipe = make_recipe({"model": model} | {word: value for word, value in named.items() if value is not None})
    named_others = recipe.evaluate.runs_tasks or recipe.evaluate.answers.is_asked
    if recipe.evaluate.data is None and not named_others:
        return recipe.replaced(eval_data="wikitext2")
    return recipe
