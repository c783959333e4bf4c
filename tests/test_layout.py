"""The tests' own order: they mirror the rooms of the package, and share through `support`, never from test to test."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import coprune

TESTS = Path(__file__).parent
ROOMS = {folder.parent.name for folder in Path(coprune.__file__).parent.glob("*/__init__.py")}


def imported(file: Path) -> Iterator[str]:
    """The modules that a file imports, also within functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "."


def test_every_folder_of_tests_is_of_a_room() -> None:
    folders = {file.relative_to(TESTS).parts[0] for file in TESTS.rglob("*/test_*.py")}
    assert folders <= ROOMS | {"golden"}


def test_no_test_is_imported() -> None:
    for file in TESTS.rglob("*.py"):
        parts = [part for module in imported(file) for part in module.split(".")]
        assert not [part for part in parts if part.startswith("test_") or part == "conftest" or not part], file
