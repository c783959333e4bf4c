"""Settings as people say them: by flat names, by places in the tree, or as whole parts, but none of them twice."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from coprune.base.errors import BadInput, unknown_name
from coprune.base.words import LeaveOut, Set
from coprune.recipe.choice import Choice, read_named, split_choice
from coprune.recipe.flags import ALIASES
from coprune.recipe.tree import FLAT, HEADS, LEAVES, PARTS, WORDS

_VARIANT = "use_variant"  # the Wanda repository's flag
PRESET = "preset"  # stands for settings in what is said; no recipe keeps it
TRAIN = "train"  # says which of a preset's settings; no recipe keeps it either
_METHOD = "method"  # whatever else is said of it is an option of its own
_OF_METHOD = "prune.method"
_TEXT_WITH_OPTIONS = re.compile(r"(?P<value>.+?):(?P<options>[\w-]+=.*)")
_DEFAULT_METHOD = "wanda"
_SCORE = "score"  # which some methods have as an option: it is theirs where nothing is removed


def is_setting(name: str) -> bool:
    """Return whether a name is that of a setting, or of a part of a recipe."""
    return name in {*FLAT, *ALIASES, *PARTS, _VARIANT, PRESET, TRAIN} or "." in name


def word_for(name: str) -> str:
    """Return the flat name of a setting by any of its names or its path. Raises BadInput for an unknown one."""
    word = ALIASES.get(name, name)
    if word in FLAT or word in (_VARIANT, PRESET, TRAIN):
        return word
    if name in WORDS:
        return WORDS[name]
    inside = [known for known in WORDS if known.startswith(f"{name.rpartition('.')[0]}.")]
    known = [*FLAT, *PARTS, PRESET, TRAIN, *ALIASES, *(WORDS if "." in name else ())]
    raise unknown_name("recipe field", name, inside if "." in name and inside else known, field=name)


def flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by their flat names, however spelled. Raises BadInput for an unknown name, or a setting given twice."""
    return {word: value for word, _, value in _said(settings)}


def layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge several mappings of settings; later ones win.

    A method's options add up, unless a later layer names another method; steps of reconstruction replace an earlier layer's
    tokens, and no steps replace all its settings. Settings keep their names. Raises BadInput as `flatten`.
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
    """Return settings as the parts of a recipe. Raises BadInput as `flatten`."""
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
        *path, name = LEAVES[word].path
        part = parts
        for step in path:
            part = part.setdefault(step, {})
        part[name] = value
    return parts


def names_said(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the name under which each setting was given, by its flat name."""
    return {word: name for word, name, _ in _said(settings)}


def _said(settings: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Return every setting: its flat name, the name under which it was given, and its value."""
    found = dict[str, tuple[str, Any]]()
    for name, value in ((inner, value) for key, said in settings.items() for inner, value in _within(str(key), said)):
        word = word_for(name)
        if word not in found:
            found[word] = name, value
            continue
        earlier, before = found[word]
        if word != "options" or not isinstance(value, Mapping) or not isinstance(before, Mapping):
            raise BadInput(
                f"{word} is given twice, as {earlier} and as {name}", field=word, value=value, fix="leave one out"
            )
        if twice := sorted(set(before) & set(value)):
            raise BadInput(f"the method's option {twice[0]} is given twice", field="options", fix="leave one out")
        found[word] = "options", {**before, **value}
    return ((word, name, value) for word, (name, value) in found.items())


def _within(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the settings of one entry of a mapping: one, or all of a part."""
    said = value.__dict__ if isinstance(value, BaseModel) else value
    if ALIASES.get(key, key) in (_METHOD, _OF_METHOD, f"{_OF_METHOD}.name") and isinstance(
        value, str | Mapping | Choice
    ):
        yield from _within_method(key, value)
    elif key.startswith(f"{_OF_METHOD}.") and key not in WORDS:
        yield f"{_OF_METHOD}.options", {key.removeprefix(f"{_OF_METHOD}.").replace("-", "_"): value}
    elif isinstance(value, str) and (told := _with_options(key, value)) is not None:
        yield from told.items()
    elif key in PARTS and isinstance(said, Mapping):
        for field in value.model_fields_set if isinstance(value, BaseModel) else said:
            yield from _within(f"{key}.{field}", said[field])
    elif key not in PARTS or key in (*FLAT, TRAIN):
        yield key, value
    elif value is not None and (head := PARTS[key].head) is not None:
        yield f"{key}.{head}", value
    elif value is not None:
        example = next(known for known in WORDS if known.startswith(f"{key}."))
        raise BadInput(
            f"{key} has settings of its own, such as {example}, and cannot be {value!r}", field=key, value=value
        )


def _with_options(key: str, value: str) -> dict[str, Any] | None:
    """Return the settings in a text with options after a colon, or None without any."""
    word = key if key in FLAT else WORDS.get(key)
    found = _TEXT_WITH_OPTIONS.fullmatch(value)
    if word not in HEADS or found is None:
        return None
    own, said = HEADS[word], read_named(f"{word}:{found['options']}")[1]
    told = {word: found["value"]}
    for name, option in said.items():
        if name not in own:
            raise unknown_name(f"option of {word}", name, own, field=word)
        told[own[name]] = option
    return told


def _within_method(key: str, value: str | Mapping[str, Any] | Choice) -> Iterator[tuple[str, Any]]:
    """Yield a method's name and its options, from text with options, a mapping, or a choice."""
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
        yield key if isinstance(value, str) else f"{_OF_METHOD}.name", split["name"]
    if split["options"]:
        yield f"{_OF_METHOD}.options", split["options"]
