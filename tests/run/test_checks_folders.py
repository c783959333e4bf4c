"""The default run folder never prevents saving a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from coprune.recipe.recipe import make_recipe
from coprune.report.run_folder import prepare_folders


@pytest.mark.parametrize("saved", ["out/foo", "out"])
def test_the_default_run_folder_is_next_to_the_model(
    saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = make_recipe({"model": "x/foo", "save_model": saved, "method": "wanda"})
    prepare_folders(recipe)
    assert not recipe.run_folder.is_relative_to(saved)
    assert recipe.run_folder.name == "wanda"
