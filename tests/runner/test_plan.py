"""Runs of several steps: the plan of a recipe, and the effect of kills, changed texts and changed settings."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from coprune.base.errors import BadInput
from coprune.base.progress import Reporter
from coprune.recipe.recipe import Recipe, make_recipe
from coprune.report.output_folder import LOCK_FILE
from coprune.runner.plan import plan_of
from coprune.runner.run_recipe import run_recipe
from support.killing import count_lines, killed_at, killed_when
from support.pico_folder import save_pico, write_words

QUIET = Reporter(quiet=True)
pytestmark = pytest.mark.usefixtures("one_thread")


def test_each_step_starts_from_the_previous_steps_model(tmp_path: Path) -> None:
    asked = {"model": "m", "remove": "vocabulary=0.5,channels=0.5", "sparsity": 0.5, "finetune": "distill"}
    plan = plan_of(make_recipe({**asked, "save_model": tmp_path / "model", "push_to_hub": "me/m"}), tmp_path)
    trim, remove, prune, train = (step.recipe for step in plan)
    assert [one.step.name for one in plan] == ["trim", "remove", "prune", "train"]
    assert [step.folder for step in plan] == [tmp_path / one.step.name for one in plan]
    left = [str(tmp_path / name / "model") for name in ("trim", "remove", "prune")]
    assert [one.model.name for one in (trim, remove, prune, train)] == ["m", *left]
    assert [str(one.output.model) for one in (trim, remove, prune, train)] == [*left, str(tmp_path / "model")]
    assert (trim.remove.parts, remove.remove.parts, prune.remove.parts) == (("vocabulary=0.5",), ("channels=0.5",), ())
    assert (remove.prune.sparsity, prune.prune.sparsity, prune.train.mode) == (None, 0.5, None)
    # The dense model of later steps has the same vocabulary as the trained one.
    assert (train.train.mode, train.train.teacher) == ("distill", left[0])
    assert not any(one.output.push_to_hub for one in (trim, remove, prune, train))


def test_a_single_step_has_the_recipe_itself() -> None:
    recipe = make_recipe({"model": "m", "sparsity": 0.5})
    assert [(one.step.name, one.recipe, one.folder) for one in plan_of(recipe)] == [("prune", recipe, None)]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_pico(tmp_path / "llama")
    write_words(tmp_path / "words.txt")
    return tmp_path


def both(place: Path, out: str, **more: Any) -> Recipe:
    asked: dict[str, Any] = {"remove": "channels=0.4,blocks=0.34", "align": 16, "pattern": "2:4", "method": "wanda"}
    words = {"dataset": str(place / "words.txt"), "nsamples": 4, "seqlen": 16, "device": "cpu", "evaluate": False}
    folders = {"save": place / out / "run", "save_model": place / out / "model"}
    return make_recipe({"model": str(place / "llama"), **asked, **words, **folders, **more})


def weights(place: Path, out: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((place / out / "model").glob("*.safetensors"))}


WRITING = ("runner/", "store/", "run_stages", "run/output", "checkpoint/writer", "report/", "base/files")


@pytest.mark.parametrize("shares", [(0.55, 0.97), pytest.param((0.3, 0.8), marks=pytest.mark.slow)], ids=str)
def test_a_run_of_two_steps_killed_at_any_moment_ends_with_the_same_bytes(
    shares: tuple[float, ...], place: Path
) -> None:
    _, lines = count_lines(lambda: run_recipe(both(place, "whole"), reporter=QUIET), WRITING)
    expected = weights(place, "whole")
    for share in shares:
        killed_at(lambda: run_recipe(both(place, "cut"), reporter=QUIET), int(lines * share), WRITING)
        if not (place / "cut" / "run" / "report.json").exists():
            run_recipe(both(place, "cut"), reporter=QUIET)
        assert weights(place, "cut") == expected
        assert not [path for path in (place / "cut").rglob(".*") if path.name != ".gitattributes"]
        shutil.rmtree(place / "cut")


def stopped_between(place: Path) -> None:
    """Kill a run between its first and second step."""
    first = place / "cut" / "run" / "remove" / "report.json"
    assert killed_when(lambda: run_recipe(both(place, "cut"), reporter=QUIET), first.exists, ("runner/",))


def test_a_text_changed_between_two_steps_is_noticed(place: Path) -> None:
    stopped_between(place)
    write_words(place / "words.txt", seed=1)
    for out in ("cut", "fresh"):
        run_recipe(both(place, out), reporter=QUIET)
    assert weights(place, "cut") == weights(place, "fresh")


def files_of_run(place: Path) -> dict[Path, int]:
    """Return a run's files with their times, except its lock file."""
    files = [path for path in (place / "cut").rglob("*") if path.is_file() and path.name != LOCK_FILE]
    return {path: path.stat().st_mtime_ns for path in files}


def test_a_changed_setting_is_named_and_replaces_a_run_only_on_request(place: Path) -> None:
    stopped_between(place)
    before = files_of_run(place)
    with pytest.raises(BadInput, match=r"holds the work of another run, in which align was 16 and is 32"):
        run_recipe(both(place, "cut", align=32), reporter=QUIET)
    with pytest.raises(BadInput, match="no file"):
        run_recipe(both(place, "cut", align=32, overwrite=True, dataset=str(place / "wrods.txt")), reporter=QUIET)
    assert files_of_run(place) == before
    run_recipe(both(place, "cut", align=32, overwrite=True), reporter=QUIET)
    run_recipe(both(place, "fresh", align=32), reporter=QUIET)
    assert weights(place, "cut") == weights(place, "fresh")
