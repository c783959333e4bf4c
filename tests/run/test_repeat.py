"""A run's `recipe.yaml` repeats the run beside it; an interrupted run resumes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from coprune.recipe.choice import Choice
from coprune.recipe.recipe import Recipe, make_recipe
from coprune.runner.repeat import beside_finished, where_to
from coprune.stages.run_identity import run_identity
from support.commands import run_command
from support.pico_folder import listing, save_pico, write_words

MODEL = ["prune", "model", "--dataset", "words.txt", "--nsamples", "4", "--seqlen", "32", "--eval-data", "test.txt"]
REPEATED = {"calibration", "matrices", "perplexity", "sparsity", "events", "sample"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_pico(tmp_path / "model", num_hidden_layers=2)
    write_words(tmp_path / "words.txt")
    write_words(tmp_path / "test.txt", count=200, seed=1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def coprune(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs a command, which has to succeed, and returns its messages."""

    def run(*arguments: Any) -> str:
        ended = run_command(list(arguments), monkeypatch, capsys)
        assert ended.code == 0, ended.err
        return ended.err

    return run


def figures(run: str) -> dict[str, Any]:
    report = json.loads((Path(run) / "report.json").read_text())
    for matrix in report["matrices"]:
        del matrix["seconds"]
    return {name: report[name] for name in REPEATED}


def weights(folder: str) -> dict[str, bytes | None]:
    return {name: content for name, content in listing(Path(folder)).items() if name.endswith(".safetensors")}


def test_a_run_is_repeated_beside_itself(coprune: Callable[..., str], place: Path) -> None:
    coprune(*MODEL, "-m", "sparsegpt:block_size=32", "-p", "2:4", "--refine", "refit:rounds=3",
            "--save", "runs/a", "--save-model", "models/x", "--log-json", "log.jsonl")  # fmt: skip
    before = listing(place)
    told = coprune("prune", "--recipe", "runs/a/recipe.yaml")
    assert "runs/a holds a finished run; this one goes to runs/a-2." in told
    assert figures("runs/a-2") == figures("runs/a")
    assert weights("models/x-2") == weights("models/x") != {}
    assert {name: content for name, content in listing(place).items() if name in before} == before
    coprune("prune", "--recipe", "runs/a-2/recipe.yaml", "--seed", "1")
    assert figures("runs/a-2-2")["calibration"] != figures("runs/a")["calibration"]


def test_a_run_in_the_default_folder_is_repeated_too(coprune: Callable[..., str], place: Path) -> None:
    coprune(*MODEL, "-m", "wanda", "-p", "2:4")
    coprune("prune", "--recipe", "out/model/2-4/wanda/recipe.yaml")
    coprune("prune", "--recipe", "out/model/2-4/wanda/recipe.yaml")
    assert figures("out/model/2-4/wanda-2") == figures("out/model/2-4/wanda-3") == figures("out/model/2-4/wanda")


def test_the_recipe_in_a_run_folder_does_not_log(coprune: Callable[..., str], place: Path) -> None:
    coprune(*MODEL, "--save", "a", "--log-json", "log.jsonl")
    kept = yaml.safe_load((place / "a" / "recipe.yaml").read_text())
    assert (kept["model"], kept["nsamples"], kept["save"]) == ("model", 4, "a")
    assert "log_json" not in kept


def recipe_in(folder: Path, **more: Any) -> Recipe:
    return make_recipe({"model": "m", "save": folder / "run", "save_model": folder / "model", **more})


def finish(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "report.json").touch()


def test_free_output_folders_are_kept(tmp_path: Path) -> None:
    asked = recipe_in(tmp_path)
    assert beside_finished(asked) == asked


