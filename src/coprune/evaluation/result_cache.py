"""Evaluations that were done already, kept by content: what was measured, of which weights, on what.

Each is one small file named by a hash of its key. A model is named by the bytes of its files, a local text by those of
its, so that nothing is looked up that has changed since. Files that cannot be read are measured again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from filelock import FileLock
from pydantic import BaseModel, ValidationError

from coprune.base.environment import user_cache
from coprune.base.errors import BadInput, about, unknown_name
from coprune.base.files import write_text
from coprune.base.words import Command, Set, Setting
from coprune.data.local_text import files_of, looks_local, split_column
from coprune.recipe.recipe import Recipe
from coprune.recipe.sources import exists

Kept = TypeVar("Kept", bound=BaseModel)

# Raised whenever a measurement is done differently, so that older ones are not taken for it.
_GENERATION = 2
_WEIGHTS = ("*.safetensors", "*.gguf")
# What else decides a model's outputs: its configuration and how it cuts text into tokens.
_OTHERS = ("*.json", "*.model", "*.txt", "*.jinja")
_NOTES = ("report.json", "finetune.json", "distributions.json")


class EvaluationCache:
    """A folder of evaluations; None keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def find(self, key: str, kind: type[Kept]) -> Kept | None:
        """Return what is kept under a key; None if nothing is."""
        if self._folder is None:
            return None
        try:
            return kind.model_validate_json(_file_of(self._folder, key).read_text(encoding="utf-8"))
        except (OSError, ValidationError):
            return None

    def get(self, key: str, kind: type[Kept], measure: Callable[[], Kept]) -> Kept:
        """Return what is kept under a key, or else measure and keep it.

        Of several processes one measures, and the others wait for what it finds. A killed one lets go.
        """
        if self._folder is None:
            return measure()
        if (kept := self.find(key, kind)) is not None:
            return kept
        self._folder.mkdir(parents=True, exist_ok=True)
        file = _file_of(self._folder, key)
        with FileLock(file.with_suffix(".lock")):
            # Another process may have measured it by now.
            if (kept := self.find(key, kind)) is not None:
                return kept
            found = measure()
            write_text(file, found.model_dump_json() + "\n")
            return found


def _file_of(folder: Path, key: str) -> Path:
    return folder / f"{hashlib.sha256(f'{_GENERATION} {key}'.encode()).hexdigest()[:32]}.json"


def default_cache_folder() -> Path:
    """Return `coprune/evaluations` in the user's cache folder (XDG_CACHE_HOME, or ~/.cache)."""
    return user_cache() / "evaluations"


def model_fingerprint(path: Path) -> str:
    """Hash a model's files: a GGUF file, or a folder's weights, configuration and tokenizer; 32 hex digits."""
    if path.is_file():
        return _digest([path])
    files = [file for pattern in (*_WEIGHTS, *_OTHERS) for file in path.glob(pattern) if file.name not in _NOTES]
    return _digest(sorted(files))


def bytes_of_weights(path: Path) -> int:
    """Return the size of a model's weight files."""
    files = [path] if path.is_file() else [file for pattern in _WEIGHTS for file in path.glob(pattern)]
    return sum(file.stat().st_size for file in files)


def require_texts(texts: Iterable[Text]) -> None:
    """Raise BadInput for a text that is a local file or folder and not there; of a corpus nothing is asked."""
    for text in texts:
        if looks_local(text.name):
            with about("eval_data", text.label):
                files_of(split_column(text.name)[0])


def text_fingerprint(name: str) -> str:
    """Identify an evaluation text: a local file or folder by its bytes, a corpus by its name."""
    if not looks_local(name):
        return name
    path, column = split_column(name)
    return f"{_digest(files_of(path))} {column or ''}"


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            while part := stream.read(2**22):
                digest.update(part)
    return digest.hexdigest()


# What a text may have of its own, and the setting of a recipe that it takes the place of.
_SETTINGS = {"seqlen": ("seqlen", 2), "tokens": ("eval_tokens", 2), "batch_size": ("batch_size", 1)}
_TEXT = re.compile(r"(?P<name>[^,]*?)(?P<settings>(?:@\w+=[^@,]*)*)")


@dataclass(frozen=True)
class Text:
    """One text with its own settings."""

    label: str
    """Name as requested."""
    name: str
    settings: dict[str, int]
    """Settings of a recipe, which count for this text alone."""

    def recipe(self, recipe: Recipe) -> Recipe:
        """Return a recipe that measures on this text alone."""
        return recipe.replaced(eval_data=self.name, **self.settings)


def split_texts(eval_data: str | None) -> list[Text]:
    """Read a list of texts. Raises BadInput for a setting that is unknown or no whole number, or a text asked for twice."""
    found: dict[str, Text] = {}
    asked = eval_data or ""
    for label in [asked] if exists(asked) else [part.strip() for part in asked.split(",")]:
        if label in found:
            raise BadInput(
                f"the text {label} is asked for twice", field="eval_data", value=eval_data, fix="leave one out"
            )
        if label:
            if exists(label):  # its name may hold an @
                found[label] = Text(label, label, {})
                continue
            matched = _TEXT.fullmatch(label)
            assert matched is not None  # the name takes whatever is no setting
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
    """Return the names of texts that are all measured alike. Raises BadInput without any, or for one with own settings."""
    texts = split_texts(eval_data)
    if not texts:
        fix = ("name some, as in ", Set("eval_data", "embedded"), ", or leave it out")
        raise BadInput("eval_data is empty", field="eval_data", value=eval_data, fix=fix)
    for text in texts:
        if text.settings:
            raise BadInput(
                (
                    "settings of one text, as in ",
                    text.label,
                    ", are for ",
                    Command("evaluate"),
                    " and ",
                    Command("compare"),
                ),
                field="eval_data",
                value=eval_data,
                fix=(
                    *("here ", Setting("seqlen"), ", ", Setting("eval_tokens"), " and ", Setting("batch_size")),
                    " count for all texts",
                ),
            )
    return [text.name for text in texts]
