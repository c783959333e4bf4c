"""The tests' own order: they mirror the rooms of the package, and share through `support`, never from test to test."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import coprune

TESTS = Path(__file__).parent
SOURCE = Path(coprune.__file__).parent
ROOMS = {folder.parent.name for folder in SOURCE.glob("*/__init__.py")}


def imported(file: Path) -> Iterator[str]:
    """The modules that a file imports, also within functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "."


def test_every_folder_of_tests_is_of_a_room() -> None:
    folders = {file.relative_to(TESTS).parts[0] for file in TESTS.rglob("*/test_*.py")}
    assert folders <= ROOMS | {"families", "golden"}


def test_no_test_is_imported() -> None:
    for file in TESTS.rglob("*.py"):
        parts = [part for module in imported(file) for part in module.split(".")]
        assert not [part for part in parts if part.startswith("test_") or part == "conftest" or not part], file


def too_large(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function has more than sixty lines beside its docstring."""
    told = ast.get_docstring(function)
    lines = 1 + (function.end_lineno or 0) - function.lineno - (len(told.splitlines()) if told else 0)
    return lines > 60


def test_no_file_and_no_function_is_too_large_to_read_at_once() -> None:
    large = []
    for file in SOURCE.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if text.count("\n") > 500:
            large.append(file.name)
        # A command has a line for every option, which is what there is to read in it.
        functions = () if file.parent.name == "commands" else ast.walk(ast.parse(text))
        large += [
            f"{file.name}:{node.name}"
            for node in functions
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and too_large(node)
        ]
    assert not large


def test_no_file_of_tests_is_endless() -> None:
    # Longer than a file of the package may be: each test is read alone, and those of a file share what is made once.
    for file in (*TESTS.rglob("*.py"), *(TESTS.parent / "benchmarks").rglob("*.py")):
        assert file.read_text(encoding="utf-8").count("\n") <= 500, file
