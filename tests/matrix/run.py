"""Try coprune on every Python, with the oldest and the newest packages that it says it works with: python tests/matrix/run.py.

Each row is a fresh environment with the package installed in it, made by uv outside of the checkout and removed
afterwards, in which a small part of the tests runs: recipes, commands, methods, and a pruning of every kind of model. A
row needs up to 7 GB for that time, most of it torch's CUDA libraries (`UV_TORCH_BACKEND=cpu` does without, where
PyTorch's own index is in reach).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Python, and which of the versions that pyproject.toml allows; of packages that it does not name, the newest fit.
ROWS = [("3.11", "lowest-direct"), ("3.11", "highest"), ("3.12", "highest"), ("3.13", "highest")]
TESTS = [
    *("recipe", "commands/test_bad_input.py", "commands/test_options.py", "model/test_transformers_private.py"),
    *("pruning/methods/test_any_group.py", "pruning/methods/test_new_pattern.py", "pruning/methods/test_methods.py"),
    *("data/test_local_text.py", "packed/test_folder.py", "packed/test_linear.py", "report/test_page.py"),
    *("training/test_masked_lora.py", "evaluation/test_extras.py", "run/test_whole_run.py"),
]
SHOWN = ("torch", "transformers", "numpy")


def main() -> int:
    """Try the rows that are asked for and print a line for each; returns 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="rows of this Python, or of this resolution")
    parser.add_argument("--place", help="where the environments are made, instead of the folder for temporary files")
    options = parser.parse_args()
    failed = 0
    for python, resolution in ROWS:
        if options.only in (None, python, resolution):
            with tempfile.TemporaryDirectory(dir=options.place) as place:
                said = tried(python, resolution, Path(place))
            failed += not said.startswith("passed")
            print(f"Python {python}, {resolution}: {said}", flush=True)
    return 1 if failed else 0


def tried(python: str, resolution: str, place: Path) -> str:
    """Make an environment, run the tests in it, and return what became of that, which begins with "passed" or not."""
    interpreter = found(python)
    if interpreter is None:
        return "not tried: there is no such Python here"
    own = place / "venv" / "bin" / "python"
    uv(place, "venv", "--quiet", "--python", interpreter, str(place / "venv"))
    started = time.monotonic()
    uv(place, "pip", "install", "--quiet", "--python", str(own), "--resolution", resolution, f"{ROOT}[all,test]")
    made = time.monotonic() - started
    # What a new package deprecates of an old one is no error.
    command = [
        str(own),
        "-m",
        "pytest",
        "-q",
        "-m",
        "not slow",
        "-W",
        "default",
        "-p",
        "no:cacheprovider",
        "--durations=10",
    ]
    command += [str(ROOT / "tests" / test) for test in TESTS]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-8000:] + done.stderr[-2000:], flush=True)
    tests = time.monotonic() - started - made
    versions = (
        f"{', '.join(f'{name} {version(own, name)}' for name in SHOWN)}; {made:.0f} s to make, {tests:.0f} s of tests"
    )
    return f"{'FAILED' if done.returncode else 'passed'} {done.stdout.splitlines()[-1]}; {versions}"


def found(python: str) -> str | None:
    """The interpreter of a version on the path, or of pyenv; None if neither works."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    named = shutil.which(f"python{python}")
    for candidate in [*([named] if named else []), *map(str, sorted(pyenv.glob(f"{python}.*/bin/python")))]:
        if subprocess.run([candidate, "-c", ""], capture_output=True, check=False).returncode == 0:
            return candidate
    return None


def uv(place: Path, *arguments: str) -> None:
    """Run uv, which has to succeed."""
    subprocess.run([sys.executable, "-m", "uv", *arguments], cwd=place, check=True)


def version(python: Path, package: str) -> str:
    """The version of a package in another environment."""
    ask = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
