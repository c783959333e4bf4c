"""Try coprune on every Python with the oldest and newest supported packages: python tests/matrix/run_matrix.py.

For every row the packages are resolved first, which needs no interpreter and shows for a future Python whether all have
wheels for it. Then, if its interpreter is found, a small part of the tests runs: recipes, commands, methods, and a
pruning of every kind of model, in a fresh environment that uv makes outside the checkout and that is removed
afterwards. A row temporarily needs up to 7 GB, most of it torch's CUDA libraries (`UV_TORCH_BACKEND=cpu` avoids them,
if PyTorch's own index is reachable).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# The versions in the classifiers, all of which must be installed and pass.
RUN = [match[1] for line in PROJECT["classifiers"] if (match := re.fullmatch(r".*Python :: (3\.\d+)", line))]
NEXT = ["3.14", "3.15"]
# Python, and which of the versions allowed by pyproject.toml; other packages are the newest that fit.
ROWS = [(RUN[0], "lowest-direct"), *((python, "highest") for python in [*RUN, *NEXT])]
# Dependencies of lm-eval in pure Python without wheels.
NO_WHEELS = ("rouge-score", "sqlitedict", "word2number")
TESTS = [
    *("recipe", "commands/test_bad_input.py", "commands/test_options.py", "model/test_transformers_private.py"),
    *("pruning/methods/test_any_group.py", "pruning/methods/test_new_pattern.py", "pruning/methods/test_methods.py"),
    *("data/test_local_text.py", "report/test_page.py"),
    *("training/test_masked_lora.py", "evaluation/test_extras.py", "run/test_whole_run.py"),
]
SHOWN = ("torch", "transformers", "numpy")


def main() -> int:
    """Try the requested rows and print a line for each; return 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="rows of this Python, or of this resolution")
    parser.add_argument("--place", help="where the environments are made, instead of the folder for temporary files")
    parser.add_argument("--resolve", action="store_true", help="resolve alone, and run nothing")
    options = parser.parse_args()
    failed = 0
    for python, resolution in ROWS:
        if options.only in (None, python, resolution):
            passed, said = resolved(python, resolution)
            if passed and not options.resolve:
                with tempfile.TemporaryDirectory(dir=options.place) as place:
                    passed, ran = tried(python, resolution, Path(place))
                said = f"{said}; {ran}"
            failed += not passed
            print(f"Python {python}, {resolution}: {said}", flush=True)
    return 1 if failed else 0


def resolved(python: str, resolution: str) -> tuple[bool, str]:
    """Resolve the packages of all extras and of the tests for a Python, from wheels only; return success and a message."""
    command = ["pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python-version", python]
    command += ["--resolution", resolution, "--extra", "all", "--extra", "test", "--only-binary", ":all:"]
    command += [word for name in NO_WHEELS for word in ("--no-binary", name)]
    done = subprocess.run(
        [sys.executable, "-m", "uv", *command, "pyproject.toml"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(done.stderr[-4000:], flush=True)
        return False, "FAILED to resolve"
    return True, f"{len(done.stdout.splitlines())} packages resolved"


def tried(python: str, resolution: str, place: Path) -> tuple[bool, str]:
    """Run the tests in a new environment; return whether they passed, and a message."""
    interpreter = found(python)
    if interpreter is None:
        return python not in RUN, "not run: there is no such Python here"
    own = place / "venv" / "bin" / "python"
    uv(place, "venv", "--quiet", "--python", interpreter, str(place / "venv"))
    started = time.monotonic()
    uv(place, "pip", "install", "--quiet", "--python", str(own), "--resolution", resolution, f"{ROOT}[all,test]")
    made = time.monotonic() - started
    # Deprecations between packages are no errors.
    command = [str(own), "-m", "pytest", "-q", "-m", "not slow", "-W", "default", "-p", "no:cacheprovider"]
    command += ["--durations=10"]
    command += [str(ROOT / "tests" / test) for test in TESTS]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-8000:] + done.stderr[-2000:], flush=True)
    tests = time.monotonic() - started - made
    versions = (
        f"{', '.join(f'{name} {version(own, name)}' for name in SHOWN)}; {made:.0f} s to make, {tests:.0f} s of tests"
    )
    said = f"{'FAILED' if done.returncode else 'passed'} {done.stdout.splitlines()[-1]}; {versions}"
    return not done.returncode, said


def found(python: str) -> str | None:
    """Return the interpreter of a version from the path or pyenv; None if neither works."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    named = shutil.which(f"python{python}")
    for candidate in [*([named] if named else []), *map(str, sorted(pyenv.glob(f"{python}.*/bin/python")))]:
        if subprocess.run([candidate, "-c", ""], capture_output=True, check=False).returncode == 0:
            return candidate
    return None


def uv(place: Path, *arguments: str) -> None:
    """Run uv; raise if it fails."""
    subprocess.run([sys.executable, "-m", "uv", *arguments], cwd=place, check=True)


def version(python: Path, package: str) -> str:
    """Return the version of a package in another environment."""
    ask = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
