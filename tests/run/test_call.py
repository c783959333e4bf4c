"""Reading a Python call: plain settings, preset and method become a recipe."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import yaml
from torch import Tensor

from coprune.base.errors import BadInput
from coprune.pruning.methods import METHODS, Pruned, apply_keep, method_named
from coprune.pruning.methods.sparsegpt import SparseGPT
from coprune.recipe.choice import Choice
from coprune.recipe.flat import flatten
from coprune.recipe.pattern import Target
from coprune.recipe.presets import PRESETS, preset_settings
from coprune.recipe.recipe import Recipe, make_recipe
from coprune.run.read_call import choice_of, options_of, read_call, sort_options
from coprune.stages.checks import prepare_solver


def recipe_of(method: Any = None, preset: str | None = None, **settings: Any) -> Recipe:
    return read_call("model", method, preset, None, settings)[0]


def sorted_for(method: str, settings: dict[str, Any]) -> dict[str, Any]:
    return flatten(sort_options(settings, options_of(method)))


def test_settings_belong_to_the_recipe_or_to_the_method() -> None:
    said = sorted_for("sparsegpt", {"nsamples": 3, "block_size": 64, "seed": 1})
    assert said == {"options": {"block_size": 64}, "nsamples": 3, "seed": 1}


@pytest.mark.parametrize(
    ("method", "settings"),
    [("sparsegpt:block_size=64", {"damping": 0.1}), ("sparsegpt", {"options": {"block_size": 64}, "damping": 0.1})],
)
def test_options_may_follow_the_name_or_be_separate(method: str, settings: dict[str, Any]) -> None:
    assert recipe_of(method, **settings).prune.method == Choice(
        name="sparsegpt", options={"block_size": 64, "damping": 0.1}
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nsampels": 3}, "unknown setting 'nsampels'; did you mean 'nsamples'"),
        ({"block_sise": 3}, "did you mean 'block_size'"),
        ({"sparsity": 0.3, "sparsity_ratio": 0.3}, "given twice"),
        ({"preset": "fasst"}, "did you mean 'fast'"),
        ({"method": "spargpt"}, "did you mean 'sparsegpt'"),
    ],
)
def test_unknown_settings_options_and_names_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        recipe_of(**{"method": "sparsegpt", **settings})


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_supplies_settings_that_are_not_given(preset: str) -> None:
    base = {"model": "model", "stream": False}
    assert recipe_of(preset=preset) == make_recipe(base | preset_settings(preset))
    assert recipe_of(preset=preset, seed=3) == make_recipe(base | preset_settings(preset) | {"seed": 3})
    groups = recipe_of(preset=preset, pattern="2:4")
    # With groups the allocation has no freedom.
    evenly = {name: value for name, value in PRESETS[preset].items() if name != "allocation"}
    assert groups == make_recipe(base | evenly | {"pattern": "2:4"})
    assert str(recipe_of(preset=preset, sparsity=0.6).prune.allocation) == PRESETS[preset].get("allocation", "uniform")
    assert recipe_of(preset=preset, pattern="2:4", permute=False) == groups.replaced(permute=False)
    assert recipe_of("wanda", preset=preset).prune.method == Choice(name="wanda")
    assert recipe_of(preset="balanced", damping=0.1).prune.method.options == {"damping": 0.1}


@dataclass(frozen=True)
class Smallest:
    """Prune the smallest weights of every row."""

    power: float = 1.0
    """Exponent of the magnitude."""
    names: tuple[str, ...] = ("a",)
    """A value that no recipe can hold."""

    statistic: ClassVar[None] = None

    def prune(self, weight: Tensor, statistic: None, target: Target) -> Pruned:
        keep = target.keep(weight.abs() ** self.power, "row")
        return Pruned(apply_keep(weight, keep), keep)


@pytest.mark.parametrize(
    ("method", "choice"),
    [
        (SparseGPT(block_size=64), Choice(name="sparsegpt", options={"block_size": 64})),
        (SparseGPT, Choice(name="sparsegpt")),
        *((method, Choice(name=name)) for name, method in METHODS.items()),
    ],
)
def test_a_registered_method_object_is_recorded_by_name_and_options(method: Any, choice: Choice) -> None:
    recipe = recipe_of(method)
    assert recipe.prune.method == choice
    assert recipe.given == []
    made = method() if isinstance(method, type) else method
    assert method_named(recipe.prune.method.name, recipe.prune.method.options) == made


def test_an_unregistered_method_is_recorded_by_class_and_marked() -> None:
    recipe, given = read_call("model", Smallest(power=2.0), None, None, {})
    assert given.method == Smallest(power=2.0)
    assert recipe.prune.method.name == f"{__name__}.Smallest"
    assert recipe.prune.method.options == {"given": True, "power": 2.0, "names": "('a',)"}
    told = recipe.to_yaml()
    assert told.startswith("# This file alone does not repeat the run: the method ")
    again = make_recipe(yaml.safe_load(told))
    assert again == recipe
    with pytest.raises(BadInput, match=r"\.Smallest is a Python object, which a recipe cannot hold"):
        prepare_solver(again)
    solver, target = prepare_solver(again, given.method)
    assert solver.solve(torch.tensor([[1.0, 2.0]]), None, target).keep.tolist() == [[False, True]]


def test_options_of_an_unregistered_method_are_not_checked() -> None:
    with pytest.raises(BadInput, match="unknown setting 'power'"):
        recipe_of(Smallest(), power=2.0)


@pytest.mark.parametrize("method", [object(), 3, dataclasses.make_dataclass("Thing", [])])
def test_invalid_methods_are_refused(method: Any) -> None:
    with pytest.raises(BadInput, match="is not a method"):
        choice_of(method)
