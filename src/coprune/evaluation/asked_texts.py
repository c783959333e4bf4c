"""The requested evaluation texts: names with their own settings, and fingerprints of local texts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from coprune.base.errors import BadInput, about, unknown_name
from coprune.base.files import digest_of_files
from coprune.base.words import Command, Set, Setting
from coprune.data.local_text import files_of, looks_local, split_column
from coprune.recipe.recipe import Recipe
from coprune.recipe.sources import exists


def require_texts(texts: Iterable[Text]) -> None:
    """Raise BadInput for a missing local file or folder; corpora are not checked."""
    for text in texts:
        if looks_local(text.name):
            with about("eval_data", text.label):
                files_of(split_column(text.name)[0])


def text_fingerprint(name: str) -> str:
    """Identify an evaluation text: a local file or folder by content, a corpus by name."""
    if not looks_local(name):
        return name
    path, column = split_column(name)
    return f"{digest_of_files(files_of(path), named=path.is_dir())} {column or ''}"


# Per-text settings, with the recipe's setting that each replaces and its minimum.
_SETTINGS = {"seqlen": ("seqlen", 2), "tokens": ("eval_tokens", 2), "batch_size": ("batch_size", 1)}
_TEXT = re.compile(r"(?P<name>[^,]*?)(?P<settings>(?:@\w+=[^@,]*)*)")


@dataclass(frozen=True)
class Text:
    """One text with its own settings."""

    label: str
    """Name as requested."""
    name: str
    settings: dict[str, int]
    """Settings of the recipe for this text only."""

    def recipe(self, recipe: Recipe) -> Recipe:
        """Return a recipe that measures on this text only."""
        return recipe.replaced(eval_data=self.name, **self.settings)


def split_texts(eval_data: str | None) -> list[Text]:
    """Parse a list of texts. Raises BadInput for an unknown or invalid setting, or a text given twice."""
    found: dict[str, Text] = {}
    asked = eval_data or ""
    for label in [asked] if exists(asked) else [part.strip() for part in asked.split(",")]:
        if label in found:
            raise BadInput(f"the text {label} is given twice", field="eval_data", value=eval_data, fix="leave one out")
        if label:
            if exists(label):  # its name may contain an @
                found[label] = Text(label, label, {})
                continue
            matched = _TEXT.fullmatch(label)
            assert matched is not None  # the name matches anything that is not a setting
            found[label] = Text(label, matched["name"], _settings(label, matched["settings"]))
    return list(found.values())


def _settings(label: str, text: str) -> dict[str, int]:
    settings = {}
    for setting in text.split("@")[1:]:
        key, value = setting.split("=", 1)
        if key not in _SETTINGS:
            raise unknown_name(f"setting of {label.split('@')[0]}:", key, _SETTINGS, field="eval_data")
        field, least = _SETTINGS[key]
        if not value.isdecimal() or int(value) < least:
            raise BadInput(
                f"{label}: {key} is a whole number of at least {least}, not {value!r}", field="eval_data", value=label
            )
        settings[field] = int(value)
    return settings


def plain_names(eval_data: str) -> list[str]:
    """Return the names of texts that share all settings. Raises BadInput if there are none, or one has its own settings."""
    texts = split_texts(eval_data)
    if not texts:
        fix = ("name some, as in ", Set("eval_data", "embedded"), ", or leave it out")
        raise BadInput("eval_data is empty", field="eval_data", value=eval_data, fix=fix)
    for text in texts:
        if text.settings:
            raise BadInput(
                (
                    "per-text settings, as in ",
                    text.label,
                    ", only work with ",
                    Command("evaluate"),
                    " and ",
                    Command("compare"),
                ),
                field="eval_data",
                value=eval_data,
                fix=(
                    *("here ", Setting("seqlen"), ", ", Setting("eval_tokens"), " and ", Setting("batch_size")),
                    " apply to all texts",
                ),
            )
    return [text.name for text in texts]
