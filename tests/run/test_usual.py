"""Defaults of a run without pruning settings, and the scope of a preset's training."""

from __future__ import annotations

from pathlib import Path

import pytest

from coprune.base.errors import BadInput
from coprune.base.words import say
from coprune.recipe.presets import usual_preset
from coprune.recipe.recipe import make_recipe
from coprune.run.preset_training import recipe_that_fits
from support.pico_folder import save_pico
from support.quantised import quantised_pico

TARGET = {"pattern": "2:4"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pico(tmp_path_factory.mktemp("usual") / "pico")


def test_a_bare_run_trains_the_whole_model_if_it_fits_and_reports_it(model: Path) -> None:
    settings, line = usual_preset({"model": str(model), **TARGET})
    assert recipe_that_fits(settings) == make_recipe(
        {"model": str(model), "preset": "balanced", "train": "whole", **TARGET}
    )
    assert line is not None
    assert "preset balanced" in say(line)


def test_a_model_too_large_to_train_whole_is_trained_block_by_block(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise BadInput("too large")

    monkeypatch.setattr("coprune.run.preset_training.require_room_to_train", refuse)
    recipe = recipe_that_fits({"model": str(model), "preset": "best", **TARGET})
    assert recipe == make_recipe({"model": str(model), "preset": "best", "train": "blocks", **TARGET})
    assert recipe.train.mode is None
    assert recipe.prune.reconstruct.steps == 200


@pytest.mark.parametrize(
    "said",
    [{"method": "wanda"}, {"refine": "refit"}, {"remove": "channels=0.5"}, {"reconstruct": 2}, {"sparsity": 0}],
    ids=lambda said: next(iter(said)),
)
def test_explicit_pruning_settings_add_no_preset(model: Path, said: dict[str, object]) -> None:
    settings = {"model": str(model), **said}
    assert usual_preset(settings) == (settings, None)
    assert recipe_that_fits(settings) == make_recipe(settings)


def test_settings_that_exclude_whole_model_training_train_blocks(model: Path) -> None:
    assert recipe_that_fits({"model": str(model), "preset": "best", **TARGET, "stream": True}).train.mode is None


@pytest.mark.parametrize(("encoding", "whole"), [("source", False), ("dense", True)])
def test_a_quantised_model_is_trained_block_by_block_to_keep_its_encoding(
    tmp_path: Path, encoding: str, whole: bool
) -> None:
    source, _ = quantised_pico(tmp_path, "fp8 block", "llama")
    said = {} if encoding == "source" else {"encoding": encoding}
    recipe = recipe_that_fits({"model": str(source), "preset": "best", **TARGET, **said})
    assert (recipe.train.mode is not None) == whole


def test_a_model_in_memory_is_trained_block_by_block(model: Path) -> None:
    settings = {"model": str(model), "preset": "best", **TARGET}
    assert recipe_that_fits(settings, in_memory=True).train.mode is None


def test_the_scope_of_training_is_refused_without_a_preset(model: Path) -> None:
    with pytest.raises(BadInput, match="no preset is given"):
        make_recipe({"model": "m", "train": "whole", "method": "wanda"})
    with pytest.raises(BadInput, match="way to train"):
        make_recipe({"model": "m", "train": "half", "preset": "best"})
