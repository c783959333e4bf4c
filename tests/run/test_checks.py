"""How a call's plain settings are sorted into a recipe."""

from __future__ import annotations

from typing import Any

import pytest

from coprune.base.errors import BadInput
from coprune.recipe.flat import flatten
from coprune.recipe.recipe import make_recipe
from coprune.run.checks import settings_for


def test_settings_are_the_recipes_or_the_methods_own() -> None:
    said = settings_for("sparsegpt", {"nsamples": 3, "block_size": 64, "calibration": {"seed": 1}})
    assert flatten(said) == {"method": "sparsegpt", "options": {"block_size": 64}, "nsamples": 3, "seed": 1}


def test_options_may_come_with_the_name_or_by_themselves() -> None:
    for said in (
        settings_for("sparsegpt:block_size=64", {"damping": 0.1}),
        settings_for("sparsegpt", {"options": {"block_size": 64}, "damping": 0.1}),
    ):
        assert flatten(said)["options"] == {"block_size": 64, "damping": 0.1}


def test_an_option_may_be_called_like_a_part() -> None:
    said = settings_for("ablate_mag_seq", {"selection": "iterative"})
    assert flatten(said)["options"] == {"selection": "iterative"}
    said = settings_for("ablate_mag_seq", {"selection": {"exclude": "*.q_proj"}})
    assert make_recipe({"model": "m", **said}).selection.exclude == ("*.q_proj",)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nsampels": 3}, "unknown setting 'nsampels'; did you mean 'nsamples'"),
        ({"block_sise": 3}, "did you mean 'block_size'"),
        ({"nsamples": 3, "calibration": {"samples": 3}}, "said twice"),
    ],
)
def test_what_is_neither_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        settings_for("sparsegpt", settings)
