"""Settings as a flat mapping: each under its own name, and none given twice."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from coprune.base.errors import BadInput, unknown_name
from coprune.base.words import LeaveOut, Set
from coprune.recipe.choice import Choice, read_named, split_choice
from coprune.recipe.flags import ALIASES
from coprune.recipe.tree import HEADS, LEAVES

_VARIANT = "use_variant"  # the Wanda repository's flag
PRESET = "preset"  # replaced by its settings; no recipe keeps it
TRAIN = "train"  # selects among a preset's settings; no recipe keeps it either
_METHOD, _OPTIONS = "method", "options"
_TEXT_WITH_OPTIONS = re.compile(r"(?P<value>.+?):(?P<options>[\w-]+=.*)")
_DEFAULT_METHOD = "wanda"
_SCORE = "score"  # also an option of some methods, to which it belongs if nothing is removed


def is_setting(name: str) -> bool:
    """Return whether a name is a setting's."""
    return ALIASES.get(name, name) in {*LEAVES, _VARIANT, PRESET, TRAIN}


def word_for(name: str) -> str:
    """Return a setting's own name for any of its names. Raises BadInput for an unknown one."""
    if is_setting(name):
        return ALIASES.get(name, name)
    raise unknown_name("recipe field", name, [*LEAVES, PRESET, TRAIN, *ALIASES], field=name)


def flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by their own names; a method's options and options after a colon become settings of their own.

    Raises:
        BadInput: a name is unknown, or a setting is given twice.
    """
    found, names = dict[str, Any](), dict[str, str]()
    for key, said in settings.items():
        for word, value in _within(word_for(str(key)), said):
            before = found.get(word)
            if word not in found:
                found[word], names[word] = value, str(key)
            elif word != _OPTIONS or not isinstance(value, Mapping) or not isinstance(before, Mapping):
                cause = f"{word} is given twice, as {names[word]} and as {key}"
                raise BadInput(cause, field=word, value=value, fix="leave one out")
            elif twice := sorted(set(before) & set(value)):
                raise BadInput(f"the method's option {twice[0]} is given twice", field=_OPTIONS, fix="leave one out")
            else:
                found[word] = {**before, **value}
    return found


def layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge several mappings of settings, as `flatten` returns them; later ones win.

    A method's options are merged, unless a later layer names another method. Reconstruction steps replace an earlier layer's
    tokens; zero steps replace all its reconstruction settings. Raises BadInput like `flatten`.
    """
    found: dict[str, Any] = {}
    for layer in layers:
        said = flatten(layer)
        if _METHOD in said and _METHOD in found and said[_METHOD] != found[_METHOD]:
            found.pop(_OPTIONS, None)
        if "reconstruct" in said:
            gone = "reconstruct_tokens" if said["reconstruct"] else "reconstruct_"
            found = {word: one for word, one in found.items() if not word.startswith(gone)}
        earlier, later = found.get(_OPTIONS), said.get(_OPTIONS)
        found |= said
        if isinstance(earlier, Mapping) and isinstance(later, Mapping):
            found[_OPTIONS] = {**earlier, **later}
    return found


def nest(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings nested in the parts of a recipe. Raises BadInput like `flatten`."""
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
    if _SCORE in flat and "remove" not in flat:
        said = flat.pop(_SCORE)
        option = said[0] if isinstance(said, list | tuple) and len(said) == 1 else said
        flat[_OPTIONS] = {**flat.get(_OPTIONS, {}), _SCORE: option}
    if _OPTIONS in flat:
        flat.setdefault(_METHOD, _DEFAULT_METHOD)
    parts: dict[str, Any] = {}
    for word, value in flat.items():
        *path, name = LEAVES[word].path
        part = parts
        for step in path:
            part = part.setdefault(step, {})
        part[name] = value
    return parts


def _within(word: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield a setting and the settings in its options."""
    if word == _METHOD and (isinstance(value, Mapping | Choice) or (isinstance(value, str) and ":" in value)):
        yield from _of_method(value)
    elif word in HEADS and isinstance(value, str) and (found := _TEXT_WITH_OPTIONS.fullmatch(value)) is not None:
        own = HEADS[word]
        yield word, found["value"]
        for name, option in read_named(f"{word}:{found['options']}")[1].items():
            if name not in own:
                raise unknown_name(f"option of {word}", name, own, field=word)
            yield own[name], option
    else:
        yield word, value


def _of_method(value: str | Mapping[str, Any] | Choice) -> Iterator[tuple[str, Any]]:
    """Yield a method's name and its options, from text with options, a mapping, or a choice."""
    if isinstance(value, Mapping):
        try:
            split = split_choice(value)
        except ValueError as error:
            raise BadInput(f"{_METHOD}: {error}", field=_METHOD, value=value) from None
    else:
        choice = Choice.of(value)
        split = {"name": choice.name, "options": choice.options}
    if "name" in split:
        yield _METHOD, split["name"]
    if split["options"]:
        yield _OPTIONS, split["options"]
