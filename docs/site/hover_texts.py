"""Hover texts of keyword arguments: what editors show of typed dictionaries, written from the settings' own descriptions.

`python docs/site/hover_texts.py` writes them into the package; a test holds them equal.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Mapping
from pathlib import Path

import coprune
from coprune.commands.methods import field_comments
from coprune.pruning.methods import METHODS
from coprune.recipe.tree import FIELDS
from coprune.recipe.views import MEASURING, TRAINING, Setting

SOURCE = Path(coprune.__file__).parent
_WIDTH = 112


def texts_by_file() -> dict[Path, dict[str, str]]:
    """The text of every key that is a setting or a method's option, by the file of its typed dictionary."""
    plain = {word: field.description or "" for word, field in FIELDS.items()}
    return {
        SOURCE / "run" / "arguments.py": _of_methods() | plain,
        SOURCE / "evaluation" / "measure_arguments.py": plain | _of(MEASURING),
        SOURCE / "training" / "finetune.py": _of(TRAINING),
    }


def _of(settings: Mapping[str, Setting]) -> dict[str, str]:
    return {name: one.description or FIELDS[one.word].description or "" for name, one in settings.items()}


def _of_methods() -> dict[str, str]:
    """The texts of the methods' own options, each of the methods that have it."""
    found: dict[str, dict[str, None]] = {}
    for method in METHODS.values():
        for option, text in field_comments(type(method)).items():
            found.setdefault(option, {})[text] = None
    return {option: " ".join(texts) for option, texts in found.items()}


def with_texts(source: str, texts: Mapping[str, str]) -> str:
    """Return a module whose typed dictionaries have these texts, each below its key, and no others."""
    lines = source.splitlines()
    for kind in [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and _is_typed(node)][::-1]:
        for key, after in list(zip(kind.body, [*kind.body[1:], None], strict=True))[::-1]:
            if not isinstance(key, ast.AnnAssign) or not isinstance(key.target, ast.Name):
                continue
            assert key.end_lineno is not None
            end = key.end_lineno
            if isinstance(after, ast.Expr):
                end = after.end_lineno or end
            lines[key.end_lineno : end] = _docstring(texts.get(key.target.id, ""))
    return "\n".join(lines) + "\n"


def _is_typed(kind: ast.ClassDef) -> bool:
    return any(keyword.arg == "total" for keyword in kind.keywords)


def _docstring(text: str) -> list[str]:
    if not text:
        return []
    first, *more = textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
    return [f'    """{first}' + ('"""' if not more else ""), *(f"    {line}" for line in more[:-1])] + (
        [f'    {more[-1]}"""'] if more else []
    )


if __name__ == "__main__":
    for file, texts in texts_by_file().items():
        file.write_text(with_texts(file.read_text(encoding="utf-8"), texts), encoding="utf-8")
