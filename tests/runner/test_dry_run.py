"""The preview of a run: it writes and loads nothing, and gives the size of the saved model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from coprune.base.progress import Reporter
from coprune.model.checkpoint.shards import stored_entries
from coprune.recipe.recipe import make_recipe
from coprune.runner.dry_run import dry_run
from coprune.runner.run_recipe import run_recipe
from support.commands import run_command
from support.pico_folder import listing, save_pico, write_words
from support.vocabularies import TEXTS, save_with_tokens

QUIET = Reporter(quiet=True)
SMALL = ["--nsamples", "4", "--seqlen", "16", "--device", "cpu", "--no-eval"]
pytestmark = pytest.mark.usefixtures("one_thread")


def asked(place: Path, **more: Any) -> Any:
    words = {"dataset": str(place / "words.txt"), "nsamples": 4, "seqlen": 16, "device": "cpu", "evaluate": False}
    folders = {"save": place / "run", "save_model": place / "left"}
    return make_recipe({"model": str(place / "whole"), "method": "wanda", **words, **folders, **more})


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {"sparsity": 0.5}),
        ("qwen2", {"remove": "channels=0.4,heads=0.5,blocks=0.34", "align": 16}),
        ("opt", {"remove": "channels=0.3", "align": 16}),
        ("gpt2", {"remove": "channels=0.3", "align": 16}),
        ("phi3", {"remove": "channels=0.4", "align": 16}),
        ("qwen3_moe", {"remove": "experts=keep:2,channels=0.5", "align": 16}),
        ("tokens", {"remove": "vocabulary=704,channels=0.4", "align": 16, "sparsity": 0.5, "vocabulary_force": True}),
    ],
    ids=str,
)
def test_the_predicted_bytes_match_the_saved_model(tmp_path: Path, family: str, more: dict[str, Any]) -> None:
    if family == "tokens":
        save_with_tokens(tmp_path / "whole", tie_word_embeddings=False)
        (tmp_path / "words.txt").write_text(" ".join(TEXTS) * 40)
    else:
        save_pico(tmp_path / "whole", family)
        write_words(tmp_path / "words.txt")
    recipe = asked(tmp_path, **more)
    told = dry_run(recipe, QUIET).size
    run_recipe(recipe, reporter=QUIET)
    stored = [sum(one.nbytes for one in stored_entries(tmp_path / name).values()) for name in ("whole", "left")]
    assert [told.before, told.after] == stored
    assert told.is_exact
    assert not told.at_most


def test_a_dry_run_writes_nothing_and_reads_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pico(tmp_path / "whole")
    write_words(tmp_path / "words.txt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("coprune.model.checkpoint.lazy.read_tensor", lambda *_: pytest.fail("a weight was read"))
    monkeypatch.setattr("coprune.model.loaded_model.load_model", lambda *_: pytest.fail("the model was loaded"))
    before = listing(tmp_path)
    words = ["prune", "whole", "--dataset", "words.txt", "--pattern", "2:4", *SMALL, "--finetune", "distill"]
    ended = run_command([*words, "--save-model", "left", "--dry-run"], monkeypatch, capsys)
    assert ended.code == 0, ended.err
    assert listing(tmp_path) == before
    told = ended.out
    assert "step 1    prune: 50.00 % of" in told
    assert "step 2    train: distill" in told
    assert "one block in memory at a time" in told
    assert "memory    at most" in told
    assert "time      about" in told
    assert "model in  left: nothing there yet" in told
    start, _, line = told.splitlines()[-1].partition("coprune ")
    assert start == "next      run it: "
    assert sorted(shlex.split(line)) == sorted([*words, "--save-model", "left"])  # in the order of the settings


def test_choosing_blocks_takes_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coprune.runner.time_estimate._rate", lambda device: 1e9)
    save_pico(tmp_path / "whole")
    write_words(tmp_path / "words.txt")
    ways = [{"score": "influence", "remove": "blocks=0.5"}, {"remove": "blocks=0.5"}, {"remove": "size=0.2"}]
    seconds = [dry_run(asked(tmp_path, **way), QUIET).seconds or 0 for way in ways]
    assert 0 < seconds[0] < seconds[1] < seconds[2]


def test_answers_and_a_second_pass_take_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coprune.runner.time_estimate._rate", lambda device: 1e7)
    save_pico(tmp_path / "whole")
    write_words(tmp_path / "words.txt")
    ways: list[dict[str, Any]] = [
        {"propagation": "sequential", "save_model": None},
        {"propagation": "block", "save_model": None},
        {"propagation": "block"},  # a saved model is checked on a few prompts
    ]
    seconds = [dry_run(asked(tmp_path, sparsity=0.5, **way), QUIET).seconds or 0 for way in ways]
    assert 0 < seconds[0] < seconds[1] < seconds[2]


def test_existing_files_at_the_target_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pico(tmp_path / "whole")
    write_words(tmp_path / "words.txt")
    monkeypatch.chdir(tmp_path)
    words = [
        "prune",
        "whole",
        "--dataset",
        "words.txt",
        "--method",
        "magnitude",
        *SMALL,
        "--save",
        "run",
        "--save-model",
        "left",
    ]
    assert run_command(words, monkeypatch, capsys).code == 0
    ended = run_command([*words, "--dry-run"], monkeypatch, capsys)
    assert "run       run: a finished run" in ended.out
    assert "refused   run already holds a finished run" in ended.out
    assert "refused" not in run_command([*words, "--overwrite", "--dry-run"], monkeypatch, capsys).out


def test_estimates_that_are_upper_bounds_are_marked(tmp_path: Path) -> None:
    save_pico(tmp_path / "whole")
    write_words(tmp_path / "words.txt")
    assert dry_run(asked(tmp_path, remove="vocabulary=loss:5%"), QUIET).size.at_most
    found = dry_run(asked(tmp_path, remove="size=0.3", align=16), QUIET).size
    assert found.at_most
    assert found.after == int(found.before * 0.7) // 4 * 4
