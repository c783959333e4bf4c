"""A second command writes beside a different run, or replaces it on request, and touches nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import coprune as package
from coprune.recipe.recipe import make_recipe
from coprune.report.run_folder import prepare_folders
from support.commands import run_command
from support.pico_folder import listing, save_pico, write_words

COMMAND = [
    "prune",
    "model",
    "--dataset",
    "words.txt",
    "--nsamples",
    "2",
    "--seqlen",
    "32",
    "-m",
    "magnitude",
    "--no-eval",
]
USUAL = Path("out/model/unstructured-0.5/magnitude")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_pico(tmp_path / "model", num_hidden_layers=2)
    write_words(tmp_path / "words.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Return a function that runs a command and returns its exit code and output."""

    def command(*more: Any) -> tuple[int, str]:
        ended = run_command([*COMMAND, *more], monkeypatch, capsys)
        return ended.code, ended.err

    return command


def test_another_seed_gets_its_own_folder_and_a_repeat_is_refused(
    place: Path, run: Callable[..., tuple[int, str]]
) -> None:
    assert run()[0] == 0
    usual = next((place / "out").rglob("report.json")).parent
    before = listing(usual)
    code, said = run("--seed", "1")
    own = usual.with_name("magnitude-seed-1").relative_to(place)
    assert code == 0
    assert f"{usual.relative_to(place)} holds a run that differs in seed; this one goes to {own}." in said
    assert (own / "report.json").is_file()
    assert listing(usual) == before
    code, said = run("--seed", "1")
    assert code == 2
    assert (
        f"{own} already holds a finished run; name another run folder with --save, or replace it with --overwrite."
        in said
    )
    (own / "log_magnitude.txt").unlink()
    assert run("--seed", "1", "--overwrite")[0] == 0
    assert (own / "log_magnitude.txt").is_file()
    assert listing(usual) == before


def test_overwrite_replaces_run_and_model_and_nothing_else(place: Path, run: Callable[..., tuple[int, str]]) -> None:
    folders = ["--save", "run", "--save-model", "run/pruned"]
    assert run(*folders)[0] == 0
    (place / "run" / "notes.txt").write_text("mine")
    ours = [place / "run" / "log_older.txt"]
    for file in ours:
        file.write_text("{}")
    code, said = run(*folders, "--sparsity", "0.75")
    assert code == 2
    assert "--overwrite" in said
    # A refused run removes nothing.
    before = listing(place)
    assert run(*folders, "--overwrite", "--dataset", "wrods.txt")[0] == 2
    assert listing(place) == before
    assert run(*folders, "--sparsity", "0.75", "--overwrite")[0] == 0
    assert json.loads((place / "run" / "report.json").read_text())["sparsity"]["matrices"] == 0.75
    assert (place / "run" / "notes.txt").read_text() == "mine"
    assert not any(file.exists() for file in ours)
    assert "overwrite" not in (place / "run" / "recipe.yaml").read_text()


def test_overwrite_keeps_foreign_files_and_the_runs_own_source(
    place: Path, run: Callable[..., tuple[int, str]]
) -> None:
    (place / "mine").mkdir()
    (place / "mine" / "thesis.txt").write_text("mine")
    code, said = run("--save", "run", "--save-model", "mine", "--overwrite")
    assert code == 2
    assert "mine already exists and is not empty; name another folder with --save-model." in said
    assert run("--save", "run", "--save-model", "pruned")[0] == 0
    with pytest.raises(package.BadInput, match="the run would replace pruned, which it reads"):
        prepare_folders(make_recipe({"model": "pruned", "save": "other", "save_model": "pruned", "overwrite": True}))
