"""The Python versions that the package allows, and the one that make chooses."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from matrix.run_matrix import PROJECT, RUN, TESTS

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def taken(tmp_path: Path, works: str, fails: str = "", untried: bool = True, **variables: str) -> str:
    """Return make's interpreter, on a path with some that work and some that cannot make environments.

    untried: whether python3 is of an untested version.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("make", "sh", "sed", "sort"):
        (folder / tool).symlink_to(str(shutil.which(tool)))
    for name, status in [*((name, 0) for name in works.split()), *((name, 1) for name in fails.split())]:
        asked = (
            f'case "$*" in *version_info\\[*) exit {int(untried)};; esac\n' if name == "python3" and not status else ""
        )
        (folder / name).write_text(f"#!/bin/sh\n{asked}exit {status}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    words = [
        "make",
        "--dry-run",
        "-W",
        "pyproject.toml",
        "demo",
        *(f"{name}={value}" for name, value in variables.items()),
    ]
    done = subprocess.run(
        words, cwd=ROOT, env={"PATH": str(folder)}, capture_output=True, text=True, check=True, timeout=60
    )
    return next(line.split()[0] for line in done.stdout.splitlines() if "-m venv" in line)


def test_no_newer_python_is_locked_out() -> None:
    assert PROJECT["requires-python"] == f">={RUN[0]}"


def test_tests_of_the_version_matrix_exist() -> None:
    assert [test for test in TESTS if not (ROOT / "tests" / test).exists()] == []


def test_make_uses_the_users_python_if_its_version_is_tested(tmp_path: Path) -> None:
    assert taken(tmp_path, "python3 python3.11 python3.12", untried=False) == "python3"


def test_make_uses_the_newest_tested_python(tmp_path: Path) -> None:
    assert taken(tmp_path, "python3 python3.11 python3.12 python3.14") == "python3.12"


def test_make_skips_a_python_that_does_not_start(tmp_path: Path) -> None:
    assert taken(tmp_path, "python3 python3.11", fails="python3.13 python3.12") == "python3.11"


def test_make_uses_a_newer_python3_if_no_tested_one_is_installed(tmp_path: Path) -> None:
    assert taken(tmp_path, "python3") == "python3"


def test_make_says_what_is_missing_if_python_is_too_old(tmp_path: Path) -> None:
    assert taken(tmp_path, "", fails="python3") == "no-python-3.11-or-newer"


def test_the_variable_python_names_another_interpreter(tmp_path: Path) -> None:
    assert taken(tmp_path, "python3.13", PYTHON="/opt/other") == "/opt/other"
