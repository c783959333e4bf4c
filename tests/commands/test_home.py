"""Paths with a `~`, which shells leave unexpanded in `--save=~/out`, as do files and Python."""

from __future__ import annotations

from pathlib import Path

import pytest

from coprune.recipe.recipe import make_recipe
from coprune.recipe.views import training_recipe
from coprune.sweeps.file import Sweep
from support.commands import run_command
from support.pico_folder import save_pico, write_words


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set a home, and another folder with a model and a text as the current one."""
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_settings_may_name_folders_in_the_home(home: Path) -> None:
    recipe = make_recipe(
        {"model": "m", "save": "~/run", "save_model": "~/model", "log_json": "~/log", "cache_dir": "~"}
    )
    assert (recipe.run_folder, recipe.output.model) == (home / "run", home / "model")
    assert (recipe.output.log_json, recipe.model.cache_dir) == (home / "log", home)
    tuned = training_recipe({"model": "m", "save": "~/run", "save_model": "~/model"})
    assert (tuned.training_folder, tuned.trained_folder) == (home / "run", home / "model")
    assert Sweep.make({"model": "m", "method": ["wanda", "magnitude"], "save": "~/table"}).folder == home / "table"
    assert make_recipe({"model": "m", "save": "~no-such-user/r"}).run_folder == Path("~no-such-user/r"), "no such user"


def test_commands_write_into_the_home(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pico(Path("model"), num_hidden_layers=1)
    write_words(Path("words.txt"))
    lines = [
        "prune model --dataset words.txt --seqlen 32 --nsamples 2 --no-eval -q --save=~/run --save-model=~/pruned",
        "report ~/run --output=~/page.html",
        "eval ~/pruned --data words.txt --seqlen 32 -q --json=~/figures.json",
        "estimate model --dataset words.txt --seqlen 32 -q --json=~/estimate.json",
    ]
    for line in lines:
        ended = run_command(line.split(), monkeypatch, capsys)
        assert ended.code == 0, ended.err
    made = {"run", "pruned", "page.html", "figures.json", "estimate.json"}
    assert made <= {path.name for path in home.iterdir()}
    assert {path.name for path in Path().iterdir()} == {"model", "words.txt"}
