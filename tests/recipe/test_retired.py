"""Settings that are gone: recipes that only held their defaults load, and all others hear what to use instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from coprune.base.errors import BadInput
from coprune.recipe.recipe import Recipe, make_recipe
from coprune.recipe.retired import RETIRED
from coprune.recipe.views import training_recipe

OF_RECIPES = {word: one for word, one in RETIRED.items() if one.place is not None}
OF_TRAININGS = sorted({*RETIRED} - {*OF_RECIPES})


@pytest.mark.parametrize("word", OF_RECIPES)
def test_a_recipe_with_the_default_loads_and_one_with_another_value_is_refused(word: str, tmp_path: Path) -> None:
    gone, file = OF_RECIPES[word], tmp_path / "recipe.yaml"
    part, _, field = str(gone.place).partition(".")
    written = "null" if gone.default is None else gone.default
    file.write_text(f"model: {{name: m}}\n{part}: {{{field}: {written}}}\n")
    assert Recipe.from_yaml(file) == make_recipe({"model": "m"})
    file.write_text(f"model: {{name: m}}\n{part}: {{{field}: something}}\n")
    with pytest.raises(BadInput, match="was retired") as raised:
        Recipe.from_yaml(file)
    assert (raised.value.field, raised.value.value) == (word, "something")


@pytest.mark.parametrize("word", OF_TRAININGS)
def test_so_do_settings_of_a_training(word: str) -> None:
    assert training_recipe({"model": "m", word: RETIRED[word].default}) == training_recipe({"model": "m"})
    with pytest.raises(BadInput, match="was retired"):
        training_recipe({"model": "m", word: 0.01})