def test_an_interrupted_run_resumes_in_its_folder(tmp_path: Path) -> None:
    asked = recipe_in(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").touch()  # killed when only the report was missing
    assert beside_finished(asked) == asked
    finish(tmp_path / "run")
    (tmp_path / "run-2").mkdir()
    assert beside_finished(asked).output.run == tmp_path / "run-2"
    assert beside_finished(asked).output.model == tmp_path / "model-2"


def test_a_model_is_never_overwritten(tmp_path: Path) -> None:
    asked = recipe_in(tmp_path)
    for name in ("model", "model-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").touch()
    found = beside_finished(asked)
    assert (found.output.run, found.output.model) == (tmp_path / "run-3", tmp_path / "model-3")


def test_explicitly_named_folders_are_kept(tmp_path: Path) -> None:
    asked = recipe_in(tmp_path)
    finish(tmp_path / "run")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").touch()
    assert beside_finished(asked, {"save", "save_model"}) == asked
    assert beside_finished(asked, {"save"}).output.run == tmp_path / "run"
    assert beside_finished(asked, {"save"}).output.model == tmp_path / "model-2"
    assert beside_finished(asked, {"save_model"}).output.model == tmp_path / "model"
    assert beside_finished(asked, {"save_model"}).output.run == tmp_path / "run-2"


def test_a_run_stopped_before_fine_tuning_resumes(tmp_path: Path) -> None:
    asked = recipe_in(tmp_path, finetune="lora")
    (tmp_path / "run" / "prune").mkdir(parents=True)
    finish(tmp_path / "run" / "prune")
    assert beside_finished(asked) == asked
    finish(tmp_path / "run")
    assert beside_finished(asked).output.run == tmp_path / "run-2"


def test_a_default_folder_stopped_before_fine_tuning_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    asked = make_recipe({"model": "m", "finetune": "lora", "seed": 1})
    run = asked.run_folder
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(asked.as_stored().to_yaml())
    assert where_to(asked, False, ()) == (asked, None)
    other = make_recipe({"model": "m", "finetune": "lora"})
    found, said = where_to(other, False, ())
    assert found.output.run == run.with_name("wanda-seed-0")
    assert said == f"{run} holds a run that differs in seed; this one goes to {found.output.run}."
    # Another run is in the way, and its replacement was not requested.
    assert where_to(other.replaced(overwrite=True), False, ())[0].output.run == found.output.run
    assert where_to(other.replaced(overwrite=True), True, ()) == (other.replaced(overwrite=True), None)


def test_equivalent_recipes_have_the_same_identity() -> None:
    flat = make_recipe({"model": "m", "method": "sparsegpt", "options": {"block_size": 64}, "refine": "refit:rounds=3",
                        "allocation": "owl:spread=0.1", "nsamples": 4, "save": "a"})  # fmt: skip
    other = make_recipe(
        {
            "model": "m",
            "method": {"name": "sparsegpt", "block_size": 64},
            "refine": [{"name": "refit", "rounds": 3}],
            "allocation": {"name": "owl", "spread": 0.1},
            "nsamples": 4,
            "save": "b",
        }
    )
    identity = run_identity(flat, "weights", "tokens")
    assert run_identity(other, "weights", "tokens") == identity
    assert identity.decides["nsamples"] == 4
    assert list(identity.decides["refine"]) == ["refit:rounds=3"]
    assert identity.decides["allocation"] == "owl:spread=0.1"
    assert identity.decides["options"] == {"block_size": 64}
    assert run_identity(flat.replaced(nsamples=5), "weights", "tokens") != identity


def test_settings_that_change_rounding_only_may_differ_on_resume() -> None:
    """Except for runs in which a batch is a training step, or in which the cuts of blocks must match."""
    smaller = make_recipe({"model": "m", "batch_size": 1})
    identity = run_identity(smaller, "weights", "tokens")
    assert identity.besides == {"batch_size": 1}
    assert identity.decides == run_identity(make_recipe({"model": "m"}), "weights", "tokens").decides
    for more in ({"reconstruct": 3}, {"remove": "heads=0.5"}, {"permute": True, "pattern": "2:4"}, {"rotate": True}):
        identity = run_identity(smaller.replaced(**more), "weights", "tokens")
        assert identity.besides == {}
        assert identity.decides["batch_size"] == 1


def test_a_stopped_run_resumes_in_the_default_folder_with_smaller_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stopped, asked = make_recipe({"model": "m"}), make_recipe({"model": "m", "batch_size": 1})
    run = stopped.run_folder
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(stopped.as_stored().to_yaml())
    assert where_to(asked, False, ()) == (asked, None)
    finish(run)
    assert where_to(asked, False, ())[0].output.run == run.with_name(f"{run.name}-batch-size-1")


def test_streaming_is_part_of_the_identity_of_error_based_cuts_only() -> None:
    zeros = make_recipe({"model": "m", "allocation": "owl", "sparsity": 0.5})
    assert run_identity(zeros, "weights", "tokens") == run_identity(zeros, "weights", "tokens", streams=True)
    cut = make_recipe({"model": "m", "allocation": "error", "remove": "channels=0.3"})
    assert run_identity(cut, "weights", "tokens") != run_identity(cut, "weights", "tokens", streams=True)
    alike = cut.replaced(allocation=Choice.of("error:tokens=0"))
    assert run_identity(alike, "weights", "tokens") == run_identity(alike, "weights", "tokens", streams=True)
