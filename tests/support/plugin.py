"""A distribution with methods, built and installed into a folder that a process can add to its path."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest


def install_package(place: Path, name: str, module: str, source: str, entries: dict[str, str]) -> Path:
    """Build a distribution from its sources with pip and install it.

    Args:
        place: an empty folder to work in.
        name: the distribution's name.
        module: the name of its only module.
        source: the module's text.
        entries: the names and values of its entry points.

    Returns:
        The folder of the installation.
    """
    if find_spec("pip") is None or find_spec("setuptools") is None:
        pytest.skip("pip and setuptools are needed to install a package")
    sources, installed = place / f"{name}-source", place / f"{name}-installed"
    sources.mkdir(parents=True)
    lines = "\n".join(f'{key} = "{value}"' for key, value in entries.items())
    (sources / "pyproject.toml").write_text(
        textwrap.dedent(f"""
        [build-system]
        requires = ["setuptools"]
        build-backend = "setuptools.build_meta"

        [project]
        name = "{name}"
        version = "0.1"

        [tool.setuptools]
        py-modules = ["{module}"]

        [project.entry-points."coprune.methods"]
        """)
        + lines
        + "\n"
    )
    (sources / f"{module}.py").write_text(source)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [
            *command,
            "--disable-pip-version-check",
            "--root-user-action=ignore",
            "--target",
            str(installed),
            str(sources),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return installed
