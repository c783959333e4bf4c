"""Bad input: one clear line in Python and on the command line, exit code 2, and nothing written or overwritten."""

from __future__ import annotations

import ast
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import coprune
from coprune.recipe.flags import CommandLine
from support.bad_inputs import make_place, read_cases, says
from support.commands import run_command

CASES = read_cases()
IN_PYTHON = [name for name, case in CASES.items() if case.python is not None]
TYPED = [name for name, case in CASES.items() if case.command is not None]
SOURCE = Path(coprune.__file__).parent
FLAG = re.compile(r"(?<![\w-])--[a-z]")
# Flags of other programs.
FOREIGN = ("pip install --no-deps ", "start its nodes with --num-cpus")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, a text, and obstacles, which no test may change."""
    folder = tmp_path_factory.mktemp("place")
    make_place(folder)
    return folder


@pytest.fixture
def untouched(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Run the test in that folder and require that it is unchanged afterwards."""
    monkeypatch.chdir(place)
    before = _states(place)
    yield place
    assert _states(place) == before


def _states(place: Path) -> dict[Path, tuple[int, ...]]:
    """Return the properties of each file that change when it is written, without reading its content."""
    found = {path: path.lstat() for path in place.rglob("*")}
    return {path: (state.st_ino, state.st_mode, state.st_size, state.st_mtime_ns) for path, state in found.items()}


@pytest.mark.parametrize("name", TYPED)
def test_the_command_line_prints_one_line_and_exits_with_2(
    name: str, untouched: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    ended = run_command(case.arguments(), monkeypatch, capsys)
    assert ended.code == 2
    assert ended.out == ""
    start, _, text = ended.err.removesuffix("\n").partition(" ")
    assert start == "coprune:"
    assert "\n" not in text
    assert says(text, case.on_command_line), text


@pytest.mark.parametrize("name", IN_PYTHON)
def test_python_raises_an_error_that_names_the_setting_and_the_cause(
    name: str, untouched: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    with pytest.raises(coprune.CopruneError) as caught:
        case.ask()
    error = caught.value
    assert says(str(error), case.text), str(error)
    assert error.field == case.field
    assert type(error) is getattr(coprune, case.error)
    assert isinstance(error, ValueError) == (case.error == "BadInput")
    assert "--" not in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    face = CommandLine(case.call)
    assert again.text(face) == error.text(face)
    # The command line refuses in the same words, unless typer itself refuses or the option has another name.
    if case.command is not None and not re.match("Invalid value for|unknown option '--", case.on_command_line):
        assert says(error.text(face), case.on_command_line), error.text(face)


def test_the_table_of_bad_inputs_covers_both_interfaces() -> None:
    both = [case for case in CASES.values() if case.python is not None and case.command is not None]
    assert len(both) >= 60
    assert sum(case.flags is not None for case in both) >= 30
    assert all(not FLAG.search(case.text) for case in CASES.values() if case.python is not None)


def test_a_valid_command_in_the_same_folder_works(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(place)
    words = ["prune", "model", "--dataset", "words.txt", "--seqlen", "32", "--nsamples", "4", "-m", "wanda"]
    ended = run_command([*words, "--save", str(tmp_path / "run")], monkeypatch, capsys)
    assert ended.code == 0
    assert Path(tmp_path / "run" / "report.json").is_file()


def texts_of_errors(file: Path) -> Iterator[object]:
    """Yield the strings in a file's errors."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
        if isinstance(node, ast.Raise) or isinstance(getattr(coprune, called, None), type) or called == "ValueError":
            yield from (inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant))


def test_only_the_command_line_names_flags() -> None:
    for file in sorted(SOURCE.rglob("*.py")):
        if file.relative_to(SOURCE).parts[0] == "commands":
            continue
        for text in texts_of_errors(file):
            if isinstance(text, str) and not any(foreign in text for foreign in FOREIGN):
                assert not FLAG.search(text), f"{file}: {text!r}"
