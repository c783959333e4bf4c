"""Which Python the package allows and which one make takes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from matrix.run_matrix import PROJECT, RUN, TESTS

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def taken(tmp_path: Path, works: str, fails: str = "", untried: bool = True, **variables: str) -> str:
    """The interpreter of make's environment, on a path with some that work and some that cannot make environments.

    untried: whether python3 is of a version on which nothing was tried.
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


def test_make_takes_the_users_own_python_if_it_was_tried(tmp_path: Path) -> None:
    assert taken(tmp_path, "python3 python3.11 python3.12", untried=False) == "python3"


def test_make_takes_the_newest_python_that_was_tried(tmp_path: Path) -> None:
    assert taken(tmp_path, "python3 python3.11 python3.12 python3.14") == "python3.12"


def test_make_passes_over_a_python_that_does_not_start(tmp_path: Path) -> None:
    assert taken(tmp_path, "python3 python3.11", fails="python3.13 python3.12") == "python3.11"


def test_make_takes_a_newer_python3_where_none_that_was_tried_is_installed(tmp_path: Path) -> None:
    assert taken(tmp_path, "python3") == "python3"


def test_make_says_what_it_lacks_where_python_is_too_old(tmp_path: Path) -> None:
    assert taken(tmp_path, "", fails="python3") == "no-python-3.11-or-newer"


def test_python_names_another_interpreter(tmp_path: Path) -> None:
    assert taken(tmp_path, "python3.13", PYTHON="/opt/other") == "/opt/other"
