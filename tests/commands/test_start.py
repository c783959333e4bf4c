"""What stands in the way before a command begins: another system, and packages that are not there."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from coprune.commands.demo import PACKAGES
from support.commands import run_command

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
# As on Windows, once what is imported before knows what it runs on.
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
def test_windows_is_refused_in_a_line(program: str, code: int, begins: str) -> None:
    ended = subprocess.run([sys.executable, "-c", ON_WINDOWS + program], capture_output=True, text=True, check=False)
    assert ended.returncode == code, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith(f"{begins}coprune runs on Linux and macOS; on Windows, ")
    assert code == 1 or len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize("gone", [list(PACKAGES), ["olmo_eval"]])
def test_the_demo_asks_for_all_that_it_needs_at_once(
    gone: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("coprune.commands.demo.find_spec", lambda name: None if name in gone else object())
    ended = run_command(["demo"], monkeypatch, capsys)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.endswith(f"type: pip install --no-deps {' '.join(PACKAGES[name] for name in gone)}.\n")


def test_the_demo_asks_for_what_the_project_installs() -> None:
    groups = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["dependency-groups"]
    assert groups["demo"] == list(PACKAGES.values())
