"""Write the keyword arguments of coprune's functions as types, for editors and type checkers.

`make keywords` writes them into the package from the settings; a test compares the two.
"""

from __future__ import annotations

import dataclasses
import textwrap
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

import coprune
from coprune.commands.methods import field_comments
from coprune.fitting.fit_settings import FitSettings
from coprune.gguf_files.export_settings import ExportSettings
from coprune.pruning.methods import METHODS
from coprune.recipe.choice import Choice
from coprune.recipe.flags import ALIASES
from coprune.recipe.tree import FIELDS, HEADS
from coprune.recipe.views import MEASURING, TRAINING, Setting
from coprune.steps.generate_settings import GenerateSettings
from coprune.sweeps.execution_settings import ExecutionSettings

FILE = Path(coprune.__file__).parent / "data" / "keyword_arguments.py"
"""The module that is written."""
_WIDTH = 112
_BEGINNING = '''"""Keyword arguments of coprune's functions as types, for editors and type checkers.

`make keywords` writes this file from the settings of a recipe and the options of the methods; nobody edits it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from coprune.data.in_memory import CalibrationData, TextData
from coprune.recipe.choice import Choice

File = str | Path
Named = str | Mapping[str, Any] | Choice
"""Something by name, perhaps with options: `owl:spread=0.1`, or `{"name": "owl", "spread": 0.1}`."""
'''
_HANDED_OVER = {"dataset": "CalibrationData", "eval_data": "TextData | None"}
"""Settings whose values a call may hold itself, with their types."""
_MODELS: tuple[type[BaseModel], ...] = (GenerateSettings, ExportSettings, FitSettings, ExecutionSettings)
"""Settings of commands that have no recipe."""
_OTHERWISE = {"options": Mapping[str, bool | int | float | str | None]}

Key = tuple[str, str]
"""Type and text of a key."""


def written() -> str:
    """Return the module as it should be."""
    options, measuring, training = _options(), _of(MEASURING, "data"), _of(TRAINING, "model", "mode")
    plain = _of({word: Setting(word) for word in FIELDS}, "model", "method")
    for word in options.keys() & plain.keys():
        plain[word] = (_joined([plain[word][0], *options[word][0]]), plain[word][1])
    plain |= {name: (plain[word][0], "") for name, word in ALIASES.items() if word in plain}
    plain["use_variant"] = ("bool", "")
    plain["train"] = ('Literal["whole", "blocks"] | None', "What a preset trains. [whole, if it fits the memory]")
    own = {name: (_joined(kinds), " ".join(texts)) for name, (kinds, texts) in options.items() if name not in plain}
    shared = {name: key for name, key in plain.items() if measuring.get(name) == training.get(name) == key}
    kinds = [
        ("SharedArguments(TypedDict", "Settings that pruning, training and measuring share.", shared),
        ("RecipeArguments(SharedArguments", "The settings of a recipe, except the model and the method.", plain),
        ("PruneArguments(RecipeArguments", "The settings of a recipe, and the methods' own options.", own),
        ("MeasureArguments(SharedArguments", "The measurements of a model, and how they are done.", measuring),
        ("FinetuneArguments(SharedArguments", "The settings of a training, except the model and the mode.", training),
        *(
            (f"{one.__name__.removesuffix('Settings')}Arguments(TypedDict", one.__doc__, _of_model(one))
            for one in _MODELS
        ),
    ]
    return _BEGINNING + "".join(
        _typed(head, str(text), {name: key for name, key in keys.items() if name not in shared or "(Typed" in head})
        for head, text, keys in kinds
    )


def _of_model(settings: type[BaseModel]) -> dict[str, Key]:
    return {name: (_joined(_names(_taken(one))), str(one.description)) for name, one in settings.model_fields.items()}


def _of(settings: Mapping[str, Setting], *without: str) -> dict[str, Key]:
    return {name: _key(name, one) for name, one in settings.items() if name not in without}


def _options() -> dict[str, tuple[list[str], list[str]]]:
    """Return types and texts of the methods' own options, each of all methods that have it."""
    found: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for method in METHODS.values():
        kinds, texts = typing.get_type_hints(type(method)), field_comments(type(method))
        for field in dataclasses.fields(method):
            known = found.setdefault(field.name, ({}, {}))
            known[0].update(dict.fromkeys(_names(kinds[field.name])))
            known[1][texts[field.name]] = None
    return {name: (list(kinds), list(texts)) for name, (kinds, texts) in found.items()}


def _key(name: str, setting: Setting) -> Key:
    field, word = FIELDS[setting.word], setting.word
    text = setting.description or str(field.description)
    if word in _HANDED_OVER:
        return _HANDED_OVER[word], text
    taken = [*_names(_OTHERWISE.get(word, _taken(field))), *(["str"] if word in HEADS else [])]
    return _joined(taken), text


def _taken(field: FieldInfo) -> Any:
    """Return the type of what a field takes: its own, or what its validator reads."""
    read = [note.json_schema_input_type for note in field.metadata if isinstance(note, BeforeValidator)]
    return next((kind for kind in read if kind is not PydanticUndefined), field.annotation)


def _names(kind: Any) -> list[str]:
    """Return the members of a type as they are written in the module."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return ["Literal[" + ", ".join(f'"{one}"' for one in arguments) + "]"]
    if origin is tuple:  # one is enough
        return [*_names(arguments[0]), f"Sequence[{_joined(_names(arguments[0]))}]"]
    if origin in (Mapping, Sequence):
        return [f"{origin.__name__}[{', '.join(_joined(_names(one)) for one in arguments)}]"]
    if arguments:
        return [name for one in arguments for name in _names(one)]
    return [{Path: "File", Choice: "Named", type(None): "None"}.get(kind, kind.__name__)]


def _joined(names: Iterable[str]) -> str:
    known = dict.fromkeys(names)
    literals = [name.removeprefix("Literal[").removesuffix("]") for name in known if name.startswith("Literal[")]
    said = dict.fromkeys(one for literal in literals for one in literal.split(", "))
    covered = {"File": ("str",), "Named": ("str",)}
    gone = {one for name in known for one in covered.get(name, ())} | {"None"}
    others = [name for name in known if name not in gone and not name.startswith("Literal[")]
    whole = ([f"Literal[{', '.join(said)}]"] if said else []) + others
    return " | ".join([*whole, *(["None"] if "None" in known else [])])


def _typed(head: str, text: str, keys: Mapping[str, Key]) -> str:
    lines = ["", "", f"class {head}, total=False):", f'    """{text}"""', ""]
    for name, (kind, told) in keys.items():
        lines += [f"    {name}: {kind}", *_docstring(told)]
    return "\n".join(lines) + "\n"


def _docstring(text: str) -> list[str]:
    if not text:
        return []
    first, *more = textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
    return [f'    """{first}' + ('"""' if not more else ""), *(f"    {line}" for line in more[:-1])] + (
        [f'    {more[-1]}"""'] if more else []
    )


if __name__ == "__main__":
    FILE.write_text(written(), encoding="utf-8")
