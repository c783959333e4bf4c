"""Settings that are gone: recipes that only held their defaults load, and all others hear what to use instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coprune.base.errors import BadInput
from coprune.recipe.recipe import Recipe, make_recipe
from coprune.recipe.retired import RETIRED
from coprune.recipe.views import training_recipe

OF_RECIPES = {word: one for word, one in RETIRED.items() if one.place is not None and one.moved is None}
OF_TRAININGS = sorted(word for word, one in RETIRED.items() if one.place is None)
MOVED: dict[str, tuple[Any, dict[str, Any]]] = {
    "finetune_scope": ("blocks", {"finetune": "dense", "finetune_only": "blocks"}),
    "finetune_against": ("other", {"finetune": "dense", "finetune_teacher": "other"}),
    "vocabulary_languages": (["de"], {"remove": "vocabulary=96k", "vocabulary_text": "de"}),
}


@pytest.mark.parametrize("word", OF_RECIPES)
def test_a_recipe_with_the_default_loads_and_one_with_another_value_is_refused(word: str, tmp_path: Path) -> None:
    gone, file = OF_RECIPES[word], tmp_path / "recipe.yaml"
    part, _, field = str(gone.place).partition(".")
    written = {None: "null", (): "[]"}.get(gone.default, gone.default)
    file.write_text(f"model: {{name: m}}\n{part}: {{{field}: {written}}}\n")
    assert Recipe.from_yaml(file) == make_recipe({"model": "m"})
    file.write_text(f"model: {{name: m}}\n{part}: {{{field}: something}}\n")
    with pytest.raises(BadInput, match="was retired") as raised:
        Recipe.from_yaml(file)
    assert (raised.value.field, raised.value.value) == (word, "something")


@pytest.mark.parametrize("word", MOVED)
def test_values_of_what_moved_are_read_from_older_recipes_and_never_lost(word: str) -> None:
    value, today = MOVED[word]
    place = [*today][-1]
    before = {"model": "m"} | {name: said for name, said in today.items() if name != place}
    unsaid: Any = [] if place in ("finetune_only", "vocabulary_text") else None
    assert make_recipe(before | {word: value, place: unsaid}) == make_recipe({"model": "m"} | today)
    with pytest.raises(BadInput, match="was retired"):
        make_recipe(before | {word: value, place: "another"})


@pytest.mark.parametrize("word", OF_TRAININGS)
def test_so_do_settings_of_a_training(word: str) -> None:
    assert training_recipe({"model": "m", word: RETIRED[word].default}) == training_recipe({"model": "m"})
    with pytest.raises(BadInput, match="was retired"):
        training_recipe({"model": "m", word: 0.01})
