"""The package as others get it: built, installed into a fresh environment, and used outside of the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from coprune.base.native.build import load_kernels
from support.pico_folder import save_pico, write_words

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that was built from the source distribution, as an installation from PyPI without wheels would."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(folder.glob("*.tar.gz"))) == 1
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of a fresh environment that holds the wheel; what coprune depends on is borrowed from this one."""
    folder = tmp_path_factory.mktemp("elsewhere") / "venv"
    venv.create(folder, with_pip=False)
    scripts = folder / "bin"
    command = [sys.executable, "-m", "pip", "--python", str(scripts / "python"), "install", "--no-deps", "--quiet"]
    subprocess.run([*command, str(wheel)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Of folders that a .pth file names no .pth file is read, so the checkout does not come along.
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return scripts


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Callable[..., str]:
    """Run a program of the fresh environment in an empty folder; its standard output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"COPRUNE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}

    def run(program: str, *arguments: str) -> str:
        command = [str(installed / program), *arguments]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_everything_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    files = {path for path in (ROOT / "src").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    expected = {path.relative_to(ROOT / "src").as_posix() for path in files}
    tasks = {
        path for path in (ROOT / "docs" / "tasks").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    expected |= {f"coprune/task_definitions/{path.relative_to(ROOT / 'docs' / 'tasks').as_posix()}" for path in tasks}
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == expected
    assert {"coprune/py.typed", "coprune/base/native/portable.cpp", "coprune/report/assets/page.js"} <= found


def test_the_commands_answer(run: Callable[..., str], installed: Path) -> None:
    place = run("python", "-c", "import coprune; print(coprune.__file__)")
    assert Path(place.strip()).is_relative_to(installed.parent)
    assert "Prune a model, measure what that did, and save it." in run("coprune", "--help")
    assert "sparsegpt" in run("coprune", "methods")


def test_a_kernel_is_compiled_and_a_model_pruned(run: Callable[..., str], tmp_path: Path) -> None:
    save_pico(tmp_path / "model", num_hidden_layers=2)
    write_words(tmp_path / "words.txt")
    ask = "from coprune.base.native.build import load_kernels; print(load_kernels() is not None)"
    compiles = load_kernels() is not None
    assert run("python", "-c", ask).strip() == str(compiles)
    assert bool(list((tmp_path / "cache").rglob("kernels.so"))) == compiles
    arguments = [
        "--dataset",
        "words.txt",
        "--nsamples",
        "4",
        "--seqlen",
        "32",
        "--method",
        "sparsegpt",
        "--pattern",
        "2:4",
    ]
    said = run("coprune", "prune", "model", *arguments, "--save", "run", "--save-model", "pruned", "--quiet")
    assert "50.00 % of the 14 pruned matrices" in said
    assert "<style>" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "pruned" / "model.safetensors").is_file()
