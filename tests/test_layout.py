"""The layout of the tests: they mirror the package's folders, and share code through `support`, never between tests."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import coprune

TESTS = Path(__file__).parent
SOURCE = Path(coprune.__file__).parent
ROOMS = {folder.parent.name for folder in SOURCE.glob("*/__init__.py")}


def imported(file: Path) -> Iterator[str]:
    """Yield the modules that a file imports, also within functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "."


def test_every_folder_of_tests_mirrors_one_of_the_package() -> None:
    folders = {file.relative_to(TESTS).parts[0] for file in TESTS.rglob("*/test_*.py")}
    assert folders <= ROOMS | {"families", "golden"}


def test_no_test_is_imported() -> None:
    for file in TESTS.rglob("*.py"):
        parts = [part for module in imported(file) for part in module.split(".")]
        assert not [part for part in parts if part.startswith("test_") or part == "conftest" or not part], file


def too_large(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether a function has more than sixty lines besides its docstring."""
    told = ast.get_docstring(function)
    lines = 1 + (function.end_lineno or 0) - function.lineno - (len(told.splitlines()) if told else 0)
    return lines > 60


def test_no_file_or_function_of_the_package_is_too_long() -> None:
    large = []
    for file in SOURCE.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if text.count("\n") > 500:
            large.append(file.name)
        # Commands have a line per option.
        functions = () if file.parent.name == "commands" else ast.walk(ast.parse(text))
        large += [
            f"{file.name}:{node.name}"
            for node in functions
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and too_large(node)
        ]
    assert not large


def test_no_file_of_tests_is_too_long() -> None:
    # Test files may be longer than the package's, since each test is read alone and a file's tests share fixtures.
    for file in (*TESTS.rglob("*.py"), *(TESTS.parent / "benchmarks").rglob("*.py")):
        assert file.read_text(encoding="utf-8").count("\n") <= 500, file
