"""Presets in a sweep: listed like methods, and shown in folders and tables."""

from __future__ import annotations

from coprune.recipe.presets import preset_settings
from coprune.recipe.recipe import make_recipe
from support.expanded import PLAIN, names, runs_of


def test_presets_are_listed_like_methods() -> None:
    found = runs_of(preset=["balanced", "best", None], pattern=["2:4", "unstructured"], seed=3)
    assert [run.name for run in found[:2]] == ["balanced/2-4", "balanced/unstructured"]
    assert [run.way for run in found[::2]] == ["balanced (sparsegpt)", "best (alps)", "wanda"]
    for run, preset in zip(found, ["balanced"] * 2 + ["best"] * 2, strict=False):
        target = {"pattern": run.recipe.prune.pattern}
        alone = make_recipe(PLAIN | target | preset_settings(preset, target) | {"seed": 3})
        assert run.recipe.has_same_result(alone)
    assert names(preset=["balanced", "best"], sweep={"folders": "{preset}-{method}"}) == [
        "balanced-sparsegpt",
        "best-alps",
    ]
    less = {"exclude": [{"preset": "best", "seed": 1}]}
    assert names(preset=["fast", "best"], seed=[0, 1], sweep=less) == ["fast/seed-0", "fast/seed-1", "best/seed-0"]


def test_an_included_preset_brings_its_own_method() -> None:
    lists = {"method": ["wanda", "sparsegpt:block_size=64"], "pattern": ["2:4", "4:8"]}
    found = runs_of(**lists, sweep={"include": [{"preset": ["balanced", "best"], "pattern": "2:4"}]})
    assert [run.way for run in found] == ["wanda"] * 2 + ["sparsegpt"] * 2 + ["balanced (sparsegpt)", "best (alps)"]
    assert not found[-1].recipe.prune.method.options
    (_, own) = runs_of(method="magnitude", sweep={"include": [{"preset": "best", "method": "wanda"}]})
    assert own.way == "best (wanda)"
