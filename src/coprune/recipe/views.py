"""The settings of measuring and training without pruning: a recipe's settings, under names that fit there."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

from coprune.base.environment import asks_for_fsdp
from coprune.base.errors import BadInput, unknown_name
from coprune.base.words import Command, LeaveOut, Set
from coprune.base.words import Setting as Named
from coprune.recipe.answers import cannot_require
from coprune.recipe.flat import flatten
from coprune.recipe.recipe import Recipe, make_recipe
from coprune.recipe.train_part import has_teacher
from coprune.recipe.tree import LEAVES


class Setting(NamedTuple):
    """A setting of a recipe under another name."""

    word: str
    """The recipe's name for it."""
    description: str | None = None
    """Help text; None for the recipe's."""


def _alike(*words: str) -> dict[str, Setting]:
    return {word: Setting(word) for word in words}


_ANSWERS = "generate", "generate_prompts", "generate_tokens", "generate_temperature", "require"
MEASURING: dict[str, Setting] = {
    "data": Setting(
        "eval_data",
        "Texts, comma-separated: embedded,c4@seqlen=1024,a path … [wikitext2]; or images: digits, a folder …",
    ),
    "tasks": Setting("tasks", "Tasks of lm-eval, comma-separated, such as boolq,arc_easy."),
    **_alike(
        *("eval_zero_shot", "num_fewshot", "include_path", "trust_tasks", "limit", "apply_chat_template", "gen_kwargs"),
        *("log_samples", *_ANSWERS, "bos"),
    ),
    "seqlen": Setting("seqlen", "Tokens per window. [min(2048, model's limit)]"),
    "batch_size": Setting("batch_size", "Windows per forward pass. [about 4096 tokens]"),
    **_alike("eval_tokens", "eval_images", "dtype", "device", "cache_dir"),
}
"""Settings of a measurement by name, from which command-line options are made."""

INSPECTING: dict[str, Setting] = {
    **_alike("sparsity", "pattern", "include", "exclude", "allocation", "dataset"),
    "nsamples": Setting(
        "nsamples", "Calibration samples for a plot, or for an allocation that needs a pass over data. [16]"
    ),
    **_alike("seqlen", "cache_dir"),
}
"""Settings that determine what would be pruned, likewise."""

TRAINING: dict[str, Setting] = {
    "model": Setting("model", "The pruned model: a local folder or Hub id."),
    "dataset": Setting(
        "dataset",
        "Text to train on, as in prune: wikitext2, c4, embedded, a datasets id or a local file; pairs or recordings, if the "
        "model reads these; or images: digits, a folder of classes, .parquet, or a datasets id. [embedded]",
    ),
    "seqlen": Setting("seqlen", "Tokens per training window. [min(1024, model's limit)]"),
    **_alike("seed"),
    "mode": Setting(
        "finetune",
        "lora, dense, distill or lora-distill. "
        "lora: low-rank adapters, masked so that merging keeps every zero; dense: the weights themselves; distill: the weights, "
        "toward the dense model (--teacher); lora-distill: adapters, toward the dense model. [lora]",
    ),
    "train": Setting("finetune_only"),
    **{
        leaf.path[-1]: Setting(word)
        for word, leaf in LEAVES.items()
        if leaf.path[0] == "train" and leaf.path[-1] not in ("mode", "only")
    },
    "exclude": Setting(
        "exclude", "Do not train what matches this pattern, nor blocks that match it entirely; repeatable."
    ),
    **_alike(
        "evaluate",
        "eval_data",
        "eval_images",
        "eval_tokens",
        "bos",
        *_ANSWERS,
        "gate",
        "device",
        "cache_dir",
        "report_to",
    ),
    "save": Setting("save", "Run folder. [out/finetune/MODEL/MODE]"),
    "save_model": Setting("save_model", "Folder for the model. [model/ in the run folder]"),
    **_alike("overwrite"),
}
"""Settings of a training by name, likewise; those of the training part have no prefix."""
_CALLED_IN_TRAINING = {setting.word: name for name, setting in TRAINING.items()}


def training_recipe(settings: Mapping[str, Any]) -> Recipe:
    """Return the recipe that trains a pruned model and prunes nothing.

    settings: those of TRAINING.

    Raises:
        BadInput: a setting is unknown, invalid or contradicts another, or a package is missing.
    """
    if find_spec("peft") is None:
        raise BadInput("fine-tuning needs peft", fix="pip install 'coprune[finetune]'")
    if asks_for_fsdp():
        raise BadInput(
            "fine-tuning over FSDP is not supported",
            fix="use data parallel processes: torchrun, or accelerate without FSDP",
        )
    recipe = make_recipe({"finetune": "lora"} | in_recipe_names(settings), _CALLED_IN_TRAINING)
    if has_teacher(recipe.train.mode) and recipe.train.teacher is None:
        needs = f"{recipe.train.mode} needs the dense model"
        raise BadInput(needs, field="teacher", fix=("name it with ", Named("teacher")))
    asked = recipe.evaluate.answers
    named = None if recipe.train.teacher else ("ask for them with ", Named("teacher"))
    if (wrong := cannot_require(asked, named)) is not None:
        raise wrong
    if (one := next((c for c in asked.measured if c.against_dense), None)) is not None:
        later = Command("evaluate", "FOLDER", Set("against", ...), Set("require", one.text))
        cause = f"{one.text} is about the dense model's measurements, which training does not make"
        raise BadInput(cause, field="require", value=one.text, fix=("save the model and run: ", later))
    return recipe


def in_recipe_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Translate settings of a training to a recipe's names. Raises BadInput for an unknown one."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in TRAINING:
            raise unknown_name("setting", name, TRAINING, field=name)
        found[TRAINING[name].word] = value
    return found


def measuring_recipe(model: str, settings: Mapping[str, Any]) -> Recipe:
    """Return the recipe that measures a model, on WikiText-2 unless texts, tasks or prompts are given.

    Args:
        model: as in a recipe.
        settings: those of MEASURING, by name or by the recipe's name.

    Raises:
        BadInput: a setting is unknown, invalid, or about pruning.
    """
    named = {(MEASURING[name].word if name in MEASURING else name): value for name, value in settings.items()}
    known = {setting.word for setting in MEASURING.values()}
    for word in flatten(named):
        if word not in known:
            cause = f"{word} is about pruning, and a measurement prunes nothing"
            raise BadInput(cause, field=word, value=settings.get(word), fix=LeaveOut(word))
    recipe = make_recipe({"model": model} | {word: value for word, value in named.items() if value is not None})
    named_others = recipe.evaluate.runs_tasks or recipe.evaluate.answers.is_asked
    if recipe.evaluate.data is None and not named_others:
        return recipe.replaced(eval_data="wikitext2")
    return recipe
