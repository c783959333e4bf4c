"""The reference of commands and of a recipe's settings, made from the code as Markdown when the site is built."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import typer

from coprune.commands.app import app
from coprune.recipe.tree import LEAVES

MARKER = "<!-- every command with its options -->"
"""The comment in `commands.md` that they replace."""
SETTINGS_MARKER = "<!-- every setting by its group -->"
"""The comment in `recipe.md` that they replace."""
# A command that takes most of prune's options names these only.
_MANY = 20
_DEFAULT = re.compile(r"\s+\[(?:default: )?([^\[\]]*)\]$")
_FLAG = re.compile(r"--[a-z]")
_RANGE = re.compile(r"\s+\[x[<>]=?[^\[\]]*\]$")

Groups = dict[str, list[tuple[str, str]]]


def commands() -> dict[str, Any]:
    """Return the commands by name."""
    found: Any = typer.main.get_command(app)
    return dict(found.commands.items())


def all_commands() -> str:
    """Return the reference of all commands."""
    known = commands()
    of_prune = {row for rows in _groups("prune", known["prune"]).values() for row in rows if row[0].startswith("-")}
    parts: list[str] = []
    for name, command in known.items():
        groups = _groups(name, command)
        shared = [] if name == "prune" else [row for rows in groups.values() for row in rows if row in of_prune]
        if len(shared) >= _MANY:
            groups = {title: [row for row in rows if row not in shared] for title, rows in groups.items()}
        parts += [f"## coprune {name}", *_told(command.help or "")]
        for title, rows in groups.items():
            if rows:
                parts += [f"**{title}**", *(f"`{names}`\n:   {_help(text)}" for names, text in rows)]
        if len(shared) >= _MANY:
            parts += ["**As in [prune](#coprune-prune)**", ", ".join(f"`{_first(names)}`" for names, _ in shared)]
    return "\n\n".join(parts) + "\n"


def all_settings() -> str:
    """Return the table of a recipe's settings, in the groups of `--help`."""
    groups: dict[str, list[str]] = {}
    for word, leaf in LEAVES.items():
        groups.setdefault(leaf.part.title, []).append(f"`{word}`")
    rows = [f"| {title} | {', '.join(words)} |" for title, words in groups.items()]
    return "\n".join(["| group | its settings |", "| --- | --- |", *rows]) + "\n"


def _groups(name: str, command: Any) -> Groups:
    """Return a command's options by the titles of its `--help`, without `--help` itself."""
    found: Groups = command.groups(typer.Context(command, info_name=f"coprune {name}"))
    return {title: [row for row in rows if not row[0].endswith("--help")] for title, rows in found.items()}


def _first(names: str) -> str:
    return next(word for word in names.replace(",", " ").split() if word.startswith("--"))


def _told(text: str) -> Iterator[str]:
    """Return the paragraphs of a command's help, with examples as code."""
    for paragraph in text.split("\n\n"):
        begin, _, example = paragraph.partition("Example: ")
        if example and not begin:
            yield f"```bash\n{example}\n```"
        else:
            yield paragraph if paragraph.startswith("    ") else _marked(paragraph)


def _help(text: str) -> str:
    """Return an option's help, with the default as a sentence."""
    text = _RANGE.sub("", text)
    if text.endswith("[required]"):
        return _marked(text.removesuffix("[required]").rstrip()) + " **Required.**"
    default = _DEFAULT.search(text)
    if default is None:
        return _marked(text)
    value = default[1].partition(";")[0]
    return f"{_marked(text[: default.start()])} Default: {_marked(value)}."


def _marked(text: str) -> str:
    """Convert text to Markdown: code stays, flags become code, other markup is escaped."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(piece if piece.startswith("`") else _escaped(piece) for piece in pieces)


def _escaped(text: str) -> str:
    words = re.split(r"((?<![\w-])--[a-z][\w-]*)", text)
    return "".join(
        f"`{word}`" if _FLAG.match(word) else re.sub(r"([\\*_{}\[\]#])", r"\\\1", word).replace("<", "&lt;")
        for word in words
    )
