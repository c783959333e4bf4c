"""One word for every setting of a recipe, beside its place in the recipe's parts.

`nsamples` is the word for `calibration.samples`. Options of the command line, columns of a sweep's table and messages
about runs go by these words; files and calls may use words, places, or both, but say nothing twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from coprune.base.errors import BadInput, unknown_name
from coprune.base.words import LeaveOut, Set
from coprune.recipe.choice import Choice, split_choice
from coprune.recipe.retired import GONE_PARTS, passed_over, retired

FLAT: dict[str, str] = {
    "model": "model.name",
    "method": "method.name",
    "options": "method.options",
    "sparsity": "pattern.sparsity",
    "pattern": "pattern.name",
    "include": "selection.include",
    "exclude": "selection.exclude",
    "propagation": "calibration.propagation",
    "refine": "refine",
    "allocation": "allocation",
    "permute": "pattern.permute",
    "rotate": "pattern.rotate",
    "remove": "structure.remove",
    "score": "structure.score",
    "domains": "structure.domains",
    "blend": "structure.blend",
    "align": "structure.align",
    "align_experts": "structure.align_experts",
    "vocabulary_text": "structure.vocabulary_text",
    "vocabulary_languages": "structure.vocabulary_languages",
    "vocabulary_force": "structure.vocabulary_force",
    "low_rank": "low_rank.rank",
    "low_rank_rounds": "low_rank.rounds",
    "reconstruct": "reconstruction.steps",
    "reconstruct_tokens": "reconstruction.tokens",
    "reconstruct_lr": "reconstruction.learning_rate",
    "reconstruct_rates": "reconstruction.rates",
    "reconstruct_dtype": "reconstruction.dtype",
    "finetune": "finetune.mode",
    "finetune_minutes": "finetune.minutes",
    "finetune_tokens": "finetune.tokens",
    "finetune_lr": "finetune.learning_rate",
    "finetune_rates": "finetune.rates",
    "finetune_scope": "finetune.scope",
    "finetune_accumulate": "finetune.accumulate",
    "finetune_dtype": "finetune.dtype",
    "dataset": "calibration.data",
    "nsamples": "calibration.samples",
    "seqlen": "calibration.seqlen",
    "calibrate_on": "calibration.calibrate_on",
    "bos": "calibration.bos",
    "seed": "calibration.seed",
    "activation_memory": "calibration.activation_memory",
    "device_activation_memory": "calibration.device_activation_memory",
    "batch_size": "calibration.batch_size",
    "dtype": "model.dtype",
    "device": "model.device",
    "cache_dir": "model.cache_dir",
    "evaluate": "evaluation.perplexity",
    "evaluate_dense": "evaluation.dense",
    "eval_data": "evaluation.data",
    "eval_images": "evaluation.images",
    "eval_tokens": "evaluation.tokens",
    "eval_zero_shot": "evaluation.zero_shot",
    "tasks": "evaluation.tasks",
    "num_fewshot": "evaluation.few_shot",
    "include_path": "evaluation.task_folder",
    "limit": "evaluation.limit",
    "apply_chat_template": "evaluation.chat_template",
    "gen_kwargs": "evaluation.gen_kwargs",
    "log_samples": "evaluation.log_samples",
    "prompt": "evaluation.prompt",
    "generate": "answers.prompts",
    "generate_prompts": "answers.count",
    "generate_tokens": "answers.new_tokens",
    "generate_temperature": "answers.temperature",
    "generate_seed": "answers.seed",
    "gate": "answers.gate",
    "require": "answers.require",
    "report_to": "output.report_to",
    "push_to_hub": "output.push_to_hub",
    "private": "output.private",
    "log_json": "output.log_json",
    "check_memory": "model.check_memory",
    "layer_error": "evaluation.layer_error",
    "stream": "model.stream",
    "save": "output.run",
    "save_model": "output.model",
    "overwrite": "output.overwrite",
    "encoding": "output.encoding",
}
# The Wanda repository's words that are not coprune's own.
_OTHER_WORDS = {"prune_method": "method", "sparsity_ratio": "sparsity", "sparsity_type": "pattern"}
_VARIANT = "use_variant"
PRESET = "preset"  # stands for settings in what is said; no recipe keeps it
TRAIN = "train"  # says which of a preset's settings; no recipe keeps it either
_WORDS = {place: word for word, place in FLAT.items()}
PARTS = tuple(dict.fromkeys(place.split(".")[0] for place in FLAT.values()))
_METHOD = "method"  # whatever else is said of it is an option of its own
_DEFAULT_METHOD = "wanda"
_SCORE = "score"  # which some methods have as an option: it is theirs where nothing is removed


def place_of(word: str) -> tuple[str, str | None]:
    """The part of a recipe that a setting is in, and its field there (None where the part is the setting)."""
    part, _, field = FLAT[word].partition(".")
    return part, field or None


def is_setting(name: str) -> bool:
    """Whether something names a setting, one that is retired, or a part of a recipe."""
    known = name in FLAT or name in _OTHER_WORDS or name in PARTS or name in (_VARIANT, PRESET, TRAIN) or "." in name
    return known or name in GONE_PARTS or retired(name) is not None


def word_for(name: str) -> str:
    """The word for a setting that is named by any of its words or by its place. Raises BadInput for no setting."""
    word = _OTHER_WORDS.get(name, name)
    if word in FLAT or word in (_VARIANT, PRESET, TRAIN):
        return word
    if name in _WORDS:
        return _WORDS[name]
    if (gone := retired(name)) is not None:
        raise gone
    part = name.partition(".")[0]
    inside = [place for place in _WORDS if place.startswith(f"{part}.")]
    known = [*FLAT, *PARTS, PRESET, TRAIN, *_OTHER_WORDS, *(_WORDS if "." in name else ())]
    raise unknown_name("recipe field", name, inside if "." in name and inside else known, field=name)


def flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their words, however they were said. Raises BadInput for an unknown name, or a setting said twice."""
    return {word: value for word, _, value in _said(settings)}


def layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Several mappings of settings as one, in which what comes later wins.

    A method's options add up, unless a later layer names another method; steps of reconstruction take the place of an earlier
    layer's tokens, and none of them of all that it says. Settings keep their names. Raises BadInput as `flatten`.
    """
    found: dict[str, tuple[str, Any]] = {}
    for layer in layers:
        said = {word: (name, value) for word, name, value in _said(layer)}
        if _METHOD in said and _METHOD in found and said[_METHOD][1] != found[_METHOD][1]:
            found.pop("options", None)
        if "reconstruct" in said:
            gone = "reconstruct_tokens" if said["reconstruct"][1] else "reconstruct_"
            found = {word: one for word, one in found.items() if not word.startswith(gone)}
        earlier, later = found.get("options"), said.get("options")
        found |= said
        if earlier and later and isinstance(earlier[1], Mapping) and isinstance(later[1], Mapping):
            found["options"] = (later[0], {**earlier[1], **later[1]})
    return dict(found.values())


def nest(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as the parts of a recipe. Raises BadInput as `flatten`."""
    flat = flatten(settings)
    if flat.pop(_VARIANT, False):
        if flat.get(_METHOD, _DEFAULT_METHOD) != "wanda":
            raise BadInput(
                (Set(_VARIANT, True), f" is a variant of wanda, not of {flat[_METHOD]}"),
                field=_VARIANT,
                value=True,
                fix=LeaveOut(_VARIANT),
            )
        flat[_METHOD] = "wanda_variant"
    if _SCORE in flat and "remove" not in flat and names_said(settings)[_SCORE] == _SCORE:
        said = flat.pop(_SCORE)
        option = said[0] if isinstance(said, list | tuple) and len(said) == 1 else said
        flat["options"] = {**flat.get("options", {}), _SCORE: option}
    if "options" in flat:
        flat.setdefault(_METHOD, _DEFAULT_METHOD)
    parts: dict[str, Any] = {}
    for word, value in flat.items():
        part, field = place_of(word)
        if field is None:
            parts[part] = value
        else:
            parts.setdefault(part, {})[field] = value
    return parts


def names_said(settings: Mapping[str, Any]) -> dict[str, str]:
    """By which name each setting was said, by its word."""
    return {word: name for word, name, _ in _said(settings)}


def _said(settings: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Every setting: its word, the name by which it was said, and its value."""
    found: dict[str, tuple[str, Any]] = {}
    for name, value in ((inner, value) for key, said in settings.items() for inner, value in _within(str(key), said)):
        if passed_over(name, value):
            continue
        word = word_for(name)
        if word not in found:
            found[word] = name, value
            continue
        earlier, before = found[word]
        if word != "options" or not isinstance(value, Mapping) or not isinstance(before, Mapping):
            raise BadInput(
                f"{word} is said twice, as {earlier} and as {name}", field=word, value=value, fix="leave one out"
            )
        if twice := sorted(set(before) & set(value)):
            raise BadInput(f"the method's option {twice[0]} is said twice", field="options", fix="leave one out")
        found[word] = "options", {**before, **value}
    return ((word, name, value) for word, (name, value) in found.items())


def _within(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What one entry of a mapping says: a setting, or those of a whole part."""
    if key in (_METHOD, "prune_method", "method.name") and isinstance(value, str | Mapping | Choice):
        yield from _within_method(key, value)
    elif key.startswith(f"{_METHOD}.") and key not in _WORDS:
        yield "method.options", {key.removeprefix(f"{_METHOD}.").replace("-", "_"): value}
    elif key in GONE_PARTS:
        inside = value if isinstance(value, Mapping) else {GONE_PARTS[key]: value}
        yield from ((f"{key}.{field}", inner) for field, inner in inside.items())
    elif key not in PARTS or FLAT.get(key) == key:
        yield key, value
    elif isinstance(value, BaseModel):
        yield from ((f"{key}.{field}", getattr(value, field)) for field in value.model_fields_set)
    elif isinstance(value, Mapping):
        yield from ((f"{key}.{field}", inner) for field, inner in value.items())
    elif key in FLAT:
        yield key, value
    elif value is not None:
        example = next(place for place in _WORDS if place.startswith(f"{key}."))
        raise BadInput(
            f"{key} has settings of its own, such as {example}, and cannot be {value!r}", field=key, value=value
        )


def _within_method(key: str, value: str | Mapping[str, Any] | Choice) -> Iterator[tuple[str, Any]]:
    """A method's name and its options, from text with options, a mapping, or a choice."""
    if isinstance(value, str) and ":" not in value:
        yield key, value
        return
    if isinstance(value, Mapping):
        try:
            split = split_choice(value)
        except ValueError as error:
            raise BadInput(f"{key}: {error}", field="method", value=value) from None
    else:
        choice = Choice.of(value)
        split = {"name": choice.name, "options": choice.options}
    if "name" in split:
        yield key if isinstance(value, str) else "method.name", split["name"]
    if split["options"]:
        yield "method.options", split["options"]
